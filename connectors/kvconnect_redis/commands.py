"""One command for many keys, pipelined: what is sent when, and how much is under way. Knows no servers.

Repeating a command changes nothing, so a conversation that was cut off may be held again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from kvconnect_redis.wire import MOST_PARTS, Wire, command

__all__ = ["Command", "Exists", "Get", "Set", "Unlink", "bulk"]

# More is sent while no more than this is under way.
# Of GET, as little as keeps both sides busy: what a server has copied for us is then still in its caches when it sends
# it. With 256 KiB blocks on two threads that was 1.5 times as fast as 4 MiB; less was a tenth slower where one thread
# and the server had to wake each other.
_GET_FLYING_BYTES = 384 << 10
# Of SET, what the kernel's buffers hold: the server must have something to do while the next group is sealed. With
# 1 MiB under way it and two threads waited for one another for a fifth of the time. Three blocks of 256 KiB are sent at
# a time, sealed just before: what has left a core's L2 is sent more slowly. Where that has 1 MiB, groups of 1 MiB are a
# tenth slower; fewer blocks cost more turns of the interpreter than they save.
_SET_FLYING_BYTES = 3 << 20
_SET_GROUP_BYTES = 768 << 10
_FLYING_LEAST = 2  # blocks, however large: one that the server works on, one that comes or goes
_FLYING_MOST = MOST_PARTS // 4  # keys; each has up to four parts
_ASKING = command(b"ASKING")


class _Group(NamedTuple):
    """What is sent at a time.

    Attributes:
        parts: The bytes.
        num_keys: How many keys.
        num_bytes: About how many bytes they move.
    """

    parts: list[bytes | memoryview]
    num_keys: int
    num_bytes: int


class Command(ABC):
    """One command for many keys.

    Attributes:
        name: What the server calls it.
        names: The keys, as the server knows them.
        group_bytes: How much is sent at a time.
        flying_bytes: How much may be under way when more is sent.
        all_well: The reply for a key for which all is well, if that is always the same and none is shorter.
    """

    name: ClassVar[str]
    group_bytes: ClassVar[int] = 1 << 20
    flying_bytes: ClassVar[int] = 0
    all_well: ClassVar[bytes] = b""

    def __init__(self, names: list[bytes]) -> None:
        """Of these keys."""
        self.names = names

    @abstractmethod
    def request(self, number: int) -> tuple[int, tuple[bytes | memoryview, ...]]:
        """Return about how many bytes one key moves, and what is sent for it."""

    def converse(self, wire: Wire, numbers: Sequence[int], *, asking: bool) -> list[Any]:
        """Ask for some of the keys, by their numbers, and return the answers.

        Args:
            wire: A connection to who has them.
            numbers: Of the keys.
            asking: Whether each must be told that it is known where it is.
        """
        answers: list[Any] = []
        sent: deque[tuple[int, int]] = deque()
        waiting = flying = 0  # keys, and bytes, of what is not answered
        bound = self.flying_bytes
        for parts, num_keys, num_bytes in self._groups(numbers, asking=asking):  # made while those before it are sent
            while waiting >= _FLYING_LEAST and (flying > bound or waiting > _FLYING_MOST):
                count, weight = sent.popleft()
                answers += self._answers(wire, count, asking=asking)
                waiting -= count
                flying -= weight
            wire.send(parts)
            sent.append((num_keys, num_bytes))
            waiting += num_keys
            flying += num_bytes
        for count, _ in sent:
            answers += self._answers(wire, count, asking=asking)
        return answers

    def _answers(self, wire: Wire, count: int, *, asking: bool) -> list[Any]:
        well = self.all_well
        if well and not asking and wire.accept(well * count):
            return [well[1:-2]] * count
        answers = []
        for _ in range(count):
            if asking:
                wire.reply()
            answers.append(wire.reply())
        return answers

    def _groups(self, numbers: Sequence[int], *, asking: bool) -> Iterator[_Group]:
        parts: list[bytes | memoryview] = []
        count = weight = 0
        for number in numbers:
            moved, request = self.request(number)
            if asking:
                parts.append(_ASKING)
            parts += request
            count += 1
            weight += moved
            if weight >= self.group_bytes or count == _FLYING_MOST:
                yield _Group(parts, count, weight)
                parts, count, weight = [], 0, 0
        if count:
            yield _Group(parts, count, weight)


class Exists(Command):
    """Is it there?"""

    name = "EXISTS"

    def request(self, number: int) -> tuple[int, tuple[bytes]]:
        """See `Command`."""
        return 0, (command(b"EXISTS", self.names[number]),)


class Unlink(Command):
    """Away with it."""

    name = "UNLINK"

    def request(self, number: int) -> tuple[int, tuple[bytes]]:
        """See `Command`."""
        return 0, (command(b"UNLINK", self.names[number]),)


class Get(Command):
    """Values, each received in its buffer and told of while the server sends the next.

    Attributes:
        arrived: What was told of: it stays what it is if the server is lost before the rest has come.
    """

    name = "GET"
    group_bytes = flying_bytes = _GET_FLYING_BYTES

    def __init__(
        self, names: list[bytes], buffers: Sequence[memoryview], arrived: Callable[[int, int | None], None]
    ) -> None:
        """Receive in `buffers`, and tell `arrived` of each value, by its number, and its length."""
        super().__init__(names)
        self.arrived: set[int] = set()
        self._buffers = buffers
        self._tell = arrived

    def request(self, number: int) -> tuple[int, tuple[bytes]]:
        """See `Command`."""
        return len(self._buffers[number]), (b"*2\r\n$3\r\nGET\r\n" + bulk(self.names[number]),)

    def converse(self, wire: Wire, numbers: Sequence[int], *, asking: bool) -> list[Any]:
        """See `Command`; more is asked for after each answer, before anybody looks at that."""
        answers: list[Any] = []
        waiting = flying = 0
        bound = self.flying_bytes
        groups = self._groups(numbers, asking=asking)
        group = next(groups, None)
        before: int | None = None
        for number in numbers:
            while group and (waiting < _FLYING_LEAST or (flying <= bound and waiting <= _FLYING_MOST)):
                wire.send(group.parts)
                waiting += group.num_keys
                flying += group.num_bytes
                group = next(groups, None)
            if before is not None:
                self._look_at(before, answers[-1])
            if asking:
                wire.reply()
            buffer = self._buffers[number]
            answers.append(wire.reply_into(buffer))
            waiting -= 1
            flying -= len(buffer)
            before = number
        if before is not None:
            self._look_at(before, answers[-1])
        return answers

    def _look_at(self, number: int, answer: Any) -> None:
        if isinstance(answer, int):
            self.arrived.add(number)
            self._tell(number, answer)


class Set(Command):
    """Values, each taken from its sequence when it is about to be sent."""

    name = "SET"
    group_bytes = _SET_GROUP_BYTES
    flying_bytes = _SET_FLYING_BYTES
    all_well = b"+OK\r\n"

    def __init__(self, names: list[bytes], frames: Sequence[memoryview], ttl: bytes) -> None:
        """Send `frames`.

        Args:
            names: The keys.
            frames: Their values.
            ttl: The words, as they are sent, that say when a key expires; empty for never.
        """
        super().__init__(names)
        self._frames = frames
        self._words = 5 if ttl else 3
        self._tail = b"\r\n" + ttl

    def request(self, number: int) -> tuple[int, tuple[bytes | memoryview, ...]]:
        """See `Command`."""
        name, frame = self.names[number], self._frames[number]
        head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (self._words, len(name), name, len(frame))
        return len(frame), (head, frame, self._tail)


def bulk(text: bytes) -> bytes:
    """Return a word of a command as it is sent."""
    return b"$%d\r\n%s\r\n" % (len(text), text)
