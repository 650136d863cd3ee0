"""The hash and checksum candidates behind ADR 0001 and 0002, interleaved in one run; medians.

    python benchmarks/digests.py

`crc32c` is compared only where it is installed (pip install crc32c): kvconnect does not depend on it.
"""

import hashlib
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

BLOCKS, WIDTH = 8192, 64  # 128k tokens in blocks of 16


def chain(new: Callable[[bytes], Any], packed: bytes) -> None:
    parent = bytes(32)
    for start in range(0, len(packed), WIDTH):
        parent = new(parent + packed[start : start + WIDTH]).digest()


def chain_copied(prepared: Any, packed: bytes) -> None:
    parent = bytes(32)
    for start in range(0, len(packed), WIDTH):
        hasher = prepared.copy()
        hasher.update(parent + packed[start : start + WIDTH])
        parent = hasher.digest()


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    packed = os.urandom(BLOCKS * WIDTH)
    hashes: dict[str, Callable[[], object]] = {
        "SHA-256, new object": lambda: chain(hashlib.sha256, packed),
        "SHA-256, copied state": lambda: chain_copied(hashlib.sha256(), packed),
        "BLAKE2b-256, new object": lambda: chain(lambda data: hashlib.blake2b(data, digest_size=32), packed),
        "BLAKE2b-256, copied state": lambda: chain_copied(
            hashlib.blake2b(digest_size=32, person=b"kvconnect-block1"), packed
        ),
    }
    print("a chained 16-token block")
    for name, seconds in medians(hashes, 9).items():
        print(f"  {name:26} {seconds / BLOCKS * 1e9:6.0f} ns")
    source = np.frombuffer(os.urandom(2 << 20), dtype=np.int64)
    target, view = np.empty_like(source), source.data
    checks: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(target, source),
        "XXH3-64": lambda: xxhash.xxh3_64_intdigest(view),
    }
    if importlib.util.find_spec("crc32c") is not None:
        crc32c: Any = importlib.import_module("crc32c")
        checks["CRC-32C"] = lambda: crc32c.crc32c(view)
    print("2 MiB in cache")
    for name, seconds in medians(checks, 200).items():
        print(f"  {name:26} {(2 << 20) / seconds / 1e9:6.1f} GB/s")


if __name__ == "__main__":
    main()
