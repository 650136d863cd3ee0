"""The index against a model of it: in whatever order, no slot is lost, shared, or freed while claimed.

Blocks of group 0 stand on one another, two on each; group 1 has a window.
"""

import math
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.protocol import BlockHash
from tests.test_eviction import Clock

SLOTS = 5
WANTS = st.tuples(st.sampled_from([35, 35, 10, 80]), st.sampled_from([None, None, 1.0, 3.0]))


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


def number_of(entry: Entry) -> int:
    return int.from_bytes(entry.block_hash, "big")


def parent_of(number: int | None) -> int | None:
    return (number - 1) // 2 if number else None


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.index = BlockIndex((None, 4), SLOTS, clock=self.clock)
        self.entries: list[Entry] = []
        self.claims: list[Entry] = []
        self.used: list[Entry] = []  # READY and unclaimed, least recently used first
        self.wants: dict[Entry, tuple[int, float]] = {}  # priority, and until when
        self.duration: dict[Entry, float | None] = {}
        self.quarantined: list[int] = []

    def victims(self, coming: int | None) -> list[Entry]:
        """Return what has to go, in order, until a slot is free for block `coming` of group 0."""
        present = [e for e in self.entries if e.state is not State.GONE]
        left = list(self.used)
        gone: list[Entry] = []

        def rank(entry: Entry) -> tuple[bool, int, int]:
            needing = [coming, *(number_of(e) for e in present if e.group == 0 and e not in gone)]
            needed = entry.group == 0 and number_of(entry) in [parent_of(number) for number in needing]
            priority, until = self.wants[entry]
            return needed, priority if self.clock.now < until else 35, self.used.index(entry)

        while left and (not gone or gone[-1].slot in self.quarantined):
            gone.append(min(left, key=rank))
            left.remove(gone[-1])
        return gone

    @rule(
        number=st.integers(0, 8),
        group=st.integers(0, 1),
        state=st.sampled_from([State.RESERVED, State.PROMOTING]),
        wants=WANTS,
    )
    def reserve(self, number: int, group: int, state: State, wants: tuple[int, float | None]) -> None:
        if self.index.get(group, name(number)) is not None:
            return
        free = self.index.num_free
        victims = [] if free else self.victims(None if group else number)
        expected = next((e for e in victims if e.slot not in self.quarantined), None)
        parent = parent_of(number)
        entry = self.index.reserve(name(number), group, state, None if parent is None else name(parent), *wants)
        assert all(e.state is State.GONE for e in victims), "another block went than the one to go first"
        if free:
            assert entry is not None
            assert all(e.state is State.READY for e in self.used)
        elif expected is None:
            assert entry is None
        else:
            assert entry is not None
            assert entry.slot == expected.slot, "more than one block went for it"
        self.used = [e for e in self.used if e.state is not State.GONE]
        if entry is not None:
            assert entry.slot not in self.quarantined
            assert all(e.slot != entry.slot for e in self.claims)
            self.entries.append(entry)
            self.duration[entry] = wants[1]
            self.wants[entry] = (wants[0], math.inf)

    def pick(self, data: st.DataObject, wanted: Callable[[Entry], bool]) -> Entry | None:
        fitting = [entry for entry in self.entries if wanted(entry)]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        entry = self.pick(data, lambda e: e.state in (State.RESERVED, State.PROMOTING))
        if entry is not None:
            self.index.commit(entry)
            self.wants[entry] = (self.wants[entry][0], self.clock.now + (self.duration[entry] or math.inf))
            assert self.index.get(entry.group, entry.block_hash) is entry
            if not entry.claims:
                self.used.append(entry)

    @rule(data=st.data(), wants=WANTS)
    def set_priority(self, data: st.DataObject, wants: tuple[int, float | None]) -> None:
        entry = self.pick(data, lambda e: True)
        if entry is not None:
            self.index.set_priority(entry, *wants)
            ready = entry.state is State.READY
            self.wants[entry] = (wants[0], self.clock.now + (wants[1] or math.inf) if ready else math.inf)
            self.duration[entry] = wants[1]
            if entry in self.used:
                self.used.remove(entry)
                self.used.append(entry)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        entry = self.pick(data, lambda e: e.state is not State.GONE)
        if entry is not None:
            self.index.void(entry)
            assert self.index.get(entry.group, entry.block_hash) is None
            self.used = [e for e in self.used if e is not entry]

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        entry = self.pick(data, lambda e: e.state is not State.GONE or e in self.claims)
        if entry is not None:
            self.index.claim(entry)
            self.claims.append(entry)
            self.used = [e for e in self.used if e is not entry]

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.claims))
        self.claims.remove(entry)
        self.index.release(entry)
        if entry.state is State.READY and entry not in self.claims:
            self.used.append(entry)

    @rule(slot=st.integers(0, SLOTS - 1))
    def quarantine(self, slot: int) -> None:
        if self.index.at_slot(slot) is not None:  # only a slot that was given to a store call can hang
            self.index.quarantine(slot)
            self.quarantined.append(slot)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def unquarantine(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.quarantined))
        self.quarantined.remove(slot)
        self.index.unquarantine(slot)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.used = []

    @invariant()
    def holds_together(self) -> None:
        self.index.check_integrity()
        for entry in self.claims:
            assert self.index.at_slot(entry.slot) is entry, "a claimed slot was given away"


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestIndex = IndexMachine.TestCase


def test_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    index = BlockIndex((None,), 3)
    entries = []
    for number in range(3):
        entry = index.reserve(name(number), 0, State.RESERVED, None)
        assert entry is not None
        index.claim(entry)
        index.commit(entry)
        entries.append(entry)
    index.release_chain(entries)
    for number in (2, 1, 0):
        index.reserve(name(100 + number), 0, State.RESERVED, None)
        assert index.get(0, name(number)) is None


@pytest.mark.parametrize("state", [State.RESERVED, State.PROMOTING])
def test_slot_on_its_way_is_never_evicted(state: State) -> None:
    index = BlockIndex((None,), 1)
    assert index.reserve(name(0), 0, state, None) is not None
    assert index.reserve(name(1), 0, State.RESERVED, None) is None


def test_claim_on_a_block_that_went_leaves_the_one_that_took_its_name_evictable() -> None:
    index = BlockIndex((None,), 2)
    old = index.reserve(name(0), 0, State.RESERVED, None)
    assert old is not None
    index.claim(old)
    index.void(old)
    new = index.reserve(name(0), 0, State.RESERVED, None)
    assert new is not None
    index.commit(new)
    index.claim(old)
    index.check_integrity()
    assert index.num_available == 1
