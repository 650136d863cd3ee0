"""The store kit in its quick form, through every door."""

from __future__ import annotations

from typing import Any

import pytest

from kvconnect.testing.store import StoreTests
from tests.remote.faults.redis_server import RedisCluster
from tests.remote.redis.servers import Doors


class _Quick(StoreTests):
    @pytest.fixture
    def quick(self) -> bool:
        return True


class TestOnOneServer(_Quick):
    @pytest.fixture
    def connector(self, server: Doors) -> Any:
        return ("redis", {"host": "127.0.0.1", "port": server.port, "path": "/0"})


class TestOverUnixSocket(_Quick):
    @pytest.fixture
    def connector(self, server: Doors) -> Any:
        return ("unix", {"path": str(server.socket)})


class TestOverTLS(_Quick):
    @pytest.fixture
    def connector(self, server: Doors) -> Any:
        certificate = str(server.authority.certificate)
        options = {"host": "127.0.0.1", "port": server.tls_port, "path": "/0", "ca_file": certificate}
        return ("rediss", options)


class TestOnCluster(_Quick):
    @pytest.fixture
    def connector(self, cluster: RedisCluster) -> Any:
        return ("redis+cluster", {"host": "127.0.0.1", "port": cluster.masters[1].port, "path": "/0"})
