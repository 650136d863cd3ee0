"""Our Redis store against a bare loop over sockets and against redis-py, in the same run, on servers of their own.

    PYTHONPATH=. python benchmarks/redis_store.py          # --only one|cluster

Ours does what the worker does: a header with a checksum before each put, all of it verified after each get, when
the store takes a frame or tells of one. The bare loop sends and receives RESP, pipelined in the same batches, and
nothing else; "+sums" does the same checksums. redis-py uses hiredis and checks nothing: a SET or GET a block, and
"batched" pipelines of the same batches. All of them over TCP, on as many threads: with one server, then with a
Cluster of three nodes. Interleaved, in another order each round; medians of ratios.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis
from redis.crc import key_slot

from benchmarks.redis_clients import TOTAL, Bare, Blocks, Client, Ours, RedisPy, RedisPyBatched, running_server
from tests.remote.faults.redis_server import RedisCluster

ROUNDS = 17
TURNS = random.Random(0)  # nobody comes after the same one each time: what the server has just done counts
LIMITS = {  # put, get
    "bare": (0.80, 0.80),
    "bare+sums": (0.90, 0.90),
    "redis-py": (4.0, 2.0),
    "redis-py batched": (4.0, 2.0),
}


def compare(clients: dict[str, Client], size: int, threads: int) -> None:
    each = [Blocks(size, TOTAL // size // threads) for _ in range(threads)]
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in clients for kind in ("put", "get")}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(ROUNDS):
            for name, client in TURNS.sample(list(clients.items()), len(clients)):
                works: list[tuple[str, Callable[[Blocks], None]]] = [("put", client.put), ("get", client.get)]
                for kind, work in works:
                    started = time.perf_counter()
                    for future in [pool.submit(work, blocks) for blocks in each]:
                        future.result()
                    if number:  # the first touches the memory
                        times[name, kind].append(time.perf_counter() - started)
    medians = {which: statistics.median(seconds) for which, seconds in times.items()}
    rates = "  ".join(
        f"{name} {TOTAL / medians[name, 'put'] / 1e9:.2f}/{TOTAL / medians[name, 'get'] / 1e9:.2f}" for name in clients
    )
    print(f"{size >> 10:5} KiB, {threads} threads, put/get GB/s: {rates}")
    for name, limits in LIMITS.items():
        for kind, limit in zip(("put", "get"), limits, strict=True):
            ratio, bare = (
                statistics.median(a / b for a, b in zip(times[name, kind], times[mine, kind], strict=True))
                for mine in ("ours", "bare")
            )
            verdict = "ok" if ratio >= limit else "MISSED"
            print(f"    {kind} {ratio:5.2f} x {name:16} limit {limit:4.2f} {verdict:6} (the bare loop {bare:.2f})")


def compare_all(
    title: str, port: int, cluster: bool, port_of: Callable[[bytes], int], client: redis.Redis | redis.RedisCluster
) -> None:
    print(title)
    for size in (256 << 10, 2 << 20):
        for threads in (1, 2):
            clients: dict[str, Client] = {
                "ours": Ours(port, cluster=cluster),
                "bare": Bare(port_of, sums=False),
                "bare+sums": Bare(port_of, sums=True),
                "redis-py": RedisPy(client),
                "redis-py batched": RedisPyBatched(client),
            }
            compare(clients, size, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("one", "cluster"))
    only = parser.parse_args().only
    if only != "cluster":
        with running_server() as port:
            compare_all("one server", port, False, lambda name: port, redis.Redis(port=port, protocol=2))
    if only != "one":
        with tempfile.TemporaryDirectory() as folder, RedisCluster(Path(folder), 3) as nodes:
            ports = [0] * 16_384
            for first, last, (_, port, *_), *_ in nodes.masters[0].do("CLUSTER", "SLOTS"):
                ports[first : last + 1] = [port] * (last + 1 - first)
            port = nodes.masters[0].port
            client = redis.RedisCluster(host="127.0.0.1", port=port, protocol=2)
            compare_all("a Cluster of three", port, True, lambda name: ports[key_slot(name)], client)


if __name__ == "__main__":
    main()
