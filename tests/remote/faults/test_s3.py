"""An S3 gateway dies, stops, crawls, forgets or lies under a steady load.

The gateway is moto, which keeps everything in memory; what stands between is our proxy.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.remote.faults import forge
from tests.remote.faults.conftest import OpenLoad
from tests.remote.faults.load import Load, WrongTokens
from tests.remote.faults.proxy import Proxy
from tests.remote.processes import Server, free_ports, listens, needs_program
from tests.remote.s3.gateways import ACCESS_KEY, SECRET_KEY, Place

BACK_S = 12.0  # hits are back that soon after a fault is over: a probe every 6 s, two timeouts, and work
FRAME = 16640  # bytes
SECRET = "0123456789abcdef0123456789abcdef"
# A store thread's call reads several ranges at once, and its client keeps the connections for the next.
CONNECTIONS = 2


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gateway that tests may stop but not kill."""
    with start_moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def place(moto: Server) -> Place:
    """A bucket of its own; the client library has made what it keeps for the whole process."""
    place = Place(endpoint(moto))
    place.open().close()
    return place


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(int(moto.command[-1])) as proxy:
        yield proxy


def start_moto(folder: Path) -> Server:
    needs_program("moto_server")
    (port,) = free_ports(1)
    return Server(["moto_server", "-H", "127.0.0.1", "-p", str(port)], folder / "log", lambda: listens(port))


def endpoint(server: Server) -> str:
    return f"http://127.0.0.1:{server.command[-1]}"


def load_on(place: Place, open_load: OpenLoad, proxy: Proxy | None = None, host: str = "") -> Load:
    query = {
        "endpoint": place.endpoint if proxy is None else f"http://127.0.0.1:{proxy.port}",
        "region": "us-east-1",
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET_KEY,
    }
    sockets = CONNECTIONS if proxy is None else 3 * CONNECTIONS
    return open_load(f"s3://{place.bucket}/some/prefix?{urlencode(query)}", connection_sockets=sockets, host=host)


def test_killed_and_started_again_empty(tmp_path: Path, open_load: OpenLoad) -> None:
    """Packs, log and bucket are gone; a new bucket is filled."""
    with start_moto(tmp_path) as server:
        place = Place(endpoint(server))
        load = load_on(place, open_load)
        load.warm()
        before = load.rest()
        failures = load.num_failures
        load.run_into_promotion()
        server.kill()
        load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")
        load.run_for(2.0)
        server.start()
        place.client.create_bucket(Bucket=place.bucket)
        load.hits_come_back(BACK_S)
        load.rests_as(before)


def test_stopped(moto: Server, place: Place, open_load: OpenLoad) -> None:
    load = load_on(place, open_load)
    load.warm()
    before = load.rest()
    failures = load.num_failures
    load.run_into_promotion()
    moto.signal(signal.SIGSTOP)
    try:
        load.run_for(5.0)
    finally:
        moto.signal(signal.SIGCONT)
    assert load.num_failures > failures
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_refused_for_a_while(place: Place, proxy: Proxy, open_load: OpenLoad) -> None:
    """Twice over; what was stored is found again."""
    load = load_on(place, open_load, proxy)
    load.warm()
    before = load.rest()
    for _ in range(2):
        failures = load.num_failures
        load.run_into_promotion()
        proxy.refuses = True
        proxy.cut()
        load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")  # noqa: B023 - called at once
        load.run_for(2.0)
        proxy.refuses = False
        load.hits_come_back(BACK_S)
        load.rests_as(before)


def test_connection_reset_within_a_pack(place: Place, proxy: Proxy, open_load: OpenLoad) -> None:
    load = load_on(place, open_load, proxy)
    load.warm()
    before = load.rest()
    for number, at in enumerate([1, 300, FRAME // 2, FRAME, 3 * FRAME]):
        load.run_into_promotion()
        proxy.reset_after(at, "down")
        load.run_until(lambda: not proxy.armed, BACK_S, "a reset")
        assert proxy.num_resets == number + 1
        load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_slow_link(place: Place, proxy: Proxy, open_load: OpenLoad) -> None:
    """200 KB/s both ways."""
    load = load_on(place, open_load, proxy)
    load.warm()
    before = load.rest()
    proxy.rate = 200_000.0
    load.run_for(8.0)
    proxy.rate = None
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_long_link(place: Place, proxy: Proxy, open_load: OpenLoad) -> None:
    """0.05 s each way: slower, and hits all the same."""
    load = load_on(place, open_load, proxy)
    load.warm()
    before = load.rest()
    proxy.latency_s = 0.05
    load.run_for(2.0)
    load.hits_come_back(BACK_S)
    proxy.latency_s = 0.0
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_link_that_swallows_everything(place: Place, proxy: Proxy, open_load: OpenLoad) -> None:
    load = load_on(place, open_load, proxy)
    load.warm()
    before = load.rest()
    failures = load.num_failures
    load.run_into_promotion()
    proxy.hole = True
    load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")
    load.run_for(3.0)
    proxy.hole = False
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def packs(place: Place) -> list[str]:
    return [path for path in place.objects() if path.startswith("packs/")]


def test_packs_expired(place: Place, open_load: OpenLoad) -> None:
    """A lifecycle rule, or somebody, deletes what the log still names."""
    load = load_on(place, open_load)
    load.warm()
    before = load.rest()
    for _ in range(2):
        load.run_into_promotion()
        for path in packs(place):
            place.delete(path)
        load.hits_come_back(BACK_S)
    load.rests_as(before)


def rewrite(place: Place, damage: Callable[[bytes], bytes]) -> int:
    """Put something else in place of every frame of every pack; return how many."""
    count = 0
    for path in packs(place):
        pack = place.read(path)
        starts = [at for at in range(len(pack)) if forge.is_frame(pack[at : at + FRAME])]
        for at in starts:
            pack = pack[:at] + damage(pack[at : at + FRAME]) + pack[at + FRAME :]
        place.put(path, pack)
        count += len(starts)
    return count


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_packs(place: Place, open_load: OpenLoad, damage: str) -> None:
    load = load_on(place, open_load)
    load.warm()
    before = load.rest()
    promoted = load.promoted
    if damage == "truncated":
        for path in packs(place):
            place.put(path, place.read(path)[: FRAME // 2])
    else:
        assert rewrite(place, forge.negated) >= 40
    load.run(4)
    assert load.promoted == promoted, "something that nobody computed came up"
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_forged_packs_without_the_secret(place: Place, open_load: OpenLoad) -> None:
    load = load_on(place, open_load, host=f"frame_secret={SECRET}")
    load.warm()
    before = load.rest()
    promoted = load.promoted
    assert rewrite(place, lambda frame: forge.plain(forge.negated(frame))) >= 40
    load.run(4)
    assert load.promoted == promoted, "something that nobody computed came up"
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_the_oracle_sees_a_forged_pack(place: Place, open_load: OpenLoad) -> None:
    """The negative control: checksums are not authentication."""
    load = load_on(place, open_load)
    load.warm()
    load.rest()
    assert rewrite(place, lambda frame: forge.plain(forge.negated(frame))) >= 40
    with pytest.raises(WrongTokens):
        load.run(len(load.prompts))
