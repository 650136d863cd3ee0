"""Runs the model over one step's flattened batch. Knows pages and rows, no requests' fate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvconnect.driver import WorkerDriver
from kvconnect.engine.attention import BatchEntry, StepContext, current_step
from kvconnect.engine.model import LoadedModel
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest
from kvconnect.engine.scheduler import Batch

__all__ = ["ModelRunner"]


class ModelRunner:
    """A model and the pages it writes to."""

    def __init__(self, loaded: LoadedModel, cache: PagedCache, workers: Sequence[WorkerDriver]) -> None:
        """Bind them."""
        self._model = loaded.model
        self._cache = cache
        self._workers = workers

    @torch.inference_mode()
    def forward(self, batch: Batch, sampled: Mapping[EngineRequest, int]) -> torch.Tensor:
        """Compute the batch.

        Args:
            batch: At least one part.
            sampled: Tokens of the step before that the scheduler has not seen; a request that needs one and has none is
                lost already, and any token will do.

        Returns:
            Logits ``(number of parts, vocabulary)``, of each part's last token.
        """
        tokens: list[int] = []
        positions: list[int] = []
        entries = []
        for request, _, start, count, _ in batch.parts:
            rows = (len(tokens), len(tokens) + count)
            tokens += request.tokens[start : start + count]
            if len(tokens) < rows[1]:
                tokens.append(sampled.get(request, 0))
            positions += range(start, start + count)
            entries.append(BatchEntry(rows, start, [self._page_rows(table, start + count) for table in request.tables]))
        token = current_step.set(StepContext(entries, self._cache.layers, self._workers))
        try:
            output = self._model(
                input_ids=torch.tensor([tokens]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=torch.tensor([entry.rows[1] - 1 for entry in entries]),
            )
        finally:
            current_step.reset(token)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _page_rows(self, table: Sequence[int], num_tokens: int) -> torch.Tensor:
        size = self._cache.block_size
        pages = torch.tensor(table)
        rows = pages[:, None] * size + torch.arange(size)
        return rows.flatten()[:num_tokens]
