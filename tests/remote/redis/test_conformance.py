"""All kits, over a real server."""

from __future__ import annotations

from pathlib import Path

from tests.remote.conformance import run_kits
from tests.remote.processes import Server, free_ports, listens, needs_program


def test_every_promise_of_the_kits_is_kept(tmp_path: Path) -> None:
    needs_program("redis-server")
    (port,) = free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with Server(command, tmp_path / "log", lambda: listens(port)):
        found = run_kits("redis", {"host": "127.0.0.1", "port": port}, tmp_path / "report.json")
    assert found["kept"] > 200
    assert found["broken"] == 0
