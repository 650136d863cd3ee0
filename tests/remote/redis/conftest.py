"""Fixtures: a server with three doors, a cluster of three nodes, and stores that are closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvconnect_redis import RedisStore

from tests.remote.faults.redis_server import RedisCluster, RedisServer
from tests.remote.processes import needs_program
from tests.remote.redis.servers import Doors, open_patiently, open_store

OpenStore = Callable[..., RedisStore]


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """For `server`."""
    needs_program("redis-server")
    with Doors(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """For `cluster`; two seconds."""
    needs_program("redis-server")
    with RedisCluster(tmp_path_factory.mktemp("cluster"), 3) as started:
        yield started


@pytest.fixture
def server(one_server: Doors) -> Doors:
    """An empty server for tests that leave its settings as they were."""
    one_server.do("FLUSHALL")
    return one_server


@pytest.fixture
def cluster(one_cluster: RedisCluster) -> RedisCluster:
    """An empty cluster for tests that leave it whole."""
    for node in one_cluster.masters:
        node.do("FLUSHALL")
    return one_cluster


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that a test may harm."""
    needs_program("redis-server")
    with RedisServer(tmp_path) as started:
        yield started


@pytest.fixture
def opened() -> Iterator[OpenStore]:
    """Open stores, which are closed when the test is over; see `open_store`, and `open_patiently` for `brief_s`."""
    stores: list[RedisStore] = []

    def open_one(url: str, *, brief_s: float = 0.0, **options: Any) -> RedisStore:
        stores.append(open_patiently(url, brief_s) if brief_s else open_store(url, **options))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()
