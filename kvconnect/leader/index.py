"""Knows which block lies in which arena slot, and decides every eviction. Pure bookkeeping: moves nothing.

A slot's life:

    free ──reserve──► RESERVED (a save fills it) ─┬─commit──► READY ──evict──► free
                      PROMOTING (a store fills it)┘  └─void──► GONE ──last release──► free

Only READY blocks match. Only READY blocks without claims are evicted, in the order of `kvconnect.eviction`. A slot that
a hung store call may still touch is quarantined: it is nobody's until that call returns.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from kvconnect.eviction import EvictionQueue
from kvconnect.protocol.keys import BlockHash
from kvconnect.protocol.retention import DEFAULT_PRIORITY

__all__ = ["BlockIndex", "Entry", "NewBlock", "State"]


class State(IntEnum):
    """Where a block's slot stands."""

    RESERVED = 0
    PROMOTING = 1
    READY = 2
    GONE = 3


class Entry:
    """One block in the arena.

    Attributes:
        block_hash: Its content name.
        group: Its layer group.
        slot: Its slot, the same on every rank.
        state: See the module.
        claims: Holds that keep it from eviction.
        waiting: Ranks that have not yet told how its promotion went.
        failed: Whether one of them said that it failed.
        source: Tier that it is promoted from, -1 for none.
        content: Its parent's hash and its tokens, for events; None if nobody listens.
        key: Its group and its content name.
        refused: Tiers that did not take it, as bits.
        decoded: Whether some of its tokens were generated, as far as is known.
        priority: With which it is kept; lower ones are evicted first.
        duration_s: Seconds for which it has that, None for ever.
        until: Monotonic time at which its priority becomes the default; inf for never, and while it is not READY.
    """

    __slots__ = (
        "block_hash",
        "claims",
        "content",
        "decoded",
        "duration_s",
        "failed",
        "group",
        "key",
        "priority",
        "refused",
        "slot",
        "source",
        "state",
        "until",
        "waiting",
    )

    def __init__(
        self, key: tuple[int, BlockHash], slot: int, state: State, priority: int, duration_s: float | None
    ) -> None:
        """Make the entry of a slot that was just taken."""
        group, block_hash = key
        self.key = key
        self.block_hash = block_hash
        self.group = group
        self.slot = slot
        self.state = state
        self.claims = 0
        self.waiting: set[int] = set()
        self.failed = False
        self.source = -1
        self.content: tuple[BlockHash | None, tuple[int, ...]] | None = None
        self.decoded = False
        self.refused = 0
        self.priority = priority
        self.duration_s = duration_s
        self.until = math.inf


class NewBlock(NamedTuple):
    """A block that needs a slot.

    Attributes:
        block_hash: Its content name.
        group: Its layer group.
        parent: The block before it, None if it begins its sequence.
        rank: Priority, and the seconds for which it has it.
    """

    block_hash: BlockHash
    group: int
    parent: BlockHash | None
    rank: tuple[int, float | None]


class Watcher(Protocol):
    """Who is told when a block becomes loadable from the arena, when its priority changes, and when it is gone."""

    def stored(self, entry: Entry) -> None:
        """It is READY."""

    def updated(self, entry: Entry) -> None:
        """It is READY, and has another priority."""

    def removed(self, entry: Entry) -> None:
        """It was READY."""


class BlockIndex:
    """Blocks by (layer group, hash) and by slot."""

    def __init__(
        self,
        windows: Sequence[int | None],
        num_slots: int,
        watcher: Watcher | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with every slot free.

        Args:
            windows: Each layer group's sliding window in tokens, None for full attention, where a block is of no use
                without those before it.
            num_slots: The smallest arena's.
            watcher: Who is told.
            clock: Monotonic seconds.
        """
        self.num_slots = num_slots
        self._watcher = watcher
        self._windows = windows
        self._clock = clock
        self._num_in: Counter[State] = Counter()
        self._num_claimed = 0
        self.evicted: Counter[int] = Counter()  # by layer group
        self._groups: list[dict[BlockHash, Entry]] = [{} for _ in windows]
        self._ready: list[set[BlockHash]] = [set() for _ in windows]
        self._by_slot: dict[int, Entry] = {}
        self._free = list(range(num_slots - 1, -1, -1))  # popped from the end: low slots first, so runs are contiguous
        self._evictable: EvictionQueue[tuple[int, BlockHash]] = EvictionQueue(clock=clock)
        self._quarantined: dict[int, int] = {}  # slot -> ranks whose call hangs
        self._retired: list[int] = []  # not used since the last `resize`

    @property
    def num_groups(self) -> int:
        """Layer groups."""
        return len(self._groups)

    def group(self, group: int) -> dict[BlockHash, Entry]:
        """Return the blocks of one layer group, by hash; read it only. Not all of them are READY."""
        return self._groups[group]

    def ready(self, group: int) -> set[BlockHash]:
        """Return the hashes of one layer group's READY blocks; read it only."""
        return self._ready[group]

    def get(self, group: int, block_hash: BlockHash) -> Entry | None:
        """Return the block's entry in whatever state, None if it has no slot."""
        return self._groups[group].get(block_hash)

    def at_slot(self, slot: int) -> Entry | None:
        """Return the entry that holds `slot`, None if it is free or unknown."""
        return self._by_slot.get(slot)

    @property
    def num_evicted(self) -> int:
        """Blocks that were forgotten to make room for others."""
        return self.evicted.total()

    @property
    def num_free(self) -> int:
        """Slots that hold nothing and may be taken."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Slots that are in use or may be, after `resize`."""
        return self.num_slots - len(self._retired)

    @property
    def num_available(self) -> int:
        """Slots that `reserve` could take now."""
        return len(self._free) + len(self._evictable)

    def reserve(
        self,
        block_hash: BlockHash,
        group: int,
        state: State,
        parent: BlockHash | None,
        priority: int = DEFAULT_PRIORITY,
        duration_s: float | None = None,
    ) -> Entry | None:
        """Take a slot for a block that has none, evicting a block if there is no free one.

        Args:
            block_hash: The block.
            group: Its layer group.
            state: `RESERVED` or `PROMOTING`.
            parent: The block before it, None if it begins its sequence.
            priority: With which it will be kept.
            duration_s: Seconds from when it becomes READY until that is the default again, None for ever.

        Returns:
            The new entry, without claims; None if every slot is claimed or on its way.
        """
        key = (group, block_hash)
        # before anything is evicted: its parent is the last that should go
        self._evictable.enter(key, None if parent is None or self._windows[group] else (group, parent))
        while not self._free:  # more than once only if a victim's slot is quarantined
            if not self._evict():
                self._evictable.leave(key)
                return None
        entry = Entry(key, self._free.pop(), state, priority, duration_s)
        self._groups[group][block_hash] = entry
        self._by_slot[entry.slot] = entry
        self._num_in[state] += 1
        return entry

    def reserve_all(self, blocks: Sequence[NewBlock], state: State) -> list[Entry] | None:
        """Take slots for blocks that have none; all of them or, with nothing changed, none (None).

        What was evicted for a list that did not fit after all stays evicted.
        """
        if len(blocks) > self.num_available:
            return None
        entries: list[Entry] = []
        try:
            for block in blocks:
                entry = self.reserve(block.block_hash, block.group, state, block.parent, *block.rank)
                if entry is None:
                    break
                entries.append(entry)
        finally:
            whole = len(entries) == len(blocks)
            for entry in () if whole else entries:
                self.void(entry)
        return entries if whole else None

    def resize(self, num_slots: int) -> list[int] | None:
        """Use `num_slots` of the slots, evicting what does not fit.

        Returns:
            Slots that are used no longer, not even by what was there; None, with nothing changed, if more are claimed
            or on their way, or there are not so many.
        """
        fewer = self.num_usable - num_slots
        if not 0 < num_slots <= self.num_slots or fewer > self.num_available:
            return None
        if fewer < 0:
            self._free[:0] = self._retired[fewer:]  # behind the others: low slots are handed out first
            del self._retired[fewer:]
            return []
        while len(self._free) < fewer:
            if not self._evict():  # a slot that could be had is quarantined
                return None
        gone, self._free = self._free[:fewer], self._free[fewer:]
        self._retired += gone
        return gone

    def commit(self, entry: Entry) -> None:
        """Make the block matchable: its bytes are in the slot on every rank."""
        if entry.state is State.GONE:  # it was voided while its step was under way
            return
        self._move(entry, State.READY)
        self._ready[entry.group].add(entry.block_hash)
        if entry.duration_s is not None:
            entry.until = self._clock() + entry.duration_s
        if not entry.claims:
            self._evictable.offer(entry.key, entry.priority, entry.until)
        if self._watcher is not None:
            self._watcher.stored(entry)

    def set_priority(self, entry: Entry, priority: int, duration_s: float | None) -> None:
        """Keep a block that is being used with another priority; one without claims becomes the most recently used.

        Args:
            entry: The block.
            priority: The new one.
            duration_s: Seconds from now, or from when it becomes READY, until it is the default again; None for ever.
        """
        if entry.state is State.GONE:
            return
        old = entry.priority
        entry.priority, entry.duration_s = priority, duration_s
        if entry.state is not State.READY:
            return
        now = self._clock()
        if entry.until <= now:
            old = DEFAULT_PRIORITY
        entry.until = math.inf if duration_s is None else now + duration_s
        if not entry.claims:
            self._evictable.offer(entry.key, priority, entry.until)
        if priority != old and self._watcher is not None:
            self._watcher.updated(entry)

    def void(self, entry: Entry) -> None:
        """Forget the block; its slot is free once nothing claims it."""
        if entry.state is State.GONE:
            return
        if self._groups[entry.group].get(entry.block_hash) is entry:
            del self._groups[entry.group][entry.block_hash]
            self._ready[entry.group].discard(entry.block_hash)
            self._evictable.leave(entry.key)
        self._move(entry, State.GONE)
        if not entry.claims:
            self._free_slot(entry)

    def claim(self, entry: Entry) -> None:
        """Keep the block's slot as it is until the matching `release`."""
        entry.claims += 1
        self._num_claimed += entry.claims == 1
        if entry.state is not State.GONE:  # else the name may be another entry's by now
            self._evictable.withdraw(entry.key)

    def release(self, entry: Entry) -> None:
        """Undo one `claim`; a READY block becomes the most recently used."""
        entry.claims -= 1
        if entry.claims == 0:
            self._num_claimed -= 1
            if entry.state is State.READY:
                self._evictable.offer(entry.key, entry.priority, entry.until)
            elif entry.state is State.GONE:
                self._free_slot(entry)

    def release_chain(self, entries: Iterable[Entry]) -> None:
        """Release blocks of one sequence, given in order: its end is evicted before its beginning."""
        for entry in reversed(list(entries)):
            self.release(entry)

    def is_quarantined(self, slot: int) -> bool:
        """Say whether a store call that was given the slot may still run."""
        return slot in self._quarantined

    def quarantine(self, slot: int) -> None:
        """Keep `slot` from reuse: a store call on one rank hangs on it."""
        self._quarantined[slot] = self._quarantined.get(slot, 0) + 1

    def unquarantine(self, slot: int) -> None:
        """Undo one `quarantine`: that call has returned."""
        left = self._quarantined.get(slot, 0) - 1
        if left > 0:
            self._quarantined[slot] = left
            return
        if self._quarantined.pop(slot, None) is not None and slot not in self._by_slot and slot not in self._free:
            self._free.append(slot)

    def clear(self) -> int:
        """Forget every READY block; claimed ones keep their slot until released. Returns how many."""
        ready = [entry for entry in self._by_slot.values() if entry.state is State.READY]
        for entry in ready:
            self.void(entry)
        return len(ready)

    def counts(self) -> dict[str, int]:
        """Return how many slots are in which state."""
        return {
            "slots": self.num_usable,
            "free": len(self._free),
            "ready": self._num_in[State.READY],
            "reserved": self._num_in[State.RESERVED],
            "promoting": self._num_in[State.PROMOTING],
            "claimed": self._num_claimed,
            "quarantined": len(self._quarantined),
        }

    def check_integrity(self) -> None:
        """Compare the maps with one another.

        Raises:
            AssertionError: Names the first invariant that does not hold. For tests and idle loops.
        """
        free, held = set(self._free), set(self._by_slot)
        assert len(free) == len(self._free), "a slot is free twice"
        assert not free & held, "a slot is free and held"
        assert not free & set(self._quarantined), "a quarantined slot is free"
        retired = set(self._retired)
        assert not retired & (free | held | set(self._quarantined)), "a slot is retired and used"
        assert free | held | retired | set(self._quarantined) == set(range(self.num_slots)), "a slot is lost"
        for slot, entry in self._by_slot.items():
            assert entry.slot == slot, "an entry lies at another slot"
            assert entry.claims >= 0, "a block is released more often than claimed"
            known = self._groups[entry.group].get(entry.block_hash) is entry
            assert known == (entry.state is not State.GONE), "a block is found after it went, or lost before"
            assert entry.state is not State.GONE or entry.claims, "a block that went keeps its slot without a claim"
            ready = entry.state is State.READY
            assert known is False or (entry.block_hash in self._ready[entry.group]) == ready, "readiness is wrong"
            evictable = ready and entry.claims == 0
            assert not known or (entry.key in self._evictable) == evictable, (
                "a block is wrongly evictable or wrongly not"
            )
            assert entry.until == math.inf or (entry.duration_s and entry.state >= State.READY), (
                "a priority reverts wrongly"
            )
        present = {entry.key for group in self._groups for entry in group.values()}
        assert self._evictable.present == present, "a block that went still counts as somebody's child, or one does not"
        self._evictable.check_integrity()
        states = Counter(entry.state for entry in self._by_slot.values())
        assert all(states[state] == self._num_in[state] for state in State), "states are counted wrongly"
        claimed = sum(entry.claims > 0 for entry in self._by_slot.values())
        assert claimed == self._num_claimed, "claimed blocks are counted wrongly"
        for ready_hashes, group in zip(self._ready, self._groups, strict=True):
            assert ready_hashes <= set(group), "a block is ready that is not known"

    def _evict(self) -> bool:
        """Forget one block that nobody claims; its slot is free unless it is quarantined. False if there is none."""
        victim = self._evictable.pop()
        if victim is None:
            return False
        self._forget(self._groups[victim[0]][victim[1]])
        self.evicted[victim[0]] += 1
        return True

    def _forget(self, entry: Entry) -> None:
        self._evictable.leave(entry.key)
        del self._groups[entry.group][entry.block_hash]
        self._ready[entry.group].discard(entry.block_hash)
        self._move(entry, State.GONE)
        self._free_slot(entry)

    def _move(self, entry: Entry, state: State) -> None:
        """Change the entry's state, and say so if it was READY."""
        if entry.state is State.READY and self._watcher is not None:
            self._watcher.removed(entry)
        self._num_in[entry.state] -= 1
        self._num_in[state] += 1
        entry.state = state

    def _free_slot(self, entry: Entry) -> None:
        self._num_in[entry.state] -= 1
        del self._by_slot[entry.slot]
        if entry.slot not in self._quarantined:
            self._free.append(entry.slot)
