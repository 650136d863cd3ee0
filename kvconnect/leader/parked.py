"""An asynchronous load: brings a parked request's blocks to its pages, over as many steps as it takes. Plans only.

What lies in the arena is loaded at once. What lies in stores comes up in rounds: each plan takes as many slots as it
can get, loads what has arrived, and lets those slots go when the step is reported. Nothing is held while it waits for a
slot, so two parked requests never wait on each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from kvconnect.leader.index import BlockIndex, State
from kvconnect.leader.promotion import TierTraffic
from kvconnect.leader.request import PlannedLoad, RequestState
from kvconnect.protocol.keys import BlockHash

__all__ = ["ParkedLoad"]


class _Block(NamedTuple):
    group: int
    ordinal: int
    page: int
    block_hash: BlockHash


class ParkedLoad:
    """The load of one parked request.

    Attributes:
        request: Whose load it is.
        ended: Whether a plan has said that it ends; it is kept until that step is reported.
    """

    def __init__(self, request: RequestState, blocks: Sequence[tuple[int, int, int]], patience_s: float) -> None:
        """Take on blocks.

        Args:
            request: The parked request.
            blocks: (group, ordinal, page), ordinals ascending.
            patience_s: Seconds without any progress after which the rest is given up.
        """
        self.request = request
        self.ended = False
        self._left = [_Block(group, ordinal, page, request.hash_of(group, ordinal)) for group, ordinal, page in blocks]
        self._chain = request.chain  # another one, or none, later: what is known of its tokens has changed
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._all_coming_at = -1  # `TierTraffic.num_ended` when all that was left was on its way up

    def plan(self, index: BlockIndex, traffic: TierTraffic) -> tuple[list[PlannedLoad], list[PlannedLoad]]:
        """Return what this step loads and what cannot be loaded any more; wants promotions for the rest.

        Entries of loads are claimed; the claims end with the step.
        """
        loads: list[PlannedLoad] = []
        fails: list[PlannedLoad] = []
        left: list[_Block] = []
        wanted: list[tuple[int, int, int]] = []
        first_bad: int | None = None
        all_coming = True
        late = time.monotonic() > self._deadline or self.request.chain is not self._chain
        if self._all_coming_at == traffic.num_ended and not late:
            return loads, fails
        for block in self._left:
            block_hash = block.block_hash
            entry = index.get(block.group, block_hash)
            if entry is not None and entry.state is State.READY and first_bad is None:
                index.claim(entry)
                self.request.retain(index, entry, block.ordinal)
                loads.append(PlannedLoad(entry, block_hash, block.group, block.ordinal, block.page))
                continue
            tier = traffic.tier_of(block.group, block_hash)
            known = (tier, block.group, block.ordinal)
            coming = entry is not None
            if first_bad is not None or late or (not coming and (tier < 0 or known in self.request.tried)):
                first_bad = block.ordinal if first_bad is None else first_bad
                fails.append(PlannedLoad(None, block_hash, block.group, block.ordinal, block.page))
                continue
            left.append(block)
            all_coming = all_coming and coming
            if not coming and len(wanted) < index.num_available:
                wanted.append(known)
        if loads or fails:
            self._deadline = time.monotonic() + self._patience_s
        self._left = left
        self._all_coming_at = traffic.num_ended if all_coming else -1
        if wanted:
            traffic.want(self.request, wanted)
        self.ended = not left
        return loads, fails

    def give_up(self) -> None:
        """Load nothing more, and name what is left as failed."""
        self._all_coming_at = -1
        self._deadline = 0.0

    def fail_again(self, lost: Sequence[PlannedLoad]) -> None:
        """Take back loads of a step that failed as a whole: they will be named as failed."""
        self._left = [_Block(load.group, load.ordinal, load.block_id, load.block_hash) for load in lost] + self._left
        self._left.sort(key=lambda block: block.ordinal)
        self._all_coming_at = -1
        self._deadline = 0.0
        self.ended = False

    def drop(self) -> None:
        """Load nothing more: the request is gone."""
        self._left = []
        self._all_coming_at = -1
