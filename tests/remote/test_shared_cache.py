"""The example: two engine processes and one Redis, as a new user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.remote.faults.redis_server import RedisServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "shared_cache"


def test_second_engine_answers_from_what_the_first_computed(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        done = subprocess.run(
            [sys.executable, str(EXAMPLE / "shared_cache.py"), "--json"],
            env={**os.environ, "SHARED_CACHE_STORE": f"redis://127.0.0.1:{server.port}"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["answers_equal"]
    for first, second in zip(result["engines"]["first"], result["engines"]["second"], strict=True):
        assert first["loaded_tokens"] == 0
        assert second["loaded_tokens"] > 1000
        assert second["computed_tokens"] <= 16 + 1  # what is in no full block, and at least one token
        at_hand = first["computed_tokens"] - (second["computed_tokens"] + second["loaded_tokens"])
        assert abs(at_hand) <= 16, "but for the beginning that all documents share"


def test_compose_file_starts_what_the_example_starts() -> None:
    """Docker is not to be had where these tests run: that the file names real arguments is all that can be seen."""
    text = (EXAMPLE / "docker-compose.yml").read_text("utf-8")
    usage = subprocess.run(
        [sys.executable, str(EXAMPLE / "shared_cache.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("--engine", "--tenant"):
        assert word in text
        assert word in usage
    assert "examples/shared_cache/Dockerfile" in text
    assert (EXAMPLE / "Dockerfile").is_file()
