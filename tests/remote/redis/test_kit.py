"""The store kit, over every kind of connection to a real server."""

from __future__ import annotations

from typing import Any

import pytest

from kvconnect.testing.store import StoreTests
from tests.remote.redis.servers import Cluster


class _Kit(StoreTests):
    @pytest.fixture
    def quick(self) -> bool:
        return True


class TestOverTcp(_Kit):
    @pytest.fixture
    def connector(self, redis_ways: dict[str, Any]) -> Any:
        name, options = redis_ways["plain"]
        return (name, {**options, "path": "/1"})


class TestAsUserWithLeastRights(_Kit):
    @pytest.fixture
    def connector(self, redis_ways: dict[str, Any]) -> Any:
        name, options = redis_ways["user"]
        return (name, {**options, "path": "/0", "prefix": "kv-of-the-kit:"})


class TestOverTls(_Kit):
    @pytest.fixture
    def connector(self, redis_ways: dict[str, Any]) -> Any:
        name, options = redis_ways["tls"]
        return (name, {**options, "path": "/2"})


class TestOverUnixSocket(_Kit):
    @pytest.fixture
    def connector(self, redis_ways: dict[str, Any]) -> Any:
        name, options = redis_ways["socket"]
        return (name, {**options, "db": 3})


class TestOverCluster(_Kit):
    @pytest.fixture
    def connector(self, cluster: Cluster) -> Any:
        return ("redis+cluster", {**cluster.options, "path": "/0"})
