"""kill -9 at any moment: the next process finds whole blocks or none, gives the same tokens, and no litter stays.

Children are forked by a server that has torch imported already, so that thirty of them cost seconds. Each builds its
engine, computes and saves; it is killed at a random moment of that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.protocol import BlockKey
from kvconnect.store import open_frame
from tests.conftest import Reference, make_model

PARAMS = SamplingParams(max_tokens=3)
KILLS = 30


def prompts() -> list[list[int]]:
    rng = random.Random(21)
    return [[rng.randrange(300) for _ in range(120)] for _ in range(16)]


def cold(path: str, started: Connection) -> None:
    """Compute and save all prompts; tell when the first block may be written, and when all are."""
    with LLM(make_model("llama"), f"disk://{path}?capacity=64MiB", block_size=8, kv_cache_bytes="4MiB") as llm:
        started.send("ready")
        for prompt in prompts():
            llm.generate([prompt], PARAMS)
    started.send("done")


def start(context: Any, path: Path) -> tuple[Any, Connection]:
    mine, other = context.Pipe()
    process = context.Process(target=cold, args=(os.fspath(path), other))
    process.start()
    other.close()
    return process, mine


def check_whole(path: Path) -> int:
    """Every published file is one whole frame under its own name."""
    count = 0
    for file in (path / "blocks").rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            size = int.from_bytes(data[24:32], "little")
            key = BlockKey(bytes.fromhex(file.name))
            open_frame(memoryview(data), key=key, fingerprint=data[104:136], payload_bytes=size)
            count += 1
    return count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_process_leaves_whole_blocks_and_no_litter(tmp_path: Path, references: dict[str, Reference]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvconnect.engine", "transformers.models.llama.modeling_llama", "tests.conftest"])
    path = tmp_path / "kv"
    process, pipe = start(context, path)
    assert pipe.recv() == "ready"
    began = time.monotonic()
    assert pipe.recv() == "done"
    whole_run = time.monotonic() - began
    process.join()
    everything = check_whole(path)
    rng = random.Random(33)
    expected = [references["llama"](prompt, 3) for prompt in prompts()]
    model = make_model("llama")
    counts = []
    killed = 0
    for number in range(KILLS):
        path = tmp_path / f"kv{number % 5}"  # a folder lives through several deaths
        process, pipe = start(context, path)
        if number % 3:  # else it may die while it opens the store
            assert pipe.recv() == "ready"
        time.sleep(rng.random() * whole_run * 0.8)
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it was quicker than the first one
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if not (path / "kvconnect-disk.json").exists():
            continue  # it died before its folder was made
        counts.append(check_whole(path))
        with LLM(model, f"disk://{path}?capacity=64MiB", block_size=8, kv_cache_bytes="4MiB") as llm:
            assert len(list((path / "tmp").iterdir())) <= 2, "litter of the dead is still there"
            sample = rng.sample(range(len(expected)), 3)
            outputs = llm.generate([prompts()[i] for i in sample], PARAMS)
            assert [output.token_ids for output in outputs] == [expected[i] for i in sample]
            assert llm.get_stats()["workers"][0]["failures"] == {}
        assert list((path / "tmp").iterdir()) == []
    assert killed >= KILLS * 2 // 3
    assert len(counts) >= KILLS // 2
    assert any(0 < count < everything for count in counts), "no child was killed while it was saving"
