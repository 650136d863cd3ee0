"""What goes down to which store, and when."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from kvconnect import StoreCapabilities
from kvconnect.errors import ConfigError
from kvconnect.protocol import Handshake, Plan
from kvconnect.protocol.messages import GroupHandshake, pack_ints
from kvconnect.protocol.retention import Retention, TokenRange
from kvconnect.store import BlockStore, TierOptions
from tests.leader.script import NONE, SIZE, TOKENS, Script, saved_keys, wait_for
from tests.store.stores import dict_store, tier


def down(plan: Plan, to: int = 0) -> list[bytes]:
    """Return the blocks that a plan sends down to a tier."""
    return [move.block_hash for move in plan.demotes.unpack() if move.target == to]


def arrived(script: Script, plan: Plan) -> None:
    """Report that everything that a plan sends down is there."""
    script.report(
        plan, demoted=pack_ints(value for move in plan.demotes.unpack() for value in (move.target, move.slot))
    )


def saved(plan: Plan) -> list[bytes]:
    return [move.block_hash for move in plan.saves.unpack()]


def test_second_hit_tier_gets_a_block_when_a_second_request_has_it() -> None:
    script = Script(tiers=[tier(dict_store(), write="second_hit")])
    blocks = saved(script.save("a", TOKENS))
    assert not len(script.plan().demotes)
    assert down(script.save("b", [*TOKENS[:8], 1, 2, 3, 4])) == blocks[:2]


def test_second_hit_counts_although_the_block_was_evicted_or_lies_on_the_device() -> None:
    script = Script(tiers=[tier(dict_store(), write="second_hit")], slots=3)
    blocks = saved(script.save("a", TOKENS))
    script.save("others", range(100, 112))  # takes all three slots
    assert saved(script.save("b", TOKENS)) == blocks
    plan = script.plan()
    assert down(plan) == blocks
    script = Script(tiers=[tier(dict_store(), write="second_hit")])
    blocks = saved(script.save("a", TOKENS))
    view = script.arrive("b", [*TOKENS, 1])
    assert down(script.plan((view, 12, 1))) == blocks


def test_prompts_and_decoded_blocks_go_to_the_tiers_that_want_them() -> None:
    script = Script(tiers=[tier(dict_store(), blocks=which) for which in ("all", "prompts", "decoded")])
    view, longer = script.arrive("a", TOKENS[:6]), script.view("a", TOKENS)  # the second block is half prompt
    first = script.plan((view, 0, 6))
    script.report(first)
    second = script.plan((longer, 6, 6), new_tokens=TOKENS[6:])
    arrived(script, second)
    script.leader.request_finished(longer, [])
    third = script.plan()
    arrived(script, third)
    blocks = saved(first) + saved(second)
    assert [down(second, to) + down(third, to) for to in range(3)] == [blocks, blocks[:1], blocks[1:]]
    fourth = script.save("b", TOKENS)  # what was generated is now a prompt
    assert [down(fourth, to) for to in range(3)] == [[], blocks[1:], []]


def test_tier_takes_no_block_below_its_priority_until_a_request_raises_it() -> None:
    script = Script(tiers=[tier(dict_store(), min_priority=50), tier(dict_store())])
    low = Retention((TokenRange(0, None, 20),))
    blocks = saved(script.save("a", TOKENS, retention=low))
    plan = script.plan()
    assert [down(plan, to) for to in range(2)] == [[], blocks]
    arrived(script, plan)
    assert down(script.save("b", TOKENS[:8], retention=Retention((TokenRange(0, None, 80),)))) == blocks[:2]


def test_priority_that_has_ended_lets_no_block_into_a_tier() -> None:
    now = [0.0]
    script = Script(tiers=[tier(dict_store(), min_priority=50, write="second_hit")], clock=lambda: now[0])
    high = Retention((TokenRange(0, None, 80, 10.0),))
    blocks = saved(script.save("a", TOKENS, retention=high))
    now[0] = 10.0
    assert down(script.save("b", TOKENS[:8])) == []
    assert down(script.save("c", TOKENS[:8], retention=high)) == blocks[:2]


def test_hit_in_a_lower_tier_goes_to_the_tiers_between() -> None:
    upper, middle, lower = (dict_store() for _ in range(3))
    tiers = [tier(upper), tier(middle, mode="r"), tier(lower)]
    script = Script(tiers=tiers)
    plan = script.save("a", TOKENS)
    lower.frames.update(dict.fromkeys(saved_keys(script, plan), b""))
    fresh = Script(tiers=tiers)
    view = fresh.arrive("b", [*TOKENS, 1])
    deadline = time.monotonic() + 10
    sent: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
    while fresh.ask(view).num_tokens != 12:
        assert time.monotonic() < deadline
        step = fresh.plan()
        fresh.report(step, promoted=pack_ints(move.slot for move in step.promotes.unpack()))
        for to, found in sent.items():
            found += down(step, to)
    step = fresh.plan()
    for to, found in sent.items():
        found += down(step, to)
    assert sent == {0: saved(plan), 1: [], 2: []}


def slow_store() -> type[BlockStore]:
    return dict_store(capabilities=StoreCapabilities(call_blocks=1))


def test_oldest_blocks_that_wait_for_a_slow_store_are_dropped_and_counted() -> None:
    """Of 64 slots a quarter may be on its way and a quarter wait; the rest stay free for other blocks."""
    script = Script(tiers=[tier(slow_store())], slots=64)
    tokens = list(range(1000, 1256))
    blocks = saved(script.save("a", tokens))
    plan = script.plan()
    assert down(plan) == blocks[32:48]
    assert script.counts()["claimed"] == 32
    assert script.leader.get_stats()["demotes_dropped"] == 32
    assert down(script.plan()) == []  # none has arrived
    arrived(script, plan)
    assert down(script.plan()) == blocks[48:]
    script.leader._check_integrity()


def test_slots_in_reserve_let_no_more_blocks_wait_for_a_slow_store() -> None:
    script = Script(tiers=[tier(slow_store())])
    block = GroupHandshake(SIZE, 0, 2, 1024, 0)
    script.leader.set_handshake_metadata(
        [Handshake(rank=0, num_slots=64, reserved_slots=1024, groups=(block,)).encode()]
    )
    blocks = saved(script.save("a", list(range(1000, 1256))))
    assert down(script.plan()) == blocks[32:48]
    assert script.counts()["claimed"] == 32


def test_dropped_block_goes_down_when_it_is_used_again() -> None:
    script = Script(tiers=[tier(slow_store())], slots=64)
    tokens = list(range(1000, 1256))
    blocks = saved(script.save("a", tokens))
    for _ in range(2):
        arrived(script, script.plan())
    assert down(script.save("b", tokens[:16])) == blocks[:4]


def test_store_that_gathers_gets_many_blocks_at_once_or_few_after_a_while() -> None:
    now = [0.0]
    store = dict_store(capabilities=StoreCapabilities(call_blocks=5, gather_s=0.5))
    script = Script(tiers=[tier(store)], clock=lambda: now[0])
    blocks = saved(script.save("a", TOKENS))
    assert down(script.plan()) == []
    assert script.leader.has_pending_work()
    now[0] = 0.4
    assert down(script.plan()) == []
    now[0] = 0.5
    assert down(script.plan()) == blocks
    blocks = saved(script.save("b", range(200, 220)))
    assert down(script.plan()) == blocks


def test_store_that_is_away_is_neither_asked_nor_written_until_it_answers() -> None:
    away = True

    def contains(store: BlockStore, keys: Sequence[bytes]) -> Sequence[bool]:
        if away:
            raise OSError("away")
        return [False] * len(keys)

    script = Script(tiers=[tier(dict_store(contains=contains))])
    for number in range(3):
        assert wait_for(script, script.arrive(f"a{number}", TOKENS)) == NONE
    assert script.leader.get_stats()["breakers"] == {"test": "open"}
    assert script.ask(script.arrive("b", TOKENS)) == NONE  # at once
    blocks = saved(script.save("c", TOKENS))
    assert not len(script.plan().demotes)
    assert script.leader.get_stats()["demotes_dropped"] == 3
    away = False
    deadline = time.monotonic() + 10
    while script.leader.get_stats()["breakers"] == {"test": "open"}:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert down(script.save("d", TOKENS)) == blocks


@pytest.mark.parametrize(("remember_s", "again"), [(100.0, False), (1e-9, True)])
def test_answer_that_a_block_is_there_is_taken_for_granted_for_a_time(remember_s: float, again: bool) -> None:
    asked = 0

    def contains(store: BlockStore, keys: Sequence[bytes]) -> Sequence[bool]:
        nonlocal asked
        asked += len(keys)
        return [True] * len(keys)

    script = Script(tiers=[tier(dict_store(contains=contains), remember_s=remember_s)])
    script.ask(view := script.arrive("a", [*TOKENS, 1]))
    deadline = time.monotonic() + 10
    while not script.leader.get_stats()["lookup_hits"]:
        assert time.monotonic() < deadline
        script.report(script.plan())
    script.leader.request_finished(view, [])
    assert asked == 3
    script.ask(script.arrive("b", [*TOKENS, 1]))
    while script.leader._lookup.num_pending:
        assert time.monotonic() < deadline
        script.report(script.plan())
    assert asked == (6 if again else 3)


def test_priority_of_a_tier_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_priority"):
        TierOptions(min_priority=101)
