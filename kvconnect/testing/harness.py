"""A deterministic engine without a model, one hook call at a time: what a test does, the connector sees.

Pages hold what follows from tokens, layer, role and position (`content`), fresh ones NaN. `StepEngine.step` calls every
hook in the engine's order, looks at what was loaded before each layer "attends", writes what the layer computes, and
breaks the promise of whoever let it read wrong bytes. `kvconnect.testing.simulation` runs random schedules; this is for
the corners.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch

from kvconnect.engine.pages import NO_PAGE, KVGeometry, PagedCache
from kvconnect.protocol import (
    EngineCapabilities,
    Finished,
    Match,
    Namespace,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)
from kvconnect.testing.content import Pages, WrongBytes, prefix_states
from kvconnect.testing.promise import BrokenPromise, must
from kvconnect.testing.target import ENGINE, Target

__all__ = ["BLOCK", "SHAPES", "KitRequest", "StepEngine", "StepResult"]

BLOCK = 4
"""Tokens a block in scripted tests."""

_PAUSE_S = 0.0005

SHAPES: dict[str, KVGeometry] = {
    "full": KVGeometry(((0, 1),), (None,), 2, 4, torch.float32),
    "full-narrow": KVGeometry(((0, 1),), (None,), 4, 2, torch.float32),
    "full-bf16": KVGeometry(((0, 1, 2),), (None,), 4, 8, torch.bfloat16),
    "window": KVGeometry(((0, 1),), (9,), 2, 4, torch.float32),
    "mixed": KVGeometry(((0, 2), (1,)), (None, 9), 2, 4, torch.float32),
}
"""Caches by name: one full group, as many bytes in other heads, bfloat16, a sliding window, and both kinds of group."""


class KitRequest:
    """One request as the kit's engine sees it.

    Attributes:
        tokens: All that are known.
        tables: Pages by group; -1 where a block has none.
        computed: Tokens whose KV is in the pages, loaded ones included.
        loaded: Tokens that the next step loads before it computes.
        offered_async: Whether the last offer was an asynchronous one.
    """

    def __init__(self, request_id: str, tokens: Sequence[int], num_groups: int, fields: dict[str, Any]) -> None:
        """Know the prompt."""
        self.request_id = request_id
        self.tokens = list(tokens)
        self.num_prompt_tokens = len(tokens)
        self.fields = fields
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.computed = 0
        self.loaded = 0
        self.offered_async = False
        self.told = len(tokens)
        self.scheduled_before = False

    def view(self) -> RequestView:
        """Return what a connector may know of it."""
        return RequestView(
            request_id=self.request_id,
            tokens=tuple(self.tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            **self.fields,
        )


class StepResult(NamedTuple):
    """What one step showed.

    Attributes:
        meta: The plan's bytes; None if the leader had none.
        reports: What each rank reported, not yet handed over if they were held back.
        finished: What each rank said of asynchronous transfers.
        bad_pages: Pages that were not loaded, by group; None if no load can be trusted.
        wrong: Bytes that were wrong when a layer read them, reported or not.
    """

    meta: bytes | None
    reports: list[bytes]
    finished: list[Finished]
    bad_pages: list[set[int]] | None
    wrong: list[WrongBytes]


class StepEngine:
    """Pages, both halves, and the calls between them."""

    def __init__(
        self,
        target: Target,
        *,
        shape: str = "full",
        num_ranks: int = 1,
        block_size: int = BLOCK,
        num_pages: int = 48,
        engine: EngineCapabilities = ENGINE,
        model: str = "",
        kv_dtype: str = "",
    ) -> None:
        """Open the target over a new cache.

        Raises:
            KVConnectError: If it does not fit.
        """
        self.geometry = SHAPES[shape]
        self.cache = PagedCache(self.geometry, block_size=block_size, num_pages=num_pages)
        self.pages = Pages(self.geometry, self.cache)
        for layer in self.cache.layers:
            layer.key.fill_(torch.nan)
            layer.value.fill_(torch.nan)
        self.failures: list[str] = []
        self._patience_s = target.patience_s
        dtype = kv_dtype or str(self.geometry.dtype).removeprefix("torch.")
        self.leader, self.workers = target.open(
            [self.cache.layout(rank, num_ranks) for rank in range(num_ranks)],
            namespace=Namespace(model=model or target.model, kv_dtype=dtype),
            engine=engine,
            on_failure=self._note,
        )
        self.block_size = block_size
        self._ids = itertools.count()
        self._steps = itertools.count()
        self._preempted: list[str] = []
        self._ended: set[str] = set()
        self._waiting: dict[str, tuple[list[list[int]], set[int]]] = {}  # pages that are read, ranks that have
        self._parked: dict[str, set[int]] = {}  # requests with an asynchronous load -> ranks that have named them
        self._closed = False

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close; what hooks raised is a broken promise, and the reason for any other."""
        self.close()
        if kind is None or kind is BrokenPromise:
            self.check_hooks()

    def arrive(self, tokens: Sequence[int], **fields: Any) -> KitRequest:
        """Tell of a new request; `fields` are those of `RequestView`."""
        request = KitRequest(f"r{next(self._ids)}", tokens, len(self.cache.pools), fields)
        self.pages.remember(request.request_id, prefix_states(tokens))
        self.leader.on_new_request(request.view())
        return request

    def ask(self, request: KitRequest, computed: int = 0) -> Match:
        """Ask once what could be loaded."""
        return self.leader.get_num_new_matched_tokens(request.view(), computed)

    def offer(self, request: KitRequest, computed: int = 0) -> Match:
        """Ask until the answer is not "again next step", with empty steps between."""
        deadline = time.monotonic() + self._patience_s
        while (match := self.ask(request, computed)).num_tokens is None:
            must(
                time.monotonic() < deadline,
                expected=f"an answer within {self._patience_s:.0f} s",
                got="Match(None, False), again and again",
                hint="get_num_new_matched_tokens must give up waiting for a store at its deadline",
            )
            self.step()
            time.sleep(_PAUSE_S)
        request.offered_async = match.load_async
        return match

    def allocate(self, request: KitRequest, external: int, computed: int = 0, room: int = 0) -> None:
        """Give the request pages for its tokens and `room` more, and say how much of the offer is taken."""
        reach = computed + external
        fresh = self.cache.extend(request.tables, (), 0, reach, len(request.tokens) + room)
        assert fresh is not None, "the kit's own cache is too small for its test"
        self.cache.fill_fresh(fresh)
        request.computed = reach
        request.loaded = external
        if external and request.offered_async:
            self._parked[request.request_id] = set()
        self.leader.update_state_after_alloc(request.view(), request.tables, external)

    def share(self, request: KitRequest, other: KitRequest, num_tokens: int) -> None:
        """Let a request use another's first pages, as engines do that name pages before their load has ended.

        It gets pages of its own for the rest, and loads nothing.
        """
        for pool, table, theirs in zip(self.cache.pools, request.tables, other.tables, strict=True):
            for page in theirs[: num_tokens // self.block_size]:
                pool.hold(page)
                table.append(page)
        self.allocate(request, 0, num_tokens)

    def append(self, request: KitRequest, token: int) -> None:
        """Accept a decoded token and give it a page."""
        request.tokens.append(token)
        self.pages.remember(request.request_id, prefix_states(request.tokens))
        fresh = self.cache.extend(request.tables, (), 0, request.computed, len(request.tokens))
        assert fresh is not None, "the kit's own cache is too small for its test"
        self.cache.fill_fresh(fresh)

    def step(
        self,
        *parts: tuple[KitRequest, int],
        hand_over: bool = True,
        load_after: bool = False,
        guess: int | None = None,
        failing_rank: int | None = None,
        lose_plan: bool = False,
    ) -> StepResult:
        """Run one step that computes `count` tokens of each request, and look at what layers read.

        Args:
            parts: Requests with pages, and how many tokens each computes.
            hand_over: Give the reports to the leader; otherwise the caller does, later.
            load_after: Call `start_load_kv` after the forward pass, as some engines do in empty steps.
            guess: A token that nobody has accepted: the last one that each request computes.
            failing_rank: A rank on which the step fails after its loads, as when a kernel did.
            lose_plan: Give the workers no plan, as when the leader had failed to make one.

        Raises:
            BrokenPromise: If a layer read wrong bytes of a load that no worker reported as failed.
        """
        output = self._describe(parts)
        meta = self.leader.build_connector_meta(output)
        for worker in self.workers:
            worker.bind(None if lose_plan else meta, output.step)
            if not load_after:
                worker.start_load_kv()
        if failing_rank is not None:
            self.workers[failing_rank].fail_step("the kit lets this step fail")
        wrong = self._forward(parts, guess)
        for worker in self.workers:
            if load_after:
                worker.start_load_kv()
        ended, self._ended = frozenset(self._ended), set()
        finished, reports = [], []
        bad: list[set[int]] | None = [set() for _ in self.cache.pools]
        for rank, worker in enumerate(self.workers):
            worker.wait_for_save()
            finished.append(worker.get_finished(ended))
            pages = worker.get_block_ids_with_load_errors()
            bad = None if bad is None or pages is None else [a | b for a, b in zip(bad, pages, strict=True)]
            reports.append(worker.build_worker_report())
            self._release(rank, finished[-1].saved)
            self._arrived(rank, finished[-1])
        for request, count in parts:
            request.computed += count - (guess is not None)
            request.loaded = 0
        if hand_over:
            self.leader.update_connector_output(reports)
        unsaid = [] if bad is None else [each for each in wrong if each.page not in bad[each.group]]
        if unsaid:
            raise BrokenPromise(
                expected="each layer to read what was computed for these tokens, or the page among the load errors",
                got=f"{len(unsaid)} wrong positions in {', '.join(request.request_id for request, _ in parts)}; "
                f"first: {unsaid[0]}",
                hint="the bytes of a load were wrong, late, or in another place",
            )
        return StepResult(meta, reports, finished, bad, wrong)

    def finish(self, request: KitRequest) -> bool:
        """Tell that it ended; its pages are NaN from here on, or once its saves are reported."""
        keeps = self.leader.request_finished(request.view(), request.tables)
        if keeps:
            self._await_save(request)
        else:
            self._scrub(request.tables)
        return keeps

    def reset(self, request: KitRequest) -> None:
        """Take its pages back: it will run again as a new one."""
        self._scrub(request.tables)
        self._preempted.append(request.request_id)
        request.computed = request.loaded = 0
        request.told = len(request.tokens)
        request.scheduled_before = False
        self.leader.request_reset(request.view())

    def settle(self) -> None:
        """Run empty steps until the connector has nothing more to do.

        Raises:
            BrokenPromise: If it never comes to an end, or never lets go of an ended request's pages.
        """
        deadline = time.monotonic() + self._patience_s
        while self.leader.has_pending_work() or self._waiting:
            must(
                time.monotonic() < deadline,
                expected=f"has_pending_work() to be False within {self._patience_s:.0f} s of empty steps",
                got=f"work without end; requests whose pages were never let go: {sorted(self._waiting) or 'none'}",
                hint="something is claimed, promised or waited for that nobody will report",
            )
            self.step()
            time.sleep(_PAUSE_S)

    def save(self, tokens: Sequence[int], **fields: Any) -> None:
        """Compute a prompt from nothing and let the connector save it, to the end."""
        request = self.arrive(tokens, **fields)
        self.allocate(request, 0)
        self.step((request, len(tokens)))
        self.finish(request)
        self.settle()

    def offered(self, tokens: Sequence[int], **fields: Any) -> int:
        """Return how many tokens of a prompt are offered, and take none."""
        request = self.arrive(tokens, **fields)
        count = self.offer(request).num_tokens or 0
        self.finish(request)
        return count

    def load(self, tokens: Sequence[int], **fields: Any) -> int:
        """Run a prompt with whatever is offered, once more after a load that failed, as engines do.

        Returns:
            How many tokens were loaded in the end, all of them right; a load that failed counts as none.
        """
        request = self.arrive(tokens, **fields)
        loaded = 0
        for _ in range(len(tokens) // self.block_size + 2):  # each round may find one more block that is not there
            loaded = self.admit(request)
            result = self.step((request, len(tokens) - request.computed))
            if result.bad_pages is not None and not any(result.bad_pages):
                break
            self.reset(request)
            loaded = 0
        else:
            self.allocate(request, 0)
            self.step((request, len(tokens)))
        self.finish(request)
        self.settle()
        return loaded

    def admit(self, request: KitRequest) -> int:
        """Take all of the offer; an asynchronous one is waited for and looked at. Returns the tokens loaded."""
        match = self.offer(request)
        external = match.num_tokens or 0
        self.allocate(request, external)
        if match.load_async:
            failed = self.wait_loaded(request)
            if failed:
                self.reset(request)
                self.allocate(request, 0)
                return 0
            self.check_loaded(request)
            request.loaded = 0
        return external

    def wait_loaded(self, request: KitRequest) -> bool:
        """Step until every rank has reported the asynchronous load; return whether one said that it failed."""
        ranks = self._parked[request.request_id]
        failed = False
        deadline = time.monotonic() + self._patience_s
        while len(ranks) < len(self.workers):
            must(
                time.monotonic() < deadline,
                expected=f"get_finished to name {request.request_id} on every rank within {self._patience_s:.0f} s",
                got=f"it was named by ranks {sorted(ranks)} of {len(self.workers)}",
                hint="an asynchronous load that failed is reported too, among loaded and failed",
            )
            result = self.step()
            failed = failed or any(request.request_id in finished.failed for finished in result.finished)
            time.sleep(_PAUSE_S)
        return failed

    def check_loaded(self, request: KitRequest) -> None:
        """Look at everything that counts as computed.

        Raises:
            BrokenPromise: If a byte of it is wrong.
        """
        wrong = self._wrong(request, range(len(self.cache.layers)), request.computed)
        must(
            not wrong,
            expected="loaded pages to hold what was computed for these tokens",
            got=f"{len(wrong)} wrong positions; first: {wrong[0] if wrong else ''}",
        )

    def check_hooks(self) -> None:
        """Say which hook raised, if one did.

        Raises:
            BrokenPromise: If one did.
        """
        must(
            not self.failures,
            expected="no hook to raise or to answer against its contract",
            got="; ".join(self.failures[:3]),
        )

    def close(self) -> None:
        """Shut both halves down; twice is fine."""
        if not self._closed:
            self._closed = True
            self.leader.shutdown()
            for worker in self.workers:
                worker.shutdown()

    def _describe(self, parts: Sequence[tuple[KitRequest, int]]) -> SchedulerOutput:
        new: list[ScheduledRequest] = []
        cached: list[ScheduledRequest] = []
        for request, count in parts:
            described = ScheduledRequest(
                request_id=request.request_id,
                num_computed_tokens=request.computed,
                num_scheduled_tokens=count,
                num_tokens=len(request.tokens),
                new_tokens=tuple(request.tokens[request.told :]),
                block_ids=request.tables,
            )
            request.told = len(request.tokens)
            (cached if request.scheduled_before else new).append(described)
            request.scheduled_before = True
        preempted, self._preempted = tuple(self._preempted), []
        return SchedulerOutput(
            step=next(self._steps), new_requests=tuple(new), cached_requests=tuple(cached), preempted=preempted
        )

    def _forward(self, parts: Sequence[tuple[KitRequest, int]], guess: int | None) -> list[WrongBytes]:
        wrong: list[WrongBytes] = []
        guessed = [] if guess is None else [guess]
        for layer in range(len(self.cache.layers)):
            for worker in self.workers:
                worker.wait_for_layer_load(layer)
            for request, count in parts:
                wrong += self._wrong(request, [layer], request.computed)
                states = prefix_states([*request.tokens, *guessed])
                table = request.tables[self.cache.layers[layer].group]
                self.pages.write(states, table, layer, request.computed, request.computed + count)
            if parts:
                for worker in self.workers:
                    worker.save_kv_layer(layer)
        return wrong

    def _wrong(self, request: KitRequest, layers: Sequence[int] | range, end: int) -> list[WrongBytes]:
        states = prefix_states(request.tokens)
        wrong = []
        for layer in layers:
            cache = self.cache.layers[layer]
            start = 0 if cache.window is None else max(0, end - cache.window + 1)
            wrong += self.pages.check(states, request.tables[cache.group], cache.group, layer, start, end)
        return wrong

    def _await_save(self, request: KitRequest) -> None:
        """Keep the request's pages until every rank has named it as saved."""
        self._ended.add(request.request_id)
        self._waiting[request.request_id] = (request.tables, set())

    def _scrub(self, tables: list[list[int]]) -> None:
        """Free pages and fill them with NaN at once: whoever still reads or writes them is found out."""
        held = [[page for page in table if page != NO_PAGE] for table in tables]
        self.cache.release_all(tables)
        self.cache.fill_fresh(held)

    def _release(self, rank: int, saved: frozenset[str]) -> None:
        for request_id in saved:
            must(
                request_id in self._waiting and rank not in self._waiting[request_id][1],
                expected="get_finished to name as saved only requests whose pages it was told to keep, once a rank",
                got=f"rank {rank} named {request_id}",
            )
            tables, ranks = self._waiting[request_id]
            ranks.add(rank)
            if len(ranks) == len(self.workers):
                del self._waiting[request_id]
                self._scrub(tables)

    def _arrived(self, rank: int, finished: Finished) -> None:
        for request_id in finished.loaded:
            must(
                request_id in self._parked and rank not in self._parked[request_id],
                expected="get_finished to name as loaded only requests with an asynchronous load, once a rank",
                got=f"rank {rank} named {request_id}",
            )
            self._parked[request_id].add(rank)
        must(
            finished.failed <= finished.loaded,
            expected="failed loads to be named among the loaded",
            got=f"rank {rank} named {sorted(finished.failed - finished.loaded)} as failed only",
        )

    def _note(self, hook: str, error: object) -> None:
        if "the kit lets this step fail" in str(error):
            return
        where = ""
        if isinstance(error, BaseException):
            frames = traceback.extract_tb(error.__traceback__)
            where = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
            error = f"{type(error).__name__}: {error}"
        self.failures.append(f"{hook}{where}: {error}")
