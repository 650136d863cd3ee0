"""Random prompts; imports no vLLM, for tests that start it in other processes."""

from __future__ import annotations

import random

__all__ = ["prompts_of"]


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Return random prompts of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(500) for _ in range(length)] for length in lengths]
