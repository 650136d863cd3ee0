"""Collects what the index and the tiers say of blocks, until the engine takes it. Off unless the engine listens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from kvconnect.leader.index import Entry
from kvconnect.leader.request import RequestState
from kvconnect.protocol import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent

__all__ = ["EventLog"]

# An engine that stops listening must not fill the memory; it has lost events then, and is told with a clear.
_MAX_EVENTS = 1 << 16


class EventLog:
    """Events since they were taken last, consecutive blocks joined.

    Attributes:
        enabled: Whether the engine listens; if not, nothing is remembered of any block.
    """

    def __init__(self, block_size: int, tier_names: Sequence[str], *, enabled: bool) -> None:
        """Know nothing; tier 0 is the arena, `tier_names` are the stores below it."""
        self.enabled = enabled
        self._block_size = block_size
        self._names = ("host", *tier_names)
        self._events: list[CacheEvent] = []

    def remember(self, entry: Entry, state: RequestState, ordinal: int) -> None:
        """Note which tokens a block holds, while the request that knows them is at hand."""
        if self.enabled and state.chain is not None:
            start = ordinal * self._block_size
            parent = state.chain.hashes[ordinal - 1] if ordinal else None
            entry.content = (parent, tuple(state.tokens[start : start + self._block_size]))

    def stored(self, entry: Entry, tier: int = 0) -> None:
        """Say that a block can be loaded from a tier."""
        if not self.enabled or entry.content is None:
            return
        parent, tokens = entry.content
        last = self._events[-1] if self._events else None
        if (
            isinstance(last, BlocksStored)
            and (last.group, last.tier) == (entry.group, tier)
            and last.block_hashes[-1] == parent
        ):
            self._events.pop()
            hashes, parent, tokens = (
                (*last.block_hashes, entry.block_hash),
                last.parent_hash,
                tuple(chain(last.tokens, tokens)),
            )
        else:
            hashes = (entry.block_hash,)
        self._add(
            BlocksStored(
                block_hashes=hashes,
                parent_hash=parent,
                tokens=tokens,
                block_size=self._block_size,
                group=entry.group,
                tier=tier,
                tier_name=self._names[tier],
            )
        )

    def removed(self, entry: Entry, tier: int = 0) -> None:
        """Say that a block cannot be loaded from a tier any more."""
        if self.enabled:
            hashes = (entry.block_hash,)
            self._add(BlocksRemoved(block_hashes=hashes, group=entry.group, tier=tier, tier_name=self._names[tier]))

    def cleared(self) -> None:
        """Say that nothing from before can be loaded any more; what was not taken yet is told by that."""
        if self.enabled:
            self._events = [CacheCleared()]

    def take(self) -> list[CacheEvent]:
        """Return what happened since the last call, once."""
        events, self._events = self._events, []
        return events

    def _add(self, event: CacheEvent) -> None:
        if len(self._events) >= _MAX_EVENTS:
            self.cleared()
        self._events.append(event)
