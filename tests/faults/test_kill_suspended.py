"""kill -9 while suspended blocks migrate to disk: whole blocks only, no private one after a start, holds expire."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.protocol import is_private, split_key
from kvconnect.protocol.keys import BlockKey
from tests.conftest import Reference, make_model
from tests.faults.test_kill import check_whole, prompts

HOLD_S = 2.0
KILLS = 8


def connector(path: str) -> list[str]:
    return ["host://?capacity=256KiB", f"disk://{path}?capacity=64MiB&hold_s={HOLD_S}"]


def suspend_and_resume(path: str, started: Connection) -> None:
    """Suspend every conversation in the middle, push it down, and bring it back."""
    with LLM(make_model("llama"), connector(path), block_size=8, kv_cache_bytes="4MiB") as llm:
        started.send("ready")
        for prompt in prompts() * 3:
            sequence = llm.sequence(llm.add_request(prompt, SamplingParams(max_tokens=12)))
            while sequence.status != "running":
                llm.step()
            llm.step()
            assert sequence.suspend()
            assert sequence.wait()
            started.send("below")
            time.sleep(0.05)
            assert sequence.resume()
            while sequence.status != "finished":
                llm.step()
    started.send("done")


def files(path: Path, folder: str) -> list[Path]:
    return [each for each in (path / folder).rglob("*") if each.is_file()]


def private(path: Path) -> list[Path]:
    return [each for each in files(path, "blocks") if is_private(split_key(BlockKey(bytes.fromhex(each.name)))[1])]


def nothing_private(path: Path) -> bool:
    return not private(path)


def soon(what: Callable[[], bool]) -> bool:
    """Wait for something that happens in the background."""
    deadline = time.monotonic() + 10
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_blocks_migrate(tmp_path: Path, references: dict[str, Reference]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvconnect.engine", "transformers.models.llama.modeling_llama", "tests.conftest"])
    rng = random.Random(44)
    model = make_model("llama")
    left_private = left_held = 0
    for number in range(KILLS):
        path = tmp_path / f"kv{number % 3}"  # a folder lives through several deaths
        mine, other = context.Pipe()
        process = context.Process(target=suspend_and_resume, args=(os.fspath(path), other))
        process.start()
        other.close()
        assert mine.recv() == "ready"
        if number % 2:
            time.sleep(rng.random() * 0.6)
        else:  # while all of a conversation is below, its partial block too
            assert mine.recv() == "below"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        check_whole(path)
        left_private += bool(private(path))
        held = files(path, "holds")
        left_held += len(held) > 1
        with LLM(model, connector(os.fspath(path)), block_size=8, kv_cache_bytes="4MiB") as llm:
            assert soon(partial(nothing_private, path)), "what nobody can load any more is still there"
            prompt = prompts()[rng.randrange(16)]
            request_id = llm.add_request(prompt, SamplingParams(max_tokens=12))
            sequence, said = llm.sequence(request_id), []
            while sequence.status != "running":
                said += [output.token_id for output in llm.step()]
            assert sequence.suspend()
            assert sequence.wait()
            assert sequence.resume()
            while sequence.status != "finished":
                said += [output.token_id for output in llm.step()]
            assert said == references["llama"](prompt, 12)
        assert list((path / "tmp").iterdir()) == []
    time.sleep(HOLD_S)
    for number in range(3):
        path = tmp_path / f"kv{number}"
        with LLM(model, connector(os.fspath(path)), block_size=8, kv_cache_bytes="4MiB"):
            pass
        check_whole(path)
        assert files(path, "holds") == []
        assert private(path) == []
    assert left_private, "no child was killed while a partial block was on disk"
    assert left_held, "no child was killed while it held blocks"
