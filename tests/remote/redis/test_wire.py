"""A server that does not speak the protocol: an error in time, little memory, and the connection is closed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
from kvconnect_redis import RedisStore
from kvconnect_redis.wire import Late, Wire

from kvconnect.errors import StoreUnavailable
from tests.remote.redis.conftest import OpenStore
from tests.remote.s3.blocks import key, read

TIMEOUT_S = 0.5
MOST_BYTES = 1 << 20  # that an answer may take of memory, beside the caller's


class Babbler:
    """Answers every EXISTS properly and anything else with what it was told: no real server can be made to say such.

    Attributes:
        port: On loopback.
        says: What it answers; repeated without end if `endless`.
        num_closed: Connections that its clients have closed.
    """

    def __init__(self) -> None:
        """Listen."""
        self.says = b""
        self.endless = False
        self.num_opened = self.num_closed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve)]

    def __enter__(self) -> Self:
        """Start."""
        self._threads[0].start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop; clients must have gone."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.num_opened += 1
                self._threads.append(threading.Thread(target=self._talk, args=(client,)))
                self._threads[-1].start()

    def _talk(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while asked := client.recv(1 << 16):
                if b"EXISTS" in asked and not self.says:
                    client.sendall(b":0\r\n" * asked.count(b"EXISTS"))
                elif b"CLIENT" in asked:
                    client.sendall(b"+OK\r\n")
                else:
                    client.sendall(self.says)
                    while self.endless:
                        client.sendall(self.says * (65_536 // len(self.says)))
        self.num_closed += 1


@pytest.fixture
def babbler() -> Iterator[Babbler]:
    with Babbler() as started:
        yield started


@pytest.fixture
def store(babbler: Babbler, opened: OpenStore) -> RedisStore:
    return opened(f"redis://127.0.0.1:{babbler.port}", brief_s=TIMEOUT_S)


RUBBISH = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "nothing but zeros": bytes(5000),
    "a length that is no number": b"$12x\r\nhello\r\n",
    "a length with spaces": b"$ 5\r\nhello\r\n",
    "a length that is negative": b"$-5\r\nhello\r\n",
    "a length in other digits": "$\u0665\r\nhello\r\n".encode(),
    "a length of 40 digits": b"$" + b"9" * 40 + b"\r\n",
    "a length of 8 EiB": b"$9223372036854775807\r\nhello\r\n",
    "a string that is longer than it says": b"$3\r\nhello\r\n",
    "a list of 8 Ei": b"*9223372036854775807\r\n",
    "a list of 8 Ei, of lists": b"*9223372036854775807\r\n" * 50,
    "lists in lists": b"*1\r\n" * 100_000,
    "a kind of a later protocol": b"%1\r\n$1\r\na\r\n$1\r\nb\r\n",
    "a line without end": b"+" + b"a" * 100_000,
    "an error without end": b"-" + b"E" * 100_000,
    "half an answer": b"$500",
    "silence": b"\r",
}
CALLS: dict[str, Callable[[RedisStore], Any]] = {
    "read": lambda store: read(store, 1, 2, size=64),
    "contains": lambda store: store.contains([key(1), key(2)]),
    "write": lambda store: store.write([key(1)], [memoryview(b"frame")]),
    "scan": lambda store: list(store.scan()),
}


def fails_well(babbler: Babbler, store: RedisStore, call: Callable[[RedisStore], Any]) -> str:
    """See that a call raises in time, without much memory, and that the connection is closed; return what it says."""
    tracemalloc.start()
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=str(babbler.port)) as raised:
            call(store)
        assert time.monotonic() - started < TIMEOUT_S + 1.0
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES + 4 * len(babbler.says)
    finally:
        tracemalloc.stop()
    deadline = time.monotonic() + 5
    while babbler.num_closed < babbler.num_opened:
        assert time.monotonic() < deadline, "the connection stays open"
        time.sleep(0.005)
    return str(raised.value)


@pytest.mark.parametrize("what", RUBBISH)
def test_rubbish_is_an_error_and_ends_the_connection(babbler: Babbler, opened: OpenStore, what: str) -> None:
    """Whatever was asked; by the next call the server may have come to its senses."""
    for name, call in CALLS.items():
        babbler.says = b""
        store = opened(f"redis://127.0.0.1:{babbler.port}", brief_s=0.2)
        babbler.says = RUBBISH[what]
        said = fails_well(babbler, store, call)
        assert len(said) < 300, (name, said)
        store.close()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("says", [b"*3\r\n", b"$9223372036854775807\r\n" + b"a" * 32_000, b"+" + b"a" * 32_000])
def test_stream_without_end_is_an_error_and_ends_the_connection(
    babbler: Babbler, store: RedisStore, says: bytes, name: str
) -> None:
    babbler.says = says
    babbler.endless = True
    try:
        fails_well(babbler, store, CALLS[name])
    finally:
        babbler.endless = False


def test_answers_that_nobody_asked_for_are_not_taken_for_the_next(babbler: Babbler, store: RedisStore) -> None:
    """What is left of one call would be another key's value in the next."""
    babbler.says = b"$5\r\nfirst\r\n$5\r\nstray\r\n"
    assert read(store, 1, size=64) == [b"first"]
    for _ in range(2):
        babbler.says = b"$4\r\nnext\r\n"
        with contextlib.suppress(StoreUnavailable):
            assert read(store, 1, size=64) == [b"next"]


def test_value_that_takes_most_of_the_time_leaves_its_end_only_the_rest() -> None:
    """By halves: a system call each for a value and its end, each with a timeout of its own."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(ours, "a server", ours.close)
        started = time.monotonic()
        wire.begin(started + 1.0)
        theirs.sendall(b"$5\r\nfirst\r\n$5\r\n")  # with the next one's line, as when more was asked for
        buffer = memoryview(bytearray(5))
        assert wire.reply_into(buffer) == 5
        timer = threading.Timer(0.8, theirs.sendall, (b"value",))
        timer.start()
        with pytest.raises(Late):
            wire.reply_into(buffer)
        assert time.monotonic() - started < 1.5
        assert bytes(buffer) == b"value"
        timer.join()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_refusal_among_answers_concerns_its_key_alone(babbler: Babbler, store: RedisStore, bad: int) -> None:
    answers = [b"+OK\r\n"] * 3
    answers[bad] = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    babbler.says = b"".join(answers)
    taken = store.write([key(number) for number in range(3)], [memoryview(b"frame")] * 3)
    assert list(taken) == [number != bad for number in range(3)]


def test_what_the_server_quotes_is_not_repeated(babbler: Babbler, store: RedisStore) -> None:
    babbler.says = b"-ERR unknown command, with args beginning with: hunter2\r\n"
    with pytest.raises(StoreUnavailable, match="GET with ERR") as raised:
        read(store, 1, size=64)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "says",
    [
        b"*0\r\n",
        b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$4\r\nhost\r\n:99999999\r\n",
        b"*1\r\n*3\r\n:5\r\n:99999\r\n*2\r\n$9\r\n127.0.0.1\r\n:7000\r\n",
        b"*1\r\n*3\r\n:9\r\n:1\r\n*2\r\n$9\r\n127.0.0.1\r\n:7000\r\n",
        b"*1\r\n:5\r\n",
        b":5\r\n",
        b"$-1\r\n",
    ],
)
def test_slots_that_make_no_sense_are_an_error(babbler: Babbler, opened: OpenStore, says: bytes) -> None:
    babbler.says = says
    with pytest.raises(StoreUnavailable, match=f"{babbler.port} (does not follow the protocol|is in a cluster whose)"):
        opened(f"redis+cluster://127.0.0.1:{babbler.port}", timeout_s=TIMEOUT_S)
