"""Our own connectors pass every kit that applies; the whole of it, and 200 seeds, are `kvconnect conformance`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvconnect.testing import (
    ConnectorTests,
    FaultTests,
    KeyPartitionTests,
    LeaderTests,
    RestartTests,
    StatefulTests,
    StoreTests,
    WorkerTests,
)


class Quick:
    @pytest.fixture
    def quick(self) -> bool:
        return True


class TestHost(Quick, LeaderTests, WorkerTests, ConnectorTests, KeyPartitionTests, FaultTests, StatefulTests):
    @pytest.fixture
    def connector(self) -> Any:
        return "host"


class TestDisk(Quick, StoreTests, ConnectorTests, KeyPartitionTests, FaultTests, RestartTests, StatefulTests):
    @pytest.fixture
    def connector(self, tmp_path: Path) -> Any:
        return f"disk://{tmp_path}/kv"


class TestDiskPacked(Quick, ConnectorTests, FaultTests):
    @pytest.fixture
    def connector(self, tmp_path: Path) -> Any:
        return ["host://?capacity=1MiB", f"disk://{tmp_path}/kv?codec=zstd"]
