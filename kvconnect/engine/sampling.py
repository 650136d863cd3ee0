"""Chooses the next token from logits: greedy, or seeded sampling with temperature and top-p. Knows no requests."""

from __future__ import annotations

import random

import torch

__all__ = ["choose_token", "draw"]


def draw(seed: int, position: int) -> float:
    """Return the number in ``[0, 1)`` that chooses a request's token at `position`.

    It depends on nothing else: a token that is thrown away and sampled again, after a preemption or a load that failed,
    is the same one, whatever else was in the batch.
    """
    return random.Random(f"{seed}:{position}").random()


def choose_token(logits: torch.Tensor, temperature: float, top_p: float, drawn: float) -> int:
    """Choose one token.

    Args:
        logits: ``(vocabulary,)`` float32, finite.
        temperature: 0 takes the best token; otherwise logits are divided by it before the softmax.
        top_p: Sample from the smallest set of best tokens whose probabilities reach it; 1 keeps all.
        drawn: A number in ``[0, 1)``, not looked at if the temperature is 0.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits.double() / temperature, dim=0).sort(descending=True, stable=True)
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    edges = probabilities.cumsum(0)
    index = int(torch.searchsorted(edges, drawn * edges[-1], right=True))
    return int(tokens[min(index, int((probabilities > 0).sum()) - 1)])
