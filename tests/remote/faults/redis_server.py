"""A redis-server for the faults: what is done to it, and what it says of its clients. Its own connections are short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import redis

from tests.remote.faults.forge import is_frame
from tests.remote.processes import Server, free_ports, needs_program

__all__ = ["RedisServer"]


class RedisServer(Server):
    """Keeps everything in memory, nothing on disk: a restart begins empty.

    Attributes:
        port: On loopback.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        """Start it.

        Args:
            folder: Where its files go.
            arguments: More of the command line.
        """
        needs_program("redis-server")
        (self.port,) = free_ports(1)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "no", *arguments]
        super().__init__(command, folder / f"redis-{self.port}.log", self._answers)

    def do(self, *command: Any) -> Any:
        """Run one command on a connection of its own."""
        with self._client() as client:
            return client.execute_command(*command)

    def num_clients(self) -> int:
        """Count connections, without the one that asks."""
        return sum(b"cmd=client|list" not in line for line in self.do("CLIENT", "LIST").splitlines())

    def frames(self) -> dict[bytes, bytes]:
        """Return every value that looks like a frame, by its name in Redis."""
        with self._client() as client:
            names = cast(list[bytes], client.keys("*"))
            values = cast(list[bytes | None], client.mget(names)) if names else []
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
