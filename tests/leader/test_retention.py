"""Which blocks the arena keeps: by what requests want, and by what depends on what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from kvconnect_host import HostConnector, HostOptions

from kvconnect.errors import ConfigError
from kvconnect.options import convert_options
from kvconnect.protocol import (
    BlocksStored,
    BlocksUpdated,
    Match,
    RequestView,
    Retention,
    TokenRange,
)
from tests.leader.script import SIZE, TOKENS, Script, saved_keys, wait_for
from tests.store.stores import dict_store, tier
from tests.test_eviction import Clock

OTHERS = list(range(100, 112))  # three blocks


def keep(priority: int, duration_s: float | None = None) -> Retention:
    return Retention((TokenRange(0, None, priority, duration_s),))


def save(script: Script, name: str, tokens: Sequence[int], retention: Retention | None = None) -> None:
    script.save(name, tokens, retention=retention)


def num_kept(script: Script, tokens: Sequence[int]) -> int:
    """Return how many blocks, from the sequence's start, lie in the arena; asking is no use of them."""
    view = script.arrive("asks", [*tokens, 1])
    match = script.ask(view)
    script.leader.request_finished(view, [])
    assert match.num_tokens is not None
    return match.num_tokens // SIZE


def load(script: Script, name: str, tokens: Sequence[int], **fields: Any) -> RequestView:
    """Run a request that loads what the arena has of it, and one token more."""
    view = script.arrive(name, [*tokens, 1], **fields)
    match = script.ask(view)
    assert match == Match(len(tokens), False)
    script.alloc(view, len(tokens))
    script.report(script.plan((view, len(tokens), 1)))
    script.leader.request_finished(view, [])
    return view


@pytest.mark.parametrize(("priority", "kept"), [(80, (3, 0)), (35, (0, 3)), (10, (0, 3))])
def test_lowest_priority_leaves_the_arena_first(priority: int, kept: tuple[int, int]) -> None:
    script = Script(slots=6)
    save(script, "a", TOKENS, keep(priority))
    save(script, "b", OTHERS)
    save(script, "c", range(200, 212))
    assert (num_kept(script, TOKENS), num_kept(script, OTHERS)) == kept


def test_ranges_and_decoded_tokens_have_their_own_priority() -> None:
    script = Script(slots=4)
    retention = Retention((TokenRange(0, 4, 80),), decode_priority=90)
    view = script.arrive("a", TOKENS[:8], retention=retention)
    script.report(script.plan((view, 0, 8)))
    whole = script.view("a", TOKENS, retention=retention)
    script.report(script.plan((whole, 8, 4), new_tokens=TOKENS[8:]))
    entries = sorted(script.leader._index.group(0).values(), key=lambda entry: entry.slot)
    assert [entry.priority for entry in entries] == [80, 35, 90]


@pytest.mark.parametrize(("waited", "kept"), [(9.5, (3, 0)), (10.0, (0, 3))])
def test_duration_counts_from_when_the_block_can_first_be_loaded(waited: float, kept: tuple[int, int]) -> None:
    clock = Clock()
    script = Script(slots=6, clock=clock)
    view = script.arrive("a", TOKENS, retention=keep(80, 10))
    plan = script.plan((view, 0, 12))
    clock.now += 100  # a long step
    script.report(plan)
    script.leader.request_finished(view, [])
    clock.now += waited
    save(script, "b", OTHERS)
    save(script, "c", range(200, 212))
    assert (num_kept(script, TOKENS), num_kept(script, OTHERS)) == kept


def test_low_priority_reverts_upwards() -> None:
    clock = Clock()
    script = Script(slots=6, clock=clock)
    save(script, "b", OTHERS)
    save(script, "a", TOKENS, keep(0, 10))
    clock.now += 10
    save(script, "c", range(200, 212))
    assert (num_kept(script, TOKENS), num_kept(script, OTHERS)) == (3, 0)


def test_blocks_below_the_threshold_are_not_saved() -> None:
    script = Script(min_priority=35)
    view = script.arrive("a", TOKENS, retention=Retention((TokenRange(4, 8, 34), TokenRange(8, None, 80))))
    plan = script.plan((view, 0, 12))
    assert [move.ordinal for move in plan.saves.unpack()] == [0, 2]
    assert script.leader.get_stats()["saves_below_priority"] == 1


def test_claim_by_a_request_that_wants_another_priority_updates_it_and_says_so() -> None:
    script = Script(slots=6, events=True)
    save(script, "a", TOKENS, keep(80))
    save(script, "b", OTHERS)
    (first, second) = script.leader.take_events()
    assert isinstance(first, BlocksStored)
    assert isinstance(second, BlocksStored)
    assert (first.priority, second.priority) == (80, 35)
    load(script, "c", TOKENS)  # says nothing
    load(script, "d", TOKENS, retention=Retention())  # nor does this, of the prompt
    load(script, "e", TOKENS, retention=keep(80))
    assert script.leader.take_events() == []
    load(script, "f", TOKENS, retention=Retention((TokenRange(0, 8, 10),)))
    updated = [
        BlocksUpdated(block_hashes=(block_hash,), group=0, tier=0, tier_name="host", priority=10)
        for block_hash in first.block_hashes[:2]
    ]
    assert script.leader.take_events() == updated
    save(script, "g", range(200, 216))  # the third block goes as a leaf, after all of `OTHERS`
    assert (num_kept(script, TOKENS), num_kept(script, OTHERS)) == (2, 0)


def test_priority_that_had_reverted_is_told_when_it_is_wanted_again() -> None:
    clock = Clock()
    script = Script(clock=clock, events=True)
    save(script, "a", TOKENS[:4], keep(80, 10))
    script.leader.take_events()
    clock.now += 5
    load(script, "b", TOKENS[:4], retention=keep(80, 10))  # for another ten seconds
    clock.now += 9
    assert script.leader.take_events() == []
    load(script, "c", TOKENS[:4], retention=keep(80, 10))
    assert script.leader.take_events() == []
    clock.now += 10
    load(script, "d", TOKENS[:4], retention=keep(80))
    assert [type(event) for event in script.leader.take_events()] == [BlocksUpdated]


def test_promoted_block_has_the_priority_that_its_request_wants() -> None:
    store = dict_store()
    script = Script(tiers=[tier(store)])
    store.frames.update(dict.fromkeys(saved_keys(script, script.save("a", TOKENS)), b""))
    fresh = Script(tiers=[tier(store)])
    view = fresh.arrive("b", [*TOKENS, 1], retention=keep(80))
    assert wait_for(fresh, view) == Match(12, False)
    assert [entry.priority for entry in fresh.leader._index.group(0).values()] == [80, 80, 80]


def test_parked_load_updates_the_priority() -> None:
    script = Script(sync_load=False)
    save(script, "a", TOKENS)
    view = script.arrive("b", [*TOKENS, 1], retention=keep(80))
    assert script.ask(view) == Match(12, True)
    script.alloc(view, 12)
    assert len(script.plan().loads) == 3
    assert [entry.priority for entry in script.leader._index.group(0).values()] == [80, 80, 80]


def test_of_two_that_compute_one_block_the_last_says_how_it_is_kept() -> None:
    clock = Clock()
    script = Script(slots=6, clock=clock, events=True)
    one = script.arrive("a", TOKENS, retention=keep(80))
    other = script.arrive("b", TOKENS, retention=keep(10, 5))
    plan = script.plan((one, 0, 12), (other, 0, 12))
    assert len(plan.saves) == 3
    clock.now += 100
    script.report(plan)
    (stored,) = script.leader.take_events()
    assert isinstance(stored, BlocksStored)
    assert stored.priority == 10
    assert {entry.until for entry in script.leader._index.group(0).values()} == {clock.now + 5}


def test_what_others_depend_on_outlives_them() -> None:
    """A request goes on from a block that was used long ago; while the new blocks are there, the old one is needed."""
    script = Script(slots=4)
    save(script, "a", TOKENS[:4])
    view = script.arrive("b", TOKENS[:8], cache="write")
    plan = script.plan((view, 4, 4))  # its first block was on the device
    script.report(plan)
    script.leader.request_finished(view, [])
    save(script, "c", OTHERS)  # takes the two free slots, and one more
    assert num_kept(script, TOKENS) == 1


def test_in_a_window_nothing_depends_on_what_came_before() -> None:
    script = Script(slots=4, windows=(SIZE,))
    index = script.leader._index
    save(script, "a", TOKENS[:4])
    view = script.arrive("b", TOKENS[:8], cache="write")
    script.report(script.plan((view, 4, 4)))
    second = list(index.group(0))[1]
    script.leader.request_finished(view, [])
    save(script, "c", OTHERS)
    assert second in index.group(0)
    assert len(index.group(0)) == 4


@pytest.mark.parametrize("value", ["-1", "101", "x"])
def test_threshold_that_is_no_priority_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="min_priority"):
        convert_options("host", {"min_priority": value}, HostOptions)


def test_threshold_reaches_the_leader() -> None:
    script = Script()
    options = convert_options("host", {"min_priority": "35"}, HostOptions)
    script.leader = HostConnector().make_leader(options, script.leader._context)
    script.shake([8])
    assert len(script.save("a", TOKENS, retention=keep(34)).saves) == 0
    assert len(script.save("b", OTHERS, retention=keep(35)).saves) == 3
