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
from kvconnect.engine.manager import Admission, Candidate, KVCacheManager
from kvconnect.engine.pool import NO_PAGE
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
        self, manager: KVCacheManager, leader: LeaderDriver | None, *, max_batch_tokens: int, max_num_seqs: int
    ) -> None:
        """Start with no requests."""
        self.waiting: deque[EngineRequest] = deque()
        self.running: list[EngineRequest] = []
        self.parked: dict[str, EngineRequest] = {}
        self.suspended: dict[str, EngineRequest] = {}
        self.num_lost_loads = 0
        self._orphans: dict[str, tuple[list[list[int]], set[int]]] = {}  # pages that a load may still write to
        self.num_preemptions = 0
        self.num_lost_saves = 0
        self._saving: dict[str, _Saving] = {}
        self._newly_saving: set[str] = set()
        self._manager = manager
        self._cache = manager.cache
        self._leader = leader
        self.max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._step = 0

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running or self.parked)

    def add(self, request: EngineRequest) -> None:
        """Queue a request and tell the leader."""
        self.waiting.append(request)
        if self._leader is not None and not request.dummy:
            self._leader.on_new_request(request.view())

    def schedule(self) -> Batch:
        """Choose what the next step computes, and give it pages.

        The results of the step before may still be out: a request goes on from where that step will leave it, over a
        token that it will have sampled.
        """
        batch = Batch(len(self._cache.pools))
        budget = self.max_batch_tokens
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
            if request.dummy:
                continue
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
        self._manager.computed(part.request, part.start + part.num_tokens)

    def finish(self, request: EngineRequest) -> None:
        """Tell the leader that a request ended, and let its pages go unless the leader still saves them."""
        request.run += 1
        self.running.remove(request)
        keeps = False
        try:
            if self._leader is not None and not request.dummy:
                keeps = self._leader.request_finished(request.view(), request.tables)
        finally:  # an interrupt in the middle of it must not cost the pages
            if keeps:
                self._saving[request.request_id] = _Saving(request.tables)
                self._newly_saving.add(request.request_id)
            else:
                self._cache.release_all(request.tables)

    def abort(self, request: EngineRequest) -> None:
        """End a request that is not finished, wherever it is; a finished one is left alone."""
        if request in self.running and not request.num_computed:  # it holds pages, and nothing is in them
            self.running.remove(request)
            self._cache.release_all(request.tables)
            request.reset()
            self.waiting.appendleft(request)
        if request in self.waiting:  # it holds no pages
            self.waiting.remove(request)
            if self._leader is not None:
                self._leader.request_finished(request.view(), request.tables)
        elif self.suspended.pop(request.request_id, None) is not None:
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

    def saves(self, request_id: str) -> bool:
        """Say whether a request's pages wait for their saves."""
        return request_id in self._saving

    @property
    def longest(self) -> int:
        """Tokens that the longest request will have that is not finished."""
        requests = (*self.waiting, *self.running, *self.parked.values(), *self.suspended.values())
        return max((request.num_prompt_tokens + request.params.max_tokens for request in requests), default=0)

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
            fresh = self._manager.grow(request, request.num_computed + count)
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
        """Schedule waiting requests while there are tokens, pages and seats; they are given their pages together."""
        candidates: list[Candidate] = []
        seats = self._max_num_seqs - len(self.running) - len(self.parked)
        room = [pool.num_available for pool in self._cache.pools]
        for request in self.waiting:
            if not budget or len(candidates) >= seats:
                break
            estimate = self._manager.estimate(request)
            if estimate is None:
                continue  # ask again next step; those behind it need not wait
            start = estimate.num_computed(self._cache.block_size)
            count = 0 if estimate.parks else min(len(request.tokens) - start, budget)
            needed = self._cache.pages_needed(request.chain.hashes, estimate.matched, start, start + count)
            room = [left - need for left, need in zip(room, needed, strict=True)]
            if candidates and min(room) < 0:
                break
            candidates.append(Candidate(request, estimate, count))
            budget -= count
        for admission in self._manager.add_sequences(candidates):
            self.waiting.remove(admission.request)
            self._place(batch, admission)

    def _place(self, batch: Batch, admission: Admission) -> None:
        """Put a request that has its pages where it belongs: into the step, or to those that wait for a load."""
        request = admission.request
        request.num_computed = admission.start
        if admission.parked:
            self._park(request)
        else:
            self.running.append(request)
            if request.num_loaded:
                batch.loading.add(request)
        if admission.num_tokens:
            self._enter(batch, request, admission.start, admission.num_tokens, admission.fresh)
        else:
            for pages, taken in zip(batch.fresh, admission.fresh, strict=True):
                pages += taken

    def _park(self, request: EngineRequest) -> None:
        request.give_up_at = time.monotonic() + _LOAD_DEADLINE_S
        self.parked[request.request_id] = request

    def suspend(self, request: EngineRequest) -> bool:
        """Take a request out of the queue and its pages below the device; they are free when `num_saving` says so.

        Returns:
            False if the leader has no room for them; then the request runs on.
        """
        if request in self.waiting:  # it holds no pages
            self.waiting.remove(request)
            if self._leader is not None and not request.dummy:
                self._leader.request_reset(request.view())
        else:
            assert request in self.running, "only a running or waiting request can be suspended"
            if self._leader is None or not self._leader.suspend(request.view(), request.tables, request.num_computed):
                return False
            self.running.remove(request)
            request.run += 1
            self._saving[request.request_id] = _Saving(request.tables)
            self._newly_saving.add(request.request_id)
            request.tables = [[] for _ in request.tables]
        self.suspended[request.request_id] = request
        return True

    def resume(self, request: EngineRequest) -> bool:
        """Give a suspended request pages for all that it had computed, and load what is not on the device.

        Returns:
            False if there are too few pages or seats, or the leader cannot load it; then it stays suspended.
        """
        if not request.num_computed:
            del self.suspended[request.request_id]
            self.waiting.appendleft(request)
            return True
        if len(self.running) + len(self.parked) >= self._max_num_seqs:
            return False
        size, computed = self._cache.block_size, request.num_computed
        matched = self._cache.match(request.chain.hashes, computed // size)
        fresh = self._cache.extend(request.tables, request.chain.hashes, matched, computed, computed)
        if fresh is None:
            return False
        self._cache.fill_fresh(fresh)
        missing = [[NO_PAGE] * min(matched, len(table)) + table[matched:] for table in request.tables]
        assert self._leader is not None, "a request without a leader is suspended with nothing computed"
        if not self._leader.resume(request.view(), missing):
            self._cache.release_all(request.tables)
            return False
        del self.suspended[request.request_id]
        self._manager.resumed(request, fresh)
        request.bad_blocks, request.ranks_loaded = set(), set()
        request.num_named = matched
        if any(page != NO_PAGE for table in missing for page in table):
            request.resumes = True
            self._park(request)
        else:
            self.running.append(request)
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
        resumes, request.resumes = request.resumes, False
        arrived = expected = request.num_computed if resumes else request.num_reused + request.num_loaded
        if request.bad_blocks:
            first = 0 if resumes else request.num_reused
            arrived = max(first, min(request.bad_blocks) * size)
            self._manager.not_loaded(request, arrived, expected, resumes=resumes)
            request.failed_loads += 1
            if any(window is not None for window in self._cache.windows):
                # pages for a shorter prefix's window were never asked for: begin again with what is on the device
                self._cache.release_all(request.tables)
                request.reset()
                self.waiting.appendleft(request)
                if self._leader is not None:
                    self._leader.request_reset(request.view())
                return
        if not resumes:
            request.num_loaded = arrived - request.num_reused
            request.num_named = request.num_reused // size
        request.num_computed = arrived
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
