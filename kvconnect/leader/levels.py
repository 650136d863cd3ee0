"""Counts what went through each tier, in blocks by layer group, and knows what those are in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from kvconnect.leader.index import BlockIndex, Entry
from kvconnect.protocol import Handshake

__all__ = ["LevelCounts"]

_HOST = 0


class LevelCounts:
    """Blocks that were saved to a tier or loaded from it since the handshake; tier 0 is the arena, then the stores.

    What comes up from a store counts as loaded from it, and not as saved to the arena.
    """

    def __init__(self, ranks: Sequence[Handshake], num_stores: int) -> None:
        """Begin with nothing.

        Args:
            ranks: What each rank said of its blocks and slots.
            num_stores: Tiers below the arena.
        """
        self._num_stores = num_stores
        self._slot_bytes = sum(rank.slot_bytes for rank in ranks)
        groups = zip(*(rank.groups for rank in ranks), strict=True)
        self._block_bytes = [sum(group.payload_bytes for group in group_of_ranks) for group_of_ranks in groups]
        self._counts: Counter[tuple[str, int, int]] = Counter()

    def count(self, what: Literal["loaded", "saved"], tier: int, entries: Iterable[Entry]) -> None:
        """Count blocks that every rank has moved."""
        for entry in entries:
            self._counts[what, tier, entry.group] += 1

    def get_stats(self, index: BlockIndex) -> list[dict[str, int]]:
        """Return for each tier what is known of it: `*_blocks` of all layer groups, `*_bytes` of all ranks.

        Of the arena also what it dropped for others, what can be loaded from it now, and its slots, all of one size.
        What the arena's blocks were loaded into is the workers' to count.
        """
        ready = {group: len(index.ready(group)) for group in range(len(self._block_bytes))}
        arena = {
            **self._sums("saved", self._moved("saved", _HOST)),
            **self._sums("dropped", index.evicted),
            **self._sums("used", ready),
            "capacity_blocks": index.num_usable,
            "capacity_bytes": index.num_usable * self._slot_bytes,
        }
        stores = [
            {**self._sums("loaded", self._moved("loaded", tier)), **self._sums("saved", self._moved("saved", tier))}
            for tier in range(1, self._num_stores + 1)
        ]
        return [arena, *stores]

    def _moved(self, what: str, tier: int) -> dict[int, int]:
        return {group: self._counts[what, tier, group] for group in range(len(self._block_bytes))}

    def _sums(self, what: str, by_group: dict[int, int]) -> dict[str, int]:
        num_bytes = sum(count * self._block_bytes[group] for group, count in by_group.items())
        return {f"{what}_blocks": sum(by_group.values()), f"{what}_bytes": num_bytes}
