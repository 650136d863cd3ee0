"""The store kit, against the stand-in in its quick form, and against a real gateway in full."""

from __future__ import annotations

from typing import Any

import pytest

from kvconnect.testing.store import StoreTests
from tests.remote.s3.gateways import Place


class TestOnMoto(StoreTests):
    @pytest.fixture
    def connector(self, place: Place) -> Any:
        return ("s3", place.options())

    @pytest.fixture
    def quick(self) -> bool:
        return True


class TestOnCeph(StoreTests):
    @pytest.fixture
    def connector(self, ceph: Place) -> Any:
        return ("s3", ceph.options())
