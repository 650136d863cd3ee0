"""Collects what the index and the tiers say of blocks, until the engine takes it. Off unless the engine listens."""

from __future__ import annotations

from collections.abc import Sequence

from kvconnect.leader.index import Entry
from kvconnect.leader.request import RequestState
from kvconnect.protocol import (
    DEFAULT_PRIORITY,
    BlocksRemoved,
    BlocksStored,
    BlocksUpdated,
    CacheCleared,
    CacheEvent,
    RequestView,
)
from kvconnect.protocol.keys import BlockHash

__all__ = ["EventLog"]

# Blocks that an engine which stops listening may leave behind; then they are forgotten, and counted.
_MAX_BLOCKS = 1 << 16


class _Run:
    """Consecutive blocks of one sequence that were stored one after the other, with one priority."""

    def __init__(self, group: int, tier: int, priority: int, parent: BlockHash | None) -> None:
        self.kind = (group, tier, priority)
        self.parent = parent
        self.hashes: list[BlockHash] = []
        self.tokens: list[int] = []


class EventLog:
    """Events since they were taken last, consecutive blocks joined.

    Blocks that a listener could mistake for others are not told of: those of requests with a salt, an adapter or media,
    whose tokens and parents say nothing of these.

    Attributes:
        enabled: Whether the engine listens; if not, nothing is remembered of any block.
        num_lost: Blocks of which nobody was told.
    """

    def __init__(self, block_size: int, tier_names: Sequence[str], *, enabled: bool) -> None:
        """Know nothing; tier 0 is the arena, `tier_names` are the stores below it."""
        self.enabled = enabled
        self.num_lost = 0
        self._block_size = block_size
        self._names = ("host", *tier_names)
        self._events: list[_Run | BlocksRemoved | BlocksUpdated | CacheCleared] = []
        self._num_blocks = 0

    def keeps_tokens(self, request: RequestView) -> bool:
        """Say whether a request's tokens are needed."""
        return self.enabled and request.cache_salt is None and request.adapter is None and not request.media

    def remember(self, entry: Entry, state: RequestState, ordinal: int) -> None:
        """Note which tokens a block holds, while the request that knows them is at hand."""
        start = ordinal * self._block_size
        tokens = tuple(state.tokens[start : start + self._block_size])
        if tokens and state.chain is not None:
            entry.content = (state.chain.hashes[ordinal - 1] if ordinal else None, tokens)

    def stored(self, entry: Entry, tier: int = 0) -> None:
        """Say that a block can be loaded from a tier."""
        if not self.enabled or entry.content is None or not self._has_room():
            return
        parent, tokens = entry.content
        run = self._events[-1] if self._events else None
        kind = (entry.group, tier, DEFAULT_PRIORITY if tier else entry.priority)
        if not isinstance(run, _Run) or run.kind != kind or run.hashes[-1] != parent:
            run = _Run(*kind, parent)
            self._events.append(run)
        run.hashes.append(entry.block_hash)
        run.tokens += tokens

    def updated(self, entry: Entry) -> None:
        """Say that a block of the arena has another priority."""
        if self.enabled and entry.content is not None and self._has_room():
            self._events.append(
                BlocksUpdated(
                    block_hashes=(entry.block_hash,),
                    group=entry.group,
                    tier=0,
                    tier_name=self._names[0],
                    priority=entry.priority,
                )
            )

    def removed(self, entry: Entry, tier: int = 0) -> None:
        """Say that a block cannot be loaded from a tier any more."""
        if self.enabled and entry.content is not None and self._has_room():
            hashes = (entry.block_hash,)
            self._events.append(
                BlocksRemoved(block_hashes=hashes, group=entry.group, tier=tier, tier_name=self._names[tier])
            )

    def cleared(self) -> None:
        """Say that nothing from before can be loaded any more; what was not taken yet is told by that."""
        if self.enabled:
            self._events, self._num_blocks = [CacheCleared()], 0

    def take(self) -> list[CacheEvent]:
        """Return what happened since the last call, once."""
        events, self._events, self._num_blocks = self._events, [], 0
        return [self._told(event) if isinstance(event, _Run) else event for event in events]

    def _told(self, run: _Run) -> BlocksStored:
        group, tier, priority = run.kind
        return BlocksStored(
            block_hashes=tuple(run.hashes),
            parent_hash=run.parent,
            tokens=run.tokens,
            block_size=self._block_size,
            group=group,
            tier=tier,
            tier_name=self._names[tier],
            priority=priority,
        )

    def _has_room(self) -> bool:
        self._num_blocks += 1
        if self._num_blocks > _MAX_BLOCKS:
            self.num_lost += 1
            return False
        return True
