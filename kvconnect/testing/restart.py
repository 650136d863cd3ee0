"""A second process over the same medium: restarts, crashes, other hash seeds."""

from __future__ import annotations

import random

import pytest

from kvconnect.testing.faults import child_prompt, run_child
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs
from kvconnect.testing.target import Target

__all__ = ["RestartTests"]

_COUNT = 5
_LOADED = 6 * BLOCK


class RestartTests(Kit):
    """Durable and shared, as seen from another process."""

    def test_another_process_finds_what_this_one_saved(self, target: Target, rng: random.Random) -> None:
        """Durable: a process started later, with another hash seed, loads every block, all bytes right."""
        needs(target.capabilities.durable, "durable")
        seed = rng.getrandbits(32)
        with StepEngine(target) as engine:
            for number in range(_COUNT):
                engine.save(child_prompt(seed, number))
        done = run_child(target, "load", seed, prompts=_COUNT)
        must_equal("exit status of the other process", done["status"], 0, done["error"])
        must_equal("tokens that it loaded", done["loaded"], _COUNT * _LOADED)

    def test_this_process_finds_what_another_saved(self, target: Target, rng: random.Random) -> None:
        """Durable: what an engine saved in a process that has ended is loaded here."""
        needs(target.capabilities.durable, "durable")
        done = run_child(target, "save", rng.getrandbits(32), prompts=_COUNT)
        must_equal("exit status of the other process", done["status"], 0, done["error"])
        seed = done["seed"]
        with StepEngine(target) as engine:
            loaded = sum(engine.load(child_prompt(seed, number)) for number in range(_COUNT))
        must_equal("tokens loaded of what it saved", loaded, _COUNT * _LOADED)

    @pytest.mark.parametrize("number", range(5))
    def test_killed_process_leaves_whole_blocks_or_none(
        self, target: Target, rng: random.Random, quick: bool, number: int
    ) -> None:
        """Crash safe: after SIGKILL in the middle of saving, what is loaded is right, and saving goes on."""
        needs(target.capabilities.durable, "durable")
        if quick and number >= 1:
            pytest.skip("quick")
        done = run_child(target, "save", rng.getrandbits(32), prompts=100_000, kill_after_s=0.02 + 0.3 * rng.random())
        must_equal("signal that ended the other process", done["status"], -9, done["error"])
        seed = done["seed"]
        with StepEngine(target) as engine:
            loaded = [engine.load(child_prompt(seed, number)) for number in range(10)]
            again = [engine.load(child_prompt(seed, number)) for number in range(10)]
        must(
            all(second >= first for first, second in zip(loaded, again, strict=True)) and again[0] == _LOADED,
            expected="blocks to be saved again where the crash had lost them",
            got=f"{again} tokens loaded in the second round",
        )
