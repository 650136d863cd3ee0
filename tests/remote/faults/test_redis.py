"""Redis dies, stops, refuses, forgets, crawls or lies under a steady load: no wrong token, no late answer, no leak.

Every test looks at each answer (`Load.step`), sees that hits come back by themselves, and what is held at rest.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.remote.faults import forge
from tests.remote.faults.conftest import OpenLoad
from tests.remote.faults.load import Load, WrongTokens, wait_until
from tests.remote.faults.proxy import Direction, Proxy
from tests.remote.faults.redis_server import RedisServer

BACK_S = 10.0  # hits are back that soon after a fault is over: a probe every 6 s, a timeout, and work
SECRET = "0123456789abcdef0123456789abcdef"
FRAME = 16640  # bytes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    with server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def url(port: int, query: str = "") -> str:
    return f"redis://127.0.0.1:{port}{query}"


@pytest.mark.parametrize("options", [{}, {"async_load": True}, {"async_scheduling": True}], ids=str)
def test_killed_and_started_again(server: RedisServer, open_load: OpenLoad, options: dict[str, Any]) -> None:
    """Three times over, with memory that does not grow."""
    load = open_load(url(server.port), **options)
    load.warm()
    before = load.rest()
    clients = len(before.threads)
    resident = []
    for _ in range(3):
        failures = load.num_failures
        load.run_into_promotion()
        server.kill()
        load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")  # noqa: B023 - called at once
        load.run_for(1.0)
        server.start()
        load.hits_come_back(BACK_S)
        load.rests_as(before)
        resident.append(load.rest().rss)
    assert server.num_clients() <= clients
    assert resident[-1] - resident[0] < 4 << 20, resident


def test_stopped_for_twenty_seconds(server: RedisServer, open_load: OpenLoad) -> None:
    load = open_load(url(server.port))
    load.warm()
    before = load.rest()
    clients = len(before.threads)
    load.run_into_promotion()
    server.signal(signal.SIGSTOP)
    try:
        answers = load.run_for(20.0)
    finally:
        server.signal(signal.SIGCONT)
    assert load.num_failures
    assert len(answers) > 60, "the load came to a stop with the store"
    load.hits_come_back(BACK_S)
    load.rests_as(before)
    assert server.num_clients() <= clients


@pytest.mark.parametrize("direction", ["down", "up"])
def test_connection_reset_within_a_value(
    server: RedisServer, proxy: Proxy, open_load: OpenLoad, direction: Direction
) -> None:
    """Wherever in a frame, read or written; what was written in part is not there."""
    load = open_load(url(proxy.port), connection_sockets=3)
    load.warm()
    before = load.rest()
    for number, place in enumerate([1, 100, 300, FRAME // 2, FRAME, FRAME + 300, 3 * FRAME]):
        failures = load.num_failures
        if direction == "up":
            server.do("FLUSHALL")  # so that there is something to write
        else:
            load.run_into_promotion()
        proxy.reset_after(place, direction)
        load.run_until(lambda: not proxy.armed, BACK_S, "a reset")
        assert proxy.num_resets == number + 1
        load.hits_come_back(BACK_S)
        assert load.num_failures - failures < 100, load.failures
    assert {len(frame) for frame in server.frames().values()} == {FRAME}
    load.rests_as(before)


def test_every_connection_reset_again_and_again(proxy: Proxy, open_load: OpenLoad) -> None:
    load = open_load(url(proxy.port), connection_sockets=3)
    load.warm()
    before = load.rest()
    for _ in range(20):
        load.run(3)
        proxy.cut()
    load.hits_come_back(BACK_S)
    load.rests_as(before)
    assert proxy.num_resets >= 20


def test_password_changed(server: RedisServer, open_load: OpenLoad, caplog: pytest.LogCaptureFixture) -> None:
    """Refused until the password is what it was; it is never told."""
    server.do("ACL", "SETUSER", "worker", "on", ">pa55word", "~*", "+@all")
    load = open_load(f"redis://worker:pa55word@127.0.0.1:{server.port}")
    load.warm()
    before = load.rest()
    failures = load.num_failures
    load.run_into_promotion()
    server.do("ACL", "SETUSER", "worker", "resetpass", ">another")
    assert server.do("CLIENT", "KILL", "USER", "worker")
    load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")
    promoted = load.promoted
    load.run_for(2.0)
    assert load.promoted == promoted
    server.do("ACL", "SETUSER", "worker", "resetpass", ">pa55word")
    load.hits_come_back(BACK_S)
    load.rests_as(before)
    assert "redis" in caplog.text
    assert "pa55word" not in caplog.text


def test_full_and_evicting_nothing(server: RedisServer, open_load: OpenLoad) -> None:
    """What is there is read all the while; what finds no room is computed, and kept once there is room again."""
    load = open_load(url(server.port))
    load.warm()
    before = load.rest()
    server.do("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", 1)
    stored = server.do("DBSIZE")
    other = load.another(1)
    other.run(20)
    other.rest()
    load.hits_come_back(BACK_S)
    assert server.do("DBSIZE") == stored
    other.rest()
    server.do("CONFIG", "SET", "maxmemory", 0)
    other.run_until(lambda: server.do("DBSIZE") > stored, BACK_S, "a block written")
    other.hits_come_back(BACK_S)
    other.rests_as(before)


def test_flushed(server: RedisServer, open_load: OpenLoad) -> None:
    """Beliefs about what was there cost a miss each, not hits for ever."""
    load = open_load(url(server.port))
    load.warm()
    before = load.rest()
    for _ in range(5):
        load.run_into_promotion()
        server.do("FLUSHALL")
        load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_slow_link(proxy: Proxy, open_load: OpenLoad) -> None:
    """200 KB/s both ways: a request's blocks alone take half a second."""
    load = open_load(url(proxy.port), connection_sockets=3)
    load.warm()
    before = load.rest()
    proxy.rate = 200_000.0
    load.run_for(6.0)
    proxy.rate = None
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_long_link(proxy: Proxy, open_load: OpenLoad) -> None:
    """0.1 s each way: slower, and hits all the same."""
    load = open_load(url(proxy.port), connection_sockets=3)
    load.warm()
    before = load.rest()
    proxy.latency_s = 0.1
    load.hits_come_back(BACK_S)
    load.run_for(3.0)
    load.hits_come_back(BACK_S)
    proxy.latency_s = 0.0
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_link_that_swallows_everything(server: RedisServer, proxy: Proxy, open_load: OpenLoad) -> None:
    load = open_load(url(proxy.port), connection_sockets=3)
    load.warm()
    before = load.rest()
    clients = len(before.threads)
    for _ in range(2):
        failures = load.num_failures
        load.run_into_promotion()
        proxy.hole = True
        load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")  # noqa: B023 - called at once
        load.run_for(3.0)
        proxy.hole = False
        load.hits_come_back(BACK_S)
        load.rests_as(before)
    wait_until(
        lambda: server.num_clients() <= clients, 5.0, lambda: f"{server.num_clients()} clients, {clients} before"
    )


Forge = Callable[[Sequence[bytes], int], bytes]


def other(frames: Sequence[bytes], number: int) -> bytes:
    return frames[number - 1]


def other_renamed(frames: Sequence[bytes], number: int) -> bytes:
    return forge.renamed(other(frames, number), forge.key_of(frames[number]))


def broken(frames: Sequence[bytes], number: int) -> bytes:
    return forge.negated(frames[number])


DAMAGE: dict[str, Forge] = {
    "empty": lambda frames, n: b"",
    "half a header": lambda frames, n: frames[n][:100],
    "a header": lambda frames, n: frames[n][:256],
    "half a payload": lambda frames, n: frames[n][: FRAME // 2],
    "a byte less": lambda frames, n: frames[n][:-1],
    "a byte more": lambda frames, n: frames[n] + b"\0",
    "a megabyte more": lambda frames, n: frames[n] + bytes(1 << 20),
    "another block": other,
    "another payload": lambda frames, n: frames[n][:256] + forge.payload_of(other(frames, n)),
    "changed payload": broken,
}
FORGERIES: dict[str, Forge] = {
    "another payload": lambda frames, n: forge.plain(other_renamed(frames, n)),
    "changed payload": lambda frames, n: forge.plain(broken(frames, n)),
}
KEYED_FORGERIES: dict[str, Forge] = {
    **FORGERIES,
    "another payload, its tag": lambda frames, n: forge.keyed(other_renamed(frames, n), None),
    "changed payload, old tag": lambda frames, n: forge.keyed(broken(frames, n), None),
    "changed payload, no tag": lambda frames, n: forge.keyed(forge.plain(broken(frames, n)), None),
    "changed payload, tag of a guessed secret": lambda frames, n: forge.keyed(broken(frames, n), b"fedcba9876543210"),
    "right payload, no tag": lambda frames, n: forge.plain(frames[n]),
}


def refused(load: Load) -> int:
    return load.failures.get("redis verify", 0)


def numbers(frame: bytes) -> np.ndarray:
    return np.frombuffer(forge.payload_of(frame), np.float32)


def outlasts(load: Load, server: RedisServer, damage: Forge) -> None:
    """See that not one of the frames that are replaced is loaded, and that the blocks are saved anew."""
    load.warm()
    before = load.rest()
    promoted = load.promoted
    good = server.frames()
    assert server.rewrite(damage) == len(good) >= 40
    load.run(4)
    assert load.promoted == promoted, "something that nobody computed came up"
    load.hits_come_back(BACK_S)
    load.run(len(load.prompts))
    load.rests_as(before)
    for name, frame in server.frames().items():
        assert np.allclose(numbers(frame), numbers(good[name]), atol=1e-3), "what is stored is not what was computed"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_values(server: RedisServer, open_load: OpenLoad, damage: Forge) -> None:
    outlasts(open_load(url(server.port)), server, damage)


@pytest.mark.parametrize("damage", KEYED_FORGERIES.values(), ids=KEYED_FORGERIES)
def test_forged_values_without_the_secret(server: RedisServer, open_load: OpenLoad, damage: Forge) -> None:
    load = open_load(url(server.port), host=f"frame_secret={SECRET}")
    outlasts(load, server, damage)
    assert refused(load)


@pytest.mark.parametrize("damage", FORGERIES.values(), ids=FORGERIES)
def test_the_oracle_sees_a_forged_value(server: RedisServer, open_load: OpenLoad, damage: Forge) -> None:
    """The negative control: checksums are not authentication, and a forged frame that is loaded shows in the tokens."""
    load = open_load(url(server.port))
    load.warm()
    load.rest()
    server.rewrite(damage)
    with pytest.raises(WrongTokens):
        load.run(len(load.prompts))
    assert not refused(load)


def test_the_oracle_sees_a_forger_who_knows_the_secret(server: RedisServer, open_load: OpenLoad) -> None:
    """The negative control of tags: nothing but the secret stands in a forger's way."""
    load = open_load(url(server.port), host=f"frame_secret={SECRET}")
    load.warm()
    load.rest()
    server.rewrite(lambda frames, n: forge.keyed(broken(frames, n), SECRET.encode()))
    with pytest.raises(WrongTokens):
        load.run(len(load.prompts))
    assert not refused(load)


def test_forger_who_never_tires(server: RedisServer, open_load: OpenLoad) -> None:
    """A process beside the load replaces whatever comes into the store, while it is read and written."""
    load = open_load(url(server.port), host=f"frame_secret={SECRET}")
    load.warm()
    before = load.rest()
    forged, stop = [0], threading.Event()

    def work() -> None:
        kinds = list(KEYED_FORGERIES.values())
        while not stop.is_set():
            for damage in kinds:
                forged[0] += server.rewrite(damage)

    forger = threading.Thread(target=work, name="test-forger")
    forger.start()
    try:
        load.run_for(5.0)
    finally:
        stop.set()
        forger.join()
    assert forged[0] > 100
    assert refused(load) > 10
    load.hits_come_back(BACK_S)
    load.rests_as(before)
