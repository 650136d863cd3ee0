"""One connection to one server: commands out, replies in, everything under a deadline. Knows no keys and no stores.

Speaks RESP2 on the socket itself: a block goes from the caller's memory into the kernel and back without a copy.
Nothing that comes in is trusted: what does not follow the protocol ends the connection.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvconnect.errors import StoreUnavailable

__all__ = ["MOST_PARTS", "Late", "Lost", "Refusal", "Refused", "Reply", "Wire", "command"]

MOST_PARTS = 1024  # of one sendmsg: IOV_MAX
_PEEK = 4096  # a reply's line must fit; what came of a body with its line is copied, the rest is not
_SLACK = 0.98  # a socket's timeout stays while it is within this of the time that is left: setting it is a system call
_DRAIN = 64 << 10
_LONGEST_TEXT = 4096  # of a string in a nested reply: addresses, cursors, names of keys
_MOST_ITEMS = 1 << 17  # of a nested reply: all slots of a cluster, each on its own
_DEEPEST = 6
_KINDS = b"+-:$*"
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
        self._armed = math.inf  # the time left below which the socket's timeout is set anew
        self._send_armed = math.inf
        if not self._encrypted:
            sock.settimeout(None)

    def begin(self, deadline: float) -> None:
        """Start a conversation that must end before `deadline` of `time.monotonic`."""
        self._deadline = deadline
        left = deadline - time.monotonic()
        self._armed = _if_near(self._armed, left)
        self._send_armed = _if_near(self._send_armed, left)
        self.answered = False
        if self._start != self._end:
            raise Lost(f"{self.where} spoke without being asked")

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all parts, in order, without copying them.

        Args:
            parts: At most `MOST_PARTS`.

        Raises:
            StoreUnavailable: If the deadline passes, or the connection is lost.
        """
        if self._deadline - time.monotonic() < self._send_armed:
            count = self._send_some(parts)
        else:  # nearly always. Short ways count here: after half a MiB all of this has left the caches, too
            try:
                count = self._sock.sendmsg(parts)
            except OSError as error:
                raise self._late_or_lost(error) from error
        if count != sum(map(len, parts)):
            self._send_rest(list(parts), count)

    def _send_rest(self, left: list[bytes | memoryview], count: int) -> None:
        """Send what comes after the first `count` bytes."""
        while True:
            first = 0
            for part in left:
                if count < len(part):
                    break
                count -= len(part)
                first += 1
            left = left[first:]
            if not left:
                return
            left[0] = memoryview(left[0])[count:]
            count = self._send_some(left)

    def accept(self, replies: bytes) -> bool:
        """Wait for as many bytes with one system call, and take them if they are these; else leave them to be read."""
        if self._start != self._end or self._deadline - time.monotonic() < self._armed:
            missing = len(replies) - (self._end - self._start)
            if missing > 0:
                self._more(missing, socket.MSG_WAITALL)
        else:  # nearly always
            try:
                self._end = self._sock.recv_into(self._memory, len(replies), socket.MSG_WAITALL)
            except OSError as error:
                raise self._late_or_lost(error) from error
            self._start = 0
            self._arrived(self._end)
        if not self._memory.startswith(replies, self._start, self._end):
            return False
        self._start += len(replies)
        return True

    def reply_into(self, buffer: memoryview) -> int | Refusal | None:
        """Read a string into `buffer`.

        Returns:
            Its length; None if there is none, or it is longer than `buffer`.
        """
        room = len(buffer)
        full = b"$%d\r\n" % room  # the line that announces a full buffer; then the body follows
        line_bytes = len(full)
        length: int | None = room
        if self._memory.startswith(full, self._start, self._end):  # nearly always: it came with the last one's end
            self._start += line_bytes
            if self._start == self._end and self._deadline - time.monotonic() >= self._armed:
                self._start = self._end = 0
                try:
                    here = self._sock.recv_into(buffer, 0, socket.MSG_WAITALL)
                    if here == room and self._deadline - time.monotonic() >= self._armed:
                        self._end = self._sock.recv_into(self._memory, 2 + line_bytes)
                except OSError as error:
                    raise self._late_or_lost(error) from error
                self.answered = True
                if here < room:
                    self._arrived(here)
                    self._fill(buffer[here:])
                self._line_end(line_bytes)
                return room
        else:
            line = self._line(line_bytes)
            if line[:1] == b"-":
                return _refusal(line)
            if line[:1] != b"$":
                raise self._garbled("no string where one was asked for")
            length = self._length(line)
        if length is None:
            return None
        if length > room:
            self._drain(length + 2)
            return None
        here = min(length, self._end - self._start)
        if here:
            buffer[:here] = self._view[self._start : self._start + here]
            self._start += here
        if here < length:
            self._fill(buffer[here:length])
        self._line_end(line_bytes)
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
        line = self._line(_PEEK)
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return _refusal(line)
        if kind == b":":
            return self._number(line)
        if kind not in (b"*", b"$"):
            raise self._garbled("a reply of an unknown kind")
        length = self._length(line)
        if length is None:
            return None
        if kind == b"*":
            if length > budget[0]:
                raise self._garbled("a reply without end")
            return [self._nested(depth - 1, budget) for _ in range(length)]
        if length > _LONGEST_TEXT:
            self._drain(length + 2)
            return None
        text = bytearray(length)
        here = min(length, self._end - self._start)
        text[:here] = self._view[self._start : self._start + here]
        self._start += here
        self._fill(memoryview(text)[here:])
        self._line_end(_PEEK)
        return bytes(text)

    def _line(self, most: int) -> bytes:
        """Read a line, receiving at most `most` bytes: little more than it where a body follows."""
        while True:
            end = self._memory.find(_CRLF, self._start, self._end)
            if end >= 0:
                line = bytes(self._view[self._start : end])
                self._start = end + 2
                return line
            if self._start < self._end and self._memory[self._start] not in _KINDS:
                raise self._garbled("a reply of an unknown kind")  # perhaps without an end
            self._more(max(1, most - (self._end - self._start)))

    def _more(self, most: int, flags: int = 0) -> None:
        """Receive some bytes behind those that are there, at most `most`."""
        if self._start:
            kept = self._end - self._start
            if kept:
                self._memory[:kept] = self._memory[self._start : self._end]
            self._start, self._end = 0, kept
        if self._end == _PEEK:
            raise self._garbled("a line that is too long")
        self._end += self._receive(self._view[self._end : self._end + most], flags)

    def _length(self, line: bytes) -> int | None:
        if line[1:] == b"-1":
            return None
        value = self._number(line)
        if value < 0:
            raise self._garbled("a negative length")
        return value

    def _number(self, line: bytes) -> int:
        if not line[1:].removeprefix(b"-").isdigit() or len(line) > 20:
            raise self._garbled("no number where one was due")
        return int(line[1:])

    def _line_end(self, most: int) -> None:
        """Read the end of a string, and of what follows at most `most` bytes: the next line comes with it."""
        while self._end - self._start < 2:
            self._more(2 + most)
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
            count -= self._receive(waste[: min(count, _DRAIN)], 0)

    def _fill(self, view: memoryview) -> None:
        """Receive until `view` is full: on plain sockets with one system call, without the interpreter's lock."""
        while len(view):
            view = view[self._receive(view, socket.MSG_WAITALL) :]

    def _receive(self, view: memoryview, flags: int) -> int:
        left = self._time_left()
        try:
            if self._encrypted:
                self._sock.settimeout(left)
                count = self._sock.recv_into(view)
            else:
                if left < self._armed:
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(left))
                    self._armed = left * _SLACK
                count = self._sock.recv_into(view, 0, flags)
        except OSError as error:
            raise self._late_or_lost(error) from error
        self._arrived(count)
        return count

    def _arrived(self, count: int) -> None:
        if not count:
            raise Lost(f"{self.where} closed the connection")
        self.answered = True

    def _send_some(self, parts: Sequence[bytes | memoryview]) -> int:
        left = self._time_left()
        try:
            if self._encrypted:
                self._sock.settimeout(left)
                return self._sock.send(parts[0])
            if self._blocking_send:
                if left < self._send_armed:
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(left))
                    self._send_armed = left * _SLACK
                return self._sock.sendmsg(parts)
            self._sock.settimeout(left)
            try:
                return self._sock.sendmsg(parts)
            finally:
                self._sock.settimeout(None)
        except OSError as error:
            raise self._late_or_lost(error) from error

    def _time_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> Late:
        return Late(f"{self.where} did not answer in time")

    def _late_or_lost(self, error: OSError) -> Late | Lost:
        if isinstance(error, (BlockingIOError, TimeoutError)):
            return self._late()
        return Lost(f"the connection to {self.where} is lost: {type(error).__name__}")

    def _garbled(self, what: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self.where} does not follow the protocol: {what}")


def _if_near(armed: float, left: float) -> float:
    """Return `armed` if the timeout that was set with it still does for what is left, else infinity."""
    return armed if armed <= left <= armed / _SLACK**2 else math.inf


def _timeval(seconds: float) -> bytes:
    """Pack seconds for SO_RCVTIMEO and SO_SNDTIMEO: 0 would mean for ever."""
    micros = max(1, int(seconds * 1e6))
    return struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)


def _refusal(line: bytes) -> Refusal:
    word, _, rest = line[1:].partition(b" ")
    shown = word.decode("ascii", "replace") if word.isalpha() and word.isupper() and len(word) <= 32 else "an error"
    return Refusal(shown, rest)
