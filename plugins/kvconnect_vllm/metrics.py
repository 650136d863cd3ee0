"""Counters of both halves on vLLM's ``/metrics`` and in its periodic log line."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvconnect.driver import LeaderDriver, WorkerDriver

__all__ = ["KVConnectProm", "KVConnectStats", "StatsSource"]

# Collecting costs tens of microseconds: not every step.
_INTERVAL_S = 0.5

# What connectors count under these names, by half; a connector that counts something else is not shown with it.
_COUNTERS = {
    "leader": {
        "committed_blocks": "blocks saved on every rank, and matchable since",
        "voided_blocks": "blocks not kept because something that they stand on had failed",
        "load_blocks": "blocks that plans load into pages",
        "load_blocks_missing": "blocks that were offered and gone before they could be loaded",
        "load_errors": "blocks that could not be loaded and were computed",
        "saves_without_slot": "blocks not saved because the arena was full of blocks in use",
        "saves_below_priority": "blocks not saved because their requests want too little for them",
        "evicted_blocks": "blocks that left the arena for others",
        "promoted_blocks": "blocks brought up from stores",
        "promote_failures": "blocks that a store was believed to hold and did not bring, or not whole",
        "demoted_blocks": "blocks written to stores",
        "demote_failures": "blocks that a store declined or failed to write",
        "demotes_dropped": "blocks not sent down: the store was too slow for them, or did not answer",
        "lookup_hits": "blocks found when stores were asked",
        "lookup_misses": "blocks not found when stores were asked",
        "lookup_failures": "questions that a store failed to answer in time",
        "requests_not_cached": "requests with something that no key covers, or that asked for it",
    },
    "worker": {
        "saved_blocks": "blocks copied from pages",
        "loaded_blocks": "blocks copied into pages",
        "save_us": "microseconds spent copying from pages",
        "load_us": "microseconds spent copying into pages",
    },
}


@dataclass
class KVConnectStats(KVConnectorStats):  # type: ignore[misc]  # Any where vLLM is not installed
    """What an interval counted: ``half.counter``, ``half.hook_seconds``, ``failures.half.hook`` and ``.store.call``."""

    def reset(self) -> None:
        """Count from nothing again."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectStats:
        """Add another rank's, or a later interval's."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the sums, for the log."""
        return {name: round(value, 6) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Say whether nothing was counted."""
        return not self.data


class StatsSource:
    """Turns one half's growing counters into what was added since the last time."""

    def __init__(self, half: str, driver: LeaderDriver | WorkerDriver) -> None:
        """Begin with what the half has counted so far unseen."""
        self._half = half
        self._driver = driver
        self._seen: defaultdict[str, float] = defaultdict(float)
        self._next_at = 0.0

    def take(self, *, at_once: bool) -> KVConnectStats | None:
        """Return what was added; None if nothing was, or if the last time was a moment ago, unless it is `at_once`."""
        now = time.monotonic()
        if now < self._next_at and not at_once:
            return None
        self._next_at = now + _INTERVAL_S
        stats = self._driver.get_stats()
        counted = {f"{self._half}.{name}": stats.get(name) for name in _COUNTERS[self._half]}
        counted[f"{self._half}.hook_seconds"] = stats["hooks"]["seconds"]
        counted.update({f"failures.{hook}": count for hook, count in stats["hooks"]["failures"].items()})
        failures = stats.get("failures")
        if self._half == "worker" and isinstance(failures, dict):
            counted.update({f"failures.store.{kind}": count for kind, count in failures.items()})
        added: dict[str, Any] = {}
        for name, value in counted.items():  # what is missing or strange this time is told the next time
            if isinstance(value, (int, float)) and value > self._seen[name]:
                added[name] = value - self._seen[name]
                self._seen[name] = value
        return KVConnectStats(data=added) if added else None


class KVConnectProm(KVConnectorPromMetrics):  # type: ignore[misc]
    """``kvconnect:<half>_<counter>_total``, ``kvconnect:hook_seconds_total`` and ``kvconnect:failures_total``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """Register the counters."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            f"{half}.{name}": self._counter_cls(
                name=f"kvconnect:{half}_{name}", documentation=f"{what} ({half})", labelnames=labelnames
            )
            for half, counters in _COUNTERS.items()
            for name, what in counters.items()
        }
        self._seconds = self._counter_cls(
            name="kvconnect:hook_seconds",
            documentation="seconds spent inside the connector's hooks",
            labelnames=[*labelnames, "half"],
        )
        self._failures = self._counter_cls(
            name="kvconnect:failures",
            documentation="calls that failed and were answered with a miss, by half and hook, or by store and call",
            labelnames=[*labelnames, "call"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's numbers."""
        values = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            kind, _, rest = name.partition(".")
            if kind == "failures":
                self._failures.labels(*values, rest).inc(value)
            elif rest == "hook_seconds":
                self._seconds.labels(*values, kind).inc(value)
            elif name in self._counters:
                self._counters[name].labels(*values).inc(value)
