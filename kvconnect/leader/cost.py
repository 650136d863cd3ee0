"""``load_policy=cost``: is it faster to load blocks from stores than to compute them? Measures, estimates, counts.

Workers report what each store read took, and each step from plan to report. Both are kept by size, because neither
is proportional to it: a read has a way to go, a step has weights to read. A store of which no read was seen for half a
minute is found out about by loading: at first no more than one read's worth of blocks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kvconnect.protocol import SchedulerOutput
from kvconnect.store import Tier

__all__ = ["LoadCost", "TimeBySize"]

_WEIGHT = 0.2  # of a new observation once there are five: the last ten make up nine tenths
_MAX_OPEN = 64
_FRESH_S = 30.0  # a store that was refused is tried again after this: it may have become faster


class TimeBySize:
    """What something takes, by how much it is; one moving average for each power of two."""

    def __init__(self) -> None:
        """Know nothing."""
        self._points: dict[int, tuple[float, float]] = {}  # bit length of the size -> average size, average seconds
        self._counts: Counter[int] = Counter()
        self.seen_at = float("-inf")

    @property
    def largest(self) -> float:
        """The largest size that was seen, as an average; 0 for none."""
        return max((size for size, _ in self._points.values()), default=0.0)

    def add(self, size: int, seconds: float) -> None:
        """Take one observation of a positive size."""
        bits = size.bit_length()
        self._counts[bits] += 1
        weight = max(_WEIGHT, 1 / self._counts[bits])
        old_size, old_seconds = self._points.get(bits, (0.0, 0.0))
        self._points[bits] = (old_size + weight * (size - old_size), old_seconds + weight * (seconds - old_seconds))
        self.seen_at = time.monotonic()

    def seconds(self, size: float) -> float:
        """Estimate: on the line between the sizes seen below and above; beyond the largest on that of the last two.

        Below the smallest, and with one size alone, in proportion. 0 if nothing is known.
        """
        points = [(0.0, 0.0), *(self._points[key] for key in sorted(self._points))]
        if len(points) == 1:
            return 0.0
        above = next((i for i in range(1, len(points)) if points[i][0] >= size), len(points) - 1)
        (x0, y0), (x1, y1) = points[above - 1], points[above]
        if above == len(points) - 1 and len(points) > 2 and size > x1 and y1 < y0:
            return y1  # noise: more is not faster
        return y0 + (size - x0) * (y1 - y0) / (x1 - x0)


class LoadCost:
    """Decides for the leader; one a connector."""

    def __init__(self, tiers: Sequence[Tier], call_blocks: Sequence[int], max_batch_tokens: int = 0) -> None:
        """Know nothing yet.

        Args:
            tiers: The stores, by number.
            call_blocks: Of each, the blocks that a worker reads in one call, see `Tier.blocks_a_call`.
            max_batch_tokens: Tokens that the engine computes in one step, 0 if it did not say.
        """
        self._tiers = tiers
        self._call_blocks = call_blocks
        self._max_batch_tokens = max_batch_tokens
        self._reads = [TimeBySize() for _ in tiers]
        self._steps = TimeBySize()
        self._planned: dict[int, int] = {}  # step -> its tokens
        self._counts: Counter[str] = Counter({"loads_made": 0, "loads_refused": 0, "probes": 0})
        self._decision: dict[str, Any] = {}

    def step_planned(self, output: SchedulerOutput) -> None:
        """Note how much a step computes."""
        parts = (*output.new_requests, *output.cached_requests)
        self._planned[output.step] = sum(part.num_scheduled_tokens for part in parts)
        while len(self._planned) > _MAX_OPEN:  # steps whose reports were lost
            del self._planned[next(iter(self._planned))]

    def step_reported(self, step: int, seconds: float) -> None:
        """Note what a step took, by the rank that says so first."""
        tokens = self._planned.pop(step, 0)
        if tokens and seconds > 0:
            self._steps.add(tokens, seconds)

    def read_ended(self, tier: int, blocks: int, seconds: float) -> None:
        """Note what one read took; of a tier or a number of blocks that cannot be, nothing."""
        if 0 <= tier < len(self._reads) and blocks > 0 and seconds >= 0:
            self._reads[tier].add(blocks, seconds)

    def choose(
        self, wanted: Sequence[tuple[int, int, int]], queued: Counter[int], num_tokens: int
    ) -> Sequence[tuple[int, int, int]]:
        """Return which blocks to load now: all, those of a probe, or none because computing is faster.

        Args:
            wanted: (tier, group, ordinal) of blocks in stores.
            queued: Blocks of each tier that are read before them.
            num_tokens: What need not be computed if they are loaded.
        """
        blocks = Counter(tier for tier, _, _ in wanted)
        unknown = {tier for tier in blocks if time.monotonic() - self._reads[tier].seen_at > _FRESH_S}
        if unknown and any(blocks[tier] > self._call_blocks[tier] for tier in unknown):
            self._counts["probes"] += 1
            return self._probe(wanted, unknown)
        load_s, compute_s = self.load_seconds(blocks, queued), self.compute_seconds(num_tokens)
        loads = bool(unknown) or not compute_s or load_s <= compute_s
        self._counts["loads_made" if loads else "loads_refused"] += 1
        self._decision = {
            "blocks": len(wanted),
            "tokens": num_tokens,
            "load_s": None if unknown else load_s,
            "compute_s": compute_s or None,
            "loaded": loads,
        }
        return wanted if loads else ()

    def load_seconds(self, blocks: Counter[int], queued: Counter[int]) -> float:
        """Estimate how long loading takes: blocks by tier, the slowest tier counts.

        Args:
            blocks: How many of each tier.
            queued: How many of each tier are read before them.
        """
        slowest = 0.0
        for tier, count in blocks.items():
            call_blocks = self._call_blocks[tier]
            calls, rest = divmod(count + queued[tier], call_blocks)
            total = calls * self._reads[tier].seconds(call_blocks) + self._reads[tier].seconds(rest)
            together = max(1, min(calls + (rest > 0), self._tiers[tier].store_class.capabilities.concurrency))
            slowest = max(slowest, total / together)
        return slowest

    def compute_seconds(self, num_tokens: int) -> float:
        """Estimate how long computing takes, in steps as large as the engine makes them; 0 if nothing is known.

        The last step counts whole, although a request that loads needs one too: what is close is loaded, because work
        that is not done is time for others.
        """
        steps, rest = divmod(num_tokens, self._max_batch_tokens or max(1, round(self._steps.largest)))
        return steps * self._steps.seconds(self._max_batch_tokens or self._steps.largest) + self._steps.seconds(rest)

    def get_stats(self) -> dict[str, Any]:
        """Return what was measured, how often which way it went, and the numbers of the last decision."""
        now = time.monotonic()
        stores = [
            {
                "name": tier.name,
                "read_s_per_block": reads.seconds(blocks) / blocks,
                "fresh": now - reads.seen_at <= _FRESH_S,
            }
            for tier, reads, blocks in zip(self._tiers, self._reads, self._call_blocks, strict=True)
        ]
        size = self._max_batch_tokens or max(1.0, self._steps.largest)
        return {
            **self._counts,
            "compute_s_per_token": self._steps.seconds(size) / size,
            "stores": stores,
            "last_decision": dict(self._decision),
        }

    def _probe(self, wanted: Iterable[tuple[int, int, int]], unknown: set[int]) -> list[tuple[int, int, int]]:
        """Return one read's worth of blocks of each tier that was not measured."""
        taken: Counter[int] = Counter()
        chosen = []
        for block in wanted:
            tier = block[0]
            if tier in unknown and taken[tier] < self._call_blocks[tier]:
                taken[tier] += 1
                chosen.append(block)
        return chosen
