"""The store's own test: the conformance kits, with one fixture."""

import pytest
from kvconnect_sqlite import SQLiteStore

from kvconnect.registry import load_registry
from kvconnect.testing import StoreTests


class TestSQLite(StoreTests):  # and the rest of kvconnect.testing, with a little more time
    @pytest.fixture
    def connector(self, tmp_path):
        return f"sqlite://{tmp_path}/kv.sqlite"


def test_entry_point_registers_the_store():
    assert load_registry().load("sqlite") is SQLiteStore
