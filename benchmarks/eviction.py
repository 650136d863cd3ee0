"""What the operations of the eviction queue cost, a block.

python benchmarks/eviction.py
"""

import itertools
import statistics
import time

from kvconnect.eviction import EvictionQueue

BLOCKS = 65536
CHAIN = 64


def measure() -> list[float]:
    """Return seconds a block of each operation on a queue of `BLOCKS` blocks in chains."""
    queue: EvictionQueue[tuple[int, bytes]] = EvictionQueue()
    keys = [(0, number.to_bytes(32, "big")) for number in range(BLOCKS)]
    ends_first = [key for start in range(0, BLOCKS, CHAIN) for key in reversed(keys[start : start + CHAIN])]
    times = [time.perf_counter()]
    for number, key in enumerate(keys):
        queue.enter(key, keys[number - 1] if number % CHAIN else None)
    times.append(time.perf_counter())
    for key in ends_first:
        queue.offer(key, 35)
    times.append(time.perf_counter())
    for key in keys:
        queue.withdraw(key)
    times.append(time.perf_counter())
    for key in ends_first:
        queue.offer(key, 35)
    times.append(time.perf_counter())
    while (victim := queue.pop()) is not None:
        queue.leave(victim)
    times.append(time.perf_counter())
    return [(end - start) / BLOCKS for start, end in itertools.pairwise(times)]


def main() -> None:
    rounds = [measure() for _ in range(7)]
    names = ("enter", "offer", "withdraw", "offer again", "pop and leave")
    for name, seconds in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"{name:14} {statistics.median(seconds) * 1e6:5.2f} µs")


if __name__ == "__main__":
    main()
