"""Mutants that move the wrong bytes, to the wrong place, or at the wrong time."""

from __future__ import annotations

import threading
import time
from typing import Any

from kvconnect.testing.loads import LoadTests
from kvconnect.testing.mutants.base import Right, leader, mutant, worker
from kvconnect.worker import OffloadWorker
from kvconnect.worker.copies import BlockCopier

__all__: list[str] = []

_HOLDS = LoadTests.test_loaded_blocks_hold_what_was_computed


def _copying(kind: type[BlockCopier]) -> type[OffloadWorker]:
    """Return a worker that copies in its own way."""

    def register_kv_caches(self: Any, layout: Any) -> None:
        OffloadWorker.register_kv_caches(self, layout)
        for copier in self._copiers:
            copier.__class__ = kind

    return worker(register_kv_caches=register_kv_caches)


class _SwapsParts(BlockCopier):
    """Reads the part at ``other(index, count)`` where it should read the one at index."""

    def _scatter_words(self, pairs: Any) -> None:
        assert self._words is not None
        count = len(self._words)
        for index, (_, pages) in enumerate(self._words):
            slots = self._words[self.other(index, count)][0]
            for block_id, slot in pairs:
                pages[block_id] = slots[slot]

    def other(self, index: int, count: int) -> int:
        return index ^ 1


@mutant(_HOLDS, "value of layer 0|key of layer 0")
class SwapsKeysAndValues(Right):
    """Writes keys where values belong."""

    worker = _copying(_SwapsParts)


class _ShiftsLayers(_SwapsParts):
    def other(self, index: int, count: int) -> int:
        return (index + 2) % count


@mutant(_HOLDS, "of layer 1")
class IsOffByOneLayer(Right):
    """Writes each layer's KV into the next layer."""

    worker = _copying(_ShiftsLayers)


class _Transposes(BlockCopier):
    def scatter(self, block_ids: Any, slots: Any, orders: Any) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            for part, region in self._slot_parts(slot):
                target = region.tensor[block_id]
                target.copy_(part.transpose(0, 1).reshape(target.shape))


@mutant(_HOLDS, "elements|bytes of nothing|position")
class TransposesHeadsAndTokens(Right):
    """Takes tokens for heads."""

    worker = _copying(_Transposes)


class _ForgetsOne(BlockCopier):
    def _gather_words(self, pairs: Any) -> None:
        assert self._words is not None
        words, self._words = self._words, self._words[:-2]
        super()._gather_words(pairs)
        self._words = words


@mutant(_HOLDS, "layer 1")
class ForgetsTheLastLayer(Right):
    """Copies every layer but the last."""

    worker = _copying(_ForgetsOne)


def _load_late(self: Any) -> None:
    loads = self._now.take("loads")
    OffloadWorker.start_load_kv(self)

    def run() -> None:
        time.sleep(0.02)
        self._load(loads)

    threading.Thread(target=run, daemon=True).start()


@mutant(_HOLDS, "nobody wrote it")
class LoadsInTheBackground(Right):
    """Starts a load that is not asynchronous, and does not wait for it before the layers attend."""

    worker = worker(start_load_kv=_load_late)


def _save_early(self: Any) -> None:
    OffloadWorker.wait_for_save(self)
    OffloadWorker.start_load_kv(self)


@mutant(_HOLDS, "nobody wrote it|a saved prompt to be loaded|bytes of nothing")
class SavesBeforeTheLayerHasRun(Right):
    """Reads the pages of a save before the forward pass has filled them."""

    worker = worker(start_load_kv=_save_early)


class _OnePastTheEnd(BlockCopier):
    def _scatter_words(self, pairs: Any) -> None:
        assert self._words is not None
        super()._scatter_words(pairs)
        for slots, pages in self._words:
            pages[max(page for page, _ in pairs) + 1] = slots[pairs[-1][1]]


@mutant(LoadTests.test_load_touches_its_pages_and_no_other, "foreign: ")
class WritesOneBlockPastTheRange(Right):
    """Copies a block too many."""

    worker = _copying(_OnePastTheEnd)


def _claim_holes(self: Any, request: Any, block_ids: Any, num_external_tokens: int) -> None:
    last = 47  # the kit's last page, which is what an index of -1 means
    full = [[last if page < 0 else page for page in table] for table in block_ids]
    _allocated(self, request, full, num_external_tokens)


_allocated = Right.leader.update_state_after_alloc


def _load_anywhere(self: Any, loads: Any) -> None:
    for move in loads:
        held = self._held.get(move.slot)
        if held is not None:
            for slots, pages in self._copiers[move.group]._words:
                pages[move.target] = slots[move.slot]


@mutant(LoadTests.test_block_without_a_page_is_skipped, "pages written that are not the request's")
class LoadsIntoMinusOne(Right):
    """Uses a block id of -1 as an index: Python's last page, which is somebody else's."""

    leader = leader(update_state_after_alloc=_claim_holes)
    worker = worker(_load=_load_anywhere)


def _start_again(self: Any) -> None:
    loads = list(self._now.loads)
    OffloadWorker.start_load_kv(self)
    self._now.loads = loads


def _report_loads_once(self: Any) -> bytes:
    kept, self._now.loads = self._now.loads, []
    report = OffloadWorker.build_worker_report(self)
    self._now.loads = kept
    return report


@mutant(LoadTests.test_plan_is_applied_once, "applied before")
class ReplaysItsPlan(Right):
    """Applies a plan whenever it is asked to start."""

    worker = worker(start_load_kv=_start_again, build_worker_report=_report_loads_once)


def _start_nothing(self: Any) -> None:
    self._started = self._now.take("loads")
    OffloadWorker.start_load_kv(self)


def _load_with_the_layer(self: Any, layer: int) -> None:
    if layer == 0:
        self._load(self.__dict__.pop("_started", ()))


@mutant(LoadTests.test_loads_may_start_after_the_forward_pass, "nobody wrote it")
class LoadsOnlyInLayerHooks(Right):
    """Makes loads when the first layer waits for them, and never if no layer does."""

    worker = worker(start_load_kv=_start_nothing, wait_for_layer_load=_load_with_the_layer)


def _plan_for_the_batch(self: Any, draft: Any) -> None:
    for request_id, state in self._requests.items():
        if request_id in self._batch:
            draft.load(state, state.loads)
        else:  # a fresh start each step: nobody else's loads are left lying about
            self._index.release_chain(load.entry for load in state.loads)
        state.loads = []


def _note_the_batch(self: Any, scheduler_output: Any) -> bytes:
    parts = (*scheduler_output.new_requests, *scheduler_output.cached_requests)
    self._batch = {part.request_id for part in parts}
    return Right.leader.build_connector_meta(self, scheduler_output)


@mutant(LoadTests.test_load_waits_for_its_request, "nobody wrote it")
class DropsLoadsOfOthers(Right):
    """Forgets pending loads of requests that are not in the step's batch."""

    leader = leader(_plan_loads=_plan_for_the_batch, build_connector_meta=_note_the_batch)


def _chunks_by_page(self: Any, scheduler_output: Any) -> bytes:
    for part in (*scheduler_output.new_requests, *scheduler_output.cached_requests):
        tokens = self._requests[part.request_id].chain.num_tokens
        chunks = [range(start, start + self._block_size) for start in range(0, tokens, self._block_size)]
        assert all(chunks[ordinal] for ordinal, _ in enumerate(part.block_ids[0]))
    return Right.leader.build_connector_meta(self, scheduler_output)


@mutant(LoadTests.test_more_pages_than_tokens_are_fine, "IndexError")
class IndexesAsManyBlocksAsPages(Right):
    """Takes the number of pages for the number of blocks that the prompt fills."""

    leader = leader(build_connector_meta=_chunks_by_page)
