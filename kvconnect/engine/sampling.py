"""Chooses the next token from logits: greedy, or seeded sampling with temperature and top-p. Knows no requests."""

from __future__ import annotations

import torch

__all__ = ["choose_token", "make_generator"]


def make_generator(seed: int | None) -> torch.Generator:
    """Return a source of randomness for one request, so that its tokens do not depend on its neighbours'."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def choose_token(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose one token.

    Args:
        logits: ``(vocabulary,)`` float32, finite.
        temperature: 0 takes the best token; otherwise logits are divided by it before the softmax.
        top_p: Sample from the smallest set of best tokens whose probabilities reach it; 1 keeps all.
        generator: Where randomness comes from; one number a call, so that a replay from the same state is the same.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits.double() / temperature, dim=0).sort(descending=True, stable=True)
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    edges = probabilities.cumsum(0)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * edges[-1]
    index = int(torch.searchsorted(edges, drawn, right=True))
    return int(tokens[min(index, int((probabilities > 0).sum()) - 1)])
