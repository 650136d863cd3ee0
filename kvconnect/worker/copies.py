"""Copies blocks between the paged cache and arena slots, for any strides. Knows no keys, plans or stores.

A block's payload is its part of each region, one behind the other, each dense in the region's own order. Where a
block's part has dense rows, on the CPU, they are copied as machine words through numpy, which lets other threads run
meanwhile; long runs of neighbours go through torch, on its threads. `benchmarks/copies.py` measures both against
memcpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from kvconnect.protocol import LayerGroup, Region
from kvconnect.store import HEADER_BYTES
from kvconnect.worker.arena import Arena
from kvconnect.worker.reorder import scatter_reordered

__all__ = ["BlockCopier"]

# Rows this long numpy copies in 0.7 of torch's time, longer ones in 0.5 to 0.6; with 16 or 32 bytes they are level.
_DENSE_BYTES = 64

# Below this a second thread costs more than it brings.
_PARALLEL_BYTES = 2 << 20

# Runs of neighbours that are this long in each region are copied on torch's threads, which the forward pass has just
# used and which still spin: 1.3 to 1.7 times as fast as numpy on two threads. For short ones starting them costs more.
_LONG_BYTES = 512 << 10

_Words = np.ndarray[Any, Any]


class BlockCopier:
    """Copies blocks of one layer group."""

    def __init__(self, group: LayerGroup, arena: Arena, order: str, pool: ThreadPoolExecutor | None) -> None:
        """Prepare views, so that a copy allocates nothing.

        Args:
            group: The layer group; its tensors stay where they are.
            arena: Where the slots are.
            order: `payload_order` of the group: how this rank packs.
            pool: Threads to share large copies among, None to copy on the caller's.
        """
        self._group = group
        self._arena = arena
        self._order = order
        self._pool = pool
        self._parts: list[tuple[int, int, Region]] = []  # payload start and end in a slot, in bytes
        start = HEADER_BYTES
        for region in group.regions:
            self._parts.append((start, start + region.block_bytes, region))
            start += region.block_bytes
        self._num_pages = int(group.regions[0].tensor.shape[0])
        self._words = self._word_views()
        self._whole = bool(self._words) and all(pages.ndim == 2 for _, pages in self._words)
        # by way of numpy: a tensor that was made in inference mode may not be written to outside of it
        self._tensors = [(torch.from_numpy(slots), torch.from_numpy(pages)) for slots, pages in self._words]

    def gather(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copy each page into its slot's payload; complete on return.

        Args:
            block_ids: Pages; none is negative.
            slots: The slot of each.
        """
        self._each(block_ids, slots, self._gather_words if self._words else self._gather_tensors, self._gather_runs)

    def scatter(self, block_ids: Sequence[int], slots: Sequence[int], orders: Sequence[str]) -> None:
        """Copy each slot's payload into its page; complete on return.

        Args:
            block_ids: Pages; none is negative.
            slots: The slot of each.
            orders: How each payload is packed, by the writer's `payload_order`.
        """
        native = [i for i, order in enumerate(orders) if order == self._order]
        if len(native) == len(orders):
            copy = self._scatter_words if self._words else self._scatter_tensors
            self._each(block_ids, slots, copy, self._scatter_runs)
            return
        self.scatter([block_ids[i] for i in native], [slots[i] for i in native], [self._order] * len(native))
        for block_id, slot, order in zip(block_ids, slots, orders, strict=True):
            if order != self._order:
                payload = self._arena.slots[slot, HEADER_BYTES : HEADER_BYTES + self._group.payload_bytes]
                scatter_reordered(payload, order, self._group, block_id)

    def _each(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        copy: Callable[[Sequence[tuple[int, int]]], None],
        copy_runs: Callable[[Sequence[tuple[int, int, int]]], None],
    ) -> None:
        pairs = list(zip(block_ids, slots, strict=True))
        if pairs and not (min(block_ids) >= 0 and max(block_ids) < self._num_pages):  # a slice would end there silently
            raise IndexError(f"pages {min(block_ids)} to {max(block_ids)} of {self._num_pages}")
        if pairs and not (min(slots) >= 0 and max(slots) < self._arena.num_slots):
            raise IndexError(f"slots {min(slots)} to {max(slots)} of {self._arena.num_slots}")
        num_bytes = len(pairs) * self._group.payload_bytes
        if self._pool is None or len(pairs) < 2 or num_bytes < _PARALLEL_BYTES:
            copy(pairs)
            return
        if self._whole and torch.get_num_threads() > 1:
            runs = list(_runs(pairs))
            if num_bytes >= len(runs) * len(self._parts) * _LONG_BYTES:
                copy_runs(runs)
                return
        half = len(pairs) // 2
        other = self._pool.submit(copy, pairs[half:])
        copy(pairs[:half])
        other.result()

    def _word_views(self) -> list[tuple[_Words, _Words]]:
        """Return, for each region, (slots, pages) as word arrays of one shape; nothing if some region has none.

        What is dense at the inner end of a block becomes one dimension of words, the rest stays as it is: a block that
        is dense as a whole has two dimensions, one that shares each head's memory with other regions has three.
        """
        views = []
        for start, end, region in self._parts:
            tensor = region.tensor
            if tensor.device.type != "cpu" or tensor.stride(-1) != 1:
                return []
            shape, strides, inner = list(tensor.shape), list(tensor.stride()), 1
            while len(shape) > 1 and strides[-1] == inner:
                inner *= shape.pop()
                strides.pop()
            if inner * tensor.element_size() < _DENSE_BYTES:
                return []
            pages = torch.as_strided(tensor, (*shape, inner), (*strides, 1))
            slots = self._arena.slots[:, start:end]
            for dtype in (torch.int64, torch.int32, torch.uint8):
                try:
                    words = pages.view(dtype)
                    views.append((slots.view(dtype).view(-1, *words.shape[1:]).numpy(), words.numpy()))
                    break
                except RuntimeError:  # size, stride or address is no multiple of the word
                    continue
        return views

    def _gather_words(self, pairs: Sequence[tuple[int, int]]) -> None:
        for block_id, slot, count in _runs(pairs):
            for slots, pages in self._words:
                slots[slot : slot + count] = pages[block_id : block_id + count]

    def _scatter_words(self, pairs: Sequence[tuple[int, int]]) -> None:
        for block_id, slot, count in _runs(pairs):
            for slots, pages in self._words:
                pages[block_id : block_id + count] = slots[slot : slot + count]

    def _gather_runs(self, runs: Sequence[tuple[int, int, int]]) -> None:
        for block_id, slot, count in runs:
            for slots, pages in self._tensors:
                slots[slot : slot + count].copy_(pages[block_id : block_id + count])

    def _scatter_runs(self, runs: Sequence[tuple[int, int, int]]) -> None:
        for block_id, slot, count in runs:
            for slots, pages in self._tensors:
                pages[block_id : block_id + count].copy_(slots[slot : slot + count])

    def _gather_tensors(self, pairs: Sequence[tuple[int, int]]) -> None:
        for block_id, slot in pairs:
            for part, region in self._slot_parts(slot):
                part.copy_(region.tensor[block_id])

    def _scatter_tensors(self, pairs: Sequence[tuple[int, int]]) -> None:
        for block_id, slot in pairs:
            for part, region in self._slot_parts(slot):
                region.tensor[block_id].copy_(part)

    def _slot_parts(self, slot: int) -> list[tuple[torch.Tensor, Region]]:
        row = self._arena.slots[slot]
        return [
            (row[start:end].view(region.tensor.dtype).view(region.block_shape), region)
            for start, end, region in self._parts
        ]


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (page, slot, count) of neighbours in both: one copy a run and region, where most prompts have one run."""
    start = 0
    for end in range(1, len(pairs) + 1):
        block_id, slot = pairs[start]
        if end == len(pairs) or pairs[end] != (block_id + end - start, slot + end - start):
            yield block_id, slot, end - start
            start = end
