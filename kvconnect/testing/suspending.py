"""The kit's engine for batches and suspension: claims offers, takes requests off the device and brings them back."""

from __future__ import annotations

import random
import time

from kvconnect.engine.pages import NO_PAGE
from kvconnect.testing.harness import BLOCK, SHAPES, KitRequest, StepEngine
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.simulation import Setting
from kvconnect.testing.target import Target

__all__ = ["SuspendEngine", "needs_of", "with_room"]

_PAUSE_S = 0.0005


class SuspendEngine(StepEngine):
    """Calls `claim_match`, `suspend`, `prefetch` and `resume` as an engine does, between steps."""

    def claim(self, request: KitRequest, num_tokens: int) -> int:
        """Have an offer held; return how many tokens of it are."""
        return self.leader.claim_match(request.view(), num_tokens)

    def ask_to_suspend(self, request: KitRequest) -> bool:
        """Take a request's pages, if the leader has room; they are NaN once every rank has named it as saved.

        What fell out of a window is let go before, as engines do.
        """
        before = [set(table) for table in request.tables]
        self.cache.release_stale(request.tables, request.computed)
        self.cache.fill_fresh([list(had - set(table)) for had, table in zip(before, request.tables, strict=True)])
        if not self.leader.suspend(request.view(), request.tables, request.computed):
            return False
        self._await_save(request)
        request.tables = [[] for _ in request.tables]
        return True

    def suspend(self, request: KitRequest) -> bool:
        """Take a request's pages and step until they are free; False if the leader has no room."""
        if not self.ask_to_suspend(request):
            return False
        self.wait_read(request)
        return True

    def wait_read(self, request: KitRequest) -> None:
        """Step until every rank has named a suspended request as saved.

        Raises:
            BrokenPromise: If one never does, or if the connector says that it has nothing to do before.
        """
        deadline = time.monotonic() + self._patience_s
        while request.request_id in self._waiting:
            must(
                time.monotonic() < deadline and self.leader.has_pending_work(),
                expected=f"get_finished to name {request.request_id} as saved on every rank, and steps until it does",
                got=f"named by ranks {sorted(self._waiting[request.request_id][1])} of {len(self.workers)}",
                hint="a suspended request's pages are free when get_finished has named it",
            )
            self.step()
            time.sleep(_PAUSE_S)

    def prefetch(self, request: KitRequest, tier: int) -> bool:
        """Have a suspended request's blocks brought up to a tier, and step until they have come."""
        accepted = self.leader.prefetch(request.view(), tier)
        self.settle()
        return accepted

    def resume(self, request: KitRequest) -> bool:
        """Give a suspended request fresh pages and wait for its load; False if the leader refuses.

        Afterwards `computed` says what came back, every byte of it right; less than before if a block was named as a
        load error. With a window the request then begins again, without pages.

        Raises:
            BrokenPromise: If a byte that counts is wrong, or the load does not end.
        """
        tables: list[list[int]] = [[] for _ in self.cache.pools]
        fresh = self.cache.extend(tables, (), 0, request.computed, request.computed)
        assert fresh is not None, "the kit's own cache is too small for its test"
        self.cache.fill_fresh(fresh)
        if not self.leader.resume(request.view(), tables):
            self._scrub(tables)
            return False
        request.tables = tables
        bad = self._wait_resumed(request) if any(map(any, _there(tables))) else set()
        if bad and any(window is not None for window in self.cache.windows):
            self.reset(request)
            return True
        if bad:
            request.computed = min(bad) * self.block_size
        self.check_loaded(request)
        self.cache.fill_fresh(self._grow(request))
        return True

    def go_on(self, request: KitRequest, *tokens: int) -> None:
        """Compute what is left of a request, in new pages if it has none, and then decode tokens."""
        if not any(request.tables):
            self.allocate(request, 0)
        left = len(request.tokens) - request.computed
        if left:
            self.step((request, left))
        for token in tokens:
            self.append(request, token)
            self.step((request, 1))

    def run(self, tokens: list[int], count: int | None = None, **fields: object) -> KitRequest:
        """Return a request of which the first `count` tokens are computed, None for all; nothing is loaded."""
        request = self.arrive(tokens, **fields)
        self.allocate(request, 0)
        self.step((request, len(tokens) if count is None else count))
        return request

    def end(self, *requests: KitRequest) -> None:
        """Finish requests and wait until nothing is left to do."""
        for request in requests:
            self.finish(request)
        self.settle()

    def press(self, rng: random.Random) -> None:
        """Save more blocks than a dozen."""
        for _ in range(4):
            self.save(_tokens(rng, 5 * self.block_size + 2))

    def must_fit(self, rng: random.Random, num_blocks: int) -> None:
        """Look whether a prompt as large as the memory can be kept there: nobody else holds any of it.

        Only for caches without windows, which need all blocks of a prompt.

        Raises:
            BrokenPromise: If it cannot.
        """
        tokens = _tokens(rng, num_blocks * self.block_size + 1)
        self.save(tokens)
        must_equal(
            "tokens that fit into the memory",
            self.load(tokens),
            num_blocks * self.block_size,
            "what was held for a request is still held, or was never given back",
        )

    def _grow(self, request: KitRequest) -> list[list[int]]:
        fresh = self.cache.extend(request.tables, (), 0, request.computed, len(request.tokens))
        assert fresh is not None, "the kit's own cache is too small for its test"
        return fresh

    def _wait_resumed(self, request: KitRequest) -> set[int]:
        """Step until every rank has named the load; return the blocks that were load errors."""
        ranks = self._parked[request.request_id] = set()
        bad: set[int] = set()
        deadline = time.monotonic() + self._patience_s
        while len(ranks) < len(self.workers):
            must(
                time.monotonic() < deadline,
                expected=f"get_finished to name {request.request_id} as loaded on every rank, once it is resumed",
                got=f"named by ranks {sorted(ranks)} of {len(self.workers)}",
                hint="a block that is lost is a load error; the load ends all the same",
            )
            pages = self.step().bad_pages or ()
            for wrong, table in zip(pages, request.tables, strict=False):
                bad |= {block for block, page in enumerate(table) if page in wrong}
            time.sleep(_PAUSE_S)
        return bad


def needs_of(target: Target, capability: str, shape: str, num_ranks: int = 1) -> None:
    """End the test unless the target declares the capability, and what the shape and the ranks need."""
    needs(getattr(target.capabilities, capability), capability)
    needs(shape != "mixed" or target.capabilities.several_groups, "several_groups")
    needs(num_ranks == 1 or target.capabilities.several_ranks, "several_ranks")


def with_room(target: Target, num_blocks: int, *, shape: str = "full", num_ranks: int = 1) -> Target:
    """Return the target with host memory for that many blocks of every layer group.

    Ends the test if that cannot be arranged from outside.
    """
    slots = num_blocks * len(SHAPES[shape].windows)
    small = target.with_arena(Setting(shape=shape, block_size=BLOCK, num_ranks=num_ranks).arena_bytes(slots))
    if small is target:
        not_shown("its memory cannot be made small from outside")
    return small


def _there(tables: list[list[int]]) -> list[list[bool]]:
    return [[page != NO_PAGE for page in table] for table in tables]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(50_000) for _ in range(count)]
