"""What goes wrong around a connector: a damaged medium, steps that fail, lost plans and reports, full disks."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvconnect.errors import KVConnectError
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.simulation import Setting, make_prompts, simulate
from kvconnect.testing.target import Target

__all__ = ["FaultTests"]

_PROMPT = 6 * BLOCK + 1
_LARGE = 512  # bytes; smaller files beside larger ones mark or describe, and a store may refuse to open over them
_DAMAGE = ["a flipped bit", "half of it", "nothing in it", "more of it", "another one's bytes", "gone", "noise"]


class FaultTests(Kit):
    """Never a wrong token, never a lost request: a fault costs speed."""

    @pytest.mark.parametrize("damage", _DAMAGE)
    def test_damaged_medium_is_a_miss(self, target: Target, rng: random.Random, damage: str) -> None:
        """Files that are torn, flipped, foreign or gone are misses: nothing wrong is loaded, nothing is raised."""
        prompts = [self.tokens(rng, _PROMPT) for _ in range(3)]
        with StepEngine(target) as engine:
            for tokens in prompts:
                engine.save(tokens)
        files = self._files(target)
        for number, path in enumerate(files):
            self._damage(path, damage, files[(number + 1) % len(files)], rng)
        try:
            engine = StepEngine(target)
        except KVConnectError as error:
            must(str(error) != "", expected="a refusal at start to say what is wrong", got="an empty message")
            return
        with engine:
            for tokens in prompts:
                engine.load(tokens)  # looks at every byte
            for tokens in prompts:
                engine.save(tokens)
                engine.load(tokens)

    def test_medium_that_vanishes_is_survived(self, target: Target, rng: random.Random) -> None:
        """The folder is deleted while the connector is open: requests are answered, nothing wrong is loaded."""
        tokens, later = self.tokens(rng, _PROMPT), self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            self._files(target)
            for path in target.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            engine.load(tokens)
            engine.save(later)
            engine.load(later)

    def test_full_disk_is_survived(self, target: Target, rng: random.Random) -> None:
        """No file may grow any more: saves fail, requests are answered, and what is stored stays right."""
        with StepEngine(target) as engine:
            engine.save(self.tokens(rng, _PROMPT))
        self._files(target)
        done = run_child(target, "full-disk", rng.getrandbits(32), prompts=6)
        must_equal("exit status of an engine on a full disk", done["status"], 0, done["error"])
        with StepEngine(target) as engine:
            for number in range(6):
                engine.load(child_prompt(done["seed"], number))

    @pytest.mark.parametrize("number", range(4))
    def test_steps_that_fail_cost_no_byte(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """Steps fail at random on some rank, and plans are lost: nothing wrong is loaded, nothing is left over."""
        if quick and number >= 1:
            pytest.skip("quick")
        prompts = make_prompts(rng)
        num_ranks = 2 if target.capabilities.several_ranks else 1
        with StepEngine(target, num_ranks=num_ranks) as engine:
            for _ in range(24):
                request = engine.arrive(rng.choice(prompts))
                engine.admit(request)
                while request.computed < len(request.tokens):
                    count = rng.randrange(1, len(request.tokens) - request.computed + 1)
                    fails = rng.random() < 0.25
                    lost = rng.random() < 0.1
                    rank = rng.randrange(num_ranks) if fails else None
                    loading = request.loaded > 0
                    engine.step((request, count), failing_rank=rank, lose_plan=lost)
                    if fails or (lost and (loading or rng.random() < 0.5)):  # without a load its KV is right
                        engine.reset(request)
                        if rng.random() < 0.3:
                            break
                        engine.admit(request)
                engine.finish(request)
            engine.settle()

    def test_reports_that_are_lost_commit_nothing(self, target: Target, rng: random.Random) -> None:
        """A rank's report is empty, because its hook failed: nothing of the step is offered, the next steps work."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            request = engine.arrive(tokens)
            engine.allocate(request, 0)
            step = engine.step((request, _PROMPT), hand_over=False)
            engine.leader.update_connector_output([b"" for _ in step.reports])
            engine.reset(request)
            engine.finish(request)
            engine.settle()
            must_equal("tokens offered of a step whose report was lost", engine.load(tokens), 0)
            must_equal("tokens loaded after it was computed again", engine.load(tokens), _PROMPT - 1)

    def test_shutdown_comes_to_an_end_with_work_in_flight(self, target: Target, rng: random.Random) -> None:
        """`shutdown` right after a step, with saves on their way, returns; what is stored is right."""
        prompts = [self.tokens(rng, _PROMPT) for _ in range(4)]
        engine = StepEngine(target)
        for tokens in prompts:
            request = engine.arrive(tokens)
            engine.allocate(request, 0)
            engine.step((request, _PROMPT))
            engine.finish(request)
        started = time.monotonic()
        engine.close()
        took = time.monotonic() - started
        must(took < 30, expected="shutdown within 30 s", got=f"{took:.1f} s")
        engine.check_hooks()
        with StepEngine(target) as again:
            for tokens in prompts:
                again.load(tokens)

    def test_hundred_requests_leave_nothing(self, target: Target, rng: random.Random, seed: int) -> None:
        """After many requests and rounds the connector has no work left, and its counters do not count requests."""
        setting = Setting(num_pages=30, max_batch_tokens=40)
        simulate(target, seed, setting, make_prompts(rng, count=30), rounds=3)

    def _files(self, target: Target) -> list[Path]:
        needs(target.capabilities.durable, "durable")
        files = sorted(path for path in target.folder.rglob("*") if path.is_file() and path.stat().st_size > 0)
        if not files:
            not_shown("the medium is no file that the kit could damage")
        return [path for path in files if path.stat().st_size >= _LARGE] or files

    def _damage(self, path: Path, damage: str, other: Path, rng: random.Random) -> None:
        if damage == "gone":
            path.unlink(missing_ok=True)
            return
        data = bytearray(path.read_bytes())
        if damage == "a flipped bit":
            for _ in range(max(1, len(data) // 4096)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif damage == "half of it":
            del data[len(data) // 2 :]
        elif damage == "nothing in it":
            data.clear()
        elif damage == "more of it":
            data += rng.randbytes(100)
        elif damage == "noise":
            data[:] = rng.randbytes(len(data))
        elif other.exists():
            data[:] = other.read_bytes()
        path.write_bytes(data)


def child_prompt(seed: int, number: int) -> list[int]:
    """Return a prompt that this process and a child both know."""
    rng = random.Random(f"{seed}:{number}")
    return [rng.randrange(50_000) for _ in range(_PROMPT)]


def run_child(target: Target, action: str, seed: int, *, prompts: int, kill_after_s: float = 0.0) -> dict[str, Any]:
    """Run `kvconnect.testing.child` over the target's medium, in a process of its own.

    Args:
        target: Must be something that another process can import.
        action: See `kvconnect.testing.child`.
        seed: Of its prompts.
        prompts: How many.
        kill_after_s: SIGKILL it that long after it says that it begins; 0 lets it end.

    Returns:
        ``status`` (exit status, negative for a signal), ``error`` (its last words), ``loaded`` tokens, ``seed``.
    """
    task = {
        "connector": target.portable(),
        "folder": str(target.folder),
        "model": target.model,
        "action": action,
        "seed": seed,
        "prompts": prompts,
    }
    environ = {
        **os.environ,
        "PYTHONHASHSEED": str(seed % 1000),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "kvconnect.testing.child", json.dumps(task)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        if kill_after_s and first.strip() == "begin":
            time.sleep(kill_after_s)
            process.kill()
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    last = (rest.strip().splitlines() or ["{}"])[-1]
    said = json.loads(last) if last.startswith("{") else {}
    error = "" if process.returncode == 0 else (errors.strip().splitlines() or [""])[-1]
    if "cannot be imported" in errors and first.strip() != "begin":
        not_shown("another process cannot import the class under test: install it")
    return {"status": process.returncode, "error": error, "seed": seed, **said}
