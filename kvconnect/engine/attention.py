"""One paged attention function under every transformers model: writes K and V into pages, attends, calls layer hooks.

It is registered in `transformers.AttentionInterface`; a step's metadata reaches it through a context variable, because
not every model hands extra arguments down to its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kvconnect.engine.pages import LayerCache
from kvconnect.errors import UnsupportedError

if TYPE_CHECKING:
    from kvconnect.driver import WorkerDriver

__all__ = ["PAGED_ATTENTION", "BatchEntry", "StepContext", "current_step"]

PAGED_ATTENTION = "kvconnect_paged"


class BatchEntry:
    """One sequence's part of a flattened batch.

    Attributes:
        rows: Where its tokens lie in the batch, ``[start, end)``.
        start: Position of the first of them in the sequence; what comes before is in the pages.
        page_rows: For each layer group, the flat row (page * block_size + offset) of every position up to the last one;
            rows of positions without a page are never looked at.
    """

    __slots__ = ("page_rows", "rows", "start")

    def __init__(self, rows: tuple[int, int], start: int, page_rows: Sequence[torch.Tensor]) -> None:
        """Describe the sequence."""
        self.rows = rows
        self.start = start
        self.page_rows = page_rows


class StepContext:
    """What the attention function needs to know of the step that is running."""

    __slots__ = ("entries", "layers", "workers")

    def __init__(
        self, entries: Sequence[BatchEntry], layers: Sequence[LayerCache], workers: Sequence[WorkerDriver]
    ) -> None:
        """Describe the step."""
        self.entries = entries
        self.layers = layers
        self.workers = workers


current_step: ContextVar[StepContext] = ContextVar("kvconnect_step")


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over pages.

    Args:
        module: The attention layer; its ``layer_idx`` chooses the pages.
        query: ``(1, num_heads, num_tokens, head_dim)``, the sequences of the batch behind one another.
        key: ``(1, num_kv_heads, num_tokens, head_dim)``.
        value: The same.
        attention_mask: None: each sequence's mask follows from its positions.
        scaling: Of the scores.
        dropout: Not used; the model is in evaluation mode.
        sliding_window: The layer's own word, compared with the cache's.
        softcap: Of the scores, for models that cap them.
        kwargs: Refused where they would change the result.

    Returns:
        ``(1, num_tokens, num_heads, head_dim)`` and None for the weights.
    """
    step = current_step.get()
    layer: int = module.layer_idx  # type: ignore[assignment]  # transformers sets it on every attention module
    cache = step.layers[layer]
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedError("attention sinks and position biases are not served by the reference engine")
    if (sliding_window or None) != cache.window or key.shape[1:4:2] != cache.key.shape[2:]:
        raise UnsupportedError(f"layer {layer} attends otherwise than its model's configuration says")
    for worker in step.workers:
        worker.wait_for_layer_load(layer)
    flat_key, flat_value = cache.key.flatten(0, 1), cache.value.flatten(0, 1)
    rows = torch.cat([entry.page_rows[cache.group][entry.start :] for entry in step.entries])
    flat_key[rows] = key[0].transpose(0, 1)
    flat_value[rows] = value[0].transpose(0, 1)
    out = torch.empty_like(query.transpose(1, 2))
    for entry in step.entries:
        start, end = entry.rows
        out[0, start:end] = _attend(query[0, :, start:end], flat_key, flat_value, entry, cache, scaling, softcap)
    for worker in step.workers:
        worker.save_kv_layer(layer)
    return out, None


def _attend(
    query: torch.Tensor,
    flat_key: torch.Tensor,
    flat_value: torch.Tensor,
    entry: BatchEntry,
    cache: LayerCache,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return ``(num_tokens, num_heads, head_dim)``. Reads only positions that some query of the sequence attends to."""
    count = query.shape[1]
    first = 0 if cache.window is None else max(0, entry.start - cache.window + 1)
    context = entry.page_rows[cache.group][first:]
    keys = flat_key[context].transpose(0, 1)
    values = flat_value[context].transpose(0, 1)
    mask = None
    if count > 1 or cache.window is not None:
        queries = torch.arange(entry.start, entry.start + count)[:, None]
        positions = torch.arange(first, entry.start + count)[None, :]
        mask = positions <= queries
        if cache.window is not None:
            mask &= positions > queries - cache.window
    if softcap is None:
        attended = scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, scale=scaling, enable_gqa=True
        )[0]
    else:
        repeat = query.shape[0] // keys.shape[0]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ keys.repeat_interleave(repeat, 0).transpose(1, 2) * scale
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        attended = weights @ values.repeat_interleave(repeat, 0)
    return attended.transpose(0, 1)


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
