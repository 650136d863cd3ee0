"""What goes wrong around a connector: a damaged medium, steps that fail, lost plans and reports, full disks."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvconnect.errors import FrameCorrupt, KVConnectError
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, open_frame
from kvconnect.store.wrapper import WrapperStore
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import BrokenPromise, must, must_equal, needs, not_shown
from kvconnect.testing.simulation import Setting, make_prompts, simulate
from kvconnect.testing.target import Target
from kvconnect.testing.trap import set_trap, trap_sprung

__all__ = ["FaultTests"]

_PROMPT = 6 * BLOCK + 1
_SMALL_ARENA = "64KiB"  # 16 blocks, of which a prompt has 6
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

    @pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "nothing in it"])
    def test_damaged_block_is_stored_again(self, target: Target, rng: random.Random, damage: str) -> None:
        """A damaged block keeps no place: computed again, it is stored again, and the next instance finds it."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
        files = self._files(target)
        for path in files:
            self._damage(path, damage, path, rng)
        for looks in (False, True):  # a store may replace what it has, or keep it until the damage is found
            try:
                engine = StepEngine(target)
            except KVConnectError as error:
                must(str(error) != "", expected="a refusal at start to say what is wrong", got="an empty message")
                return
            with engine:
                if looks:
                    engine.load(tokens)
                engine.save(tokens)
                engine.load(tokens)
        with StepEngine(target) as engine:
            poisoned = "a file that is there and damaged must not keep the block from being stored"
            must_equal("tokens loaded by an instance that came later", engine.load(tokens), _PROMPT - 1, poisoned)

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
        watched, torn = watch_reads(target)
        with StepEngine(watched) as engine:
            for number in range(6):
                engine.load(child_prompt(done["seed"], number))
        must_be_whole(torn, "when the disk was full")

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
            must_equal("tokens offered of a step whose report was lost", engine.offered(tokens), 0)
            engine.load(tokens)  # computes and saves it
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
        """After many requests and rounds the connector has no work left, and holds no page."""
        setting = Setting(num_pages=30, max_batch_tokens=40)
        simulate(target, seed, setting, make_prompts(rng, count=30), rounds=3)

    def test_hundred_requests_leave_room_for_one_more(self, target: Target, rng: random.Random) -> None:
        """With little memory, after a hundred requests that ended in every way, a new prompt is saved and loaded."""
        with StepEngine(target.with_arena(_SMALL_ARENA)) as engine:
            prompts = [self.tokens(rng, _PROMPT) for _ in range(4)]
            for number in range(100):
                request = engine.arrive(prompts[number // 2 % 4])
                if number % 5 < 4:  # else it is gone before it was asked about
                    engine.admit(request)
                if number % 5 < 3:  # else before its step
                    engine.step((request, len(request.tokens) - request.computed))
                if number % 5 == 2:
                    engine.reset(request)
                engine.finish(request)
            engine.settle()
            last = self.tokens(rng, _PROMPT)
            engine.save(last)
            must_equal(
                "tokens loaded of a prompt that was saved after a hundred requests",
                engine.load(last),
                _PROMPT - 1,
                hint="what a request claims must be let go, however it ends",
            )

    @pytest.mark.parametrize("call", ["read", "contains", "write"])
    def test_store_that_never_answers_is_survived(self, target: Target, rng: random.Random, call: str) -> None:
        """A store hangs in a call: requests are answered, and bytes that arrive after all overwrite nothing."""
        if not target.resolved.tiers:
            not_shown(f"{target.name} has no store that could hang")
        needs(target.capabilities.durable, "durable")
        stored = [self.tokens(rng, _PROMPT) for _ in range(2)]
        later = [self.tokens(rng, _PROMPT) for _ in range(3)]
        with StepEngine(target) as engine:
            for tokens in stored:
                engine.save(tokens)
        hang = _Hang(2 * target.patience_s)
        with StepEngine(_hanging(target, call, hang)) as engine:
            try:
                request = engine.arrive(stored[0])
                engine.admit(request)
                engine.finish(request)  # it computes nothing: what waited for its bytes may be used for others
                engine.settle()
                for tokens in later:
                    engine.save(tokens)
                engine.load(stored[1])
            finally:
                hang.end()
                took = max(each.seconds_in_hooks for each in (engine.leader, *engine.workers))
                must(  # before whatever else went wrong, which this would explain
                    took < target.patience_s,
                    expected="no hook to wait for a store that hangs",
                    got=f"{took:.1f} s within the hooks of one half",
                    hint="call a store on a thread of its own, and give up on it when its timeout has passed",
                )
            hang.wait_returned()
            engine.settle()
            for tokens in (*later, *stored):
                engine.load(tokens)

    def test_nothing_is_unpickled(self, target: Target, rng: random.Random, unpickled: list[str]) -> None:
        """Neither what was stored nor what somebody put in its place is unpickled: that would run a stranger's code."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
        self._load_again(target, tokens)
        must_equal("calls that unpickle, no pickle being allowed anywhere", unpickled, [], "parse with msgspec")
        trap = set_trap()
        for path in _stored_files(target):
            path.write_bytes(trap)
        self._load_again(target, tokens)
        must_equal("calls that unpickle, no pickle being allowed anywhere", unpickled, [], "parse with msgspec")
        must(not trap_sprung(), expected="stored bytes to be parsed, never executed", got="code in a file was run")

    def _load_again(self, target: Target, tokens: Sequence[int]) -> None:
        """Load in a new engine; a refusal at start is fine."""
        try:
            engine = StepEngine(target)
        except KVConnectError:
            return
        try:
            engine.load(tokens)
        except BrokenPromise:
            pass  # other tests say that; here only code that runs counts
        finally:
            engine.close()

    def _files(self, target: Target) -> list[Path]:
        needs(target.capabilities.durable, "durable")
        return _stored_files(target) or not_shown("the medium is no file that the kit could damage")

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


def _stored_files(target: Target) -> list[Path]:
    files = sorted(path for path in target.folder.rglob("*") if path.is_file() and path.stat().st_size > 0)
    return [path for path in files if path.stat().st_size >= _LARGE] or files


class _Hang:
    """Calls that do not return before `end`."""

    def __init__(self, longest_s: float) -> None:
        """Hang at most `longest_s` from the first call on, so that who waits without a deadline comes to an end too."""
        self._longest_s = longest_s
        self._until = 0.0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._inside = 0

    def __call__(self, call: Any, *args: Any) -> Any:
        with self._lock:
            self._inside += 1
            self._until = self._until or time.monotonic() + self._longest_s
        try:
            self._ended.wait(self._until - time.monotonic())
            return call(*args)
        finally:
            with self._lock:
                self._inside -= 1

    def end(self) -> None:
        """Let all of them return."""
        self._ended.set()

    def wait_returned(self) -> None:
        """Wait for them."""
        while self._inside:
            time.sleep(0.001)


def _hanging(target: Target, call: str, hang: _Hang) -> Target:
    """Return the target over stores of which one call hangs; it has less time than the test."""
    timeout_s = min(1.0, 0.3 * target.patience_s)

    def wrap(kind: type[BlockStore]) -> type[BlockStore]:
        def hangs(self: WrapperStore, *args: Any) -> Any:
            return hang(getattr(self.inner, call), *args)

        members = {"inner_class": kind, "Options": kind.Options, "capabilities": kind.capabilities, call: hangs}
        return type(f"Hanging{kind.__name__}", (WrapperStore,), members)

    hung = target.with_store(wrap)
    hung.resolved = msgspec.structs.replace(
        hung.resolved,
        tiers=tuple(
            msgspec.structs.replace(tier, use=msgspec.structs.replace(tier.use, timeout_s=timeout_s))
            for tier in hung.resolved.tiers
        ),
    )
    return hung


def watch_reads(target: Target) -> tuple[Target, list[str]]:
    """Return the target, and a list to which its stores add what is wrong with each frame that they read."""
    torn: list[str] = []

    def wrap(kind: type[BlockStore]) -> type[BlockStore]:
        class Watched(WrapperStore):
            inner_class = kind
            Options = kind.Options
            capabilities = kind.capabilities

            def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
                lengths = list(self.inner.read(keys, buffers))
                for key, buffer, length in zip(keys, buffers, lengths, strict=True):
                    if length is not None:
                        frame = buffer[:length]
                        payload_bytes = int.from_bytes(frame[24:32], "little")
                        try:
                            open_frame(frame, key=key, fingerprint=bytes(frame[104:136]), payload_bytes=payload_bytes)
                        except FrameCorrupt as error:
                            torn.append(str(error))
                return lengths

        return Watched

    return target.with_store(wrap), torn


def must_be_whole(torn: Sequence[str], when: str) -> None:
    """Break the promise if a store has read a frame that was not whole.

    Args:
        torn: What `watch_reads` saw.
        when: What had happened to the process that wrote it.
    """
    must(
        not torn,
        expected=f"every frame that a store reads to be whole, or a miss, {when}",
        got=f"{len(torn)} that are not; the first: {torn[0] if torn else ''}",
        hint="publish a frame in one step: write it under another name and rename, or in one transaction",
    )


def child_prompt(seed: int, number: int) -> list[int]:
    """Return a prompt that this process and a child both know."""
    rng = random.Random(f"{seed}:{number}")
    return [rng.randrange(50_000) for _ in range(_PROMPT)]


def run_child(
    target: Target, action: str, seed: int, *, prompts: int, times: int = 1, kill_after_s: float = 0.0
) -> dict[str, Any]:
    """Run `kvconnect.testing.child` over the target's medium, in a process of its own.

    Args:
        target: Must be something that another process can import.
        action: See `kvconnect.testing.child`.
        seed: Of its prompts.
        prompts: How many, each time.
        times: How often to do it, each time in a process of its own, with the prompts that come next.
        kill_after_s: SIGKILL it that long after it has done the first; 0 lets it end.

    Returns:
        ``status`` (exit status, negative for a signal), ``error`` (its last words), ``loaded`` tokens, ``seed``,
        ``done`` prompts.
    """
    task = {
        "connector": target.portable(),
        "folder": str(target.folder),
        "model": target.model,
        "action": action,
        "seed": seed,
        "prompts": prompts,
        "times": times,
        "patience_s": target.patience_s,
    }
    environ = {
        **os.environ,
        "PYTHONHASHSEED": str(seed % 1000),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    command = [sys.executable, "-m", "kvconnect.testing.child"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environ)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin as told:  # not as an argument, which everybody on the machine could read: it may hold a password
        json.dump(task, told)
    with ThreadPoolExecutor(2) as pool, process.stdout, process.stderr:
        reading = pool.submit(process.stderr.read)  # a pipe that is full would stop the child
        try:
            first = pool.submit(process.stdout.readline).result(timeout=60)
            if kill_after_s and first:
                time.sleep(kill_after_s)
                process.kill()
            rest = pool.submit(process.stdout.read).result(timeout=60)
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
        errors = reading.result()
    lines = [first.strip(), *rest.splitlines()]
    last = lines[-1]
    said = json.loads(last) if last.startswith("{") else {}
    error = "" if process.returncode == 0 else (errors.strip().splitlines() or [""])[-1]
    if "cannot be imported" in errors and not first:
        not_shown("another process cannot import the class under test: install it")
    return {"status": process.returncode, "error": error, "seed": seed, "done": lines.count("done"), **said}
