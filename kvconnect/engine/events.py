"""What can be found where, told as it changes: numbered events, the newest of them kept, and who follows them.

The device is told of by the page pools, everything below it by the connector's leader. A listener that comes too late
sees a hole in the numbers and starts anew from a snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from kvconnect.engine.pool import CachedBlock, PagePool
from kvconnect.protocol import BlockChain, BlocksRemoved, BlocksStored, BlocksUpdated, CacheCleared, CacheEvent
from kvconnect.protocol.keys import BlockHash

__all__ = ["DEVICE_TIER", "EventBuffer", "EventFollower", "EventSnapshot", "NumberedEvent"]

DEVICE_TIER = -1
"""Events' number of the device: tiers below it count from 0."""

_DEVICE_NAME = "device"


class NumberedEvent(msgspec.Struct, frozen=True):
    """An event with its place among all of one engine.

    Attributes:
        event_id: Counts from 0, without holes but for events that were forgotten.
        event: What happened; on the device if its tier is -1 (``"device"``).
    """

    event_id: int
    event: CacheEvent


class EventSnapshot(msgspec.Struct, frozen=True):
    """What can be found on the device, for a listener that begins late or has missed something.

    Host memory and stores are not in it: no hook enumerates them.

    Attributes:
        next_id: Of the first event that is not in it.
        stored: All blocks of the device, as if they were stored now.
    """

    next_id: int
    stored: list[BlocksStored]


class _Run:
    """Consecutive blocks of one sequence in one layer group, with one priority."""

    def __init__(self, group: int, parent: BlockHash | None, priority: int) -> None:
        self.group = group
        self.parent = parent
        self.priority = priority
        self.hashes: list[BlockHash] = []
        self.tokens: list[int] = []

    def continues(self, block: CachedBlock, priority: int) -> bool:
        """Say whether a block comes right behind these."""
        return self.priority == priority and self.hashes[-1] == block.parent

    def add(self, block: CachedBlock) -> None:
        """Append a block."""
        self.hashes.append(block.block_hash)
        self.tokens += block.tokens


class _Removed:
    """Blocks of one layer group that went one after the other."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.hashes: list[BlockHash] = []


class EventBuffer:
    """The newest events that nobody has taken yet, consecutive blocks of a layer group joined.

    Blocks that a listener could mistake for others are not told of: those of salted requests, whose tokens and parents
    say nothing of the salt.
    """

    def __init__(self, pools: Sequence[PagePool], block_size: int, max_events: int) -> None:
        """Listen to the pools from now on.

        Args:
            pools: One a layer group.
            block_size: Tokens a page.
            max_events: Events kept; then the oldest are forgotten. Positive.
        """
        self._pools = pools
        self._block_size = block_size
        self._max_events = max_events
        self._root = BlockChain(block_size).root
        self._next_id = 0
        self._events: deque[tuple[int, _Run | _Removed | CacheEvent]] = deque()
        self._open: dict[int, _Run | _Removed] = {}  # by layer group: the device's last event
        for group, pool in enumerate(pools):
            pool.listener = _GroupListener(self, group)

    def stored(self, group: int, block: CachedBlock, priority: int) -> None:
        """Tell that a block can be found on the device."""
        if block.salted:
            return
        run = self._open.get(group)
        if not isinstance(run, _Run) or not run.continues(block, priority):
            run = self._open[group] = self._new_run(group, block, priority)
            self._append(run)
        run.add(block)

    def removed(self, group: int, block: CachedBlock) -> None:
        """Tell that it can be found there no longer."""
        if block.salted:
            return
        gone = self._open.get(group)
        if not isinstance(gone, _Removed):
            gone = self._open[group] = _Removed(group)
            self._append(gone)
        gone.hashes.append(block.block_hash)

    def updated(self, group: int, block: CachedBlock, priority: int) -> None:
        """Tell that it is kept there with another priority."""
        if block.salted:
            return
        self._open.pop(group, None)
        self._append(
            BlocksUpdated(
                block_hashes=(block.block_hash,),
                group=group,
                tier=DEVICE_TIER,
                tier_name=_DEVICE_NAME,
                priority=priority,
            )
        )

    def add(self, events: Sequence[object]) -> None:
        """Add what the connector tells; what is no event is left out."""
        for event in events:
            if isinstance(event, CacheEvent):
                self._append(event)

    def take(self) -> list[NumberedEvent]:
        """Return what is kept, oldest first, once."""
        taken = [NumberedEvent(number, self._told(event)) for number, event in self._events]
        self._events.clear()
        self._open.clear()
        return taken

    def snapshot(self) -> EventSnapshot:
        """Return what can be found on the device; what is not taken yet stays, with lower numbers."""
        self._open.clear()  # what comes from now on is another event
        runs: list[_Run] = []
        for group, pool in enumerate(self._pools):
            run: _Run | None = None
            for block in pool.blocks:
                if block.salted:
                    continue
                priority = pool.priority_of(block.block_hash)
                if run is None or not run.continues(block, priority):
                    run = self._new_run(group, block, priority)
                    runs.append(run)
                run.add(block)
        return EventSnapshot(self._next_id, [self._stored_event(run) for run in runs])

    def _append(self, event: _Run | _Removed | CacheEvent) -> None:
        if len(self._events) == self._max_events:
            self._events.popleft()  # what is still added to it reaches nobody who has not seen the hole
        self._events.append((self._next_id, event))
        self._next_id += 1

    def _new_run(self, group: int, block: CachedBlock, priority: int) -> _Run:
        return _Run(group, None if block.parent == self._root else block.parent, priority)

    def _told(self, event: _Run | _Removed | CacheEvent) -> CacheEvent:
        if isinstance(event, _Run):
            return self._stored_event(event)
        if isinstance(event, _Removed):
            return BlocksRemoved(
                block_hashes=tuple(event.hashes), group=event.group, tier=DEVICE_TIER, tier_name=_DEVICE_NAME
            )
        return event

    def _stored_event(self, run: _Run) -> BlocksStored:
        return BlocksStored(
            block_hashes=tuple(run.hashes),
            parent_hash=run.parent,
            tokens=run.tokens,
            block_size=self._block_size,
            group=run.group,
            tier=DEVICE_TIER,
            tier_name=_DEVICE_NAME,
            priority=run.priority,
        )


class _GroupListener:
    """Tells the buffer which pool speaks."""

    def __init__(self, buffer: EventBuffer, group: int) -> None:
        self._buffer = buffer
        self._group = group

    def stored(self, block: CachedBlock, priority: int) -> None:
        """See `PoolListener`."""
        self._buffer.stored(self._group, block, priority)

    def removed(self, block: CachedBlock) -> None:
        """See `PoolListener`."""
        self._buffer.removed(self._group, block)

    def updated(self, block: CachedBlock, priority: int) -> None:
        """See `PoolListener`."""
        self._buffer.updated(self._group, block, priority)


class EventFollower:
    """Knows which blocks lie where by listening alone.

    Attributes:
        blocks: (tier, layer group, hash) of every block that it believes in; tier -1 is the device. Of stores they are
            those that this engine wrote and has not missed since: what another wrote, or a store dropped, is not told.
        lost: Whether events were missed: then it believes in nothing, and takes none, until `restart`.
        device_only: Whether it does not know what lay below the device when it was restarted; what came there since it
            knows. A cleared cache ends that.
    """

    def __init__(self) -> None:
        """Follow an engine from its first event on."""
        self.blocks: set[tuple[int, int, BlockHash]] = set()
        self.lost = False
        self.device_only = False
        self._next_id = 0

    def follow(self, events: Sequence[NumberedEvent]) -> bool:
        """Take events, in order; those that a snapshot has already are left out.

        Returns:
            False if some were missed, by this call or an earlier one: see `lost`.
        """
        for numbered in events:
            if self.lost or numbered.event_id < self._next_id:
                continue
            if numbered.event_id > self._next_id:
                self.lost = True
                self.blocks.clear()
                continue
            self._next_id += 1
            self._apply(numbered.event)
        return not self.lost

    def restart(self, snapshot: EventSnapshot) -> None:
        """Begin anew with what the device has, and go on with the snapshot's next event."""
        self.blocks.clear()
        self.lost = False
        self.device_only = True
        self._next_id = snapshot.next_id
        for event in snapshot.stored:
            self._apply(event)

    def _apply(self, event: CacheEvent) -> None:
        if isinstance(event, CacheCleared):  # of the connector's: pages stay, and are told of by their own events
            self.blocks = {block for block in self.blocks if block[0] == DEVICE_TIER}
            self.device_only = False
        elif not isinstance(event, BlocksUpdated):
            named = {(event.tier, event.group, block_hash) for block_hash in event.block_hashes}
            if isinstance(event, BlocksStored):
                self.blocks |= named
            else:
                self.blocks -= named
