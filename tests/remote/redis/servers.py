"""Redis servers for tests: one with every way in, a cluster of three, and a peer that speaks rubbish."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvconnect_redis import RedisOptions, RedisStore

from kvconnect.options import convert_options
from kvconnect.protocol import BlockKey
from kvconnect.store import StoreContext
from tests.remote.processes import Server, free_ports, listens

__all__ = [
    "PASSWORD",
    "RIGHTS",
    "USER",
    "Cluster",
    "Redis",
    "Rubbish",
    "certificates",
    "eventually",
    "frame",
    "key",
    "name_of",
    "open_store",
    "read",
    "redis_client",
]

USER = "kv"
PASSWORD = "s3cret-pass"
# All that the store needs; in a cluster also +cluster|slots +asking.
RIGHTS = "resetkeys ~kv* -@all +get +set +exists +unlink +scan +select +client|setname"


def key(number: int) -> BlockKey:
    return BlockKey(random.Random(number).randbytes(72))


def frame(number: int, size: int = 5000) -> memoryview:
    return memoryview(random.Random(-number - 1).randbytes(size))


def name_of(number: int, prefix: str = "kv:") -> bytes:
    """What the server calls the key."""
    return prefix.encode() + key(number).hex().encode()


def open_store(options: dict[str, Any], *, name: str = "redis", timeout_s: float = 10.0) -> RedisStore:
    return RedisStore(convert_options(name, options, RedisOptions), StoreContext(name=name, timeout_s=timeout_s))


def read(store: RedisStore, *numbers: int, size: int = 8192) -> list[bytes | None]:
    buffers = [memoryview(bytearray(size)) for _ in numbers]
    lengths = store.read([key(n) for n in numbers], buffers)
    return [None if n is None else bytes(buffer[:n]) for n, buffer in zip(lengths, buffers, strict=True)]


def eventually(true: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait until something is so; errors count as not yet."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(Exception):
            if true():
                return
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def redis_client(port: int) -> Any:
    import redis

    return redis.Redis(host="127.0.0.1", port=port, protocol=2)


class Redis:
    """One server process, and redis-py for looking into it.

    Attributes:
        port: For TCP.
        server: The process.
        client: Of redis-py, with all rights.
    """

    def __init__(self, folder: Path, *arguments: str, port: int | None = None) -> None:
        self.port = free_ports(1)[0] if port is None else port
        folder.mkdir(exist_ok=True)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self.server = Server([*command, *arguments], folder / "log", lambda: listens(self.port))
        self.client = redis_client(self.port)
        self.options: dict[str, Any] = {"host": "127.0.0.1", "port": self.port}

    @property
    def connections(self) -> int:
        """How many connections of stores it has."""
        return sum(each["name"] == "kvconnect" for each in self.client.client_list())

    def __enter__(self) -> Redis:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.server.kill()


class Cluster:
    """Three nodes without replicas, which go on when one is lost."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Start them; `stack` ends them."""
        extra = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"]
        extra += ["--cluster-config-file", "nodes.conf", "--appendonly", "no"]
        self.nodes = [stack.enter_context(Redis(folder / str(port), *extra, port=port)) for port in free_ports(3)]
        addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
        create = ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", "0", "--cluster-yes"]
        subprocess.run(create, check=True, capture_output=True, timeout=60)
        eventually(self.whole)
        self.options: dict[str, Any] = {"host": "127.0.0.1", "port": self.nodes[0].port}

    def whole(self) -> bool:
        """Whether every node sees every slot served by a living node."""
        return all(
            node.client.cluster("INFO")["cluster_state"] == "ok"
            and node.client.cluster("INFO")["cluster_slots_ok"] == "16384"
            for node in self.nodes
        )

    def owner(self, number: int) -> Redis:
        """The node that has a key's slot, by the first node's word."""
        slot = self.slot(number)
        for first, last, (_, port, *_), *_ in self.nodes[0].client.execute_command("CLUSTER SLOTS", parse=False):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise LookupError(slot)

    def slot(self, number: int) -> int:
        """The slot of a key, by a node's word."""
        return int(self.nodes[0].client.execute_command("CLUSTER KEYSLOT", name_of(number)))


class Rubbish:
    """A peer on loopback that says what it is told to, whatever it is asked: no real server sends malformed replies.

    Attributes:
        answer: Sent for whatever comes in; a server that has no keys to begin with.
        pause_s: If not 0, byte by byte with that between them.
    """

    def __init__(self) -> None:
        self.answer = b":0\r\n"
        self.pause_s = 0.0
        self.accepted = 0
        self._peers: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.options: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self._listener.getsockname()[1],
            "client_name": "",  # there is no handshake to get right then
        }

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._peers.append(peer)
            self._threads.append(threading.Thread(target=self._serve, args=(peer,)))
            self._threads[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            while peer.recv(1 << 20):
                if not self.pause_s:
                    peer.sendall(self.answer)
                    continue
                for byte in self.answer:
                    peer.sendall(bytes([byte]))
                    if self._stopped.wait(self.pause_s):
                        return

    def __enter__(self) -> Rubbish:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


def certificates(folder: Path) -> dict[str, str]:
    """Make an authority and a certificate for 127.0.0.1 that it has signed; return their files."""
    files = {each: str(folder / f"{each}.pem") for each in ("ca", "ca_key", "cert", "key", "request")}
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    extensions = folder / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    signed = ["-CA", files["ca"], "-CAkey", files["ca_key"], "-CAcreateserial", "-extfile", str(extensions)]
    for command in (
        ["req", "-x509", *new_key, "-keyout", files["ca_key"], "-out", files["ca"], "-days", "2", "-subj", "/CN=tests"],
        ["req", *new_key, "-keyout", files["key"], "-out", files["request"], "-subj", "/CN=127.0.0.1"],
        ["x509", "-req", "-in", files["request"], *signed, "-out", files["cert"], "-days", "2"],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True, timeout=60)
    return files
