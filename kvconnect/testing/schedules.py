"""Random schedules: everything at once, byte for byte."""

from __future__ import annotations

import random

import pytest

from kvconnect.testing.harness import BLOCK
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import needs
from kvconnect.testing.simulation import Setting, make_prompts, simulate
from kvconnect.testing.target import Target

__all__ = ["ScheduleTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2


class ScheduleTests(Kit):
    """Whatever comes together, layers read right bytes."""

    @pytest.mark.parametrize("number", range(8))
    def test_any_schedule_reads_right_bytes(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """Chunks, preemption, aborts, eviction, ranks, parked loads and steps planned ahead, in any order."""
        if quick and number >= 3:
            pytest.skip("quick")
        simulate(target, seed, self._setting(target, rng), make_prompts(rng))

    @pytest.mark.parametrize("number", range(4))
    def test_arena_smaller_than_a_prompt_is_enough(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """With room for a few blocks, loads and saves compete: evictions, rounds, drops, and right bytes."""
        if quick and number >= 1:
            pytest.skip("quick")
        setting = self._setting(target, rng)
        small = target.with_arena(setting.arena_bytes(rng.randrange(3, 25)))
        needs(small is not target, "host")
        simulate(small, seed, setting, make_prompts(rng, count=3), rounds=6)  # few prompts, often: some are still there

    def _setting(self, target: Target, rng: random.Random) -> Setting:
        can = target.capabilities
        return Setting.draw(
            rng, several_groups=can.several_groups, several_ranks=can.several_ranks, async_load=can.async_load
        )
