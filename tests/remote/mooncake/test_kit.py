"""The store over a real pool keeps what stores promise; the kits of connectors run in `make test-remote`."""

from __future__ import annotations

from typing import Any

import pytest

from kvconnect.testing import StoreTests
from tests.remote.mooncake.pool import Pool


class TestMooncake(StoreTests):
    @pytest.fixture
    def quick(self) -> bool:
        return True

    @pytest.fixture
    def connector(self, pool: Pool) -> Any:
        return pool.url
