"""vLLM as users run it: an engine core in its own process, workers in theirs; and speculation, which needs a process.

Greedy outputs equal those of the same engine without a connector.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.prompts import prompts_of

ROOT = Path(__file__).parents[2]
PROMPTS = prompts_of(100, 205, 310)
LOADED = [96, 192, 288]
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@contextlib.contextmanager
def session(command: list[str], log: Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; whatever it has started ends with the block."""
    before = set(Path("/dev/shm").glob("vllm_*"))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.2)
            for path in set(Path("/dev/shm").glob("vllm_*")) - before:
                path.unlink(missing_ok=True)


def run(folder: Path, tmp_path: Path, connector: Any, *, count: int = 12, **job: Any) -> list[dict[str, Any]]:
    """Run one engine in a process of its own; return what came out of each round."""
    environ = job.pop("environ", {})
    told, said, log = tmp_path / "job.json", tmp_path / "said.json", tmp_path / "log"
    rounds = job.pop("rounds", [PROMPTS])
    told.write_text(
        json.dumps(
            {
                "folder": str(folder),
                "connector": connector,
                "count": count,
                "rounds": rounds,
                "options": job.pop("options", {}),
            }
        )
    )
    said.unlink(missing_ok=True)
    with session([sys.executable, "-m", "tests.vllm.run_llm", str(told), str(said)], log, **environ) as process:
        code = process.wait(300)
    assert code == 0, log.read_text(errors="replace")[-6000:]
    found: list[dict[str, Any]] = json.loads(said.read_text())
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_of_their_own(folder: Path, tmp_path: Path, ranks: int) -> None:
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    job: dict[str, Any] = {"environ": environ}
    if ranks > 1:
        job["options"] = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    (plain,) = run(folder, tmp_path, None, **job)
    first, again = run(folder, tmp_path, connector, rounds=[PROMPTS, PROMPTS], **job)
    assert first["tokens"] == again["tokens"] == plain["tokens"]
    assert again["cached"] == LOADED  # from host memory
    (restarted,) = run(folder, tmp_path, connector, **job)
    assert restarted["tokens"] == plain["tokens"]
    assert restarted["cached"] == LOADED  # from disk


def test_speculative_decoding(folder: Path, tmp_path: Path) -> None:
    """Drafts that are rejected leave their KV in the pages for a step; none of it may be saved."""
    options = {"speculative_config": SPECULATIVE}
    (plain,) = run(folder, tmp_path, None, count=90)
    loops = [[*prompt, *tokens, *tokens] for prompt, tokens in zip(PROMPTS, plain["tokens"], strict=True)]
    (after,) = run(folder, tmp_path, None, count=90, rounds=[loops])
    longer = [[*prompt, *tokens] for prompt, tokens in zip(loops, after["tokens"], strict=True)]
    (last,) = run(folder, tmp_path, None, count=20, rounds=[longer])
    store = [f"disk://{tmp_path}/kv"]
    (drafted,) = run(folder, tmp_path, store, count=90, rounds=[loops], options=options)
    assert drafted["tokens"] == after["tokens"]
    (loaded,) = run(folder, tmp_path, store, count=20, rounds=[longer], options=options)
    assert loaded["tokens"] == last["tokens"]
    for tokens, cached in zip(longer, loaded["cached"], strict=True):
        assert cached >= (len(tokens) - 8) // 32 * 32 - 32
