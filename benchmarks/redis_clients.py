"""Who the Redis benchmarks compare, what they move, and a server for them."""

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvconnect_redis import RedisOptions, RedisStore

from kvconnect.protocol import BlockKey
from kvconnect.store import StoreContext
from kvconnect.store.frame import HEADER_BYTES, open_frame, seal_frame
from kvconnect.worker.arena import PAGE_BYTES, Arena

TOTAL, BATCH = 64 << 20, 8 << 20
FINGERPRINT, ORDER = bytes(32), "layer,role,token,head,dim"


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

    def __init__(self, port: int, *, cluster: bool = False) -> None:
        """Connect."""
        options = RedisOptions(host="127.0.0.1", port=port, cluster=cluster)
        self.store = RedisStore(options, StoreContext(name="redis", timeout_s=60.0))

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
    """RESP over blocking sockets, knowing every length, and who has which key, beforehand."""

    def __init__(self, port_of: Callable[[bytes], int], *, sums: bool) -> None:
        """Connect when a thread comes.

        Args:
            port_of: Says which server has a key.
            sums: Whether to seal and verify.
        """
        self.port_of, self.sums = port_of, sums
        self.own = threading.local()

    def connection(self, port: int) -> socket.socket:
        """Return the calling thread's socket to a server."""
        sockets: dict[int, socket.socket] = self.own.__dict__.setdefault("sockets", {})
        if port not in sockets:
            sockets[port] = socket.create_connection(("127.0.0.1", port))
            sockets[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sockets[port]

    def split(self, blocks: Blocks) -> Iterator[tuple[socket.socket, list[int]]]:
        """Yield each batch, server by server."""
        for numbers in blocks.batches():
            parts: dict[int, list[int]] = {}
            for n in numbers:
                parts.setdefault(self.port_of(blocks.names[n]), []).append(n)
            for port, part in parts.items():
                yield self.connection(port), part

    def put(self, blocks: Blocks) -> None:
        """SET a batch, then read its replies."""
        for sock, numbers in self.split(blocks):
            frames = [blocks.seal(n) if self.sums else blocks.sent[n] for n in numbers]
            parts: list[Any] = []
            for n, frame in zip(numbers, frames, strict=True):
                name = blocks.names[n]
                parts += [b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, len(frame)), frame, b"\r\n"]
            assert sock.sendmsg(parts) == sum(map(len, parts))
            assert sock.recv(5 * len(numbers), socket.MSG_WAITALL) == b"+OK\r\n" * len(numbers)

    def get(self, blocks: Blocks) -> None:
        """GET a batch, then read its replies."""
        head = b"$%d\r\n" % (HEADER_BYTES + blocks.size)
        for sock, numbers in self.split(blocks):
            sock.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$147\r\n%s\r\n" % blocks.names[n] for n in numbers))
            for n in numbers:
                assert sock.recv(len(head), socket.MSG_WAITALL) == head
                sock.recv_into(blocks.received[n], 0, socket.MSG_WAITALL)
                sock.recv(2, socket.MSG_WAITALL)
            for n in numbers if self.sums else ():
                blocks.verify(n)


class RedisPy(Client):
    """redis-py as its documentation shows it, with hiredis: a command a block."""

    def __init__(self, client: Any) -> None:
        """Use a `redis.Redis` or a `redis.RedisCluster`."""
        self.client = client

    def put(self, blocks: Blocks) -> None:
        """SET each."""
        for name, frame in zip(blocks.names, blocks.sent, strict=True):
            self.client.set(name, frame)

    def get(self, blocks: Blocks) -> None:
        """GET each, and copy it to where it is wanted."""
        for name, buffer in zip(blocks.names, blocks.received, strict=True):
            buffer[:] = self.client.get(name)


class RedisPyBatched(RedisPy):
    """redis-py's pipelines: as many blocks in a call as a store is given."""

    def put(self, blocks: Blocks) -> None:
        """SET a batch."""
        for numbers in blocks.batches():
            with self.client.pipeline(transaction=False) as pipeline:
                for n in numbers:
                    pipeline.set(blocks.names[n], blocks.sent[n])
                assert all(pipeline.execute())

    def get(self, blocks: Blocks) -> None:
        """GET a batch, and copy each block to where it is wanted."""
        for numbers in blocks.batches():
            with self.client.pipeline(transaction=False) as pipeline:
                for n in numbers:
                    pipeline.get(blocks.names[n])
                for n, value in zip(numbers, pipeline.execute(), strict=True):
                    blocks.received[n][:] = value


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
