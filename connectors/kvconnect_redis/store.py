"""A block store in Redis or Valkey: a key a block, one server or a cluster of them, shared by everybody who knows it.

A key is the prefix and the block key in hex; its value is the frame. The server may evict what it likes. What it does
not have, and what it cannot be asked for, is a miss.
"""

from __future__ import annotations

import os
import time
from binascii import hexlify
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from kvconnect.errors import ConfigError, StoreUnavailable
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, StoreCapabilities, StoreContext
from kvconnect_redis.cluster import Route, Topology
from kvconnect_redis.commands import Command, Exists, Get, Set, Unlink, bulk
from kvconnect_redis.nodes import Node, Untrusted
from kvconnect_redis.settings import RedisOptions, Settings, read_settings
from kvconnect_redis.wire import Refusal, Refused, Wire, command

__all__ = ["RedisOptions", "RedisStore"]

_DEADLINE = 0.9  # of the tier's timeout: an answer just in time is worth more than one that nobody awaits any more
_KEY_BYTES = 72
_MOST_ROUNDS = 5  # of keys that have moved while we looked for them
_PROBES = 16  # a node with half of a cluster's slots passes for a single server once in 65,536 times
_SCAN_COUNT = b"1000"
_OF_ONE_KEY = ("OOM", "WRONGTYPE")  # refusals that are an answer: no room for it; something else has its name
# At start these are mistakes in the configuration; later they are outages. ERR: no such database, no password needed.
_MISCONFIGURED = {
    "WRONGPASS": "check user and password",
    "NOAUTH": "give a user or a password",
    "NOPERM": "let the user do GET, SET, EXISTS, UNLINK and SCAN on keys that begin with the prefix",
    "DENIED": "protected mode lets nobody in from another machine without a password",
    "MOVED": "it is in a cluster: write redis+cluster:// or cluster=true",
    "ERR": "check db, user and password",
}
_FULL = b"max number of clients reached"


class RedisStore(BlockStore):
    """A Redis or Valkey server, or a cluster of them, used by any number of processes at once."""

    Options = RedisOptions
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(shared=True, scans=True, concurrency=2)

    def __init__(self, options: RedisOptions, context: StoreContext) -> None:
        """Connect, so that a mistake in the configuration is found now.

        Raises:
            ConfigError: If options contradict one another, or the server lets nobody in as configured.
            StoreUnavailable: If there is no server.
        """
        settings = read_settings(options, context.name)
        self._prefix = settings.prefix
        self._ttl = b"" if not settings.ttl_ms else b"$2\r\nPX\r\n" + bulk(b"%d" % settings.ttl_ms)
        self._timeout_s = context.timeout_s * _DEADLINE
        self._pid = os.getpid()
        self._closed = False
        self._topology = Topology(settings, most_idle=self.capabilities.concurrency)
        try:
            self._open(settings)
        except BaseException:
            self._topology.close()
            raise

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Ask for each key whether it exists; those of a node that is away do not."""
        return [answer == 1 for answer in self._settled(keys, Exists(self._names(keys)))]

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        """Receive each value in its buffer; those of a node that is away are misses."""
        lengths: list[int | None] = [None] * len(keys)
        RedisStore.read_each(self, keys, buffers, lengths.__setitem__)  # a subclass' may call this
        return lengths

    def read_each(
        self,
        keys: Sequence[BlockKey],
        buffers: Sequence[memoryview],
        arrived: Callable[[int, int | None], None],
    ) -> None:
        """Receive each value in its buffer, and tell of it while the server sends the next; of misses at last."""
        asked = Get(self._names(keys), buffers, arrived)
        self._settled(keys, asked)
        for index in range(len(keys)):
            if index not in asked.arrived:
                arrived(index, None)

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        """Send each frame; False if the server has no memory left for it, or is away."""
        answers = self._settled(keys, Set(self._names(keys), frames, self._ttl))
        return [answer == b"OK" for answer in answers]

    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Unlink each key.

        Raises:
            StoreUnavailable: If some could not be: they may still be there.
        """
        for answer in self._ask(Unlink(self._names(keys))):
            if isinstance(answer, StoreUnavailable):
                raise answer

    def scan(self) -> Iterator[BlockKey]:
        """Yield what is there, page by page, each page under a deadline of its own.

        Raises:
            StoreUnavailable: If a node does not answer.
        """
        self._check_usable()
        self._topology.refresh(self._deadline())
        seen: set[BlockKey] = set()  # a server that grows its table while it is scanned names keys twice
        for node in self._topology.owners():
            cursor = b"0"
            while True:
                cursor, names = self._scan_page(node, cursor)
                for name in names:
                    key = self._block_key(name)
                    if key is not None and key not in seen:
                        seen.add(key)
                        yield key
                if cursor == b"0":
                    break

    def close(self) -> None:
        """Close every connection; the server keeps what it has."""
        self._closed = True
        self._topology.close()

    def _open(self, settings: Settings) -> None:
        """Look for keys that are not there: it shows the password, the permissions and the kind of server.

        A node of a cluster that is taken for a single server refuses most of them, though not each.
        """
        try:
            if settings.cluster:
                self._topology.learn(self._deadline())
            keys = [BlockKey(bytes([number]) * _KEY_BYTES) for number in range(_PROBES)]
            self.contains(keys)
        except Refused as error:
            way = _MISCONFIGURED.get(error.refusal.word)
            if way is None or error.refusal.rest == _FULL:
                raise
            raise ConfigError(f"{error}; {way}") from None
        except Untrusted as error:
            raise ConfigError(f"{error}; give the certificate of who signed it as ca_file=") from None

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreUnavailable("this store is closed")
        if os.getpid() != self._pid:
            raise StoreUnavailable("this store was opened before a fork, in another process; open one in each")

    def _names(self, keys: Sequence[BlockKey]) -> list[bytes]:
        return [self._prefix + hexlify(key) for key in keys]

    def _block_key(self, name: Any) -> BlockKey | None:
        """Return the block key that a name stands for; None if it is somebody else's."""
        if not isinstance(name, bytes) or len(name) != len(self._prefix) + 2 * _KEY_BYTES:
            return None
        digits = name[len(self._prefix) :]
        try:
            key = BlockKey(bytes.fromhex(digits.decode("ascii")))
        except ValueError:
            return None
        return key if self._names([key]) == [name] else None

    def _scan_page(self, node: Node, cursor: bytes) -> tuple[bytes, list[Any]]:
        self._check_usable()
        pattern = b"".join(b"\\" + bytes([c]) if c in b"*?[]\\" else bytes([c]) for c in self._prefix) + b"*"
        asked = command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _SCAN_COUNT)

        def converse(wire: Wire) -> Any:
            wire.send([asked])
            return wire.reply()

        answer = node.talk(self._deadline(), converse)
        if isinstance(answer, Refusal):
            raise Refused(node.where, "SCAN", answer)
        match answer:
            case [bytes() as following, list() as names]:
                return following, names
        raise StoreUnavailable(f"{node.where} does not follow the protocol: no page of keys")

    def _settled(self, keys: Sequence[BlockKey], asked: Command) -> list[Any]:
        """Ask, and raise if nobody answered; in a cluster, what some nodes did not is a miss.

        A node that is lost must not look like an outage: calls for its keys alone would keep the others from being
        asked.
        """
        answers = self._ask(asked)
        errors = [answer for answer in answers if isinstance(answer, StoreUnavailable)]
        if not errors:
            return answers
        if self._topology.clustered:
            refused = any(isinstance(error, Refused) for error in errors)
            if len(errors) < len(keys) or not (refused or self._topology.is_away):
                return answers
        raise errors[0]

    def _ask(self, asked: Command) -> list[Any]:
        """Ask every key's server.

        Returns:
            Its answer for each key: a `StoreUnavailable` where there is none, a `Refusal` that concerns this key alone.
        """
        self._check_usable()
        deadline = self._deadline()
        self._topology.refresh(deadline)
        answers: list[Any] = [None] * len(asked.names)
        todo, nobody = self._topology.split(asked.names)
        for number in nobody:
            self._topology.suspect()
            answers[number] = StoreUnavailable("no node of the cluster has the key's slot")
        for _ in range(_MOST_ROUNDS):
            todo = self._round(asked, todo, answers, deadline)
            if not todo:
                break
            self._topology.refresh(deadline)
        return answers

    def _round(
        self, asked: Command, todo: Mapping[Route, Sequence[int]], answers: list[Any], deadline: float
    ) -> Mapping[Route, Sequence[int]]:
        """Ask each server for its keys, and return those that are somewhere else."""
        elsewhere: dict[Route, list[int]] = {}
        for done, (route, numbers) in enumerate(todo.items()):
            # a node that does not answer leaves the others their part of the time
            now = time.monotonic()
            until = now + (deadline - now) / (len(todo) - done)
            try:
                found = route.node.talk(until, partial(asked.converse, numbers=numbers, asking=route.asking))
            except StoreUnavailable as error:
                self._topology.suspect()
                found = [error] * len(numbers)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
                if isinstance(answer, Refusal) and answer.word not in _OF_ONE_KEY:
                    answers[number] = Refused(route.node.where, asked.name, answer)
                    following = self._topology.follow(answer, route.node)
                    if following is not None:
                        elsewhere.setdefault(following, []).append(number)
        return elsewhere
