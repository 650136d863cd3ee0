"""When saves are committed, and when they are void: reports that are late, lost, torn or bad."""

from __future__ import annotations

from typing import Any

import pytest

from kvconnect.protocol import (
    LoadError,
    Match,
    Report,
)
from kvconnect.protocol.messages import pack_ints
from tests.leader.script import NONE, TOKENS, Script, slots
from tests.store.stores import dict_store, tier


def test_save_is_invisible_until_every_rank_has_reported_it() -> None:
    script = Script(ranks=2)
    view = script.arrive("a", TOKENS)
    plan = script.plan((view, 0, 12))
    other = script.arrive("b", [*TOKENS, 1])
    assert script.ask(other) == NONE
    script.report(plan, rank=0)
    assert script.ask(other) == NONE
    script.report(plan, rank=1)
    assert script.ask(other) == Match(12, False)


@pytest.mark.parametrize("rank", [0, 1])
def test_save_that_failed_on_one_rank_is_not_committed(rank: int) -> None:
    script = Script(ranks=2)
    view = script.arrive("a", TOKENS)
    plan = script.plan((view, 0, 12))
    bad = slots(plan.saves.unpack())[1]
    script.report(plan, rank=1 - rank)
    script.report(plan, rank=rank, failed_saves=pack_ints([bad]))
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(4, False)
    script.leader._check_integrity()


def test_load_error_voids_the_requests_saves_of_that_step_and_of_those_in_flight() -> None:
    script = Script(ranks=2)
    script.save("a", TOKENS[:4])
    view = script.arrive("b", [*TOKENS, 1, 2, 3, 4])
    assert script.ask(view) == Match(4, False)
    script.alloc(view, 4)
    first = script.plan((view, 4, 4))  # loads block 0, computes and saves block 1 on top of it
    second = script.plan((view, 8, 4))  # planned before the first step is reported: block 2
    assert [move.ordinal for move in first.loads.unpack()] == [0]
    assert [move.ordinal for move in second.saves.unpack()] == [2]
    script.report(first, rank=0)
    script.report(first, rank=1, load_errors=(LoadError("b", 0, pack_ints([0])),))
    script.report(second)
    assert script.ask(script.arrive("c", [*TOKENS, 9])) == NONE  # nor is the block that could not be loaded
    script.leader._check_integrity()
    assert script.counts()["ready"] == 0


def test_load_error_of_one_request_leaves_its_neighbours_saves() -> None:
    script = Script()
    script.save("a", TOKENS[:4])
    bad, good = script.arrive("b", TOKENS), script.arrive("c", range(200, 212))
    script.ask(bad)
    script.alloc(bad, 4)
    plan = script.plan((bad, 4, 8), (good, 0, 12))
    script.report(plan, load_errors=(LoadError("b", 0, pack_ints([0])),))
    assert script.ask(script.arrive("d", [*range(200, 212), 1])) == Match(12, False)


@pytest.mark.parametrize("data", [b"", b"rubbish", b"KVR\x07"])
def test_report_that_cannot_be_read_commits_nothing_of_its_step(data: bytes) -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    script.plan((view, 0, 12))
    script.leader.update_connector_output([data])
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == NONE
    assert script.counts()["free"] == 8
    assert not script.leader.has_pending_work()


def test_step_in_which_a_worker_hook_raised_commits_nothing() -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    script.report(script.plan((view, 0, 12)), error="wait_for_save: boom")
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == NONE


def test_slot_of_a_lost_report_is_used_again_once_the_rank_names_it() -> None:
    script = Script(tiers=[tier(dict_store())], slots=3)
    script.save("a", TOKENS)
    plan = script.plan()
    down = plan.demotes.unpack()
    script.leader.update_connector_output([b"torn"])
    assert script.counts()["quarantined"] == 3
    pairs = pack_ints(value for move in down for value in (move.target, move.slot))
    script.report(script.plan(), demoted=pairs)
    assert script.counts()["quarantined"] == 0
    script.leader._check_integrity()


def test_slot_of_a_lost_report_is_out_of_use_until_the_rank_has_named_it_for_every_store() -> None:
    script = Script(tiers=[tier(dict_store()), tier(dict_store(), name="other")], slots=3)
    script.save("a", TOKENS)
    down = script.plan().demotes.unpack()
    script.leader.update_connector_output([b"torn"])
    for to, left in ((0, 3), (1, 0)):
        pairs = pack_ints(value for move in down if move.target == to for value in (to, move.slot))
        script.report(script.plan(), demoted=pairs)
        assert script.counts()["quarantined"] == left
        script.leader._check_integrity()


def test_plan_that_never_reached_its_worker_costs_no_slot() -> None:
    script = Script(tiers=[tier(dict_store())], slots=3)
    script.save("a", TOKENS)
    plan = script.plan()
    assert len(plan.demotes) == 3
    script.leader.update_connector_output([Report.unbound(plan.step, 0, "bind raised").encode()])
    assert script.counts()["quarantined"] == script.counts()["claimed"] == 0
    assert not script.leader.has_pending_work()


def test_step_whose_report_never_came_is_closed_by_the_next_one() -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    script.plan((view, 0, 12))
    script.report(script.plan())
    assert script.counts()["free"] == 8
    assert not script.leader.has_pending_work()


@pytest.mark.parametrize("fields", [{"promoted": b"abc"}, {"demoted": pack_ints([0])}, {"failed_saves": b"a"}])
def test_report_with_torn_columns_is_taken_for_none(fields: dict[str, Any]) -> None:
    script = Script(ranks=2)
    view = script.arrive("a", TOKENS)
    plan = script.plan((view, 0, 12))
    script.leader.update_connector_output(
        [Report(step=plan.step, rank=0, **fields).encode(), Report(step=plan.step, rank=1).encode()]
    )
    assert script.counts()["free"] == 8
    assert not script.leader.has_pending_work()
