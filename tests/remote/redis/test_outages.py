"""A server that is killed, stopped, slow or cut off: calls end in time with an error, and come back by themselves."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvconnect_redis import RedisStore

from kvconnect.errors import StoreUnavailable
from tests.remote.faults.load import wait_until
from tests.remote.faults.proxy import Proxy
from tests.remote.faults.redis_server import RedisServer
from tests.remote.redis.conftest import OpenStore
from tests.remote.redis.servers import Doors, Held, open_patiently, open_store
from tests.remote.s3.blocks import frame, key, read, write

BRIEF_S = 0.25
SLACK_S = 1.0  # a busy machine
BACK_S = 5.0
CALLS: dict[str, Callable[[RedisStore], Any]] = {
    "contains": lambda store: store.contains([key(1)]),
    "read": lambda store: read(store, 1),
    "write": lambda store: write(store, 1),
    "write much": lambda store: write(store, 1, size=8 << 20),
    "remove": lambda store: store.remove([key(1)]),
    "scan": lambda store: list(store.scan()),
}


@pytest.fixture
def proxy(server: Doors) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def tls_proxy(server: Doors) -> Iterator[Proxy]:
    with Proxy(server.tls_port) as proxy:
        yield proxy


def proxied(server: Doors, proxy: Proxy) -> str:
    """Return the URL of the server's door that a proxy stands before."""
    if proxy.target == server.tls_port:
        return f"rediss://127.0.0.1:{proxy.port}?ca_file={server.authority.certificate}"
    return f"redis://127.0.0.1:{proxy.port}"


def ends_in_time(call: Callable[[], object], seconds: float = BRIEF_S) -> None:
    """See that a call fails, and does not take longer than it may."""
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        call()
    assert time.monotonic() - started < seconds + SLACK_S


def comes_back(store: RedisStore, number: int = 1) -> None:
    """See that blocks are written and read again, soon."""

    def works() -> bool:
        with contextlib.suppress(StoreUnavailable):
            write(store, number)
            return read(store, number) == [frame(number)]
        return False

    wait_until(works, BACK_S, "a store that works")


@pytest.mark.parametrize("door", ["url", "tls_url", "socket_url"])
@pytest.mark.parametrize("name", CALLS)
def test_connection_that_died_while_idle_is_replaced_unseen(
    server: Doors, opened: OpenStore, door: str, name: str
) -> None:
    store = opened(getattr(server, door))
    write(store, 1)
    server.do("CLIENT", "KILL", "TYPE", "normal")
    CALLS[name](store)


def test_server_killed_and_started_again(own_server: RedisServer, opened: OpenStore) -> None:
    store = opened(f"redis://127.0.0.1:{own_server.port}")
    write(store, 1)
    own_server.kill()
    for call in CALLS.values():
        with pytest.raises(StoreUnavailable, match=str(own_server.port)):
            call(store)
    own_server.start()
    wait_until(lambda: _asks(store), BACK_S, "an answer")
    assert read(store, 1) == [None]
    comes_back(store)


def _asks(store: RedisStore) -> bool:
    with contextlib.suppress(StoreUnavailable):
        store.contains([key(1)])
        return True
    return False


@pytest.mark.parametrize(
    ("door", "name"),
    [("url", name) for name in CALLS]
    + [(door, name) for door in ("tls_url", "socket_url") for name in ("read", "write much")],
)
def test_stopped_server_is_waited_for_no_longer_than_said(
    server: Doors, opened: OpenStore, door: str, name: str
) -> None:
    store = opened(getattr(server, door), brief_s=BRIEF_S)
    comes_back(store)
    server.signal(signal.SIGSTOP)
    try:
        ends_in_time(lambda: CALLS[name](store))
    finally:
        server.signal(signal.SIGCONT)
    comes_back(store)


@pytest.mark.parametrize("door", ["url", "tls_url", "socket_url"])
def test_stopped_server_lets_nobody_in_and_opening_ends_in_time(server: Doors, door: str) -> None:
    server.signal(signal.SIGSTOP)
    try:
        ends_in_time(lambda: open_store(getattr(server, door), timeout_s=BRIEF_S))
    finally:
        server.signal(signal.SIGCONT)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("name", ["read", "write"])
def test_trickle_ends_in_time(
    server: Doors, opened: OpenStore, proxy: Proxy, tls_proxy: Proxy, encrypted: bool, name: str
) -> None:
    """Bytes come all the while, some every few milliseconds: no single one is late."""
    used = tls_proxy if encrypted else proxy
    frames = [
        memoryview(bytes(size)) for size in (4 << 20, 16 << 20)
    ]  # the second: more than the kernel's buffers take
    assert opened(server.url).write([key(1)], frames[:1]) == [True]
    store = opened(proxied(server, used), brief_s=0.6)
    used.rate = 500_000.0
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: store.read([key(1)], [memoryview(bytearray(4 << 20))]),
        "write": lambda: store.write([key(2)], frames[1:]),
    }
    ends_in_time(calls[name], 0.6)
    assert used.num_bytes["down" if name == "read" else "up"] > 30_000
    used.rate = None
    used.cut()
    comes_back(store, 3)


@pytest.mark.parametrize(
    ("encrypted", "place"),
    [(False, 100), (False, 4096), (False, 70_000), (True, 70_000), (True, 900_000)],
    ids=str,
)
def test_reset_within_a_value_is_an_error_and_the_next_call_right(
    server: Doors, opened: OpenStore, proxy: Proxy, tls_proxy: Proxy, encrypted: bool, place: int
) -> None:
    used = tls_proxy if encrypted else proxy
    store = opened(proxied(server, used))
    write(store, 1, 2, size=1 << 20)
    used.reset_after(place, "down")
    with pytest.raises(StoreUnavailable, match=str(used.port)):
        read(store, 1, size=1 << 20)  # of one: a reset before the second is asked for is rightly tried once more
    assert not used.armed
    assert read(store, 2, 1, size=1 << 20) == [frame(2, 1 << 20), frame(1, 1 << 20)]


@pytest.mark.parametrize("place", [100, 70_000, 1_500_000])
def test_what_was_written_in_part_is_not_there(server: Doors, opened: OpenStore, proxy: Proxy, place: int) -> None:
    store = opened(proxied(server, proxy))
    proxy.reset_after(place, "up")
    frames = [memoryview(frame(number, 1 << 20)) for number in (1, 2)]
    with contextlib.suppress(StoreUnavailable):  # it is tried once more: nothing had been answered
        assert store.write([key(1), key(2)], frames) == [True, True]
    assert not proxy.armed
    assert all(server.do("STRLEN", name) == 1 << 20 for name in server.do("KEYS", "*"))
    comes_back(store, 3)


def test_errors_leave_nothing(server: Doors, opened: OpenStore, proxy: Proxy) -> None:
    """Neither connections nor threads, however calls and openings ended."""
    elsewhere = opened(server.url)
    for round_number in range(3):
        if round_number == 1:
            wait_until(lambda: not proxy.num_open, BACK_S, "connections that end")
            before = Held.now()
            clients = server.num_clients()
        elsewhere.write([key(1)], [memoryview(frame(1, 1 << 20))])
        store = open_patiently(proxied(server, proxy), BRIEF_S)
        proxy.reset_after(500_000, "down")
        with pytest.raises(StoreUnavailable):
            read(store, 1, size=1 << 20)
        comes_back(store)
        proxy.hole = True
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                read(store, 1)
        store.close()
        with pytest.raises(StoreUnavailable):
            open_store(proxied(server, proxy), timeout_s=BRIEF_S)
        proxy.hole = False
    wait_until(lambda: not proxy.num_open, BACK_S, "connections that end")
    wait_until(lambda: server.num_clients() <= clients, BACK_S, "clients that leave")
    wait_until(lambda: Held.now() == before, BACK_S, lambda: f"{Held.now()}, {before} before")


def test_server_whose_places_are_taken_is_no_mistake(tmp_path: Path) -> None:
    """It may have room a moment later, so the configuration is not blamed."""
    with RedisServer(tmp_path) as server:
        server.do("CONFIG", "SET", "maxclients", 1)
        url = f"redis://127.0.0.1:{server.port}"
        first = open_store(url)
        with pytest.raises(StoreUnavailable):
            open_store(url, timeout_s=BRIEF_S)
        first.close()
        wait_until(lambda: _opens(url), BACK_S, "a place")


def _opens(url: str) -> bool:
    with contextlib.suppress(StoreUnavailable):
        open_store(url).close()
        return True
    return False
