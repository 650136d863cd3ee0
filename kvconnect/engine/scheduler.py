"""Decides what each step computes: continuous batching, chunked prefill, preemption. Calls the leader; runs no model.

A step computes at most `max_batch_tokens` tokens. Running requests go first, then waiting ones in the order of arrival.
When pages run out, the request that was admitted last gives its pages back and is computed again later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvconnect.driver import LeaderDriver
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest
from kvconnect.protocol import ScheduledRequest, SchedulerOutput

__all__ = ["Batch", "BatchPart", "Scheduler"]

logger = logging.getLogger(__name__)

# A connector that never reports a save may keep pages this long; then another request needs them more.
_SAVE_DEADLINE_S = 30.0

# And one that never reports a load may keep its pages for good, but not the request: that is computed in other pages.
_LOAD_DEADLINE_S = 60.0


class _Saving:
    """Pages of a request that has ended; `deadline` begins with the first step after that."""

    def __init__(self, tables: list[list[int]]) -> None:
        self.tables = tables
        self.deadline = float("inf")
        self.ranks: set[int] = set()


class BatchPart(NamedTuple):
    """One request's part of a step.

    Attributes:
        request: The request.
        run: Which of its runs this is; a request that was reset or ended since has another.
        start: First position that it computes.
        num_tokens: How many.
        samples: Whether the last of them gives a token, or is a chunk's end whose logits mean nothing.
    """

    request: EngineRequest
    run: int
    start: int
    num_tokens: int
    samples: bool

    @property
    def counts(self) -> bool:
        """Whether what the step computed still means anything for the request."""
        return self.run == self.request.run


class Batch:
    """What one step computes.

    Attributes:
        parts: A part for each request.
        fresh: Pages handed out for it, by layer group.
        preempted: Requests that lost their pages.
        loading: Requests of `parts` for which the step loads before it computes.
    """

    def __init__(self, num_groups: int) -> None:
        """Start empty."""
        self.parts: list[BatchPart] = []
        self.fresh: list[list[int]] = [[] for _ in range(num_groups)]
        self.preempted: list[str] = []
        self.loading: set[EngineRequest] = set()

    def remove(self, request: EngineRequest) -> int:
        """Take a request out before the step has run; return the tokens it was to compute."""
        removed = sum(part.num_tokens for part in self.parts if part.request is request)
        self.parts = [part for part in self.parts if part.request is not request]
        self.loading.discard(request)
        return removed

    def failed_loads(self, bad_pages: Sequence[set[int]] | None) -> set[EngineRequest]:
        """Return the requests whose loads failed.

        Args:
            bad_pages: Pages that were not loaded, by group; None if no load of the step can be trusted.
        """
        if bad_pages is None:
            return set(self.loading)
        return {
            request
            for request in self.loading
            if any(not pages.isdisjoint(table) for pages, table in zip(bad_pages, request.tables, strict=True))
        }


class Scheduler:
    """Waiting and running requests."""

    def __init__(
        self, cache: PagedCache, leader: LeaderDriver | None, *, max_batch_tokens: int, max_num_seqs: int
    ) -> None:
        """Start with no requests."""
        self.waiting: deque[EngineRequest] = deque()
        self.running: list[EngineRequest] = []
        self.parked: dict[str, EngineRequest] = {}
        self.num_lost_loads = 0
        self._orphans: dict[str, tuple[list[list[int]], set[int]]] = {}  # pages that a load may still write to
        self.num_preemptions = 0
        self.num_lost_saves = 0
        self._saving: dict[str, _Saving] = {}
        self._newly_saving: set[str] = set()
        self._cache = cache
        self._leader = leader
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._step = 0

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running or self.parked)

    def add(self, request: EngineRequest) -> None:
        """Queue a request and tell the leader."""
        self.waiting.append(request)
        if self._leader is not None:
            self._leader.on_new_request(request.view())

    def schedule(self) -> Batch:
        """Choose what the next step computes, and give it pages.

        The results of the step before may still be out: a request goes on from where that step will leave it, over a
        token that it will have sampled.
        """
        batch = Batch(len(self._cache.pools))
        budget = self._max_batch_tokens
        for request in list(self.running):
            if not budget:
                break
            if request in self.running:  # it may have been preempted for one before it
                budget = self._continue(batch, request, budget)
        if not batch.preempted:
            self._admit(batch, budget)
        for part in batch.parts:
            part.request.num_computed = part.start + part.num_tokens
            part.request.num_pending += part.samples
        return batch

    def output(self, batch: Batch) -> SchedulerOutput:
        """Describe the batch for the leader, and count the step."""
        new: list[ScheduledRequest] = []
        cached: list[ScheduledRequest] = []
        for request, _, start, count, _ in batch.parts:
            described = ScheduledRequest(
                request_id=request.request_id,
                num_computed_tokens=start,
                num_scheduled_tokens=count,
                num_tokens=len(request.tokens),
                new_tokens=request.tokens[request.num_told :],
                block_ids=request.tables,
            )
            request.num_told = len(request.tokens)
            (cached if request.scheduled_before else new).append(described)
            request.scheduled_before = True
        step, self._step = self._step, self._step + 1
        return SchedulerOutput(
            step=step, new_requests=tuple(new), cached_requests=tuple(cached), preempted=tuple(batch.preempted)
        )

    def advance(self, part: BatchPart) -> None:
        """Note that a part is computed and right; full blocks can be found by others now."""
        request, computed = part.request, part.start + part.num_tokens
        full = computed // self._cache.block_size
        self._cache.name_full(request.tables, request.chain.hashes, request.num_named, full)
        request.num_named = full
        self._cache.release_stale(request.tables, computed)

    def finish(self, request: EngineRequest) -> None:
        """Tell the leader that a request ended, and let its pages go unless the leader still saves them."""
        request.run += 1
        self.running.remove(request)
        keeps = False
        try:
            keeps = self._leader is not None and self._leader.request_finished(request.view(), request.tables)
        finally:  # an interrupt in the middle of it must not cost the pages
            if keeps:
                self._saving[request.request_id] = _Saving(request.tables)
                self._newly_saving.add(request.request_id)
            else:
                self._cache.release_all(request.tables)

    def abort(self, request: EngineRequest) -> None:
        """End a request that is not finished, wherever it is; a finished one is left alone."""
        if request in self.waiting:  # it holds no pages
            self.waiting.remove(request)
            if self._leader is not None:
                self._leader.request_finished(request.view(), request.tables)
        elif request in self.running:
            self.finish(request)
        elif request.request_id in self.parked:  # its pages are free when the load has ended
            request.aborted = True
            if self._leader is not None:
                self._leader.request_finished(request.view(), request.tables)

    def take_newly_saving(self) -> frozenset[str]:
        """Return the requests that ended since the last call and whose pages wait for their saves."""
        ids, self._newly_saving = frozenset(self._newly_saving), set()
        for request_id in ids:
            self._saving[request_id].deadline = time.monotonic() + _SAVE_DEADLINE_S
        return ids

    def saves_ended(self, rank: int, request_ids: frozenset[str], *, num_ranks: int) -> None:
        """Take what one rank says of saves that ended; pages go when every rank has said so, or at the deadline."""
        for request_id in request_ids & self._saving.keys():
            self._saving[request_id].ranks.add(rank)
        now = time.monotonic()
        for request_id, saving in list(self._saving.items()):
            complete = len(saving.ranks) == num_ranks
            if complete or now > saving.deadline:
                self._cache.release_all(saving.tables)
                del self._saving[request_id]
                if not complete:
                    self.num_lost_saves += 1
                    logger.warning("kvconnect: saves of %s were not reported in time; its pages are freed", request_id)

    @property
    def num_saving(self) -> int:
        """Requests that ended and whose pages are still being saved."""
        return len(self._saving)

    def _continue(self, batch: Batch, request: EngineRequest, budget: int) -> int:
        """Schedule a running request; return what is left of the budget."""
        if request.num_generated + request.num_pending >= request.params.max_tokens:
            return budget  # its last token is on its way
        count = min(len(request.tokens) + request.num_pending - request.num_computed, budget)
        while True:
            fresh = self._cache.extend(
                request.tables, request.chain.hashes, 0, request.num_computed, request.num_computed + count
            )
            if fresh is not None:
                self._enter(batch, request, request.num_computed, count, fresh)
                return budget - count
            victim = self.running[-1]
            budget += batch.remove(victim)
            self.reset_request(victim)
            batch.preempted.append(victim.request_id)
            self.num_preemptions += 1
            if victim is request:
                return budget

    def _admit(self, batch: Batch, budget: int) -> None:
        """Schedule waiting requests while there are tokens, pages and seats."""
        for request in list(self.waiting):
            if not budget or len(self.running) + len(self.parked) >= self._max_num_seqs:
                return
            block_size = self._cache.block_size
            matched = self._cache.match(request.chain.hashes, (len(request.tokens) - 1) // block_size)
            loaded, parks = 0, False
            if self._leader is not None and request.failed_loads < request.MAX_FAILED_LOADS:
                offer = self._leader.get_num_new_matched_tokens(request.view(), matched * block_size)
                if offer.num_tokens is None:
                    continue  # ask again next step; those behind it need not wait
                loaded, parks = offer.num_tokens, offer.load_async
            if parks:
                if not self._park(batch, request, matched, loaded):
                    return
                continue
            admitted = self._allocate(request, matched, loaded, budget)
            if admitted is None:
                return
            computed, count, fresh = admitted
            loaded = computed - matched * block_size
            request.num_computed = computed
            request.num_named = matched
            request.num_reused = matched * block_size
            request.num_loaded = loaded
            if loaded:
                batch.loading.add(request)
            self.waiting.remove(request)
            self.running.append(request)
            self._enter(batch, request, computed, count, fresh)
            budget -= count

    def _park(self, batch: Batch, request: EngineRequest, matched: int, loaded: int) -> bool:
        """Give a waiting request the pages of an asynchronous load, and wait; False if there are too few pages."""
        computed = matched * self._cache.block_size + loaded
        fresh = self._cache.extend(request.tables, request.chain.hashes, matched, computed, computed)
        if fresh is None:
            return False
        assert self._leader is not None, "only a leader offers asynchronous loads"
        self.waiting.remove(request)
        request.num_reused = matched * self._cache.block_size
        request.num_loaded = loaded
        request.give_up_at = time.monotonic() + _LOAD_DEADLINE_S
        for pages, taken in zip(batch.fresh, fresh, strict=True):
            pages += taken
        if self._leader.update_state_after_alloc(request.view(), request.tables, loaded):
            self.parked[request.request_id] = request
        else:  # the leader failed: nothing will be loaded
            self._cache.release_all(request.tables)
            request.reset()
            request.failed_loads += 1
            self.waiting.appendleft(request)
        return True

    def bad_blocks(self, bad_pages: Sequence[set[int]] | None) -> dict[EngineRequest, set[int]]:
        """Return which blocks of parked requests did not arrive in a step; the leader names lost ones itself."""
        found: dict[EngineRequest, set[int]] = {}
        for request in self.parked.values() if bad_pages is not None else ():
            for pages, table in zip(bad_pages or (), request.tables, strict=True):
                bad = {block for block, page in enumerate(table) if page in pages}
                if bad:
                    found.setdefault(request, set()).update(bad)
        return found

    def loads_ended(self, rank: int, request_ids: frozenset[str], *, num_ranks: int) -> None:
        """Take what one rank says of asynchronous loads that ended; a request goes on when every rank has said so."""
        for request_id in request_ids:
            if request_id in self._orphans:
                tables, ranks = self._orphans[request_id]
                ranks.add(rank)
                if len(ranks) == num_ranks:
                    self._cache.release_all(tables)
                    del self._orphans[request_id]
            elif request_id in self.parked:
                self.parked[request_id].ranks_loaded.add(rank)
        now = time.monotonic()
        for request in list(self.parked.values()):
            if len(request.ranks_loaded) == num_ranks:
                del self.parked[request.request_id]
                self._unpark(request)
            elif now > request.give_up_at:
                del self.parked[request.request_id]
                self._orphan(request)

    def _unpark(self, request: EngineRequest) -> None:
        """Go on with what arrived before the first bad block."""
        if request.aborted:
            self._cache.release_all(request.tables)
            return
        size = self._cache.block_size
        arrived = request.num_reused + request.num_loaded
        if request.bad_blocks:
            arrived = max(request.num_reused, min(request.bad_blocks) * size)
            request.failed_loads += 1
            if any(window is not None for window in self._cache.windows):
                # pages for a shorter prefix's window were never asked for: begin again with what is on the device
                self._cache.release_all(request.tables)
                request.reset()
                self.waiting.appendleft(request)
                if self._leader is not None:
                    self._leader.request_reset(request.view())
                return
        request.num_loaded = arrived - request.num_reused
        request.num_computed = arrived
        request.num_named = request.num_reused // size
        self.running.append(request)

    def _orphan(self, request: EngineRequest) -> None:
        """Compute a request in other pages: its load did not end in time, and may still write to those it has."""
        self.num_lost_loads += 1
        logger.warning("kvconnect: the load of %s did not end in time; it is computed instead", request.request_id)
        self._orphans[request.request_id] = (request.tables, request.ranks_loaded)
        request.tables = [[] for _ in request.tables]
        if request.aborted:
            return
        request.reset()
        request.failed_loads = request.MAX_FAILED_LOADS
        self.waiting.appendleft(request)
        if self._leader is not None:
            self._leader.request_reset(request.view())

    def _allocate(
        self, request: EngineRequest, matched: int, loaded: int, budget: int
    ) -> tuple[int, int, list[list[int]]] | None:
        """Give a waiting request its pages and tell the leader.

        Args:
            request: Without pages.
            matched: Blocks found on the device.
            loaded: Tokens that the leader offers on top.
            budget: Tokens that may be computed.

        Returns:
            Tokens that need not be computed, tokens to compute, and the fresh pages; None if there are too few pages.
        """
        computed = matched * self._cache.block_size + loaded
        count = min(len(request.tokens) - computed, budget)
        fresh = self._cache.extend(request.tables, request.chain.hashes, matched, computed, computed + count)
        if fresh is None:
            return None
        told = self._leader is None or self._leader.update_state_after_alloc(request.view(), request.tables, loaded)
        if told or not loaded:
            return computed, count, fresh
        self._cache.release_all(request.tables)  # the leader failed: nothing will be loaded into these pages
        return self._allocate(request, matched, 0, budget)

    def _enter(
        self, batch: Batch, request: EngineRequest, start: int, count: int, fresh: Sequence[Sequence[int]]
    ) -> None:
        samples = start + count == len(request.tokens) + request.num_pending
        batch.parts.append(BatchPart(request, request.run, start, count, samples))
        for pages, taken in zip(batch.fresh, fresh, strict=True):
            pages += taken

    def reset_request(self, request: EngineRequest) -> None:
        """Take a running request's pages back and queue it as the next one; what is in flight does not count."""
        self.running.remove(request)
        self._cache.release_all(request.tables)
        request.reset()
        self.waiting.appendleft(request)
        if self._leader is not None:
            self._leader.request_reset(request.view())
