"""Which server has which key: one has all, or a cluster is asked, and what its nodes refuse is learnt from."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvconnect.errors import ConfigError, StoreUnavailable
from kvconnect_redis.nodes import Node
from kvconnect_redis.settings import Settings
from kvconnect_redis.wire import Refusal, Refused, Wire, command

__all__ = ["Route", "Topology"]

_SLOTS = 16_384
_MOST_NODES = 1000
_REFRESH_S = 1.0  # at most that often, however many keys have moved
_REFRESH_SHARE = 0.25  # of a call's time: what is known may do
_ASKED = 3  # nodes that are asked for the slots, one after the other
_WHO_HAS_WHAT = command(b"CLUSTER", b"SLOTS")


class Route(NamedTuple):
    """Where to send a command.

    Attributes:
        node: The server.
        asking: It is about to take the key's slot over, and answers only if told that it is known.
    """

    node: Node
    asking: bool = False


class Topology:
    """The servers and their slots. Thread-safe."""

    def __init__(self, settings: Settings, most_idle: int) -> None:
        """Know the configured server only; `learn` tells of the others.

        Args:
            settings: How to connect.
            most_idle: See `Node`.
        """
        self.clustered = settings.cluster
        self._settings = settings
        self._most_idle = most_idle
        self._lock = threading.Lock()
        self._learning = threading.Lock()
        self._seed = Node(settings, settings.host, settings.port, most_idle)
        self._nodes = {(settings.host, settings.port): self._seed}
        self._slots: list[Node | None] = [None] * _SLOTS
        self._stale = False
        self._next_refresh = 0.0
        self._closed = False

    @property
    def seed(self) -> Node:
        """The configured server."""
        return self._seed

    @property
    def is_away(self) -> bool:
        """Whether no server that has keys answered when it was last asked."""
        return all(node.away for node in self.owners())

    def owners(self) -> list[Node]:
        """Return the servers that have keys."""
        if not self.clustered:
            return [self._seed]
        with self._lock:
            return list(dict.fromkeys(node for node in self._slots if node is not None))

    def split(self, keys: Sequence[bytes]) -> tuple[Mapping[Route, Sequence[int]], Sequence[int]]:
        """Return which of the keys, by their places, each server has, and those whose slot nobody has."""
        if not self.clustered:
            return {Route(self._seed): range(len(keys))} if keys else {}, ()
        from redis.crc import key_slot

        found: dict[Node | None, list[int]] = {}
        for place, key in enumerate(keys):
            found.setdefault(self._slots[key_slot(key)], []).append(place)
        nobody = found.pop(None, [])
        return {Route(node): places for node, places in found.items() if node is not None}, nobody

    def follow(self, refusal: Refusal, node: Node) -> Route | None:
        """Return where `node` sends a key with MOVED or ASK; None if it does not, or that cannot be read."""
        if refusal.word not in ("MOVED", "ASK"):
            self._stale = True  # CLUSTERDOWN, READONLY, ...: somebody else may have the slot by now
            return None
        if not self.clustered:
            return None
        try:
            number, address = refusal.rest.decode("ascii").split(" ")
            host, port = address.rsplit(":", 1)
            slot = int(number)
            found = self._node(host.strip("[]") or node.host, int(port))
        except ValueError:
            return None
        if found is None or not 0 <= slot < _SLOTS:
            return None
        if refusal.word == "ASK":
            return Route(found, asking=True)
        with self._lock:
            self._slots[slot] = found
        self._stale = True
        return Route(found)

    def suspect(self) -> None:
        """Note that what is known may be out of date."""
        self._stale = True

    def refresh(self, deadline: float) -> None:
        """Ask again who has what, if there is a reason and the last time was long ago; failing is fine."""
        if not self.clustered or not self._stale or time.monotonic() < self._next_refresh:
            return
        if not self._learning.acquire(blocking=False):
            return  # another thread does, and what is known will do meanwhile
        try:
            self._next_refresh = time.monotonic() + _REFRESH_S * (1 + random.random())
            now = time.monotonic()
            self.learn(now + (deadline - now) * _REFRESH_SHARE)
        except StoreUnavailable:
            pass
        finally:
            self._learning.release()

    def learn(self, deadline: float) -> None:
        """Ask the cluster's nodes who has what.

        Raises:
            StoreUnavailable: If none of those asked could say.
        """
        with self._lock:
            known = [node for node in self._nodes.values() if node is not self._seed]
        random.shuffle(known)
        asked = sorted([self._seed, *known], key=lambda node: node.resting)[:_ASKED]
        failed: StoreUnavailable | None = None
        for number, node in enumerate(asked):
            now = time.monotonic()
            try:
                self._take_over(node, node.talk(now + (deadline - now) / (len(asked) - number), _who_has_what))
                return
            except StoreUnavailable as error:
                failed = failed or error
        assert failed is not None, "the seed is always asked"
        raise failed

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def _take_over(self, source: Node, ranges: Any) -> None:
        """Make an answer to CLUSTER SLOTS what is known.

        Raises:
            StoreUnavailable: If it is none, or says that nobody has any slot.
        """
        slots: list[Node | None] = [None] * _SLOTS
        try:
            for first, last, (host, port, *_), *_ in ranges:
                if host == b"?":
                    continue  # the node does not know that one's name
                name = source.host if host in (None, b"") else host.decode("ascii")
                node = self._node(name, port)
                if not 0 <= first <= last < _SLOTS or node is None:
                    raise ValueError
                slots[first : last + 1] = [node] * (last + 1 - first)
        except (TypeError, ValueError, AttributeError) as error:
            raise StoreUnavailable(f"{source.where} does not follow the protocol: no list of slots") from error
        used = set(slots)
        if used == {None}:
            raise StoreUnavailable(f"{source.where} is in a cluster whose slots nobody has")
        with self._lock:
            self._slots = slots
            self._stale = None in used
            gone = [place for place, node in self._nodes.items() if node not in used and node is not self._seed]
            left = [self._nodes.pop(place) for place in gone]
        for node in left:
            node.close()

    def _node(self, host: str, port: int) -> Node | None:
        """Return the server at an address; None if that is none, or there are too many."""
        if not host or not isinstance(port, int) or not 0 < port <= 65_535:
            return None
        with self._lock:
            found = self._nodes.get((host, port))
            if found is None and not self._closed and len(self._nodes) < _MOST_NODES:
                found = self._nodes[host, port] = Node(self._settings, host, port, self._most_idle)
            return found


def _who_has_what(wire: Wire) -> Any:
    wire.send([_WHO_HAS_WHAT])
    answer = wire.reply()
    if isinstance(answer, Refusal):
        if b"cluster support disabled" in answer.rest:
            raise ConfigError(f"{wire.where} is not in a cluster; write redis:// or rediss://, without cluster=true")
        raise Refused(wire.where, "CLUSTER SLOTS", answer)
    return answer
