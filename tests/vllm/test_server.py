"""vLLM's OpenAI server: metrics, cache reset, SIGKILL in the middle of saving and a restart."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.test_processes import session

WORDS = 1500
BLOCK = 32


def long_prompt(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(500)}" for _ in range(WORDS))


class Server:
    """A server that answers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        """Return a page."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send JSON, return JSON."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
            return json.loads(text) if text else None

    def complete(self, prompt: str, **options: Any) -> str:
        """Return the eight words that follow."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options}
        text: str = self.post("/v1/completions", body)["choices"][0]["text"]
        return text

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric, summed over its labels."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            found = re.fullmatch(rf"{re.escape(name)}\{{(.*)\}} (\S+)", line)
            if found and all(f'{key}="{value}"' in found[1] for key, value in labels.items()):
                total += float(found[2])
        return total

    def wait_for_metric(self, name: str, least: float) -> float:
        """Wait until a metric is that high: vLLM collects them in its own time."""
        deadline = time.monotonic() + 30
        while (value := self.metric(name)) < least:
            assert time.monotonic() < deadline, f"{name} is {value}"
            time.sleep(0.2)
        return value


@contextlib.contextmanager
def serve(folder: Path, log: Path, connector: Any) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--block-size", str(BLOCK), "--shutdown-timeout", "30"]
    if connector is not None:
        transfer = {
            "kv_connector": "KVConnect",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connector": connector},
        }
        command += ["--kv-transfer-config", json.dumps(transfer)]
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with session(command, log, **environ) as process:
        server = Server(process, port)
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-6000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                server.get("/health")
                break
            time.sleep(0.5)
        yield server


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the server says without a connector."""
    with serve(folder, tmp_path_factory.mktemp("plain") / "log", None) as server:
        return [server.complete(long_prompt(seed)) for seed in range(6)]


def test_metrics_reset_kill_and_restart(folder: Path, tmp_path: Path, expected: list[str]) -> None:
    connector = ["host://?capacity=256MiB", f"disk://{tmp_path}/kv"]
    log = tmp_path / "log"
    with serve(folder, log, connector) as server:
        assert server.complete(long_prompt(0)) == expected[0]
        blocks = WORDS // BLOCK
        server.wait_for_metric("kvconnect:leader_committed_blocks_total", blocks)
        server.wait_for_metric("kvconnect:leader_demoted_blocks_total", blocks)
        server.wait_for_metric("kvconnect:worker_saved_blocks_total", blocks)
        assert 0 < server.metric("kvconnect:hook_seconds_total", half="leader") < 5
        assert server.metric("kvconnect:failures_total") == 0

        server.post("/reset_prefix_cache")
        assert server.complete(long_prompt(0)) == expected[0]
        assert server.metric("vllm:external_prefix_cache_hits_total") == blocks * BLOCK
        server.wait_for_metric("kvconnect:worker_loaded_blocks_total", blocks)

        server.post("/reset_prefix_cache")
        told = {"kvconnect": {"cache": "none"}}
        assert server.complete(long_prompt(0), kv_transfer_params=told) == expected[0]
        assert server.metric("vllm:external_prefix_cache_hits_total") == blocks * BLOCK

        server.post("/reset_prefix_cache?reset_external=true")  # new weights: nothing from before may be loaded
        assert server.complete(long_prompt(0)) == expected[0]
        assert server.metric("vllm:external_prefix_cache_hits_total") == blocks * BLOCK
        assert "kvconnect: connector host+disk under vLLM" in log.read_text(errors="replace")

    # killed while several prompts are being computed and saved
    with serve(folder, log, connector) as server:

        def ask(seed: int) -> None:
            with contextlib.suppress(OSError, ValueError):
                server.complete(long_prompt(seed), max_tokens=64)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(1, 6)]
        for thread in threads:
            thread.start()
        store = tmp_path / "kv"
        seen = len(list(store.rglob("*")))
        deadline = time.monotonic() + 60
        while len(list(store.rglob("*"))) < seen + 40:
            assert time.monotonic() < deadline, "nothing is saved"
            time.sleep(0.005)
        os.killpg(server.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(60)

    with serve(folder, log, connector) as server:
        assert [server.complete(long_prompt(seed)) for seed in range(6)] == expected
        assert server.metric("vllm:external_prefix_cache_hits_total") >= 40 * BLOCK
        assert server.metric("kvconnect:failures_total") == 0
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
