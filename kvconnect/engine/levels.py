"""What each level of the cache holds and what went through it: the device's own counts, and the connector's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvconnect.engine.manager import KVCacheManager

__all__ = ["LEVEL_COUNTS", "level_stats"]

LEVEL_COUNTS = tuple(
    f"{what}_{unit}" for what in ("loaded", "saved", "dropped", "used", "capacity") for unit in ("blocks", "bytes")
)
"""What is said of every level; None where nobody knows."""


def level_stats(
    names: Sequence[str], manager: KVCacheManager, leader: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, int | None]]:
    """Return the counts of every level, by its name; a second one of a name has its number behind it.

    Args:
        names: Of the levels, the device first.
        manager: Of the device.
        leader: The leader's counters: ``levels``, if it has that, counts host memory and the stores.
        workers: Each rank's counters; ``loaded_blocks`` and ``loaded_bytes`` are of loads from host memory.
    """
    levels: dict[str, dict[str, int | None]] = {}
    known: list[Mapping[str, Any]] = [_device(manager)]
    told = leader.get("levels")
    if isinstance(told, list) and len(told) == len(names) - 1 and all(isinstance(each, dict) for each in told):
        known += told
    for number, name in enumerate(names):
        counts = known[number] if number < len(known) else {}
        levels[name if name not in levels else f"{name}-{number}"] = {key: counts.get(key) for key in LEVEL_COUNTS}
    if len(known) > 1 and workers and all({"loaded_blocks", "loaded_bytes"} <= stats.keys() for stats in workers):
        host = levels[names[1]]
        host["loaded_blocks"] = min(stats["loaded_blocks"] for stats in workers)
        host["loaded_bytes"] = sum(stats["loaded_bytes"] for stats in workers)
    return levels


def _device(manager: KVCacheManager) -> dict[str, int]:
    """Count pages: loaded are those that requests found, saved those that could be found from then on."""
    cache, totals = manager.cache, manager.totals
    counts = dict.fromkeys(LEVEL_COUNTS, 0)
    for pool, page_bytes in zip(cache.pools, cache.page_bytes, strict=True):
        numbers = {
            "saved": pool.num_named,
            "dropped": pool.num_evicted,
            "used": pool.num_used,
            "capacity": pool.num_usable,
        }
        for what, number in numbers.items():
            counts[f"{what}_blocks"] += number
            counts[f"{what}_bytes"] += number * page_bytes
    counts["loaded_blocks"] = totals.reused
    counts["loaded_bytes"] = totals.reused // len(cache.pools) * cache.bytes_per_page
    return counts
