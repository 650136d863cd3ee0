"""The engine's KV cache manager: what a request finds, what it gets, and in which order a batch is given it.

A batch is admitted in two phases. First every request claims what it matches, on the device and through the leader's
`claim_match`; nothing is allocated, loaded or evicted. Then each is given its pages. So nothing that one request
counted on is evicted for its neighbour, and a step computes what was estimated, never more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from kvconnect.driver import LeaderDriver
from kvconnect.engine.pages import PagedCache, PartialMatch
from kvconnect.engine.pool import NO_PAGE
from kvconnect.engine.request import EngineRequest
from kvconnect.engine.stats import BlockCounts

__all__ = ["Admission", "Candidate", "Estimate", "KVCacheManager"]

logger = logging.getLogger(__name__)


class Estimate(NamedTuple):
    """What a request would find now. Nothing is held.

    Attributes:
        matched: Full blocks on the device.
        loaded: Tokens behind them that the leader offers.
        parks: Whether those would arrive after this step.
        partial: A page that begins like the block behind those.
    """

    matched: int
    loaded: int
    parks: bool
    partial: PartialMatch | None

    def num_computed(self, block_size: int) -> int:
        """Tokens that need not be computed."""
        return self.matched * block_size + self.loaded + (self.partial.num_tokens if self.partial else 0)


class Candidate(NamedTuple):
    """A waiting request that the scheduler wants to run, and how many tokens of it the step may compute."""

    request: EngineRequest
    estimate: Estimate
    num_tokens: int


class Admission(NamedTuple):
    """A request that has its pages.

    Attributes:
        request: The request.
        start: First token to compute.
        num_tokens: How many of them; 0 if it waits for an asynchronous load, or that could not be begun.
        parked: Whether it does.
        fresh: Pages taken, by group, to be filled with NaN.
        counts: What became of its blocks by that.
    """

    request: EngineRequest
    start: int
    num_tokens: int
    parked: bool
    fresh: list[list[int]]
    counts: BlockCounts


class _Claim:
    """What is held for one candidate until its pages are its own."""

    def __init__(self, candidate: Candidate, estimate: Estimate, pages: list[list[int]]) -> None:
        self.request = candidate.request
        self.limit = candidate.num_tokens
        self.estimate = estimate
        self.pages = pages  # by group, a holder more each


class KVCacheManager:
    """Device pages, and what the connector brings to them.

    Attributes:
        cache: The pages.
        totals: Block counts of all requests but dummy ones.
    """

    def __init__(
        self,
        cache: PagedCache,
        leader: LeaderDriver | None,
        *,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
    ) -> None:
        """Start with nothing held.

        Args:
            cache: The pages.
            leader: Of the connector, None for none.
            enable_block_reuse: Whether requests find the blocks of earlier ones.
            enable_partial_reuse: Whether they find parts of blocks on the device.
        """
        self.cache = cache
        self.totals = BlockCounts()
        self._leader = leader
        self._reuse = enable_block_reuse
        self._partial = enable_block_reuse and enable_partial_reuse

    def estimate(self, request: EngineRequest) -> Estimate | None:
        """Return what a waiting request would find now; None if the leader wants to be asked again next step."""
        size = self.cache.block_size
        if not self._reuse or request.dummy:
            return Estimate(0, 0, False, None)
        matched = self.cache.match(request.chain.hashes, (len(request.tokens) - 1) // size)
        loaded, parks = 0, False
        if self._leader is not None and request.failed_loads < request.MAX_FAILED_LOADS:
            offer = self._leader.get_num_new_matched_tokens(request.view(), matched * size)
            if offer.num_tokens is None:
                return None
            loaded, parks = offer.num_tokens, offer.load_async
        partial = None
        if self._partial and not parks:
            blocks = matched + loaded // size
            partial = self.cache.match_partial(request.chain, request.tokens, blocks, len(request.tokens) - 1)
        return Estimate(matched, loaded, parks, partial)

    def add_sequences(self, batch: Sequence[Candidate]) -> list[Admission]:
        """Give waiting requests their pages: all of the batch, or as many from its start as there are pages for.

        Each computes at most the tokens that its candidate names; one that finds more than was estimated computes less,
        and its last chunk may be this one. Requests that find nothing take the same way.

        Args:
            batch: In the order of arrival. Their estimates are looked at again: what they say is there is claimed.

        Returns:
            What was admitted, a prefix of the batch; the others hold nothing.

        Raises:
            BaseException: What interrupted it; then no request of the batch holds anything.
        """
        claims: list[_Claim] = []
        admitted: list[Admission] = []
        try:
            claims.extend(map(self._claim, batch))
            while claims:
                admission = self._admit(claims[0])
                if admission is None and len(claims) > 1:
                    # what its neighbours count on may be all there is: the first in the queue goes first
                    self._unclaim(claims, keep=1)
                    admission = self._admit(claims[0])
                if admission is None and claims[0].estimate.partial is not None:
                    self._drop_partial(claims[0])
                    admission = self._admit(claims[0])
                if admission is None:
                    break
                admitted.append(admission)
                self._release_pages(claims.pop(0))
            self._unclaim(claims, keep=0)
        except BaseException:
            self._unclaim(claims, keep=0)
            for admission in admitted:
                self._take_back(admission)
            raise
        for admission in admitted:
            self._count(admission.request, admission.counts)
        return admitted

    def grow(self, request: EngineRequest, num_tokens: int) -> list[list[int]] | None:
        """Give a running request pages for `num_tokens` tokens; None, with nothing changed, if there are too few."""
        fresh = self.cache.extend(request.tables, request.chain.hashes, 0, request.num_computed, num_tokens)
        if fresh is not None:
            self._count(request, self._pages(fresh, []))
        return fresh

    def computed(self, request: EngineRequest, num_tokens: int) -> None:
        """Note that a request's first `num_tokens` tokens are computed and right: others find its full blocks now."""
        full = num_tokens // self.cache.block_size
        if not request.dummy:
            self.cache.name_full(
                request.tables,
                request.chain,
                request.tokens,
                request.num_named,
                full,
                num_prompt_tokens=request.num_prompt_tokens,
                retention=request.params.retention,
                salted=request.params.cache_salt is not None,
            )
        request.num_named = full
        self.cache.release_stale(request.tables, num_tokens)

    def resumed(self, request: EngineRequest, fresh: Sequence[Sequence[int]]) -> None:
        """Count a resume: `fresh` pages, by group, are filled through the connector."""
        counts = self._pages(fresh, fresh)
        counts.restored = sum(map(len, fresh))
        self._count(request, counts)

    def not_loaded(self, request: EngineRequest, arrived: int, end: int, *, resumes: bool) -> None:
        """Count what an asynchronous load did not bring, tokens ``[arrived, end)``: it is computed in its pages."""
        size = self.cache.block_size
        blocks = slice(arrived // size, -(-end // size))
        pages = [[page for page in table[blocks] if page != NO_PAGE] for table in request.tables]
        number, num_bytes = self._sum(pages)
        lost = BlockCounts(new=number, loaded_bytes=-num_bytes)
        if resumes:
            lost.restored = -number
        else:
            full = (request.num_prompt_tokens - 1) // size
            lost.missed = max(0, min(full, blocks.stop) - blocks.start) * len(self.cache.pools)
            lost.loaded = -lost.missed
        self._count(request, lost)

    # -- phase 1 -------------------------------------------------------------------------------------------------

    def _claim(self, candidate: Candidate) -> _Claim:
        """Hold what a request matches; nothing moves."""
        request, estimate = candidate.request, candidate.estimate
        size = self.cache.block_size
        if self._reuse and not request.dummy:
            now = self.cache.match(request.chain.hashes, (len(request.tokens) - 1) // size)
            if now != estimate.matched:  # the offer counts from another block: it is asked for anew
                estimate = self.estimate(request) or Estimate(now, 0, False, None)
        pages: list[list[int]] = [[] for _ in self.cache.pools]
        for group, pool in enumerate(self.cache.pools):
            # as far back as a window reaches if no more than this is had in the end
            for block in range(self.cache.first_needed(group, estimate.matched * size), estimate.matched):
                page = pool.find(request.chain.hashes[block])
                pool.hold(page)
                pages[group].append(page)
                retention = request.params.retention
                said = retention and retention.said_of_block(block, size, request.num_prompt_tokens)
                if said:
                    pool.set_priority(page, *said)
        claim = _Claim(candidate, estimate, pages)
        try:
            self._hold_partial(claim)
            if estimate.loaded and self._leader is not None:
                held = self._leader.claim_match(request.view(), estimate.loaded)
                if held < estimate.loaded:  # a part that lies behind what is missing now is of no use
                    self._drop_partial(claim)
                    claim.estimate = claim.estimate._replace(loaded=held, parks=estimate.parks and held > 0)
        except BaseException:
            self._release_pages(claim)
            raise
        return claim

    def _hold_partial(self, claim: _Claim) -> None:
        if claim.estimate.partial is not None:
            for pool, page in zip(self.cache.pools, claim.estimate.partial.pages, strict=True):
                if page != NO_PAGE:
                    pool.hold(page)

    def _drop_partial(self, claim: _Claim) -> None:
        partial = claim.estimate.partial
        claim.estimate = claim.estimate._replace(partial=None)
        if partial is not None:
            for pool, page in zip(self.cache.pools, partial.pages, strict=True):
                if page != NO_PAGE:
                    pool.release(page)

    def _unclaim(self, claims: list[_Claim], *, keep: int) -> None:
        """Let go of what claims behind the first `keep` hold, and forget them."""
        while len(claims) > keep:
            claim = claims.pop()
            self._release_pages(claim)
            if claim.estimate.loaded and self._leader is not None:
                self._leader.release_match(claim.request.view())

    def _release_pages(self, claim: _Claim) -> None:
        self._drop_partial(claim)
        for pool, pages in zip(self.cache.pools, claim.pages, strict=True):
            for page in reversed(pages):
                pool.release(page)
        claim.pages = [[] for _ in claim.pages]

    # -- phase 2 -------------------------------------------------------------------------------------------------

    def _admit(self, claim: _Claim) -> Admission | None:
        """Give a request its pages and tell the leader; None, with nothing changed, if there are too few pages."""
        request, estimate = claim.request, claim.estimate
        start = estimate.num_computed(self.cache.block_size)
        count = 0 if estimate.parks else min(len(request.tokens) - start, claim.limit)  # 0: its load has just failed
        fresh = self.cache.extend(request.tables, request.chain.hashes, estimate.matched, start, start + count)
        if fresh is None:
            return None
        try:
            told = self._tell(request, estimate.loaded)
        except BaseException:
            self.cache.release_all(request.tables)
            raise
        if not told and estimate.loaded:  # the leader failed: nothing will be loaded into these pages
            self.cache.release_all(request.tables)
            request.failed_loads += estimate.parks
            self._drop_partial(claim)
            claim.estimate = claim.estimate._replace(loaded=0, parks=False)
            return self._admit(claim)
        counts = self._counts_of(request, estimate, fresh)
        if estimate.partial is not None:
            self.cache.fill_fresh(fresh)
            self.cache.copy_partial(estimate.partial, request.tables, start // self.cache.block_size)
            fresh = [[] for _ in fresh]
        request.num_named = estimate.matched
        request.num_reused = start - estimate.loaded
        request.num_loaded = estimate.loaded
        return Admission(request, start, count, estimate.parks, fresh, counts)

    def _tell(self, request: EngineRequest, loaded: int) -> bool:
        if self._leader is None or request.dummy:
            return True
        return self._leader.update_state_after_alloc(request.view(), request.tables, loaded)

    def _take_back(self, admission: Admission) -> None:
        """Undo an admission: the request waits again."""
        request = admission.request
        self.cache.release_all(request.tables)
        request.reset()
        if self._leader is not None and not request.dummy:
            self._leader.request_reset(request.view())

    def _counts_of(self, request: EngineRequest, estimate: Estimate, fresh: Sequence[Sequence[int]]) -> BlockCounts:
        """Return what an admission does: each full block of the prompt but its last token's is in one of three."""
        size, groups = self.cache.block_size, len(self.cache.pools)
        loaded = estimate.loaded // size
        full = (request.num_prompt_tokens - 1) // size
        found = min(full, estimate.matched)
        span = slice(estimate.matched, estimate.matched + loaded)
        counts = self._pages(fresh, [[page for page in table[span] if page != NO_PAGE] for table in request.tables])
        counts.reused = found * groups
        counts.partially_reused = groups * (estimate.partial is not None)
        counts.loaded = min(full - found, loaded) * groups
        counts.missed = max(0, full - found - loaded) * groups
        return counts

    def _pages(self, taken: Sequence[Sequence[int]], loaded: Sequence[Sequence[int]]) -> BlockCounts:
        """Count pages, by group, of which the `loaded` ones are not computed into."""
        number, num_bytes = self._sum(taken)
        loads, load_bytes = self._sum(loaded)
        return BlockCounts(allocated=number, new=number - loads, allocated_bytes=num_bytes, loaded_bytes=load_bytes)

    def _sum(self, pages: Sequence[Sequence[int]]) -> tuple[int, int]:
        sizes = [len(of_group) for of_group in pages]
        return sum(sizes), sum(size * each for size, each in zip(sizes, self.cache.page_bytes, strict=False))

    def _count(self, request: EngineRequest, counts: BlockCounts) -> None:
        request.counts.add(counts)
        if not request.dummy:  # nobody gets its output
            self.totals.add(counts)
