"""The S3 store as a ratio to obstore alone: objects of the same size, as many requests at once, in the same run.

    python benchmarks/s3_store.py                                  # starts Ceph, see tests/remote/ceph.sh
    python benchmarks/s3_store.py ENDPOINT BUCKET ACCESS SECRET    # a server and a bucket that are there

Each call moves 16 MiB of sealed frames, on one thread and on four. The store puts one object and a log entry, and reads
ranges; every frame is sealed before it is written and opened after it was read. obstore puts one object of 16 MiB, and
gets ranges of 4 MiB at once, on as many threads; nobody looks at the bytes. "fetch" is obstore again, which then copies
what it got to where it is wanted, as the store must: its bytes come in memory of its own. Interleaved; medians, of
ratios within a round.
"""

import contextlib
import importlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import obstore
from kvconnect_s3 import S3Options, S3Store
from obstore.store import S3Store as Client

from kvconnect.options import Secret
from kvconnect.protocol import BlockKey
from kvconnect.store import HEADER_BYTES, StoreContext, open_frame, seal_frame

ROOT = Path(__file__).parents[1]
CALL_BYTES, RANGE_BYTES, ROUNDS, TIMEOUT_S = 16 << 20, 4 << 20, 20, 30.0
FINGERPRINT, ORDER = bytes(32), "token head dim"


@contextlib.contextmanager
def gateway() -> Iterator[tuple[str, str, str, str]]:
    """Start Ceph, and make a bucket."""
    sys.path.insert(0, str(ROOT))
    processes = importlib.import_module("tests.remote.processes")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (port,) = processes.free_ports(1)
        command = ["bash", str(ROOT / "tests/remote/ceph.sh"), f"{name}/cluster", str(port)]
        with processes.Server(command, folder / "log", (folder / "cluster/ready").exists, start_s=120.0):
            place = importlib.import_module("tests.remote.s3.gateways").Place(f"http://127.0.0.1:{port}")
            yield place.endpoint, place.bucket, "AKIDTEST", "SECRETTEST"


class Blocks:
    """Frames of one size for one thread: 16 MiB of them, and buffers to read into."""

    def __init__(self, size: int) -> None:
        """Make them."""
        self.payload_bytes = size - HEADER_BYTES
        self.keys = [BlockKey(os.urandom(72)) for _ in range(CALL_BYTES // size)]
        self.frames = [memoryview(bytearray(os.urandom(size))) for _ in self.keys]
        self.buffers = [memoryview(bytearray(size)) for _ in self.keys]

    def write(self, store: S3Store) -> None:
        """Seal them, and write them in one call."""
        for key, frame in zip(self.keys, self.frames, strict=True):
            seal_frame(frame, self.payload_bytes, key=key, fingerprint=FINGERPRINT, order=ORDER)
        assert all(store.write(self.keys, self.frames))

    def read(self, store: S3Store) -> None:
        """Read them in one call, and open each when it has come."""

        def verify(index: int, length: int | None) -> None:
            frame = self.buffers[index][:length]
            open_frame(frame, key=self.keys[index], fingerprint=FINGERPRINT, payload_bytes=self.payload_bytes)

        store.read_each(self.keys, self.buffers, verify)


def measure(store: S3Store, client: Client, size: int, threads: int, pool: ThreadPoolExecutor) -> None:
    blocks = [Blocks(size) for _ in range(threads)]
    data = [os.urandom(CALL_BYTES) for _ in range(threads)]
    wanted = [memoryview(bytearray(CALL_BYTES)) for _ in range(threads)]
    starts = list(range(0, CALL_BYTES, RANGE_BYTES))

    def put(number: int) -> None:
        obstore.put(client, f"alone/{number}", data[number], use_multipart=False)

    def get(number: int) -> Sequence[obstore.Bytes]:
        lengths = [RANGE_BYTES] * len(starts)
        return obstore.get_ranges(client, f"alone/{number}", starts=starts, lengths=lengths, coalesce=0)

    def fetch(number: int) -> None:
        for start, got in zip(starts, get(number), strict=True):
            wanted[number][start : start + RANGE_BYTES] = memoryview(got)

    works: dict[str, Callable[[int], object]] = {
        "put": put,
        "write": lambda number: blocks[number].write(store),
        "get": get,
        "fetch": fetch,
        "read": lambda number: blocks[number].read(store),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    turns = random.Random(0)
    for number in range(ROUNDS // threads + 4):
        # once in order: what is got must have been put
        for name, work in turns.sample(list(works.items()), len(works)) if number else works.items():
            started = time.perf_counter()
            list(pool.map(work, range(threads)))
            if number:  # the first opens connections
                times[name].append(time.perf_counter() - started)
    rate = {name: threads * CALL_BYTES / statistics.median(seconds) / 1e9 for name, seconds in times.items()}
    ratio = {
        (name, limit): statistics.median(alone / ours for alone, ours in zip(times[limit], times[name], strict=True))
        for name, limit in (("write", "put"), ("read", "get"), ("read", "fetch"))
    }
    print(
        f"{size >> 10:6} KiB {threads:7}   {rate['put']:6.3f} {rate['write']:6.3f} {ratio['write', 'put']:6.2f}   "
        f"{rate['get']:6.3f} {rate['fetch']:6.3f} {rate['read']:6.3f} {ratio['read', 'get']:6.2f} "
        f"{ratio['read', 'fetch']:6.2f}"
    )


def run(endpoint: str, bucket: str, access: str, secret: str) -> None:
    options = S3Options(
        host=bucket,
        path="benchmark",
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=access,
        secret_access_key=Secret(secret),
    )
    client = Client(
        bucket,
        prefix="benchmark",
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=access,
        secret_access_key=secret,
        unsigned_payload=True,  # as the store does
        client_options={"allow_http": True, "timeout": timedelta(seconds=TIMEOUT_S)},
    )
    store = S3Store(options, StoreContext(name="s3", timeout_s=TIMEOUT_S))
    columns = ["put", "write", "ratio"], ["get", "fetch", "read", "to get", "fetch"]
    print(f"{'blocks':>10} threads   {'   '.join(' '.join(f'{each:>6}' for each in part) for part in columns)}   GB/s")
    for size in (256 << 10, 2 << 20):
        for threads in (1, 4):
            with ThreadPoolExecutor(threads) as pool:
                measure(store, client, size, threads, pool)
    store.close()


def main() -> None:
    if len(sys.argv) == 5:
        run(*sys.argv[1:])
    else:
        with gateway() as place:
            run(*place)


if __name__ == "__main__":
    main()
