"""``load_policy=cost``: is it faster to load blocks from stores than to compute them? Measures, estimates, counts.

A store's read of ``n`` blocks takes ``latency + n * each`` seconds; both come from the reads that workers report, by
least squares over recent ones. Computing ``n`` tokens takes ``n`` times what a token took in recent prefill steps. What
was not measured, or not for half a minute, is found out by loading: at first no more than one read's worth of blocks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kvconnect.protocol import SchedulerOutput
from kvconnect.store import Tier

__all__ = ["LoadCost", "ReadTime"]

_KEEP = 0.9  # how much of the evidence a new observation leaves: the last ten weigh about two thirds
_FRESH_S = 30.0  # a store that was refused is tried again after this: it may have become faster
_SAME_SIZE = 0.01  # variance of read sizes below which latency cannot be told from rate


class ReadTime:
    """What reads of one store take."""

    def __init__(self) -> None:
        """Know nothing."""
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, blocks, their squares, seconds, blocks times seconds
        self._seen_at = 0.0

    @property
    def known(self) -> bool:
        """Whether a read was seen lately."""
        return self._sums[0] > 0 and time.monotonic() - self._seen_at < _FRESH_S

    def add(self, blocks: int, seconds: float) -> None:
        """Take one read of at least one block."""
        new = (1.0, blocks, blocks**2, seconds, blocks * seconds)
        calls, total, squares, spent, products = (
            _KEEP * old + value for old, value in zip(self._sums, new, strict=True)
        )
        self._sums = (calls, total, squares, spent, products)
        self._seen_at = time.monotonic()

    def fit(self) -> tuple[float, float]:
        """Return seconds a call and seconds a block, neither negative; (0, 0) if nothing is known."""
        calls, total, squares, spent, products = self._sums
        if not calls:
            return 0.0, 0.0
        mean, seconds = total / calls, spent / calls
        variance = squares / calls - mean**2
        slope = seconds / mean
        if variance > _SAME_SIZE:
            slope = min(max((products / calls - mean * seconds) / variance, 0.0), slope)
        return seconds - slope * mean, slope


class LoadCost:
    """Decides for the leader; one a connector."""

    def __init__(self, tiers: Sequence[Tier], call_blocks: int) -> None:
        """Know nothing yet.

        Args:
            tiers: The stores, by number.
            call_blocks: Blocks that a worker reads in one call, see `blocks_a_call`.
        """
        self._tiers = tiers
        self._call_blocks = call_blocks
        self._reads = [ReadTime() for _ in tiers]
        self._tokens = self._seconds = 0.0
        self._planned: dict[int, tuple[float, int]] = {}  # step -> when it was planned, tokens if it is a prefill step
        self._last_report = 0.0
        self._counts: Counter[str] = Counter({"loads_made": 0, "loads_refused": 0, "probes": 0})
        self._decision: dict[str, Any] = {}

    def step_planned(self, output: SchedulerOutput) -> None:
        """Note when a step begins, and how much it computes if it is mostly prefill."""
        counts = [part.num_scheduled_tokens for part in (*output.new_requests, *output.cached_requests)]
        prefill = sum(count for count in counts if count > 1)
        self._planned[output.step] = (time.monotonic(), sum(counts) if prefill * 2 >= sum(counts) else 0)

    def step_reported(self, step: int) -> None:
        """Note when a step ended: engines that plan ahead end one a step, so it began when the one before it ended."""
        now = time.monotonic()
        began, tokens = self._planned.pop(step, (now, 0))
        for old in [number for number in self._planned if number < step]:
            del self._planned[old]
        if tokens:
            self._tokens = self._tokens * _KEEP + tokens
            self._seconds = self._seconds * _KEEP + now - max(began, self._last_report)
        self._last_report = now

    def read_ended(self, tier: int, blocks: int, seconds: float) -> None:
        """Note what one read took; of a tier or a number of blocks that cannot be, nothing."""
        if 0 <= tier < len(self._reads) and blocks > 0 and seconds >= 0:
            self._reads[tier].add(blocks, seconds)

    def choose(
        self, wanted: Sequence[tuple[int, int, int]], queued: int, num_tokens: int
    ) -> Sequence[tuple[int, int, int]]:
        """Return which blocks to load now: all, those of a probe, or none because computing is faster.

        Args:
            wanted: (tier, group, ordinal) of blocks in stores.
            queued: Blocks that other requests wait for already.
            num_tokens: What need not be computed if they are loaded.
        """
        blocks = Counter(tier for tier, _, _ in wanted)
        unknown = {tier for tier in blocks if not self._reads[tier].known}
        if unknown and any(blocks[tier] > self._call_blocks for tier in unknown):
            self._counts["probes"] += 1
            return self._probe(wanted, unknown)
        if unknown or not self._tokens:
            self._counts["loads_made"] += 1
            return wanted
        load_s = self.load_seconds(blocks, queued)
        compute_s = num_tokens * self._seconds / self._tokens
        loads = load_s <= compute_s
        self._counts["loads_made" if loads else "loads_refused"] += 1
        self._decision = {
            "blocks": len(wanted),
            "tokens": num_tokens,
            "load_s": load_s,
            "compute_s": compute_s,
            "loaded": loads,
        }
        return wanted if loads else ()

    def load_seconds(self, blocks: Counter[int], queued: int = 0) -> float:
        """Estimate how long loading takes: blocks by tier, the slowest tier counts.

        Args:
            blocks: How many of each tier.
            queued: Blocks that are read before them.
        """
        slowest = 0.0
        for tier, count in blocks.items():
            latency, each = self._reads[tier].fit()
            total = count + queued
            calls = -(-total // self._call_blocks)
            together = max(1, min(calls, self._tiers[tier].store_class.capabilities.concurrency))
            slowest = max(slowest, (calls * latency + total * each) / together)
        return slowest

    def get_stats(self) -> dict[str, Any]:
        """Return what was measured, how often which way it went, and the numbers of the last decision."""
        stores = []
        for tier, read in zip(self._tiers, self._reads, strict=True):
            latency, each = read.fit()
            stores.append({"name": tier.name, "read_latency_s": latency, "read_s_per_block": each, "fresh": read.known})
        per_token = self._seconds / self._tokens if self._tokens else None
        return {
            **self._counts,
            "prefill_s_per_token": per_token,
            "stores": stores,
            "last_decision": dict(self._decision),
        }

    def _probe(self, wanted: Iterable[tuple[int, int, int]], unknown: set[int]) -> list[tuple[int, int, int]]:
        """Return one read's worth of blocks of each tier that was not measured."""
        taken: Counter[int] = Counter()
        chosen = []
        for block in wanted:
            tier = block[0]
            if tier in unknown and taken[tier] < self._call_blocks:
                taken[tier] += 1
                chosen.append(block)
        return chosen
