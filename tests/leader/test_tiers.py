"""What lies in stores: looked up, brought up, sent down."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvconnect.protocol import (
    Match,
)
from kvconnect.protocol.messages import pack_ints
from tests.leader.script import ASK_AGAIN, NONE, TOKENS, Script, saved_keys, slots, wait_for
from tests.store.stores import dict_store, tier


def test_block_in_a_store_is_promoted_before_it_is_offered() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)], ranks=2)
    plan = script.save("a", TOKENS)
    store.frames.update(dict.fromkeys(saved_keys(script, plan), b""))
    fresh = Script(tiers=[tier(store)], ranks=2)
    view = fresh.arrive("b", [*TOKENS, 1])
    assert fresh.ask(view) == ASK_AGAIN
    assert wait_for(fresh, view) == Match(12, False)
    fresh.alloc(view, 12)
    assert len(fresh.plan((view, 12, 1)).loads) == 3
    fresh.leader._check_integrity()


def test_block_of_which_a_shard_is_missing_is_no_hit() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)], ranks=2)
    keys = saved_keys(script, script.save("a", TOKENS))
    store.frames.update(dict.fromkeys(keys, b""))
    del store.frames[keys[3]]  # block 1, rank 1
    fresh = Script(tiers=[tier(store)], ranks=2)
    view = fresh.arrive("b", [*TOKENS, 1])
    assert wait_for(fresh, view) == Match(4, False)


def test_promotion_that_fails_is_tried_once_and_then_computed() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)])
    store.frames.update(dict.fromkeys(saved_keys(script, script.save("a", TOKENS)), b""))
    fresh = Script(tiers=[tier(store)])
    view = fresh.arrive("b", [*TOKENS, 1])
    promotes = 0
    deadline = time.monotonic() + 10
    while (match := fresh.ask(view)) == ASK_AGAIN:
        assert time.monotonic() < deadline
        plan = fresh.plan()
        found = slots(plan.promotes.unpack())
        promotes += len(found)
        fresh.report(plan, not_promoted=pack_ints(found))
        time.sleep(0.001)
    assert match == NONE
    assert promotes == 3
    assert fresh.counts()["free"] == 8


def test_engine_that_cannot_ask_again_is_offered_only_what_is_ready() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)], can_ask_again=False)
    script.save("a", TOKENS[:4])
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(4, False)


def test_committed_blocks_go_down_once_and_stay_claimed_until_they_are_there() -> None:
    script = Script(tiers=[tier(dict_store())], slots=3)
    script.save("a", TOKENS)
    plan = script.plan()
    down = plan.demotes.unpack()
    assert len(down) == 3
    assert not len(script.plan((script.arrive("b", range(100, 112)), 0, 12)).saves)  # all slots are claimed
    script.report(plan, demoted=pack_ints(value for move in down for value in (move.target, move.slot)))
    assert script.counts()["claimed"] == 0
    assert not len(script.plan().demotes)
    assert script.leader.get_stats()["demoted_blocks"] == 3


def test_read_only_tier_is_not_written_and_write_only_tier_not_asked() -> None:
    script = Script(tiers=[tier(dict_store(), mode="r"), tier(dict_store(), mode="w")])
    script.save("a", TOKENS)
    assert {move.target for move in script.plan().demotes.unpack()} == {1}


def test_slot_of_a_hung_call_is_not_reused_until_it_returns() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)], slots=3)
    store.frames.update(dict.fromkeys(saved_keys(script, script.save("a", TOKENS)), b""))
    fresh = Script(tiers=[tier(store)], slots=3)
    view = fresh.arrive("b", [*TOKENS, 1])
    deadline = time.monotonic() + 10
    plan = fresh.plan()
    while not len(plan.promotes):
        assert time.monotonic() < deadline
        fresh.report(plan)
        fresh.ask(view)
        plan = fresh.plan()
        time.sleep(0.001)
    hung = pack_ints(slots(plan.promotes.unpack()))
    fresh.report(plan, not_promoted=hung, quarantined=hung)
    assert fresh.counts()["quarantined"] == 3
    writer = fresh.arrive("c", range(100, 112))
    plan = fresh.plan((writer, 0, 12))
    assert not len(plan.saves)
    fresh.report(plan, released=hung)
    fresh.leader._check_integrity()
    assert len(fresh.plan((fresh.arrive("d", range(200, 212)), 0, 12)).saves) == 3


def test_lookup_that_hangs_is_given_up_at_its_deadline() -> None:
    def hang(self: Any, keys: Any) -> Any:
        time.sleep(0.5)
        return [True] * len(keys)

    script = Script(tiers=[tier(dict_store(contains=hang), timeout_s=0.05)])
    view = script.arrive("a", TOKENS)
    assert script.ask(view) == ASK_AGAIN
    time.sleep(0.1)
    assert script.ask(view) == NONE
    assert script.leader.get_stats()["lookup_failures"] >= 1


def test_reports_about_slots_that_were_never_given_change_nothing() -> None:
    script = Script()
    script.save("a", TOKENS)
    before = script.counts()
    odd = pack_ints([-1, 0, 7, 8, 99])
    script.report(script.plan(), promoted=odd, not_promoted=odd, released=odd, demoted=pack_ints([0, 1, 9, 9]))
    script.leader._check_integrity()
    assert script.counts() == before


def test_request_waits_for_blocks_that_another_is_bringing_up() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)])
    store.frames.update(dict.fromkeys(saved_keys(script, script.save("a", TOKENS)), b""))
    fresh = Script(tiers=[tier(store)])
    first, second = fresh.arrive("b", [*TOKENS, 1]), fresh.arrive("c", [*TOKENS, 2])
    deadline = time.monotonic() + 10
    plan = fresh.plan()
    while not len(plan.promotes):
        assert time.monotonic() < deadline
        fresh.report(plan)
        assert fresh.ask(first) == ASK_AGAIN
        plan = fresh.plan()
        time.sleep(0.001)
    while fresh.leader._lookup.num_pending or not fresh.leader._requests["c"].looked_up:
        assert time.monotonic() < deadline
        assert fresh.ask(second) == ASK_AGAIN
        fresh.leader._lookup.poll()
    assert fresh.ask(second) == ASK_AGAIN  # nothing is left to promote for it, and it must not compute what is coming
    fresh.report(plan, promoted=pack_ints(slots(plan.promotes.unpack())))
    assert fresh.ask(first) == fresh.ask(second) == Match(12, False)


def test_living_request_is_not_offered_old_blocks_from_a_store_after_a_reset() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)])
    store.frames.update(dict.fromkeys(saved_keys(script, script.save("a", TOKENS)), b""))
    fresh = Script(tiers=[tier(store)])
    view = fresh.arrive("b", [*TOKENS, 1])
    fresh.leader.reset_cache()
    assert wait_for(fresh, view) == NONE


@pytest.mark.parametrize("lost", [True, False])
def test_promotion_that_never_ends_is_waited_for_only_so_long(lost: bool) -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)])
    store.frames.update(dict.fromkeys(saved_keys(script, script.save("a", TOKENS)), b""))
    fresh = Script(tiers=[tier(store, timeout_s=0.3)])
    view = fresh.arrive("b", [*TOKENS, 1])
    began = time.monotonic()
    while fresh.ask(view) == ASK_AGAIN:
        assert time.monotonic() - began < 5
        plan = fresh.plan()
        if lost:
            fresh.leader.update_connector_output([b""])
        else:
            fresh.report(plan)  # says nothing of the promotions
        time.sleep(0.001)
    assert fresh.ask(view) == NONE
    fresh.leader._check_integrity()
