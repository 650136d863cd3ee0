"""The engine's steps, with every call that a connector gets, in order. Knows no texts and no stop conditions.

Read `EngineCore.step`. A step is planned, run and taken. With asynchronous scheduling it is taken only after the next
one was planned and has run: the plan of step N+1 is built before the reports of step N are seen, on a token that nobody
has read yet, as engines do that keep a GPU busy.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from kvconnect.driver import LeaderDriver, WorkerDriver
from kvconnect.engine.config import CacheLevel
from kvconnect.engine.events import EventBuffer, EventSnapshot, NumberedEvent
from kvconnect.engine.manager import KVCacheManager
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest, FinishReason
from kvconnect.engine.sampling import choose_token, draw
from kvconnect.engine.scheduler import Batch, Scheduler
from kvconnect.protocol import EngineCapabilities, Finished

__all__ = ["ENGINE_CAPABILITIES", "EngineCore", "NewToken", "Runner"]

logger = logging.getLogger(__name__)

ENGINE_CAPABILITIES = EngineCapabilities(
    can_ask_again=True,
    load_errors="block",
    reports=True,
    handshake=True,
    steps_when_idle=True,
    layer_hooks=True,
    batch_claim=True,
)
"""What this engine can do; whether it parks requests and how many tokens it takes a step are added when it starts."""

_UNWRITTEN = "attention read KV that nobody wrote"
_IDLE_S = 0.0005  # between steps that compute nothing but wait for a store
_SETTLE_S = 60.0  # longer than a connector may keep pages, see `kvconnect.engine.scheduler`


class Runner(Protocol):
    """Computes a batch: a model, or what stands in for one where only the KV matters."""

    def forward(self, batch: Batch, sampled: Mapping[EngineRequest, int]) -> torch.Tensor:
        """Write the batch's KV into its pages and return logits of each part's last token.

        NaN in a row says that the part read KV that nobody wrote.

        Args:
            batch: At least one part.
            sampled: Tokens of the step before that the scheduler has not seen; a request that needs one and has none is
                lost already, and any token will do.
        """
        ...


class NewToken(NamedTuple):
    """A token that was generated: whose it is, and why it was the last one, if it was."""

    request: EngineRequest
    token: int
    finish_reason: FinishReason | None


class _Ran:
    """A step that has run and was not taken yet.

    Attributes:
        batch: What it computed.
        sampled: The token of each request that got one.
        failed: Requests whose loads the workers say failed.
        unwritten: Requests that read KV that nobody wrote although no worker said so.
        bad_blocks: Blocks of parked requests that did not arrive.
        finished: What each rank said of asynchronous transfers.
        reports: What each rank reports to the leader.
        error: What the forward pass raised.
    """

    def __init__(self, batch: Batch) -> None:
        """Begin with nothing known."""
        self.batch = batch
        self.sampled: dict[EngineRequest, int] = {}
        self.failed: set[EngineRequest] = set()
        self.unwritten: set[EngineRequest] = set()
        self.bad_blocks: dict[EngineRequest, set[int]] = {}
        self.finished: list[Finished] = []
        self.reports: list[bytes] = []
        self.error: BaseException | None = None

    @property
    def lost(self) -> set[EngineRequest]:
        """Requests for whose present run nothing that the step computed counts."""
        alive = {part.request for part in self.batch.parts if part.counts}
        return alive if self.error is not None else (self.failed | self.unwritten) & alive


class EngineCore:
    """Scheduler, model runner, pages and connector, in one thread.

    Attributes:
        scheduler: Decides.
        manager: Gives requests their pages.
        cache: The pages.
        num_unwritten: Requests that read KV that nobody wrote.
    """

    def __init__(
        self,
        runner: Runner,
        cache: PagedCache,
        leader: LeaderDriver | None,
        workers: Sequence[WorkerDriver],
        *,
        ends: Callable[[EngineRequest], FinishReason | None],
        max_batch_tokens: int,
        max_num_seqs: int,
        async_scheduling: bool,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        max_events: int = 0,
    ) -> None:
        """Start with no requests; the connector stays the caller's to shut down.

        Args:
            runner: The model.
            cache: Its pages.
            leader: Of the connector, None for none.
            workers: One a rank.
            ends: Says why a request ends with the token that it got last, None if it goes on.
            max_batch_tokens: Tokens a step.
            max_num_seqs: Requests running at once.
            async_scheduling: Plan and run each step before the results of the one before it are taken.
            enable_block_reuse: Whether requests find the blocks of earlier ones.
            enable_partial_reuse: Whether they find parts of blocks on the device.
            max_events: Events kept until they are taken, 0 for none.
        """
        self.cache = cache
        self._events = EventBuffer(cache.pools, cache.block_size, max_events) if max_events else None
        self.manager = KVCacheManager(
            cache, leader, enable_block_reuse=enable_block_reuse, enable_partial_reuse=enable_partial_reuse
        )
        self.scheduler = Scheduler(self.manager, leader, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)
        self.num_unwritten = 0
        self._leader = leader
        self._workers = workers
        self._runner = runner
        self._ends = ends
        self._async_scheduling = async_scheduling
        self._in_flight: deque[_Ran] = deque()
        self._tokens: list[NewToken] = []  # taken, and not handed out yet

    @property
    def has_connector_work(self) -> bool:
        """Whether the connector needs steps although nothing is to be computed."""
        pending = self._leader is not None and self._leader.has_pending_work()
        return pending or bool(self._in_flight) or self.scheduler.num_saving > 0

    def step(self) -> list[NewToken]:
        """Run one step; return the tokens of the step that was taken.

        Raises:
            RuntimeError: If a request with nothing from a connector read KV that nobody wrote.
            BaseException: What the forward pass raised; its requests are queued again. With asynchronous scheduling an
                exception comes one step later, an interrupt at once; tokens that were taken before come with the next
                step.
        """
        self._advance(self.scheduler.schedule())
        tokens, self._tokens = self._tokens, []
        return tokens

    def suspend(self, request: EngineRequest) -> bool:
        """Take a request's pages below the device and wait until they are free.

        What others get meanwhile comes with the next step.

        Returns:
            False if there is no room for them, or if the request ends with what was in flight; then it goes on.

        Raises:
            RuntimeError: If the connector does not say in time that it has read the pages; they are freed all the same.
        """
        self._settle_steps()
        if request not in self.scheduler.running and request not in self.scheduler.waiting:
            return False
        if not self.idle_until(lambda: self.scheduler.suspend(request)):
            return False
        if not self.idle_until(lambda: not self.scheduler.saves(request.request_id)):
            raise RuntimeError(f"the pages of {request.request_id} were not read within {_SETTLE_S:.0f} s")
        return True

    def prefetch(self, request: EngineRequest, level: int) -> bool:
        """Have a suspended request's blocks brought up to `level`, from the next step on; False if there is no room."""
        leader, view = self._leader, request.view()
        return leader is not None and self.idle_until(lambda: leader.prefetch(view, level - CacheLevel.HOST))

    def resize(self, level: int, num_bytes: int) -> bool:
        """Give a level another size, after what the connector is doing has ended; False leaves all as it was.

        Raises:
            RuntimeError: If a request holds pages.
        """
        self._settle_steps()
        self.idle_until(lambda: not self.has_connector_work)
        if self.scheduler.running or self.scheduler.parked:
            raise RuntimeError("suspend or finish the running requests first")
        if level == CacheLevel.DEVICE:
            num_pages = num_bytes // self.cache.bytes_per_page
            fits = self.scheduler.longest <= num_pages * self.cache.block_size  # else it would wait for ever
            return fits and self.cache.resize(num_pages)
        resized = self._leader is not None and self._leader.resize_tier(level - CacheLevel.HOST, num_bytes)
        if resized:
            self.idle()  # workers learn what they need not keep
        return resized

    @property
    def can_suspend(self) -> bool:
        """Whether the connector can take a request's pages."""
        return self._leader is not None and self._leader.capabilities.suspend

    def suspended_blocks(self, request_id: str) -> list[tuple[int, int, int]]:
        """Return (layer group, block, place) of a suspended request: 0 host memory, 1 the first store, -1 nowhere."""
        stats = {} if self._leader is None else self._leader.get_stats().get("suspended", {})
        return [tuple(block) for block in stats.get(request_id, {}).get("blocks", ())]

    def take_events(self) -> list[NumberedEvent]:
        """Return what was not taken yet; nothing if none are kept."""
        self._collect_events()
        return [] if self._events is None else self._events.take()

    def snapshot_events(self) -> EventSnapshot | None:
        """Return what can be found on the device, None if no events are kept."""
        self._collect_events()
        return None if self._events is None else self._events.snapshot()

    def idle(self) -> None:
        """Run a step that computes nothing, for what moves between the connector's tiers."""
        self._advance(Batch(len(self.cache.pools)))

    def idle_until(self, done: Callable[[], bool], timeout_s: float = _SETTLE_S) -> bool:
        """Run steps that compute nothing until `done`; False if nothing moves any more, or it takes too long.

        `done` may be an attempt for which there is room once what is on its way to a store has arrived there.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            if not self.has_connector_work or time.monotonic() > deadline:
                return False
            self.idle()
        return True

    def _settle_steps(self) -> None:
        """Take what has run."""
        if self._in_flight:
            self.idle()

    def _advance(self, batch: Batch) -> None:
        """Run a step; take the results of the one before it, and its own unless another may be planned first."""
        before = self._in_flight[-1] if self._in_flight else None
        try:
            ran = self._run(batch, before)
        except BaseException:  # an interrupt in the middle of a hook: the connector's half of this step never ended
            self._reset_all(batch)
            raise
        self._in_flight.append(ran)
        interrupted = ran.error is not None and not isinstance(ran.error, Exception)
        keep = 1 if self._async_scheduling and batch.parts and not interrupted else 0
        while len(self._in_flight) > keep:
            taking = self._in_flight.popleft()
            try:
                self._take(taking)
            except BaseException:
                self._reset_all(taking.batch)
                raise
        if not batch.parts:
            time.sleep(_IDLE_S)

    def _run(self, batch: Batch, before: _Ran | None) -> _Ran:
        """Plan a step, and do what workers do: load, compute, sample, save, report.

        Args:
            batch: The step.
            before: The step before, if its results were not taken yet.
        """
        ran = _Ran(batch)
        self.cache.fill_fresh(batch.fresh)
        if self._leader is not None:
            output = self.scheduler.output(batch)
            meta = self._leader.build_connector_meta(output)
            for worker in self._workers:
                worker.bind(meta, output.step)
                worker.start_load_kv()
        logits = None
        try:
            if batch.parts:
                logits = self._runner.forward(batch, {} if before is None else before.sampled)
        except BaseException as error:  # raised again when the step is taken
            ran.error = error
            self._fail_step(f"the forward pass failed: {type(error).__name__}")
        newly_saving = self.scheduler.take_newly_saving()
        bad_pages: list[set[int]] | None = [set() for _ in self.cache.pools]
        for worker in self._workers:
            worker.wait_for_save()
            ran.finished.append(worker.get_finished(newly_saving))
            bad_pages = _union(bad_pages, worker.get_block_ids_with_load_errors())
        ran.failed = batch.failed_loads(bad_pages)
        ran.bad_blocks = self.scheduler.bad_blocks(bad_pages)
        if logits is not None:
            self._sample(ran, logits, set() if before is None else before.lost)
        ran.reports = [worker.build_worker_report() for worker in self._workers]
        return ran

    def _sample(self, ran: _Ran, logits: torch.Tensor, lost: set[EngineRequest]) -> None:
        """Choose tokens, and find out who read KV that nobody wrote: fresh pages hold NaN, and NaN reaches the logits.

        A connector that says it loaded and did not is the way to get there; nothing of such a step is committed.

        Args:
            ran: The step.
            logits: Of each part's last token.
            lost: Requests that stand on a step that failed.
        """
        finite = torch.isfinite(logits).all(dim=1).tolist()
        for part, row, good in zip(ran.batch.parts, logits, finite, strict=True):
            request, params = part.request, part.request.params
            if not good:
                ran.unwritten.add(request)
            elif part.samples:
                drawn = draw(request.seed, part.start + part.num_tokens) if params.temperature else 0.0
                ran.sampled[request] = choose_token(row, params.temperature, params.top_p, drawn)
        ran.unwritten -= ran.failed | lost
        if ran.unwritten:
            self._fail_step(_UNWRITTEN)

    def _fail_step(self, why: str) -> None:
        for worker in self._workers:
            worker.fail_step(why)

    def _take(self, ran: _Ran) -> None:
        """Take a step's results: the leader commits or voids, loads that failed are computed, tokens come out."""
        num_ranks = len(self._workers)
        lost_any = bool(ran.lost)
        if self._leader is not None:
            self._leader.update_connector_output(ran.reports)
            self._collect_events()
        for request, blocks in ran.bad_blocks.items():
            request.bad_blocks |= blocks
        for rank, finished in enumerate(ran.finished):
            self.scheduler.saves_ended(rank, finished.saved, num_ranks=num_ranks)
            self.scheduler.loads_ended(rank, finished.loaded, num_ranks=num_ranks)
        impossible = self._count_failures(ran)
        for request in ran.lost:
            self.scheduler.reset_request(request)
        if isinstance(ran.error, Exception) and not lost_any:
            logger.warning("a step failed that computed nothing for anybody who is left: %r", ran.error)
        elif ran.error is not None:
            raise ran.error
        if impossible:
            raise RuntimeError(f"{_UNWRITTEN}, without a connector's part in it")
        for part in ran.batch.parts:
            if not part.counts:  # it ended, or began again, while the step ran
                continue
            self.scheduler.advance(part)
            if part.samples:
                token = ran.sampled[part.request]
                part.request.append(token)
                reason = self._ends(part.request)
                self._tokens.append(NewToken(part.request, token, reason))
                if reason is not None:
                    self.scheduler.finish(part.request)

    def _collect_events(self) -> None:
        """Number what the leader has to tell; each step, so that nothing piles up there."""
        if self._events is not None and self._leader is not None:
            self._events.add(self._leader.take_events())

    def _reset_all(self, batch: Batch) -> None:
        """Let everybody begin again for whom the batch still means something."""
        for part in batch.parts:
            if part.counts:
                self.scheduler.reset_request(part.request)

    def _count_failures(self, ran: _Ran) -> bool:
        """Count against each request what the step lost; say whether it lost what no connector can have had part in."""
        alive = {part.request for part in ran.batch.parts if part.counts}
        for request in ran.failed & alive:
            request.failed_loads += 1
        unwritten = ran.unwritten & alive
        self.num_unwritten += len(unwritten)
        impossible = any(
            self._leader is None or request.failed_loads >= request.MAX_FAILED_LOADS for request in unwritten
        )
        for request in unwritten:
            request.failed_loads = request.MAX_FAILED_LOADS
        return impossible


def _union(pages: list[set[int]] | None, more: Sequence[set[int]] | None) -> list[set[int]] | None:
    """Join the pages of two ranks, by group; None, which trusts nothing, stays."""
    if pages is None or more is None:
        return None
    return [mine | other for mine, other in zip(pages, more, strict=True)]
