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
        self._simulate(target, rng, seed)

    @pytest.mark.parametrize("number", range(4))
    def test_arena_smaller_than_a_prompt_is_enough(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """With room for a few blocks, loads and saves compete: evictions, rounds, drops, and right bytes."""
        if quick and number >= 1:
            pytest.skip("quick")
        small = target.with_arena(f"{rng.choice([24, 40, 96])}KiB")
        needs(small is not target, "host")
        self._simulate(small, rng, seed)

    def _simulate(self, target: Target, rng: random.Random, seed: int) -> None:
        can = target.capabilities
        setting = Setting.draw(
            rng, several_groups=can.several_groups, several_ranks=can.several_ranks, async_load=can.async_load
        )
        simulate(target, seed, setting, make_prompts(rng))
