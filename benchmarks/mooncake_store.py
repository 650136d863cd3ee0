"""The Mooncake store as a ratio to Mooncake's own client, over a real pool, each with and without checksums.

    PYTHONPATH=. python benchmarks/mooncake_store.py

Both move the same batches on as many threads, between one process's registered memory and another's that gives 2 GiB to
the pool, over TCP on loopback; every put has fresh keys. "+sums" seals each frame before, and verifies it after, as the
worker does. Interleaved; medians, of ratios within a round.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from kvconnect_mooncake import MooncakeOptions, MooncakeStore

from kvconnect.protocol import BlockKey
from kvconnect.protocol.keys import KEY_BYTES
from kvconnect.store import HEADER_BYTES, StoreContext, Tier, open_frame, seal_frame
from tests.remote.mooncake.pool import Client, Pool

BLOCK_BYTES = (256 << 10, 2 << 20)
MOVED = 64 << 20
ROUNDS = 15
FINGERPRINT = b"f" * 32
Work = Callable[[Sequence[int]], None]


def main() -> None:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder, Pool(Path(folder), 2 << 30) as pool, Client(pool) as peer:
        options = MooncakeOptions(host="127.0.0.1", port=pool.port)
        store = MooncakeStore(options, StoreContext(name="mooncake", timeout_s=10))
        memory = np.random.default_rng(0).integers(0, 255, MOVED + (16 << 20), np.uint8)
        store.attach(memory.data)
        peer.raw.register_buffer(memory.ctypes.data, memory.nbytes)
        print("block     threads batch             alone  sums both  sums ours")
        for block in BLOCK_BYTES:
            for threads in (1, 2, 4):
                compare(store, peer.raw, memory, block, threads)
        store.close()


def compare(store: MooncakeStore, peer: Any, memory: Any, block: int, threads: int) -> None:
    frame = HEADER_BYTES + block
    slot = -(-frame // 4096) * 4096
    count = MOVED // slot
    batch = Tier(name="mooncake", store_class=MooncakeStore, options=None).blocks_a_call(block)
    slots = [memory.data[number * slot : (number + 1) * slot] for number in range(count)]
    base = memory.ctypes.data
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    keys: list[BlockKey] = []

    def seal(part: Sequence[int]) -> None:
        for i in part:
            seal_frame(slots[i], block, key=keys[i], fingerprint=FINGERPRINT, order="dense")

    def verify(part: Sequence[int]) -> None:
        for i in part:
            open_frame(slots[i][:frame], key=keys[i], fingerprint=FINGERPRINT, payload_bytes=block)

    def our_put(part: Sequence[int]) -> None:
        assert all(store.write([keys[i] for i in part], [slots[i][:frame] for i in part]))

    def our_get(part: Sequence[int]) -> None:
        assert list(store.read([keys[i] for i in part], [slots[i] for i in part])) == [frame] * len(part)

    def names(part: Sequence[int]) -> list[str]:
        return [f"peer:{keys[i].hex()}" for i in part]

    def addresses(part: Sequence[int]) -> list[int]:
        return [base + i * slot for i in part]

    def peer_put(part: Sequence[int]) -> None:
        assert not any(peer.batch_put_from(names(part), addresses(part), [frame] * len(part)))

    def peer_get(part: Sequence[int]) -> None:
        assert peer.batch_get_into(names(part), addresses(part), [slot] * len(part)) == [frame] * len(part)

    def with_sums(put: Work, get: Work) -> tuple[Work, Work]:
        def sealed_put(part: Sequence[int]) -> None:
            seal(part)
            put(part)

        def verified_get(part: Sequence[int]) -> None:
            get(part)
            verify(part)

        return sealed_put, verified_get

    clients = {
        "store": (our_put, our_get),
        "peer": (peer_put, peer_get),
        "store+sums": with_sums(our_put, our_get),
        "peer+sums": with_sums(peer_put, peer_get),
    }
    times: dict[tuple[str, str], list[float]] = {(name, way): [] for name in clients for way in ("put", "get")}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(ROUNDS + 1):
            order = list(clients.items())
            for name, works in order[number % 4 :] + order[: number % 4]:
                keys[:] = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(count)]
                for way, work in zip(("put", "get"), works, strict=True):
                    started = time.perf_counter()
                    list(pool.map(work, batches))
                    if number:  # the first touches the memory
                        times[name, way].append(time.perf_counter() - started)
            peer.remove_all(True)

    def ratio(mine: str, other: str, way: str) -> float:
        pairs = zip(times[mine, way], times[other, way], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    for way in ("put", "get"):
        rates = "  ".join(f"{name} {count * frame / statistics.median(times[name, way]) / 1e9:.2f}" for name in clients)
        ratios = [ratio("store", "peer", way), ratio("store+sums", "peer+sums", way), ratio("store+sums", "peer", way)]
        print(
            f"{block >> 10:5} KiB {threads:7} {batch:5} {way}   "
            + "".join(f"{value:11.2f}" for value in ratios)
            + f"   GB/s: {rates}",
            flush=True,
        )


if __name__ == "__main__":
    main()
