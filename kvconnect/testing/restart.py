"""A second process over the same medium: restarts, crashes, other hash seeds."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvconnect.testing.faults import child_prompt, must_be_whole, run_child, watch_reads
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.target import Target

__all__ = ["RestartTests"]

_COUNT = 5
_LOADED = 6 * BLOCK
_CRASHES = 3
_PROMPTS = 8  # that a process saves until it comes to its limit
_NOT_CUT = "the medium is no file whose writes the kit can cut off"


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
        last = done["done"]
        self._goes_on(target, done["seed"], range(max(0, last - 9), last + 1))  # the last one is half there, at best

    def test_write_that_is_cut_off_leaves_whole_blocks_or_none(
        self, target: Target, rng: random.Random, quick: bool
    ) -> None:
        """Crash safe: after a process is killed within a write, what is loaded is right, and saving goes on."""
        needs(target.capabilities.durable, "durable")
        with StepEngine(target) as engine:
            engine.save(self.tokens(rng, _LOADED + 1))
        seen = 0
        for action in ("cut-new", "cut-grown"):
            seed = self._cut_off(target, rng, action, 1)
            if seed is not None:
                self._goes_on(target, seed, range(_PROMPTS))
                seen += 1
                if quick:
                    break
        if not seen:
            not_shown(_NOT_CUT)

    def test_crashes_leave_no_litter(self, target: Target, rng: random.Random) -> None:
        """Crash safe: what processes leave that are killed within a write is gone after another one has worked."""
        needs(target.capabilities.durable, "durable")
        counts = []
        for _ in range(2):
            with StepEngine(target) as engine:
                engine.save(self.tokens(rng, _LOADED + 1))
            counts.append(_count_files(target.folder))
        seed = self._cut_off(target, rng, "cut-new", _CRASHES)
        if seed is None:
            not_shown(_NOT_CUT)
        prompts = [child_prompt(seed, number) for number in range(_CRASHES * _PROMPTS)]
        with StepEngine(target) as engine:
            for tokens in (*prompts, self.tokens(rng, _LOADED + 1)):
                engine.load(tokens)  # saves what was lost
        most = counts[1] + (len(prompts) + 1) * (counts[1] - counts[0])
        left = _count_files(target.folder)
        must(
            left <= most,
            expected=f"at most {most} files: as many for each prompt as without a crash",
            got=f"{left} after {_CRASHES} crashes and a new start",
            hint="remove what crashed processes left when the store is opened",
        )

    def _cut_off(self, target: Target, rng: random.Random, action: str, times: int) -> int | None:
        """Let processes be killed within a write.

        Returns:
            The seed of the prompts that they tried to save; None if no write was cut off.
        """
        if not _count_files(target.folder):
            return None
        done = run_child(target, action, rng.getrandbits(32), prompts=_PROMPTS, times=times)
        if done["status"] == 0:
            return None
        must_equal("signal that ended the other process", done["status"], -signal.SIGXFSZ, done["error"])
        return int(done["seed"])

    def _goes_on(self, target: Target, seed: int, numbers: Sequence[int]) -> None:
        """Look at what a crash has left of these prompts, and save it again."""
        prompts = [child_prompt(seed, number) for number in numbers]
        watched, torn = watch_reads(target)
        loaded = []
        for _ in range(2):  # each time from the medium
            with StepEngine(watched) as engine:
                loaded.append([engine.load(tokens) for tokens in prompts])
            must_be_whole(torn, "after a crash")
        must_equal(
            "tokens loaded in the second round",
            loaded[1],
            [_LOADED] * len(prompts),
            hint="blocks that a crash has lost must be saved again",
        )


def _count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))
