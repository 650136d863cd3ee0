"""The Mooncake store with the framework's checksums, as a ratio to Mooncake's own client, over a real pool.

    PYTHONPATH=. python benchmarks/mooncake_store.py

Both move the same batches on as many threads, between one process's registered memory and another's that gives 2 GiB to
the pool, over TCP on loopback; every put has fresh keys. The store also seals each frame before, and verifies it after.
Interleaved; medians.
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
ROUNDS = 9
FINGERPRINT = b"f" * 32


def main() -> None:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder, Pool(Path(folder), 2 << 30) as pool, Client(pool) as peer:
        options = MooncakeOptions(host="127.0.0.1", port=pool.port)
        store = MooncakeStore(options, StoreContext(name="mooncake", timeout_s=10))
        memory = np.random.default_rng(0).integers(0, 255, MOVED + (16 << 20), np.uint8)
        store.attach(memory.data)
        peer.raw.register_buffer(memory.ctypes.data, memory.nbytes)
        print("block     threads batch       put: store, peer, ratio        get: store, peer, ratio")
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

    def our_put(part: Sequence[int]) -> None:
        frames = [seal_frame(slots[i], block, key=keys[i], fingerprint=FINGERPRINT, order="dense") for i in part]
        assert all(store.write([keys[i] for i in part], frames))

    def our_get(part: Sequence[int]) -> None:
        lengths = store.read([keys[i] for i in part], [slots[i] for i in part])
        for i, length in zip(part, lengths, strict=True):
            open_frame(slots[i][:length], key=keys[i], fingerprint=FINGERPRINT, payload_bytes=block)

    def names(part: Sequence[int]) -> list[str]:
        return [f"peer:{keys[i].hex()}" for i in part]

    def addresses(part: Sequence[int]) -> list[int]:
        return [base + i * slot for i in part]

    def peer_put(part: Sequence[int]) -> None:
        assert not any(peer.batch_put_from(names(part), addresses(part), [frame] * len(part)))

    def peer_get(part: Sequence[int]) -> None:
        assert peer.batch_get_into(names(part), addresses(part), [slot] * len(part)) == [frame] * len(part)

    works: dict[str, Callable[[Sequence[int]], None]] = {
        "our put": our_put,
        "peer put": peer_put,
        "our get": our_get,
        "peer get": peer_get,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(ROUNDS + 1):
            keys[:] = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(count)]
            order = list(works) if number % 2 else ["peer put", "our put", "peer get", "our get"]
            for name in order:
                started = time.perf_counter()
                list(pool.map(works[name], batches))
                if number:  # the first touches the memory
                    times[name].append(time.perf_counter() - started)
            peer.remove_all(True)
    rate = {name: count * frame / statistics.median(taken) / 1e9 for name, taken in times.items()}
    ratios = {
        way: statistics.median(
            theirs / ours for ours, theirs in zip(times[f"our {way}"], times[f"peer {way}"], strict=True)
        )
        for way in ("put", "get")
    }
    print(
        f"{block >> 10:5} KiB {threads:7} {batch:5}  "
        f"{rate['our put']:9.2f} {rate['peer put']:6.2f} GB/s {ratios['put']:5.2f}  "
        f"{rate['our get']:9.2f} {rate['peer get']:6.2f} GB/s {ratios['get']:5.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
