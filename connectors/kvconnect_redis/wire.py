"""One connection to one server: commands out, replies in, everything under a deadline. Knows no keys and no stores.

Speaks RESP2 on the socket itself: a block goes from the caller's memory into the kernel and back without a copy.
Nothing that comes in is trusted: what does not follow the protocol ends the connection.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvconnect.errors import StoreUnavailable

__all__ = ["Late", "Lost", "Refusal", "Refused", "Reply", "Wire", "command"]

_PEEK = 4096  # a reply's line must fit; what came of a body with its line is copied, the rest is not
_MOST_PARTS = 1000  # of one sendmsg; IOV_MAX is 1024
_DRAIN = 64 << 10
_LONGEST_TEXT = 4096  # of a string in a nested reply: addresses, cursors, names of keys
_MOST_ITEMS = 1 << 17  # of a nested reply: all slots of a cluster, each on its own
_DEEPEST = 6
_CRLF = b"\r\n"


class Late(StoreUnavailable):
    """The deadline has passed."""


class Lost(StoreUnavailable):
    """The connection is closed; the server may be there."""


class Refusal(NamedTuple):
    """An error that the server answers: its code, such as ``OOM``, and the rest, which may quote what was sent."""

    word: str
    rest: bytes


class Refused(StoreUnavailable):
    """The server refuses what it was asked.

    Attributes:
        refusal: What it said. Its code is in the message, the rest is not: that may hold secrets.
        command: What it was asked.
    """

    def __init__(self, where: str, command: str, refusal: Refusal) -> None:
        """Name the server, the command and the code."""
        super().__init__(f"{where} refuses {command} with {refusal.word}")
        self.command = command
        self.refusal = refusal


Reply = bytes | int | Refusal | list[Any] | None


def command(*words: bytes) -> bytes:
    """Return a command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Wire:
    """A connected socket, used by one thread at a time.

    After any exception the replies are out of step: close it.

    Attributes:
        where: The server, for messages.
        answered: Whether anything came since `begin`.
    """

    def __init__(self, sock: socket.socket, where: str, close: Callable[[], None]) -> None:
        """Take over a connected socket, on which no reply is outstanding.

        Args:
            sock: Plain or TLS.
            where: The server, for messages.
            close: Closes it.
        """
        self.where = where
        self.answered = False
        self._sock = sock
        self._close = close
        self._encrypted = isinstance(sock, ssl.SSLSocket)
        # A blocking send on a Unix socket waits anew for each 32 KiB that the kernel takes: a reader who trickles would
        # stretch it. TCP counts the whole call.
        self._blocking_send = sock.family != socket.AF_UNIX
        self._memory = bytearray(_PEEK)
        self._view = memoryview(self._memory)
        self._start = self._end = 0
        self._deadline = 0.0
        if not self._encrypted:
            sock.settimeout(None)

    def begin(self, deadline: float) -> None:
        """Start a conversation that must end before `deadline` of `time.monotonic`."""
        self._deadline = deadline
        self.answered = False
        if self._start != self._end:
            raise Lost(f"{self.where} spoke without being asked")

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all parts, in order, without copying them.

        Raises:
            StoreUnavailable: If the deadline passes, or the connection is lost.
        """
        left = list(parts)
        first = 0
        while first < len(left):
            batch = left[first : first + _MOST_PARTS]
            count = self._send_some(batch)
            for part in batch:
                if count < len(part):
                    break
                count -= len(part)
                first += 1
            if count:
                left[first] = memoryview(left[first])[count:]

    def reply_into(self, buffer: memoryview) -> int | Refusal | None:
        """Read a string into `buffer`.

        Returns:
            Its length; None if there is none, or it is longer than `buffer`.
        """
        kind, rest = self._line()
        if kind == b"-":
            return _refusal(rest)
        if kind != b"$":
            raise self._garbled("no string where one was asked for")
        length = self._length(rest)
        if length is None:
            return None
        if length > len(buffer):
            self._drain(length + 2)
            return None
        here = min(length, self._end - self._start)
        buffer[:here] = self._view[self._start : self._start + here]
        self._start += here
        if here < length:
            self._start = self._end = 0
            self._fill([buffer[here:length], self._view[:2]])
            self._end = 2
        self._line_end()
        return length

    def reply(self) -> Reply:
        """Read any reply: short strings, numbers, lists of them. A string that is too long for that is None."""
        return self._nested(_DEEPEST, [_MOST_ITEMS])

    def close(self) -> None:
        """Close the connection; twice is fine."""
        self._close()

    def _nested(self, depth: int, budget: list[int]) -> Reply:
        budget[0] -= 1
        if depth < 0 or budget[0] < 0:
            raise self._garbled("a reply without end")
        kind, rest = self._line()
        if kind == b"+":
            return rest
        if kind == b"-":
            return _refusal(rest)
        if kind == b":":
            return self._number(rest)
        if kind == b"*":
            count = self._length(rest)
            return None if count is None else [self._nested(depth - 1, budget) for _ in range(count)]
        if kind != b"$":
            raise self._garbled("a reply of an unknown kind")
        length = self._length(rest)
        if length is None:
            return None
        if length > _LONGEST_TEXT:
            self._drain(length + 2)
            return None
        text = bytearray(length)
        here = min(length, self._end - self._start)
        text[:here] = self._view[self._start : self._start + here]
        self._start += here
        if here < length:
            self._fill([memoryview(text)[here:]])
        while self._end - self._start < 2:
            self._more()
        self._line_end()
        return bytes(text)

    def _line(self) -> tuple[bytes, bytes]:
        """Read a line; return its first byte and the rest."""
        while True:
            end = self._memory.find(_CRLF, self._start, self._end)
            if end >= 0:
                line = bytes(self._view[self._start : end])
                self._start = end + 2
                return line[:1], line[1:]
            self._more()

    def _more(self) -> None:
        """Receive some bytes behind those that are there."""
        if self._start:
            kept = self._end - self._start
            self._memory[:kept] = self._memory[self._start : self._end]
            self._start, self._end = 0, kept
        if self._end == _PEEK:
            raise self._garbled("a line that is too long")
        self._end += self._receive([self._view[self._end :]], 0)

    def _length(self, digits: bytes) -> int | None:
        if digits == b"-1":
            return None
        value = self._number(digits)
        if value < 0:
            raise self._garbled("a negative length")
        return value

    def _number(self, digits: bytes) -> int:
        if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
            raise self._garbled("no number where one was due")
        return int(digits)

    def _line_end(self) -> None:
        while self._end - self._start < 2:
            self._more()
        if self._view[self._start : self._start + 2] != _CRLF:
            raise self._garbled("a string of another length than it says")
        self._start += 2

    def _drain(self, count: int) -> None:
        """Read `count` bytes and forget them."""
        here = min(count, self._end - self._start)
        self._start += here
        count -= here
        waste = memoryview(bytearray(min(count, _DRAIN)))
        while count:
            count -= self._receive([waste[: min(count, _DRAIN)]], 0)

    def _fill(self, views: list[memoryview]) -> None:
        """Receive until all views are full."""
        while views:
            count = self._receive(views, socket.MSG_WAITALL)
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _receive(self, views: list[memoryview], flags: int) -> int:
        left = self._time_left()
        try:
            if self._encrypted:
                self._sock.settimeout(left)
                count = self._sock.recv_into(views[0])
            else:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(left))
                count = self._sock.recvmsg_into(views, 0, flags)[0]
        except (BlockingIOError, TimeoutError) as error:
            raise self._late() from error
        except OSError as error:
            raise self._lost(error) from error
        if not count:
            raise Lost(f"{self.where} closed the connection")
        self.answered = True
        return count

    def _send_some(self, parts: list[bytes | memoryview]) -> int:
        left = self._time_left()
        try:
            if self._encrypted:
                self._sock.settimeout(left)
                return self._sock.send(parts[0])
            if self._blocking_send:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(left))
                return self._sock.sendmsg(parts)
            self._sock.settimeout(left)
            try:
                return self._sock.sendmsg(parts)
            finally:
                self._sock.settimeout(None)
        except (BlockingIOError, TimeoutError) as error:
            raise self._late() from error
        except OSError as error:
            raise self._lost(error) from error

    def _time_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> Late:
        return Late(f"{self.where} did not answer in time")

    def _lost(self, error: OSError) -> Lost:
        return Lost(f"the connection to {self.where} is lost: {type(error).__name__}")

    def _garbled(self, what: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self.where} does not follow the protocol: {what}")


def _timeval(seconds: float) -> bytes:
    """Pack seconds for SO_RCVTIMEO and SO_SNDTIMEO: 0 would mean for ever."""
    micros = max(1, int(seconds * 1e6))
    return struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)


def _refusal(line: bytes) -> Refusal:
    word, _, rest = line.partition(b" ")
    shown = word.decode("ascii", "replace") if word.isalpha() and word.isupper() and len(word) <= 32 else "an error"
    return Refusal(shown, rest)
