"""Our Redis store against a bare loop over sockets and against redis-py, in the same run, on a server of its own.

    python benchmarks/redis_store.py

Ours does what the worker does: a header with a checksum before each put, all of it verified after each get, when
the store takes a frame or tells of one. The bare loop sends and receives RESP, pipelined in the same batches, and
nothing else; "+sums" does the same checksums. redis-py uses hiredis, one SET or GET a block. All of them over TCP, on
as many threads. Interleaved, in another order each round; medians of ratios.
"""

import contextlib
import os
import random
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from kvconnect_redis import RedisOptions, RedisStore

from kvconnect.protocol import BlockKey
from kvconnect.store import StoreContext
from kvconnect.store.frame import HEADER_BYTES, open_frame, seal_frame
from kvconnect.worker.arena import PAGE_BYTES, Arena

TOTAL, BATCH, ROUNDS = 64 << 20, 8 << 20, 17
TURNS = random.Random(0)  # nobody comes after the same one each time: what the server has just done counts
FINGERPRINT, ORDER = bytes(32), "layer,role,token,head,dim"
LIMITS = {"bare": (0.80, 0.80), "bare+sums": (0.90, 0.90), "redis-py": (4.0, 2.0)}  # put, get


def slots(count: int, size: int) -> list[memoryview]:
    """Return memory for frames of `size` bytes of payload: slots of a worker's arena."""
    room = HEADER_BYTES + size
    arena = Arena(count * (room + PAGE_BYTES), size, pinned=False)
    return [arena.slot(number)[:room] for number in range(count)]


class Blocks:
    """What one thread puts and gets: its keys, slots to send from and slots to receive in."""

    def __init__(self, size: int, count: int) -> None:
        """Make `count` blocks of `size` bytes."""
        self.size = size
        self.keys = [BlockKey(os.urandom(72)) for _ in range(count)]
        self.names = [b"kv:" + key.hex().encode() for key in self.keys]
        self.sent, self.received = slots(count, size), slots(count, size)
        payload = os.urandom(size)
        for slot in self.sent:
            slot[HEADER_BYTES:] = payload

    def batches(self) -> list[range]:
        """Return the numbers of the blocks of each call, as many as the worker would give to one."""
        step = BATCH // self.size
        return [range(first, min(first + step, len(self.keys))) for first in range(0, len(self.keys), step)]

    def seal(self, n: int) -> memoryview:
        """Return a frame."""
        return seal_frame(self.sent[n], self.size, key=self.keys[n], fingerprint=FINGERPRINT, order=ORDER)

    def verify(self, n: int) -> None:
        """Check a frame."""
        open_frame(self.received[n], key=self.keys[n], fingerprint=FINGERPRINT, payload_bytes=self.size)


class Sealed(Sequence[memoryview]):
    """Frames that are sealed when they are taken, as the worker gives them to a store."""

    def __init__(self, blocks: Blocks, numbers: range) -> None:
        """Of some of the blocks."""
        self.blocks, self.numbers = blocks, numbers

    def __len__(self) -> int:
        """Count them."""
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        """Seal one."""
        return self.blocks.seal(self.numbers[index])


class Client(ABC):
    """Puts and gets all blocks of one thread."""

    @abstractmethod
    def put(self, blocks: Blocks) -> None:
        """Send all blocks."""

    @abstractmethod
    def get(self, blocks: Blocks) -> None:
        """Receive all blocks."""


class Ours(Client):
    """The store."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self.store = RedisStore(RedisOptions(host="127.0.0.1", port=port), StoreContext(name="redis", timeout_s=60.0))

    def put(self, blocks: Blocks) -> None:
        """Write."""
        for numbers in blocks.batches():
            assert all(self.store.write([blocks.keys[n] for n in numbers], Sealed(blocks, numbers)))

    def get(self, blocks: Blocks) -> None:
        """Read and verify."""
        for numbers in blocks.batches():

            def verify(index: int, length: int | None, numbers: range = numbers) -> None:
                assert length == HEADER_BYTES + blocks.size
                blocks.verify(numbers[index])

            self.store.read_each([blocks.keys[n] for n in numbers], [blocks.received[n] for n in numbers], verify)


class Bare(Client):
    """RESP over a blocking socket, knowing every length beforehand."""

    def __init__(self, port: int, *, sums: bool) -> None:
        """Connect when a thread comes."""
        self.port, self.sums = port, sums
        self.own = threading.local()

    def socket(self) -> socket.socket:
        """Return the calling thread's socket."""
        if not hasattr(self.own, "socket"):
            self.own.socket = socket.create_connection(("127.0.0.1", self.port))
            self.own.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected: socket.socket = self.own.socket
        return connected

    def put(self, blocks: Blocks) -> None:
        """SET a batch, then read its replies."""
        sock = self.socket()
        for numbers in blocks.batches():
            frames = [blocks.seal(n) if self.sums else blocks.sent[n] for n in numbers]
            parts: list[Any] = []
            for n, frame in zip(numbers, frames, strict=True):
                name = blocks.names[n]
                parts += [b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, len(frame)), frame, b"\r\n"]
            assert sock.sendmsg(parts) == sum(map(len, parts))
            assert sock.recv(5 * len(numbers), socket.MSG_WAITALL) == b"+OK\r\n" * len(numbers)

    def get(self, blocks: Blocks) -> None:
        """GET a batch, then read its replies."""
        sock = self.socket()
        head = b"$%d\r\n" % (HEADER_BYTES + blocks.size)
        for numbers in blocks.batches():
            sock.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$147\r\n%s\r\n" % blocks.names[n] for n in numbers))
            for n in numbers:
                assert sock.recv(len(head), socket.MSG_WAITALL) == head
                sock.recv_into(blocks.received[n], 0, socket.MSG_WAITALL)
                sock.recv(2, socket.MSG_WAITALL)
            for n in numbers if self.sums else ():
                blocks.verify(n)


class RedisPy(Client):
    """As its documentation shows it."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self.client = redis.Redis(host="127.0.0.1", port=port, protocol=2)

    def put(self, blocks: Blocks) -> None:
        """SET each."""
        for name, frame in zip(blocks.names, blocks.sent, strict=True):
            self.client.set(name, frame)

    def get(self, blocks: Blocks) -> None:
        """GET each, and copy it to where it is wanted."""
        for name, buffer in zip(blocks.names, blocks.received, strict=True):
            buffer[:] = self.client.get(name)  # type: ignore[assignment] # bytes: nothing is decoded


def compare(port: int, size: int, threads: int) -> None:
    each = [Blocks(size, TOTAL // size // threads) for _ in range(threads)]
    clients: dict[str, Client] = {
        "ours": Ours(port),
        "bare": Bare(port, sums=False),
        "bare+sums": Bare(port, sums=True),
        "redis-py": RedisPy(port),
    }
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
            print(f"    {kind} {ratio:5.2f} x {name:10} limit {limit:4.2f} {verdict:6} (the bare loop {bare:.2f})")


@contextlib.contextmanager
def running_server() -> Iterator[int]:
    """Run a server that keeps nothing on disk; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        server = subprocess.Popen([*command, "--appendonly", "no"], stdout=subprocess.DEVNULL)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.05)
            yield port
        finally:
            server.kill()
            server.wait()


def main() -> None:
    with running_server() as port:
        for size in (256 << 10, 2 << 20):
            for threads in (1, 2):
                compare(port, size, threads)


if __name__ == "__main__":
    main()
