"""The scheduler's half of the adapter: what vLLM's scheduler tells and asks, in our leader's words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import msgspec
from vllm.v1.request import RequestStatus

from kvconnect.driver import LeaderDriver, open_leader
from kvconnect.errors import MetadataError
from kvconnect.protocol import Match, Report, RequestView, ScheduledRequest, SchedulerOutput
from kvconnect_vllm.config import EngineSetup
from kvconnect_vllm.messages import Handshake, StepPlan, StepReports
from kvconnect_vllm.requests import request_view

__all__ = ["BlockTables", "SchedulerSide"]

logger = logging.getLogger(__name__)

# As in the reference engine: a connector that never reports keeps pages this long, and a request this long.
_SAVE_DEADLINE_S = 30.0
_LOAD_DEADLINE_S = 60.0

# Loads of one request that may fail before it is no longer asked about.
_MAX_FAILED_LOADS = 3


class BlockTables(Sequence[Sequence[int]]):
    """A request's pages by layer group, fetched when they are looked at: most steps of most requests fill no block.

    vLLM keeps a null page where a window has moved on; here it is -1, as for every block without a page.
    """

    def __init__(self, num_groups: int, fetch: Callable[[], Sequence[Sequence[int]]], null_page: int) -> None:
        """Remember how to get them."""
        self._num_groups = num_groups
        self._fetch = fetch
        self._null_page = null_page
        self._tables: list[list[int]] | None = None

    def __len__(self) -> int:
        """Return the number of layer groups."""
        return self._num_groups

    @overload
    def __getitem__(self, group: int) -> list[int]: ...
    @overload
    def __getitem__(self, group: slice) -> list[list[int]]: ...
    def __getitem__(self, group: int | slice) -> list[int] | list[list[int]]:
        """Return one group's pages."""
        return self._all()[group]

    def __iter__(self) -> Iterator[list[int]]:
        """Walk through the groups."""
        return iter(self._all())

    def _all(self) -> list[list[int]]:
        if self._tables is None:
            null = self._null_page
            self._tables = [[-1 if page == null else page for page in table] for table in self._fetch()]
        return self._tables


class _Known:
    """A request from its arrival to its end.

    Attributes:
        request: vLLM's.
        view: Ours; its tokens grow with vLLM's.
        num_told: Tokens that the leader was told of in plans, the prompt included.
        named: Whether a plan has named it since it arrived or was reset.
        parked: Whether it waits for an asynchronous load, or has waited and was not yet scheduled.
        failed_loads: How many of its loads failed.
        offered_at: Tokens that were computed when the last offer was made.
        offer: That offer.
    """

    __slots__ = (
        "failed_loads",
        "named",
        "num_told",
        "offer",
        "offered_at",
        "parked",
        "request",
        "view",
    )

    def __init__(self, request: Any, view: RequestView) -> None:
        self.request = request
        self.view = view
        self.num_told = len(view.tokens)
        self.named = False
        self.parked = False
        self.failed_loads = 0
        self.offered_at = 0
        self.offer = Match(0, False)


class _Parked:
    """An asynchronous load: the pages that it fills, and who still fills them."""

    __slots__ = ("blocks", "deadline", "given_up", "pages", "ranks")

    def __init__(self, pages: frozenset[int], blocks: list[Any], ranks: Iterable[int]) -> None:
        self.pages = pages
        self.blocks = blocks
        self.ranks = set(ranks)
        self.deadline = time.monotonic() + _LOAD_DEADLINE_S
        self.given_up = False


class SchedulerSide:
    """One leader under vLLM's scheduler. One thread calls it.

    Attributes:
        setup: What it was started with.
        leader: The leader.
        num_lost_loads: Loads that were given up because nobody reported them in time.
        num_lost_saves: Saves of ended requests that were.
    """

    def __init__(self, setup: EngineSetup) -> None:
        """Open the leader.

        Raises:
            KVConnectError: If the connector cannot work as configured.
        """
        self.leader: LeaderDriver = open_leader(
            setup.resolved,
            namespace=setup.namespace,
            engine=setup.capabilities,
            block_size=setup.block_size,
            num_ranks=setup.num_ranks,
            num_groups=setup.num_groups,
        )
        self.setup = setup
        self._known: dict[str, _Known] = {}
        self._parked: dict[str, _Parked] = {}
        self._saving: dict[str, float] = {}  # ended requests whose pages are kept -> when that ends
        self._newly_saving: set[str] = set()
        self._lost_pages: set[int] = set()
        self._parking: set[str] = set()
        self._lost_loads: set[str] = set()
        self._loading: dict[str, tuple[frozenset[int], ...]] = {}
        self._step = 0
        self._pool: Any = None
        self._tables_of: Callable[[str], Sequence[Sequence[int]]] | None = None
        self._null_page = 0
        self.num_lost_loads = 0
        self.num_lost_saves = 0

    def bind_kv_cache_manager(self, manager: Any) -> None:
        """Learn where vLLM keeps its block tables and its pool."""
        self._tables_of = manager.get_block_ids
        self._pool = manager.block_pool
        self._null_page = self._pool.null_block.block_id

    def set_handshakes(self, handshakes: Mapping[int, Handshake]) -> None:
        """Hand over what each rank's worker said of its cache.

        Two connectors under one `MultiConnector` both get the first one's: then this one stays off, as it has none.
        """
        mine = [handshakes[rank] for rank in sorted(handshakes)]
        if not all(isinstance(each, Handshake) and each.configuration == self.setup.configuration for each in mine):
            logger.warning(
                "kvconnect: vLLM gave this connector another's handshake; it offers nothing and saves nothing"
            )
            mine = []
        self.leader.set_handshake_metadata([each.data for each in mine])

    # -- one request ---------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Tell of a request."""
        known = self._known[request.request_id] = _Known(request, request_view(request))
        if known.view.uncacheable:
            logger.debug("request %s is not cached: %s", request.request_id, known.view.uncacheable)
        self.leader.on_new_request(known.view)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Ask what could be loaded; vLLM asks at every step in which the request might be scheduled.

        What a leader offers to load within the step is parked too, until that step has run. vLLM (0.32) shares a page
        that is loaded within a step before it is loaded, relies on its owner to compute it if that fails, though the
        owner may be aborted first, and with asynchronous scheduling keeps the token of the step after.
        """
        known = self._known[request.request_id]
        if known.named or known.parked:  # it was preempted, or its load failed as a whole: it begins again
            self._reset(known)
        if known.failed_loads >= _MAX_FAILED_LOADS or request.request_id in self._parked:
            return 0, False
        known.offer = self.leader.get_num_new_matched_tokens(known.view, num_computed_tokens)
        known.offered_at = num_computed_tokens
        return known.offer.num_tokens, bool(known.offer.num_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Tell of an allocation; not of the second one, which vLLM makes when an asynchronous load has ended."""
        known = self._known[request.request_id]
        if known.parked and not num_external_tokens:
            known.parked = False
            if known.failed_loads and not known.offer.load_async:  # it goes on from the first bad block
                self._reset(known)
            return
        tables = BlockTables(self.setup.num_groups, blocks.get_block_ids, self._null_page)
        offered = known.offer.num_tokens or 0
        start = known.offered_at
        told = self.leader.update_state_after_alloc(known.view, tables, num_external_tokens)
        if num_external_tokens < offered:
            self.leader.cancel_load(known.view, start + num_external_tokens, start + offered)
        if not num_external_tokens:
            return
        size = self.setup.block_size
        ordinals = range(start // size, (start + num_external_tokens) // size)
        by_group = tuple(frozenset(table[i] for i in ordinals if i < len(table) and table[i] >= 0) for table in tables)
        pages = frozenset().union(*by_group)
        known.parked = True
        self._parking.add(request.request_id)
        if not told:  # nobody will load, and nobody will touch the pages
            self._lose_load(request.request_id, pages)
            return
        held = [block for group in blocks.blocks for block in list(group)[ordinals.start : ordinals.stop]]
        self._parked[request.request_id] = _Parked(pages, held, range(self.setup.num_ranks))
        if not known.offer.load_async:
            self._loading[request.request_id] = by_group

    def request_finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> bool:
        """Tell that a request ended; True if vLLM must keep its pages until a worker reports it as saved."""
        known = self._known.pop(request.request_id, None)
        if known is None:
            return False
        tables = BlockTables(self.setup.num_groups, lambda: block_ids, self._null_page)
        if not self.leader.request_finished(known.view, tables):
            return False
        self._saving[request.request_id] = float("inf")
        self._newly_saving.add(request.request_id)
        return True

    # -- one step ------------------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """Describe the step to the leader and return its plan, with what the workers need to know of vLLM's side."""
        preempted = []
        for request_id in scheduler_output.preempted_req_ids or ():
            known = self._known.get(request_id)
            if known is not None:
                preempted.append(request_id)
                if known.named:
                    self._reset(known)
        new: list[ScheduledRequest] = []
        cached: list[ScheduledRequest] = []
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            known = self._known.get(request_id)
            if known is not None:
                drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
                described = self._describe(known, count - drafts, scheduler_output.kv_connector_block_state)
                (cached if known.named else new).append(described)
                known.named = True
        step, self._step = self._step, self._step + 1
        plan = self.leader.build_connector_meta(
            SchedulerOutput(
                step=step, new_requests=tuple(new), cached_requests=tuple(cached), preempted=tuple(preempted)
            )
        )
        return self._step_plan(step, plan, idle=not scheduler_output.total_num_scheduled_tokens)

    def empty_step(self) -> StepPlan:
        """Return the plan of a step that computes nothing and of which vLLM knows nothing."""
        step, self._step = self._step, self._step + 1
        return self._step_plan(step, self.leader.build_connector_meta(SchedulerOutput(step=step)), idle=True)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._known

    def update_connector_output(self, reports: StepReports | None, bad_pages: set[int], failed: set[str]) -> None:
        """Take what the workers of one step said.

        Args:
            reports: Their reports; None if vLLM brought none.
            bad_pages: Pages that vLLM takes back; only with one layer group.
            failed: Parked requests that vLLM takes back whole.
        """
        if reports is not None:
            said = [reports.reports.get(rank, b"") for rank in range(self.setup.num_ranks)]
            if bad_pages - reports.bad_pages:  # another connector's: what was computed on them is garbage
                said = [_failed(report, "another connector's load failed") for report in said]
            self.leader.update_connector_output(said)
        for request_id in failed if not self.setup.page_errors else ():
            if request_id in self._known:
                self._known[request_id].failed_loads += 1
        if bad_pages:
            self._take_back(bad_pages)
        for rank, ended in reports.loads_ended.items() if reports is not None else ():
            self._loads_ended(rank, ended)

    def saves_ended(self, request_ids: Iterable[str]) -> None:
        """Learn that vLLM takes these requests' pages back: every rank has reported them as saved."""
        for request_id in request_ids:
            self._saving.pop(request_id, None)

    @property
    def has_pending_work(self) -> bool:
        """Whether vLLM should keep stepping although it has nothing to compute."""
        waits = self._saving or self._lost_loads or any(not parked.given_up for parked in self._parked.values())
        return bool(waits) or self.leader.has_pending_work()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _describe(self, known: _Known, count: int, block_state: Any) -> ScheduledRequest:
        request, tokens = known.request, known.view.tokens
        known.parked = False
        described = ScheduledRequest(
            request_id=request.request_id,
            # planned ahead, vLLM counts drafts that nobody has verified
            num_computed_tokens=min(request.num_computed_tokens, len(tokens)),
            num_scheduled_tokens=count,
            num_tokens=len(tokens),
            new_tokens=tokens[known.num_told :],
            block_ids=BlockTables(
                self.setup.num_groups,
                lambda: block_state.get_block_ids(request.request_id),
                self._null_page,
            ),
        )
        known.num_told = len(tokens)
        return described

    def _reset(self, known: _Known) -> None:
        """Tell that a request begins again."""
        known.named = known.parked = False
        known.num_told = len(known.view.tokens)
        self.leader.request_reset(known.view)

    def _step_plan(self, step: int, plan: bytes | None, *, idle: bool) -> StepPlan:
        now = time.monotonic()
        for request_id in self._newly_saving:
            self._saving[request_id] = now + _SAVE_DEADLINE_S
        lost_saves = {request_id for request_id, deadline in self._saving.items() if now > deadline}
        for request_id in lost_saves:
            self.num_lost_saves += 1
            self._saving[request_id] = float("inf")  # said once; gone when the workers have said it
            logger.warning("kvconnect: saves of %s were not reported in time; its pages are freed", request_id)
        for request_id, parked in self._parked.items():
            if now > parked.deadline and not parked.given_up:
                self._give_up(request_id, parked)
        taken = StepPlan(
            step=step,
            plan=plan,
            idle=idle,
            loading=self._loading,
            lost_pages=frozenset(self._lost_pages),
            parking=frozenset(self._parking),
            lost_loads=frozenset(self._lost_loads),
            saving=frozenset(self._newly_saving),
            lost_saves=frozenset(lost_saves),
        )
        self._loading, self._lost_pages, self._newly_saving = {}, set(), set()
        self._parking, self._lost_loads = set(), set()
        return taken

    def _give_up(self, request_id: str, parked: _Parked) -> None:
        """Compute a request whose load did not end in time; its pages stay out of use until nobody fills them."""
        self.num_lost_loads += 1
        logger.warning("kvconnect: the load of %s did not end in time; it is computed instead", request_id)
        parked.given_up = True
        if self._pool is not None:
            self._pool.touch([block for block in parked.blocks if not block.is_null])
        self._lose_load(request_id, parked.pages)

    def _lose_load(self, request_id: str, pages: frozenset[int]) -> None:
        """Have the workers say that a parked request's load has ended and failed; it is not asked about again."""
        self._lost_loads.add(request_id)
        if self.setup.page_errors:
            self._lost_pages |= pages
        if request_id in self._known:
            self._known[request_id].failed_loads = _MAX_FAILED_LOADS

    def _loads_ended(self, rank: int, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            parked = self._parked.get(request_id)
            if parked is None:
                continue
            parked.ranks.discard(rank)
            if not parked.ranks:
                del self._parked[request_id]
                if parked.given_up and self._pool is not None:
                    self._pool.free_blocks([block for block in parked.blocks if not block.is_null])

    def _take_back(self, bad_pages: set[int]) -> None:
        """Tell the leader of everybody who begins again: our parked loads, and whom another connector's load failed."""
        for request_id, known in self._known.items():
            if known.request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                parked = self._parked.get(request_id)
                known.failed_loads += parked is not None and not parked.pages.isdisjoint(bad_pages)
            elif known.named:
                pages = None if self._tables_of is None else self._tables_of(request_id)[0]
                if pages is None or not bad_pages.isdisjoint(pages):
                    known.failed_loads += 1
                    self._reset(known)


def _failed(report: bytes, why: str) -> bytes:
    """Return a report that says that nothing of its step can be trusted; empty if it is of a format of its own."""
    try:
        return msgspec.structs.replace(Report.decode(report), error=why).encode()
    except MetadataError:
        return b""
