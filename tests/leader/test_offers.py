"""What the offload leader offers, and to whom."""

from __future__ import annotations

import pytest

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import (
    Handshake,
    LeaderContext,
    Match,
    Namespace,
    Plan,
)
from kvconnect.protocol.messages import GroupHandshake
from tests.leader.script import ENGINE, NONE, SIZE, TOKENS, Script


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


def test_secret_that_cannot_key_the_hash_is_refused_at_start() -> None:
    from kvconnect.errors import ConfigError

    with pytest.raises(ConfigError, match="at most 64 bytes"):
        OffloadLeader(
            LeaderContext(namespace=Namespace(model="id:m", kv_dtype="float32"), engine=ENGINE), key_secret=b"x" * 65
        )
