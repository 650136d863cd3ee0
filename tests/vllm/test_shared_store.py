"""Two vLLM engines, each in processes of its own, and one real Redis."""

from __future__ import annotations

from pathlib import Path

from tests.remote.processes import Server, free_ports, listens, needs_program
from tests.vllm.test_processes import LOADED, run


def test_one_vllm_loads_what_another_computed_if_it_knows_the_secret(folder: Path, tmp_path: Path) -> None:
    needs_program("redis-server")
    (port,) = free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    ours = {"KVCONNECT_HOST_FRAME_SECRET": "what both engines were told"}
    connector = ["host://?capacity=64MiB", f"redis://127.0.0.1:{port}"]
    with Server(command, tmp_path / "redis.log", lambda: listens(port)):
        (first,) = run(folder, tmp_path, connector, environ=ours)
        (second,) = run(folder, tmp_path, connector, environ=ours)
        (stranger,) = run(folder, tmp_path, [connector[0], connector[1] + "?mode=r"])
    assert first["cached"] == stranger["cached"] == [0, 0, 0]
    assert second["cached"] == LOADED
    assert first["tokens"] == second["tokens"] == stranger["tokens"]
