"""Our Redis store against both Redis connectors of LMCache, in the same run, on a server of its own.

    PYTHONPATH=.:connectors python -m benchmarks.redis_lmcache    # where lmcache 0.5.6 and redis are installed

LMCache's connectors are called where its engine calls them, with a batch of memory objects: `RedisConnector`
(``redis://``, Python) and `RESPConnector` (``resp://``, C++ threads; 8 is its default). Their memory lies ready
and warm, so what LMCache spends on allocating is left out. Ours seals and verifies every frame, on two threads;
theirs check nothing. "unchecked" is ours with frames that were sealed before, and that nobody verifies: equal terms.
One server, TCP on loopback; interleaved, in another order each round; medians.
"""

import asyncio
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")  # before it is imported

import torch
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.protocol import init_remote_metadata_info
from lmcache.v1.storage_backend.connector.redis_connector import RedisConnector, RESPConnector
from lmcache.v1.storage_backend.job_executor.pq_executor import AsyncPQExecutor
from lmcache.v1.storage_backend.native_clients.resp_client import RESPClient
from redis import asyncio as redis_asyncio

from benchmarks.redis_clients import BATCH, TOTAL, Blocks, Ours, running_server

THREADS, ROUNDS = 2, 17
TURNS = random.Random(0)  # nobody comes after the same one each time: what the server has just done counts


class MemoryObject:
    """What LMCache's connectors ask of one of theirs."""

    def __init__(self, memory: memoryview) -> None:
        self.byte_array = memory

    def get_shapes(self) -> list[torch.Size]:
        return [torch.Size([len(self.byte_array)])]

    def get_dtypes(self) -> list[torch.dtype]:
        return [torch.uint8]

    def get_memory_format(self) -> MemoryFormat:
        return MemoryFormat.BINARY_BUFFER


class Key(str):
    """A key of theirs."""

    def to_string(self) -> str:
        return self


class Lmcache:
    """An event loop on a thread of its own, as LMCache's remote backend has one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


class Connector(Lmcache):
    """A connector of theirs, made without the parts of an engine that its constructor asks for."""

    def __init__(self, port: int, threads: int | None = None) -> None:
        """Open a connection.

        Args:
            port: The server's.
            threads: C++ threads of ``resp://``; None for ``redis://``.
        """
        super().__init__()
        self.free: list[memoryview] = []
        self.run(self.open(port, threads))

    async def open(self, port: int, threads: int | None) -> None:
        if threads is None:
            self.connector = object.__new__(RedisConnector)
            self.connector.sem = asyncio.Semaphore(150)
            self.connector.connection = redis_asyncio.Redis(port=port, max_connections=150)
        else:
            self.connector = object.__new__(RESPConnector)
            self.connector.client = RESPClient("127.0.0.1", port, threads, self.loop)
            self.connector.meta_shapes = self.connector.meta_dtypes = self.connector.meta_fmt = None
        self.connector.local_cpu_backend = self
        self.connector.pq_executor = AsyncPQExecutor(self.loop)

    def allocate(self, shapes: Any, dtypes: Any, fmt: Any) -> MemoryObject:
        return MemoryObject(self.free.pop(0))

    def put(self, keys: list[Key], sent: list[memoryview]) -> None:
        self.run(self.connector.batched_put(keys, [MemoryObject(memory) for memory in sent]))

    def get(self, keys: list[Key], received: list[memoryview]) -> None:
        self.free = list(received)
        assert all(self.run(self.connector.batched_get_non_blocking("lookup", keys)))


class Unchecked(Ours):
    """The store, without what the worker does to frames."""

    def put(self, blocks: Blocks) -> None:
        """Write what is there."""
        for numbers in blocks.batches():
            frames = [blocks.sent[n] for n in numbers]
            assert all(self.store.write([blocks.keys[n] for n in numbers], frames))

    def get(self, blocks: Blocks) -> None:
        """Read."""
        for numbers in blocks.batches():
            assert all(self.store.read([blocks.keys[n] for n in numbers], [blocks.received[n] for n in numbers]))


def compare(port: int, size: int) -> None:
    each = [Blocks(size, TOTAL // size // THREADS) for _ in range(THREADS)]
    works: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name, ours in (("ours", Ours(port)), ("unchecked", Unchecked(port))):
            works[name] = partial(_all, pool, ours.put, each), partial(_all, pool, ours.get, each)
        for name, theirs in (
            ("redis://", Connector(port)),
            ("resp:// 2", Connector(port, 2)),
            ("resp:// 8", Connector(port, 8)),
        ):
            keys = [Key(f"{name}@{key.hex()}") for blocks in each for key in blocks.keys]
            sent = [memory for blocks in each for memory in blocks.sent]
            received = [memory for blocks in each for memory in blocks.received]
            works[name] = _batched(theirs.put, keys, sent), _batched(theirs.get, keys, received)
        times: dict[tuple[str, int], list[float]] = {(name, way): [] for name in works for way in range(2)}
        for number in range(ROUNDS):
            for name, ways in TURNS.sample(list(works.items()), len(works)):
                for way, work in enumerate(ways):
                    started = time.perf_counter()
                    work()
                    if number:  # the first touches the memory
                        times[name, way].append(time.perf_counter() - started)
    print(f"{size >> 10} KiB:")
    for name in works:
        rates = [TOTAL / statistics.median(times[name, way]) / 1e9 for way in range(2)]
        ratios = [
            statistics.median(a / b for a, b in zip(times[name, way], times[mine, way], strict=True))
            for mine in ("ours", "unchecked")
            for way in range(2)
        ]
        print(
            f"  {name:10} put {rates[0]:5.2f} get {rates[1]:5.2f} GB/s  ours is {ratios[0]:5.2f}x, {ratios[1]:5.2f}x"
            f"  unchecked {ratios[2]:5.2f}x, {ratios[3]:5.2f}x"
        )


def _all(pool: ThreadPoolExecutor, work: Callable[[Blocks], None], each: Sequence[Blocks]) -> None:
    for future in [pool.submit(work, blocks) for blocks in each]:
        future.result()


def _batched(
    work: Callable[[list[Key], list[memoryview]], None], keys: list[Key], memory: list[memoryview]
) -> Callable[[], None]:
    count = max(1, BATCH // len(memory[0]))

    def run() -> None:
        for first in range(0, len(keys), count):
            work(keys[first : first + count], memory[first : first + count])

    return run


def main() -> None:
    init_remote_metadata_info(1)
    with running_server() as port:
        for size in (256 << 10, 2 << 20):
            compare(port, size)


if __name__ == "__main__":
    main()
