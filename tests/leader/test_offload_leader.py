"""The offload leader under scripted reports: what it offers, when it commits, and what it does when things go wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import (
    EngineCapabilities,
    Handshake,
    LeaderContext,
    LoadError,
    Match,
    Move,
    Namespace,
    Plan,
    Report,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)
from kvconnect.protocol.messages import GroupHandshake, pack_ints
from kvconnect.store import Tier
from tests.store.stores import dict_store, tier

SIZE = 4
ENGINE = EngineCapabilities(can_ask_again=True, load_errors="block", reports=True, handshake=True)
NONE = Match(0, False)
ASK_AGAIN = Match(None, False)


class Script:
    """A leader, and the engine's part played by hand: pages 0, 1, 2, ... for every request, one group."""

    def __init__(
        self,
        *,
        slots: int = 8,
        ranks: int = 1,
        tiers: Sequence[Tier] = (),
        windows: Sequence[int] = (0,),
        can_ask_again: bool = True,
    ) -> None:
        engine = EngineCapabilities(can_ask_again=can_ask_again, load_errors="block", reports=True, handshake=True)
        namespace = Namespace(model="id:m", kv_dtype="float32")
        self.ranks = ranks
        self.groups = len(windows)
        self.leader = OffloadLeader(
            LeaderContext(namespace=namespace, engine=engine, num_ranks=ranks, tiers=tuple(tiers))
        )
        self.shake([slots] * ranks, windows)
        self.step = 1
        self.told: dict[str, int] = {}

    def shake(self, slots: Sequence[int], windows: Sequence[int] = (0,)) -> None:
        self.leader.set_handshake_metadata(
            [
                Handshake(
                    rank=rank,
                    num_slots=count,
                    groups=tuple(GroupHandshake(SIZE, window, 2, 1024, rank) for window in windows),
                ).encode()
                for rank, count in enumerate(slots)
            ]
        )

    def view(self, name: str, tokens: Sequence[int], **fields: Any) -> RequestView:
        return RequestView(request_id=name, tokens=list(tokens), num_prompt_tokens=len(tokens), **fields)

    def arrive(self, name: str, tokens: Sequence[int], **fields: Any) -> RequestView:
        view = self.view(name, tokens, **fields)
        self.leader.on_new_request(view)
        self.told[name] = len(tokens)
        return view

    def ask(self, view: RequestView, computed: int = 0) -> Match:
        return self.leader.get_num_new_matched_tokens(view, computed)

    def alloc(self, view: RequestView, external: int) -> None:
        table = list(range(-(-len(view.tokens) // SIZE)))
        self.leader.update_state_after_alloc(view, [table] * self.groups, external)

    def plan(self, *parts: tuple[RequestView, int, int], new_tokens: Sequence[int] = ()) -> Plan:
        """Plan a step that computes ``[start, start + count)`` of each request."""
        scheduled = tuple(
            ScheduledRequest(
                request_id=view.request_id,
                num_computed_tokens=start,
                num_scheduled_tokens=count,
                num_tokens=len(view.tokens),
                new_tokens=new_tokens,
                block_ids=[list(range(-(-len(view.tokens) // SIZE)))] * self.groups,
            )
            for view, start, count in parts
        )
        output = SchedulerOutput(step=self.step, cached_requests=scheduled)
        self.step += 1
        return Plan.decode(self.leader.build_connector_meta(output))

    def report(self, plan: Plan, *, rank: int | None = None, **fields: Any) -> None:
        """Report a step, on one rank or on all."""
        ranks = range(self.ranks) if rank is None else [rank]
        reports = [Report(step=plan.step, rank=each, **fields).encode() for each in ranks]
        if rank is None:
            self.leader.update_connector_output(reports)
        else:
            padding = [Report(step=0, rank=each).encode() for each in range(self.ranks)]  # of no open step
            padding[rank] = reports[0]
            self.leader.update_connector_output(padding)

    def save(self, name: str, tokens: Sequence[int]) -> Plan:
        """Run one whole request; what it computed is committed when this returns."""
        view = self.arrive(name, tokens)
        plan = self.plan((view, 0, len(tokens)))
        self.report(plan)
        self.leader.request_finished(view, [])
        self.leader._check_integrity()
        return plan

    def counts(self) -> dict[str, int]:
        counted: dict[str, int] = self.leader.get_stats()["arena"]
        return counted


def slots(moves: Sequence[Move]) -> list[int]:
    return [move.slot for move in moves]


TOKENS = list(range(50, 62))  # three blocks


def test_what_was_saved_and_committed_is_offered_one_token_short() -> None:
    script = Script()
    assert script.ask(script.arrive("cold", TOKENS)) == NONE
    script.leader.request_finished(script.view("cold", TOKENS), [])
    script.save("a", TOKENS)
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == Match(12, False)
    assert script.ask(script.arrive("c", TOKENS)) == Match(8, False)  # a whole-prompt hit leaves a token to compute
    assert script.ask(script.arrive("d", [*TOKENS[:9], 0, 0, 0])) == Match(8, False)
    assert script.ask(script.arrive("e", [0, *TOKENS[1:]])) == NONE


def test_offer_counts_from_what_is_computed_and_shrinks_and_grows_with_it() -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    answers = [script.ask(view, computed) for computed in (8, 4, 0, 4, 8, 12, 5)]
    assert [answer.num_tokens for answer in answers] == [4, 8, 12, 8, 4, 0, 0]
    before = script.counts()
    for _ in range(35):
        script.ask(view)
    assert script.counts() == before


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


@pytest.mark.parametrize(
    ("cache", "saves", "loads"), [("both", 3, 12), ("read", 0, 12), ("write", 3, 0), ("none", 0, 0)]
)
def test_request_says_what_it_may_do(cache: str, saves: int, loads: int) -> None:
    script = Script(slots=16)
    view = script.arrive("a", range(300, 312), cache=cache)
    assert len(script.plan((view, 0, 12)).saves) == saves
    script.save("b", TOKENS)
    assert script.ask(script.arrive("c", [*TOKENS, 1], cache=cache)) == Match(loads, False)


def test_request_that_no_key_covers_is_not_cached() -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1], uncacheable="prompt embeddings")
    assert script.ask(view) == NONE
    assert not len(script.plan((view, 0, 13)).saves)


def test_salt_and_adapter_keep_requests_apart() -> None:
    script = Script(slots=16)
    script.save("a", TOKENS)
    longer = [*TOKENS, 1]
    assert script.ask(script.arrive("b", longer, cache_salt="x")) == NONE
    assert script.ask(script.arrive("c", longer, adapter=b"lora")) == NONE
    assert script.ask(script.arrive("d", longer)) == Match(12, False)


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


def test_block_that_is_being_loaded_is_not_evicted_for_a_save() -> None:
    script = Script(slots=3)
    script.save("a", TOKENS)
    reader = script.arrive("b", [*TOKENS, 1])
    script.ask(reader)
    script.alloc(reader, 12)
    writer = script.arrive("c", range(100, 112))
    plan = script.plan((reader, 12, 1), (writer, 0, 12))
    assert len(plan.loads) == 3
    assert len(plan.saves) == 0
    script.report(plan)
    assert len(script.plan((script.arrive("d", range(200, 212)), 0, 12)).saves) == 3


def test_offer_that_vanished_before_the_plan_is_named_as_failed() -> None:
    script = Script(slots=3)
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    assert script.ask(view) == Match(12, False)
    script.leader._index.clear()
    script.alloc(view, 12)
    plan = script.plan((view, 12, 1))
    assert not len(plan.loads)
    assert [move.ordinal for move in plan.fails.unpack()] == [0, 1, 2]


def test_engine_may_take_less_than_was_offered_and_cancel() -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    script.ask(view)
    script.alloc(view, 8)
    script.leader.cancel_load(view, 4, 8)
    assert [move.ordinal for move in script.plan((view, 4, 9)).loads.unpack()] == [0]


def test_plan_is_never_replayed() -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    script.ask(view)
    script.alloc(view, 12)
    assert len(script.plan((view, 12, 1)).loads) == 3
    empty = script.plan()
    assert [len(moves) for moves in (empty.loads, empty.saves, empty.promotes, empty.demotes, empty.fails)] == [0] * 5


@pytest.mark.parametrize("ending", ["finish", "reset"])
def test_request_that_ends_before_its_plan_leaves_no_claim(ending: str) -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    script.ask(view)
    script.alloc(view, 12)
    assert script.counts()["claimed"] == 3
    if ending == "finish":
        assert script.leader.request_finished(view, []) is False
    else:
        script.leader.request_reset(view)
    assert script.counts()["claimed"] == 0
    script.leader._check_integrity()


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


def test_reset_cache_matches_nothing_from_before() -> None:
    script = Script()
    script.save("a", TOKENS)
    running = script.arrive("old", [*TOKENS, 1])
    in_flight = script.arrive("flying", range(400, 408))
    plan = script.plan((in_flight, 0, 8))
    assert script.leader.reset_cache() is True
    script.report(plan)  # computed with the old weights
    assert script.counts()["free"] == 8
    assert script.ask(running) == NONE
    assert script.ask(script.arrive("b", [*TOKENS, 1])) == NONE
    script.save("c", TOKENS)
    assert script.ask(script.arrive("d", [*TOKENS, 1])) == Match(12, False)
    assert script.ask(running) == NONE  # it began under the old weights


@pytest.mark.parametrize(
    ("slots_by_rank", "windows", "why"),
    [
        ([8], [(0,), (0,)], "1 of 2 ranks"),
        ([8, 0], [(0,), (0,)], "smaller than one block"),
        ([8, 8], [(0,), (5,)], "disagree"),
    ],
)
def test_ranks_that_do_not_agree_turn_the_leader_off_with_the_reason(
    slots_by_rank: list[int], windows: list[tuple[int, ...]], why: str
) -> None:
    script = Script(ranks=2)
    fresh = OffloadLeader(
        LeaderContext(namespace=Namespace(model="id:m", kv_dtype="float32"), engine=ENGINE, num_ranks=2)
    )
    script.leader = fresh
    fresh.set_handshake_metadata(
        [
            Handshake(
                rank=rank, num_slots=count, groups=tuple(GroupHandshake(SIZE, w, 2, 64, 0) for w in windows[rank])
            ).encode()
            for rank, count in enumerate(slots_by_rank)
        ]
    )
    assert why in fresh.get_stats()["off"]
    assert script.ask(script.arrive("a", TOKENS)) == NONE
    assert script.plan((script.view("a", TOKENS), 0, 12)) == Plan(step=1)


def test_smallest_arena_counts() -> None:
    script = Script(ranks=2)
    script.shake([8, 5])
    assert script.counts()["slots"] == 5


def test_sliding_window_needs_only_the_blocks_in_it() -> None:
    script = Script(slots=16, windows=(0, 5))
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    for ordinal in (0, 1):  # out of the window of 5 tokens before token 12
        entry = script.leader._index.get(1, script.leader._requests["b"].chain.hashes[ordinal])  # type: ignore[union-attr]
        assert entry is not None
        script.leader._index.void(entry)
    assert script.ask(view) == Match(12, False)
    entry = script.leader._index.get(1, script.leader._requests["b"].chain.hashes[2])  # type: ignore[union-attr]
    assert entry is not None
    script.leader._index.void(entry)
    assert script.ask(view) == NONE


def test_holes_in_a_block_table_are_skipped() -> None:
    script = Script()
    script.save("a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1])
    script.ask(view)
    script.leader.update_state_after_alloc(view, [[-1, -1, 7, 8]], 12)
    moves = script.plan((view, 12, 1)).loads.unpack()
    assert [(move.ordinal, move.target) for move in moves] == [(2, 7)]


# -- stores ------------------------------------------------------------------------------------------------------


def wait_for(script: Script, view: RequestView) -> Match:
    """Ask again until the leader has an answer, with empty steps between as an engine would make them."""
    deadline = time.monotonic() + 10
    while (match := script.ask(view)) == ASK_AGAIN:
        assert time.monotonic() < deadline
        plan = script.plan()
        script.report(plan, promoted=pack_ints(slots(plan.promotes.unpack())))
        time.sleep(0.001)
    return match


def saved_keys(script: Script, plan: Plan) -> list[Any]:
    from kvconnect.protocol import block_key

    namespace = script.leader._namespace
    return [
        block_key(namespace, move.block_hash, move.group, rank)
        for move in plan.saves.unpack()
        for rank in range(script.ranks)
    ]


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


def test_plan_that_never_reached_its_worker_costs_no_slot() -> None:
    script = Script(tiers=[tier(dict_store())], slots=3)
    script.save("a", TOKENS)
    assert len(script.plan().demotes) == 3
    script.leader.update_connector_output([Report(step=-1, rank=0, error="bind raised").encode()])
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


def test_decoded_tokens_are_known_after_a_preemption() -> None:
    script = Script()
    view = script.arrive("a", TOKENS[:6], cache="write")
    script.report(script.plan((view, 0, 6)))
    view = script.view("a", TOKENS)  # six tokens were decoded meanwhile, and told by nobody else
    script.leader.request_reset(view)
    assert len(script.plan((view, 0, 12)).saves) == 2
    assert "requests_with_token_gap" not in script.leader.get_stats()


def test_secret_that_cannot_key_the_hash_is_refused_at_start() -> None:
    from kvconnect.errors import ConfigError

    with pytest.raises(ConfigError, match="at most 64 bytes"):
        OffloadLeader(
            LeaderContext(namespace=Namespace(model="id:m", kv_dtype="float32"), engine=ENGINE), key_secret=b"x" * 65
        )
