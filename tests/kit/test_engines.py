"""The reference engine keeps the engine's side of the contract."""

from __future__ import annotations

import pytest

from kvconnect.testing.engine import EngineTests
from kvconnect.testing.engines import EngineUnderTest
from kvconnect.testing.reference import ReferenceEngine


class TestReferenceEngine(EngineTests):
    @pytest.fixture
    def engine(self) -> type[EngineUnderTest]:
        return ReferenceEngine

    @pytest.fixture
    def patience_s(self) -> float:
        return 10.0
