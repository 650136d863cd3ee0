"""Which blocks are saved, and when."""

from __future__ import annotations

import pytest

from kvconnect.protocol import LoadError, Match, Report, RequestView
from kvconnect.protocol.messages import pack_ints
from tests.leader.script import TOKENS, Script


def test_blocks_fill_across_chunks_and_while_decoding() -> None:
    script = Script()
    view = script.arrive("a", TOKENS[:6])
    plan = script.plan((view, 0, 3))
    assert not len(plan.saves)
    script.report(plan)
    plan = script.plan((view, 3, 3))
    assert [(move.ordinal, move.target) for move in plan.saves.unpack()] == [(0, 0)]
    script.report(plan)
    view = script.view("a", TOKENS[:8])
    plan = script.plan((view, 6, 2), new_tokens=TOKENS[6:8])
    assert [(move.ordinal, move.target) for move in plan.saves.unpack()] == [(1, 1)]
    script.report(plan)
    assert script.ask(script.arrive("b", TOKENS)) == Match(8, False)


def test_block_is_saved_only_when_all_its_tokens_are_known() -> None:
    """Asynchronous scheduling: the step's last token is sampled while the step is planned."""
    script = Script()
    view = script.arrive("a", TOKENS[:7])
    plan = script.plan((view, 0, 8))  # computes token 7, whose id nobody has said
    assert [move.ordinal for move in plan.saves.unpack()] == [0]
    script.report(plan)
    plan = script.plan((script.view("a", TOKENS[:8]), 8, 1), new_tokens=TOKENS[7:8])
    assert [move.ordinal for move in plan.saves.unpack()] == [1]


def test_tokens_that_were_never_told_stop_caching_for_the_request() -> None:
    script = Script()
    script.arrive("a", TOKENS[:4])
    plan = script.plan((script.view("a", TOKENS), 0, 12), new_tokens=TOKENS[8:])  # tokens 4 to 7 are missing
    assert not len(plan.saves)
    assert script.leader.get_stats()["requests_with_token_gap"] == 1


def test_block_is_saved_once() -> None:
    script = Script()
    assert len(script.save("a", TOKENS).saves) == 3
    assert len(script.save("b", TOKENS).saves) == 0
    assert len(script.save("c", [*TOKENS, 1, 2, 3, 4]).saves) == 1


def test_full_arena_drops_saves_and_counts_them() -> None:
    script = Script(slots=2)
    view = script.arrive("a", TOKENS)
    plan = script.plan((view, 0, 12))
    assert len(plan.saves) == 2
    assert script.leader.get_stats()["saves_without_slot"] == 1
    script.report(plan)
    script.leader.request_finished(view, [])
    assert len(script.save("b", range(100, 108)).saves) == 2  # committed and unclaimed blocks make room
    assert script.leader.get_stats()["evicted_blocks"] == 2


def test_reset_request_is_computed_and_saved_anew() -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    plan = script.plan((view, 0, 12))
    script.report(plan, load_errors=(LoadError("a", 0, pack_ints([])),))  # voids its saves
    script.leader.request_reset(view)
    plan = script.plan((view, 0, 12))
    assert len(plan.saves) == 3
    script.report(plan)
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(12, False)


def test_holes_in_a_block_table_are_skipped() -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    script.ask(view)
    script.leader.update_state_after_alloc(view, [[-1, -1, 7, 8]], 12)
    moves = script.plan((view, 12, 1)).loads.unpack()
    assert [(move.ordinal, move.target) for move in moves] == [(2, 7)]


def test_decoded_tokens_are_known_after_a_preemption() -> None:
    script = Script()
    view = script.arrive("a", TOKENS[:6], cache="write")
    script.report(script.plan((view, 0, 6)))
    view = script.view("a", TOKENS)  # six tokens were decoded meanwhile, and told by nobody else
    script.leader.request_reset(view)
    assert len(script.plan((view, 0, 12)).saves) == 2
    assert "requests_with_token_gap" not in script.leader.get_stats()


# -- steps planned before the results of the one before are known ------------------------------------------------


def ahead(script: Script, name: str = "a") -> tuple[RequestView, RequestView]:
    """Run a request whose third block was computed before its last token was known; return it before and after.

    Its third block is full in the pages, and no plan so far could name it.
    """
    view = script.arrive(name, TOKENS[:11])
    first = script.plan((view, 0, 11))
    second = script.plan((view, 11, 1))  # computes position 11, on a token that nobody has told
    assert (len(first.saves), len(second.saves)) == (2, 0)
    script.report(first)
    script.report(second)
    return view, script.view(name, TOKENS)


def test_block_of_an_unknown_token_is_saved_by_the_next_plan_that_knows_it() -> None:
    script = Script()
    _, view = ahead(script)
    plan = script.plan((view, 12, 1), new_tokens=TOKENS[11:])
    assert [move.ordinal for move in plan.saves.unpack()] == [2]
    script.report(plan)
    assert script.leader.request_finished(view, [[0, 1, 2, 3]]) is False
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(12, False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_pages_of_an_ended_request_are_kept_for_its_last_block(ranks: int) -> None:
    script = Script(ranks=ranks)
    _, view = ahead(script)
    assert script.leader.request_finished(view, [[4, 5, 6]]) is True
    assert script.leader.has_pending_work()
    plan = script.plan()
    assert [(move.ordinal, move.target) for move in plan.saves.unpack()] == [(2, 6)]
    assert plan.saved == ("a",)
    early = script.plan()  # planned before the report: named again, saved once
    assert (len(early.saves), early.saved) == (0, ("a",))
    for rank in range(ranks):
        assert script.ask(script.arrive(f"b{rank}", [*TOKENS, 1])) == Match(8, False)
        script.report(plan, rank=rank)
    script.report(early)
    assert script.plan().saved == ()
    assert script.ask(script.arrive("c", [*TOKENS, 1])) == Match(12, False)


def test_plan_with_a_last_save_that_is_lost_frees_the_pages_and_commits_nothing() -> None:
    script = Script()
    _, view = ahead(script)
    assert script.leader.request_finished(view, [[4, 5, 6]]) is True
    lost = script.plan()
    script.leader.update_connector_output([Report.unbound(lost.step, 0, "no plan").encode()])
    again = script.plan()
    assert (len(again.saves), again.saved) == (0, ("a",))
    script.report(again)
    assert script.plan().saved == ()
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(8, False)
    assert script.counts()["reserved"] == 0


def test_request_that_ended_on_garbage_saves_nothing_more() -> None:
    """It was aborted after a step in which its load failed had run, and before that was known."""
    script = Script()
    script.save("first", TOKENS[:4])
    view = script.arrive("a", TOKENS[:11])
    assert script.ask(view) == Match(4, False)
    script.alloc(view, 4)
    loading = script.plan((view, 4, 7))
    following = script.plan((view, 11, 1))
    assert script.leader.request_finished(script.view("a", TOKENS), [[4, 5, 6]]) is True
    script.report(loading, load_errors=(LoadError("a", 0, pack_ints([0])),))
    script.report(following)
    last = script.plan()
    assert (len(last.saves), last.saved) == (0, ("a",))
    script.report(last)
    assert script.counts()["ready"] == 0


def test_request_that_ended_in_an_old_epoch_saves_nothing_more() -> None:
    script = Script()
    _, view = ahead(script)
    assert script.leader.request_finished(view, [[4, 5, 6]]) is True
    script.leader.reset_cache()
    last = script.plan()
    assert (len(last.saves), last.saved) == (0, ("a",))


def test_request_that_ends_in_time_or_early_keeps_no_pages() -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    script.report(script.plan((view, 0, 6)))
    assert script.leader.request_finished(view, [[0, 1]]) is False  # aborted in the middle of its prompt
    never = script.arrive("b", TOKENS)
    assert script.leader.request_finished(never, [[]]) is False
    script = Script()
    _, holes = ahead(script, "c")
    assert script.leader.request_finished(holes, [[0, 1, -1]]) is False  # its page fell out of the window


def test_saves_that_a_failed_load_made_void_are_planned_again() -> None:
    script = Script()
    script.save("first", TOKENS[:4])
    view = script.arrive("a", TOKENS)
    assert script.ask(view) == Match(4, False)
    script.alloc(view, 4)
    loading = script.plan((view, 4, 4))
    following = script.plan((view, 8, 4))
    script.report(loading, load_errors=(LoadError("a", 0, pack_ints([0])),))
    script.leader.request_reset(view)
    recomputing = script.plan((view, 0, 12))
    assert [move.ordinal for move in recomputing.saves.unpack()] == [0, 1]  # the third is reserved, still
    script.report(following)
    script.report(recomputing)
    late = script.plan((view, 12, 0))
    assert [move.ordinal for move in late.saves.unpack()] == [2]
    script.report(late)
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(12, False)
    script.leader._check_integrity()


def test_last_block_is_saved_by_the_very_next_plan_or_not_at_all() -> None:
    """Between that plan and a later one the engine may have given the pages to another request."""
    script = Script()
    _, view = ahead(script)
    assert script.leader.request_finished(view, [[4, 5, 6]]) is True
    script.step += 1  # a step whose plan was never made
    late = script.plan()
    assert (len(late.saves), late.saved) == (0, ("a",))


def test_saves_of_a_step_that_failed_as_a_whole_are_planned_again_but_not_for_ever() -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    script.report(script.plan((view, 0, 12)), error="wait_for_save raised")
    again = script.plan((view, 12, 0))
    assert [move.ordinal for move in again.saves.unpack()] == [0, 1, 2]
    planned = 0
    for _ in range(30):
        script.report(again, error="wait_for_save raised")
        again = script.plan((view, 12, 0))
        planned += len(again.saves) > 0
    assert planned < 10


def test_step_planned_on_a_failed_one_commits_nothing_though_it_loaded_nothing() -> None:
    script = Script()
    view = script.arrive("a", TOKENS)
    first = script.plan((view, 0, 4))
    second = script.plan((view, 4, 8))
    script.report(first, error="the forward pass failed")
    script.report(second)
    assert script.counts()["ready"] == script.counts()["reserved"] == 0


def test_plan_that_was_never_made_costs_no_other_step() -> None:
    """A report says whose plan never came; it must not close the step that was opened in its place."""
    script = Script(ranks=1)
    view = script.arrive("a", TOKENS)
    opened = script.plan((view, 0, 12))
    script.leader.update_connector_output([Report.unbound(opened.step - 1, 0, "no plan").encode()])
    assert script.counts()["reserved"] == 3
    script.report(opened)
    assert script.counts()["ready"] == 3
