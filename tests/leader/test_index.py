"""The index against a model of it: in whatever order, no slot is lost, shared, or freed while claimed."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.protocol import BlockHash

SLOTS = 5


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(2, SLOTS)
        self.entries: list[Entry] = []
        self.claims: list[Entry] = []
        self.used: list[Entry] = []  # READY and unclaimed, least recently used first
        self.quarantined: list[int] = []

    @rule(number=st.integers(0, 8), group=st.integers(0, 1), state=st.sampled_from([State.RESERVED, State.PROMOTING]))
    def reserve(self, number: int, group: int, state: State) -> None:
        if self.index.get(group, name(number)) is not None:
            return
        free = self.index.num_free
        expected = next((e for e in self.used if e.slot not in self.quarantined), None)
        entry = self.index.reserve(name(number), group, state)
        if free:
            assert entry is not None
            assert all(e.state is State.READY for e in self.used)
        elif expected is None:
            assert entry is None
        else:
            assert entry is not None
            assert entry.slot == expected.slot, "another than the least recently used block went"
        self.used = [e for e in self.used if e.state is not State.GONE]
        if entry is not None:
            assert entry.slot not in self.quarantined
            assert all(e.slot != entry.slot for e in self.claims)
            self.entries.append(entry)

    def pick(self, data: st.DataObject, wanted: Callable[[Entry], bool]) -> Entry | None:
        fitting = [entry for entry in self.entries if wanted(entry)]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        entry = self.pick(data, lambda e: e.state in (State.RESERVED, State.PROMOTING))
        if entry is not None:
            self.index.commit(entry)
            assert self.index.get(entry.group, entry.block_hash) is entry
            if not entry.claims:
                self.used.append(entry)

    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        entry = self.pick(data, lambda e: e.state is not State.GONE)
        if entry is not None:
            self.index.void(entry)
            assert self.index.get(entry.group, entry.block_hash) is None
            self.used = [e for e in self.used if e is not entry]

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        entry = self.pick(data, lambda e: e.state is not State.GONE)
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
    index = BlockIndex(1, 3)
    entries = []
    for number in range(3):
        entry = index.reserve(name(number), 0, State.RESERVED)
        assert entry is not None
        index.claim(entry)
        index.commit(entry)
        entries.append(entry)
    index.release_chain(entries)
    for number in (2, 1, 0):
        index.reserve(name(100 + number), 0, State.RESERVED)
        assert index.get(0, name(number)) is None


@pytest.mark.parametrize("state", [State.RESERVED, State.PROMOTING])
def test_slot_on_its_way_is_never_evicted(state: State) -> None:
    index = BlockIndex(1, 1)
    assert index.reserve(name(0), 0, state) is not None
    assert index.reserve(name(1), 0, State.RESERVED) is None
