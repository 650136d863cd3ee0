"""All kits, over a real server."""

from __future__ import annotations

from pathlib import Path

from tests.remote.conformance import run_kits
from tests.remote.faults.redis_server import RedisServer


def test_every_promise_of_the_kits_is_kept(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        found = run_kits("redis", {"host": "127.0.0.1", "port": server.port}, tmp_path / "report.json")
    assert found["kept"] > 200
    assert found["broken"] == 0
