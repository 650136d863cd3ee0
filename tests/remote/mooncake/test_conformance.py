"""All kits, over a real pool."""

from __future__ import annotations

from pathlib import Path

from tests.remote.conformance import run_kits
from tests.remote.mooncake.pool import Pool


def test_every_promise_of_the_kits_is_kept(pool: Pool, tmp_path: Path) -> None:
    found = run_kits("mooncake", {"host": "127.0.0.1", "port": pool.port}, tmp_path / "report.json")
    assert found["kept"] > 200
    assert found["broken"] == 0
