"""How much of a request's beginning could be loaded, from the arena and from below it. Looks; changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.leader.promotion import TierTraffic
from kvconnect.leader.request import RequestState
from kvconnect.protocol import BlockChain, first_needed_block, longest_match

__all__ = ["Below", "Matcher"]


class Below(NamedTuple):
    """What would make a match longer than the arena's blocks do.

    Attributes:
        wanted: Blocks in stores: (tier, group, ordinal), ordinals ascending.
        coming: Entries on their way up, another request's promotions that serve this one too.
        end: How many blocks, from the sequence's start, would be at hand.
    """

    wanted: list[tuple[int, int, int]]
    coming: list[Entry]
    end: int


class Matcher:
    """Compares a chain with the index and with what stores are believed to hold."""

    def __init__(self, index: BlockIndex, traffic: TierTraffic, block_size: int, windows: Sequence[int | None]) -> None:
        """Match blocks of `block_size` tokens in layer groups with these windows."""
        self._index = index
        self._traffic = traffic
        self._block_size = block_size
        self._windows = windows

    @property
    def stops_early(self) -> bool:
        """Whether a block that is nowhere makes those behind it useless."""
        return self._windows[0] is None

    def num_ready(self, chain: BlockChain, first: int, limit: int) -> int:
        """Return how many blocks, from the sequence's start, would be at hand if the arena's were loaded.

        Args:
            chain: The sequence.
            first: Blocks that are on the device.
            limit: Blocks to look at.
        """
        hashes = itertools.islice(chain.hashes, first, limit)
        if len(self._windows) == 1 and self.stops_early:  # up to the first miss, without a loop of ours
            return first + len(list(itertools.takewhile(self._index.ready(0).__contains__, hashes)))
        known = list(hashes)
        present = [
            [False] * first + [block_hash in ready for block_hash in known]
            for ready in (self._index.ready(group) for group in range(len(self._windows)))
        ]
        return longest_match(present, self._block_size, self._windows, first, limit)

    def needed(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return (group, ordinal) of the blocks of ``[first, end)`` that a request with `end` blocks attends to."""
        return [
            (group, ordinal)
            for ordinal in range(first, end)
            for group, window in enumerate(self._windows)
            if ordinal >= first_needed_block(end * self._block_size, self._block_size, window)
        ]

    def below(self, state: RequestState, chain: BlockChain, first: int, ready: int, limit: int) -> Below:
        """Return what would make the match longer than `ready`; what the request tried already does not count."""
        sources: list[list[int]] = []  # by group and block: -2 in the arena, -1 nowhere, else the tier
        coming: dict[tuple[int, int], Entry] = {}
        for group in range(len(self._windows)):
            get = self._index.group(group).get
            row = [-1] * first
            for ordinal in range(first, limit):
                entry = get(chain.hashes[ordinal])
                if entry is not None and entry.state is not State.RESERVED:
                    row.append(-2)
                    if entry.state is State.PROMOTING:
                        coming[group, ordinal] = entry
                    continue
                tier = self._traffic.tier_of(group, chain.hashes[ordinal])
                row.append(-1 if (tier, group, ordinal) in state.tried else tier)
                if row[-1] == -1 and len(self._windows) == 1 and self.stops_early:
                    break
            sources.append(row + [-1] * (limit - len(row)))
        present = [[source != -1 for source in row] for row in sources]
        best = longest_match(present, self._block_size, self._windows, first, limit)
        if best <= ready:
            return Below([], [], ready)
        needed = self.needed(first, best)
        wanted = [
            (sources[group][ordinal], group, ordinal) for group, ordinal in needed if sources[group][ordinal] >= 0
        ]
        return Below(wanted, [coming[place] for place in needed if place in coming], best)
