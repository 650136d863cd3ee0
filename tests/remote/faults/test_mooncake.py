"""A Mooncake pool loses its memory or its master under a steady load.

A pool that lost a provider says for about 10 s that its objects are there; nothing may rely on that.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.remote.faults.conftest import OpenLoad
from tests.remote.faults.load import Load
from tests.remote.mooncake.pool import Pool, needs_mooncake

STALE_S = 11.0  # until the master gives up on a provider that died: its client_ttl of 10 s, and a second
BACK_S = 12.0  # hits are back that soon after a fault is over: a probe every 6 s, two timeouts, and work
CONNECTIONS = 5  # the client's library keeps some to the master and to each provider for each of its threads


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    needs_mooncake()
    with Pool(tmp_path, 64 << 20) as pool:
        yield pool


def load_on(pool: Pool, open_load: OpenLoad) -> Load:
    return open_load(pool.url, connection_sockets=CONNECTIONS)


def test_provider_killed(pool: Pool, open_load: OpenLoad) -> None:
    """The master goes on saying that blocks are there; each belief costs a failed read, no token and no time."""
    load = load_on(pool, open_load)
    load.warm()
    before = load.rest()
    found, failed = load.lookup_hits, load.promote_failures
    load.run_into_promotion()
    pool.provider.kill()
    load.run_for(STALE_S)
    assert load.lookup_hits > found
    assert load.promote_failures > failed, "the pool was never asked for what it had lost"
    promoted = load.promoted
    load.run(6)
    assert load.promoted == promoted
    pool.provide_again()
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_provider_killed_and_started_at_once(pool: Pool, open_load: OpenLoad) -> None:
    """Names that the dead one held are taken until the master gives up on it; then hits come back."""
    load = load_on(pool, open_load)
    load.warm()
    before = load.rest()
    load.run_into_promotion()
    pool.provider.kill()
    pool.provide_again()
    load.hits_come_back(STALE_S + BACK_S)
    load.rests_as(before)


@pytest.mark.parametrize("part", ["master", "provider"])
def test_stopped(pool: Pool, open_load: OpenLoad, part: str) -> None:
    load = load_on(pool, open_load)
    load.warm()
    before = load.rest()
    server = pool.master if part == "master" else pool.provider
    failures = load.num_failures
    load.run_into_promotion()
    server.signal(signal.SIGSTOP)
    try:
        load.run_for(5.0)
    finally:
        server.signal(signal.SIGCONT)
    assert load.num_failures > failures
    load.hits_come_back(BACK_S)
    load.rests_as(before)


def test_master_killed_and_started_again(pool: Pool, open_load: OpenLoad) -> None:
    """It has forgotten everything; providers and clients find it again by themselves."""
    load = load_on(pool, open_load)
    load.warm()
    before = load.rest()
    failures = load.num_failures
    load.run_into_promotion()
    pool.master.kill()
    load.run_until(lambda: load.num_failures > failures, 5.0, "a failure")
    load.run_for(2.0)
    pool.master.start()
    load.hits_come_back(STALE_S + BACK_S)
    load.rests_as(before)
