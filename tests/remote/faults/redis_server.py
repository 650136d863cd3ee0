"""A redis-server for the faults: what is done to it, and what it says of its clients. Its own connections are short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

import redis

from tests.remote.faults.forge import is_frame
from tests.remote.faults.load import wait_until
from tests.remote.processes import Server, free_ports, needs_program

__all__ = ["RedisCluster", "RedisServer"]

_SLOTS: Final = 16_384
_START_S: Final = 30.0


class RedisServer(Server):
    """Keeps everything in memory, nothing on disk: a restart begins empty.

    Attributes:
        port: On loopback.
        bus: Where nodes of a cluster talk to one another.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        """Start it.

        Args:
            folder: Where its files go.
            arguments: More of the command line.
        """
        needs_program("redis-server")
        self.port, self.bus = free_ports(2)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "no", "--cluster-port", str(self.bus), *arguments]
        super().__init__(command, folder / f"redis-{self.port}.log", self._answers)

    def do(self, *command: Any) -> Any:
        """Run one command on a connection of its own."""
        with self._client() as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]

    def num_clients(self) -> int:
        """Count connections, without the one that asks."""
        return sum(b"cmd=client|list" not in line for line in self.do("CLIENT", "LIST").splitlines())

    def frames(self) -> dict[bytes, bytes]:
        """Return every value that looks like a frame, by its name in Redis."""
        with self._client() as client:
            names = cast(list[bytes], client.keys("*"))
            values = [cast(bytes | None, client.get(name)) for name in names]  # in a cluster there is no MGET
        return {name: value for name, value in zip(names, values, strict=True) if value and is_frame(value)}

    def rewrite(self, forge: Callable[[Sequence[bytes], int], bytes]) -> int:
        """Put something else in place of every frame; return how many.

        Args:
            forge: Given all frames and the number of one of them, returns what is put in its place.
        """
        found = self.frames()
        frames = list(found.values())
        with self._client() as client:
            for number, name in enumerate(found):
                client.set(name, forge(frames, number), xx=True)
        return len(frames)

    def migrate(self, slot: int, other: RedisServer) -> None:
        """Hand one slot over to another node of the cluster, key by key, as `redis-cli --cluster reshard` does."""
        mine, others = self.node_id, other.node_id
        other.do("CLUSTER", "SETSLOT", slot, "IMPORTING", mine)
        self.do("CLUSTER", "SETSLOT", slot, "MIGRATING", others)
        while keys := self.do("CLUSTER", "GETKEYSINSLOT", slot, 10):
            for key in keys:  # one by one: a slot is half here and half there for longer
                self.do("MIGRATE", "127.0.0.1", other.port, key, 0, 5000)
        for node in (other, self):
            node.do("CLUSTER", "SETSLOT", slot, "NODE", others)

    @property
    def node_id(self) -> str:
        """Its name in the cluster."""
        return cast(bytes, self.do("CLUSTER", "MYID")).decode()

    def _answers(self) -> bool:
        with contextlib.suppress(redis.exceptions.RedisError), self._client() as client:
            return bool(client.ping())
        return False

    @contextlib.contextmanager
    def _client(self) -> Iterator[redis.Redis]:
        client = redis.Redis(port=self.port, socket_timeout=5.0)
        try:
            yield client
        finally:
            client.close()


class RedisCluster:
    """Nodes that share the slots, each with one replica or none; a node that is started again is who it was.

    Attributes:
        masters: Those that have slots at first.
        replicas: Of the masters, in their order; empty if there are none.
    """

    def __init__(self, folder: Path, masters: int, *, replicated: bool = False, covers_all: bool = False) -> None:
        """Start it and wait until every node knows every other.

        Args:
            folder: Where its files go.
            masters: How many.
            replicated: Whether each has a replica.
            covers_all: Whether nobody answers while a slot has no node.
        """
        self._nodes: list[RedisServer] = []
        try:
            for _ in range(masters * (2 if replicated else 1)):
                self._nodes.append(self._node(folder, covers_all))
            self.masters, self.replicas = self._nodes[:masters], self._nodes[masters:]
            self._join()
        except BaseException:
            self.kill()
            raise

    def settled(self) -> bool:
        """Whether every node that runs says that all slots are served."""
        return all(b"cluster_state:ok" in node.do("CLUSTER", "INFO") for node in self._nodes if node.running)

    def kill(self) -> None:
        """Kill every node."""
        for node in self._nodes:
            node.kill()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill every node."""
        self.kill()

    def _node(self, folder: Path, covers_all: bool) -> RedisServer:
        own = folder / f"node-{len(self._nodes)}"
        own.mkdir()
        coverage = "yes" if covers_all else "no"
        arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"]
        return RedisServer(own, *arguments, "--cluster-require-full-coverage", coverage)

    def _join(self) -> None:
        first, *others = self._nodes
        for number, node in enumerate(self.masters):
            share = _SLOTS / len(self.masters)
            node.do("CLUSTER", "ADDSLOTSRANGE", round(number * share), round((number + 1) * share) - 1)
            node.do("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in others:
            node.do("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus)
        everybody = b"cluster_known_nodes:%d\r" % len(self._nodes)
        wait_until(
            lambda: all(everybody in node.do("CLUSTER", "INFO") for node in self._nodes), _START_S, "nodes that know"
        )
        for master, replica in zip(self.masters, self.replicas, strict=False):
            wait_until(lambda: _accepted(replica, master.node_id), _START_S, "a replica")  # noqa: B023 - called at once
            wait_until(
                lambda: replica.do("INFO", "replication")["master_link_status"] == "up",  # noqa: B023 - called at once
                _START_S,
                "a replica that has what its master has",
            )
        wait_until(self.settled, _START_S, "a cluster")


def _accepted(replica: RedisServer, master: str) -> bool:
    try:
        return bool(replica.do("CLUSTER", "REPLICATE", master))
    except redis.exceptions.ResponseError:  # it has not heard of its master yet
        return False
