"""Gather and scatter between per-layer pages and arena slots, as a ratio to memcpy in the same run.

    python benchmarks/copies.py

2 MiB blocks: 32 layers of K and V, 16 tokens, 8 heads, 128 elements of bfloat16. memcpy copies the same bytes between
two touched buffers, block by block, on as many threads. Interleaved; medians.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from kvconnect.protocol import KVCacheLayout, LayerGroup, Region
from kvconnect.worker.arena import Arena
from kvconnect.worker.copies import BlockCopier

LAYERS, TOKENS, HEADS, DIM, BLOCKS, PAGES = 32, 16, 8, 128, 64, 128
AXES = {
    "dense": ("token", "head", "dim"),
    "neighbours": ("token", "head", "dim"),
    "view of dense": ("head", "token", "dim"),
    "padded": ("token", "head", "dim"),
}


def layout(name: str) -> KVCacheLayout:
    regions = []
    for layer in range(LAYERS):
        for role in ("key", "value"):
            tensor = torch.randn(PAGES, TOKENS, HEADS, DIM + (name == "padded") * 8).bfloat16()[..., :DIM]
            if name == "view of dense":
                tensor = tensor.transpose(1, 2)
            regions.append(Region(tensor=tensor, axes=AXES[name], layers=(layer,), roles=(role,)))
    group = LayerGroup(block_size=TOKENS, layers=tuple(range(LAYERS)), regions=tuple(regions))
    return KVCacheLayout(groups=(group,), heads=(0, HEADS), total_heads=HEADS).in_memory_order()


def main() -> None:
    size = LAYERS * 2 * TOKENS * HEADS * DIM * 2
    source, target = (np.ones((BLOCKS, size // 8), dtype=np.int64) for _ in range(2))
    rng = np.random.default_rng(0)
    pages_of = {name: rng.permutation(PAGES)[:BLOCKS].tolist() for name in AXES} | {"neighbours": list(range(BLOCKS))}

    def memcpy(rows: range) -> None:
        for row in rows:
            target[row] = source[row]

    print(f"{BLOCKS} blocks of {size >> 20} MiB")
    print(f"{'layout':14} threads {'memcpy':>11} {'gather':>11} {'scatter':>11}  gather/memcpy  scatter/memcpy")
    for name in AXES:
        pages = pages_of[name]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(1) as pool:
                described = layout(name)
                arena = Arena((BLOCKS + 1) * (size + 8192), size, pinned=False)
                order = described.payload_order(0)
                copies = BlockCopier(described.groups[0], arena, order, pool if threads == 2 else None)
                slots = list(range(BLOCKS)) if name == "neighbours" else rng.permutation(BLOCKS).tolist()

                def both(pool: ThreadPoolExecutor = pool, threads: int = threads) -> None:
                    half = BLOCKS // 2 if threads == 2 else BLOCKS
                    other = pool.submit(memcpy, range(half, BLOCKS))
                    memcpy(range(half))
                    other.result()

                gather = partial(copies.gather, pages, slots)
                scatter = partial(copies.scatter, pages, slots, [order] * BLOCKS)

                works: dict[str, Callable[[], None]] = {"memcpy": both, "gather": gather, "scatter": scatter}
                times: dict[str, list[float]] = {kind: [] for kind in works}
                for number in range(8):
                    for kind, work in works.items():
                        started = time.perf_counter()
                        work()
                        if number:  # the first touches the memory
                            times[kind].append(time.perf_counter() - started)
            rate = {kind: BLOCKS * size / statistics.median(seconds) / 1e9 for kind, seconds in times.items()}
            print(
                f"{name:14} {threads:7} {rate['memcpy']:6.2f} GB/s {rate['gather']:6.2f} GB/s "
                f"{rate['scatter']:6.2f} GB/s  {rate['gather'] / rate['memcpy']:13.2f}  "
                f"{rate['scatter'] / rate['memcpy']:14.2f}"
            )


if __name__ == "__main__":
    main()
