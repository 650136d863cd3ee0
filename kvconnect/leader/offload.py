"""The offload connector's leader: one for every store. Decides what is loaded, saved, promoted and evicted.

It offers only blocks that lie in the arena, verified on every rank. What a store holds is looked up off the scheduling
path and promoted first, while the engine asks again. Read `get_num_new_matched_tokens`, `update_state_after_alloc`,
`build_connector_meta` and `update_connector_output` in that order: it is the life of a block.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from kvconnect.errors import MetadataError, UnsupportedError
from kvconnect.leader.base import Leader
from kvconnect.leader.chains import new_chain
from kvconnect.leader.cost import LoadCost
from kvconnect.leader.draft import PlanDraft
from kvconnect.leader.events import EventLog
from kvconnect.leader.holds import StoreHolds
from kvconnect.leader.index import BlockIndex, State
from kvconnect.leader.ledger import StepLedger
from kvconnect.leader.levels import LevelCounts
from kvconnect.leader.lookup import Presence, StoreLookup
from kvconnect.leader.match import Below, Matcher
from kvconnect.leader.parked import ParkedLoad
from kvconnect.leader.promotion import TierTraffic
from kvconnect.leader.request import PlannedLoad, RequestState
from kvconnect.leader.saves import SavePlanner
from kvconnect.leader.suspended import Suspensions
from kvconnect.protocol import (
    BlockChain,
    CacheEvent,
    Handshake,
    LeaderContext,
    Match,
    Plan,
    Report,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)
from kvconnect.protocol.messages import unpack_ints
from kvconnect.protocol.retention import check_priority

__all__ = ["OffloadLeader"]

logger = logging.getLogger(__name__)

# Store beliefs remembered a tier: about 250 MB of Python objects at the limit, 16M tokens of block size 16.
_MAX_BELIEFS = 1 << 20


class OffloadLeader(Leader):
    """Index, planner and policies of the arena and the stores below it."""

    def __init__(
        self,
        context: LeaderContext,
        *,
        key_secret: bytes = b"",
        load_policy: Literal["always", "cost"] = "always",
        min_priority: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the stores for lookups; offer nothing before the handshake.

        Args:
            context: What the engine and the configuration say.
            key_secret: Keys the block hashes, see `BlockChain`.
            load_policy: ``always`` loads what is there; ``cost`` leaves in the stores what is faster to compute.
            min_priority: Blocks of a lower priority are not saved.
            clock: Monotonic seconds, for priorities that hold for a time.

        Raises:
            ConfigError: If the secret is too long, or the priority is none.
            KVConnectError: If a store cannot be opened.
        """
        BlockChain(1, secret=key_secret)  # a secret that cannot key the hash is refused here, not at every request
        self._context = context
        self._secret = key_secret
        self._load_policy = load_policy
        check_priority("min_priority", min_priority)
        self._min_priority = min_priority
        self._clock = clock
        self._epoch = b""
        self._off = "no handshake yet"
        self._requests: dict[str, RequestState] = {}
        self._parked: dict[str, ParkedLoad] = {}
        self._counts: Counter[str] = Counter()
        self._presence = Presence(len(context.tiers), _MAX_BELIEFS)
        self._lookup = StoreLookup(context.tiers, self._presence)
        self._ledger = StepLedger(context.num_ranks)
        self._namespace = b""
        self._use_cache(())

    # -- start ---------------------------------------------------------------------------------------------------

    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        """Size the index after the smallest arena; stay off, with a reason, if the ranks disagree."""
        try:
            ranks = [Handshake.decode(data) for data in per_rank]
            self._off = self._disagreement(ranks)
        except MetadataError as error:
            self._off = f"handshake cannot be read: {error}"
        if self._off:
            logger.warning("kvconnect offers nothing: %s", self._off)
            return
        self._namespace = self._context.namespace.digest(ranks[0].groups[0].block_size)
        self._use_cache(ranks)
        self._suspended.clean()

    def _use_cache(self, ranks: Sequence[Handshake]) -> None:
        """Make the parts that depend on the engine's cache and on the arenas, which every rank describes alike."""
        groups = ranks[0].groups if ranks else ()
        self._ranks = ranks
        num_slots = min((rank.num_slots for rank in ranks), default=0)
        reserved = min((max(rank.num_slots, rank.reserved_slots) for rank in ranks), default=0)
        self._groups = groups
        self._shards = [sorted({rank.groups[g].shard for rank in ranks}) for g in range(len(groups))]
        self._block_size = groups[0].block_size if groups else 0
        tiers = self._context.tiers
        self._events = EventLog(
            self._block_size, [tier.name for tier in tiers], enabled=self._context.engine.takes_events
        )
        windows = [group.window or None for group in groups]
        watcher = self._events if self._events.enabled else None
        self._index = BlockIndex(windows, reserved, watcher, clock=self._clock)
        if num_slots < reserved:
            self._index.resize(num_slots)
        self._levels = LevelCounts(ranks, len(tiers))
        largest = max((group.payload_bytes for group in groups), default=1)
        self._traffic = TierTraffic(
            self._index,
            self._presence,
            tiers,
            self._context.num_ranks,
            self._events,
            self._levels,
            payload_bytes=largest,
            is_away=self._lookup.is_away,
            clock=self._clock,
        )
        self._matcher = Matcher(self._index, self._traffic, self._block_size, windows)
        self._saves = SavePlanner(
            self._index,
            self._block_size,
            self._counts,
            self._events,
            self._traffic.down,
            min_priority=self._min_priority,
        )
        self._suspended = Suspensions(
            self._index,
            self._traffic,
            self._presence,
            self._block_size,
            partial(StoreHolds, self._lookup, tiers, self._namespace, self._shards),
        )
        self._unused: list[int] = []  # slots that the next plan names as such
        self._cost = LoadCost(
            tiers, [tier.blocks_a_call(largest) for tier in tiers], self._context.engine.max_batch_tokens
        )

    def _disagreement(self, ranks: Sequence[Handshake]) -> str:
        if len(ranks) != self._context.num_ranks:
            return f"{len(ranks)} of {self._context.num_ranks} ranks shook hands"
        if any(rank.num_slots <= 0 for rank in ranks):
            return "an arena is smaller than one block"
        shapes = {tuple((g.block_size, g.window) for g in rank.groups) for rank in ranks}
        if len(shapes) != 1:
            return f"ranks disagree on block sizes and windows of the layer groups: {sorted(shapes)}"
        sizes = {size for size, _ in shapes.pop()}
        if len(sizes) != 1:
            return f"layer groups with different block sizes {sorted(sizes)} are not supported"
        return ""

    # -- one request ---------------------------------------------------------------------------------------------

    def on_new_request(self, request: RequestView) -> None:
        """Hash the prompt."""
        if self._off:
            return
        old = self._requests.pop(request.request_id, None)
        if old is not None:  # an id that comes back without having ended
            self._drop(old)
            self._suspended.forget(old)
        chain: BlockChain | None = None
        if request.uncacheable or request.cache == "none":
            self._counts["requests_not_cached"] += 1
        else:
            try:
                chain = self._new_chain(request)
            except UnsupportedError as error:
                self._counts["requests_not_cached"] += 1
                logger.debug("request %s is not cached: %s", request.request_id, error)
        self._requests[request.request_id] = RequestState(
            request, chain, keep_tokens=self._events.keeps_tokens(request)
        )

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        """Offer what lies in the arena; ask for time while a store is looked up or a block comes up."""
        state = self._requests.get(request.request_id)
        if state is None or not state.reads or state.chain is None or num_computed_tokens % self._block_size:
            return Match(0, False)
        chain = state.chain
        if chain.num_tokens < len(request.tokens) and not state.extend(request.tokens[chain.num_tokens :]):
            return Match(0, False)
        first = state.first = num_computed_tokens // self._block_size
        limit = (len(request.tokens) - 1) // self._block_size  # leaves a token to compute
        if limit <= first:
            return Match(0, False)
        ready = end = self._matcher.num_ready(chain, first, limit)
        if ready < limit and self._lookup.readable and self._context.engine.can_ask_again:
            found = self._look_below(state, chain, first, ready, limit)
            if found is None:
                self._counts["asked_again"] += 1
                return Match(None, False)
            end = found
        state.parked = end > ready or (end > first and not self._context.engine.sync_load)
        return Match((end - first) * self._block_size, state.parked)

    def claim_match(self, request: RequestView, num_tokens: int) -> int:
        """Claim the offered blocks that lie in the arena; of an asynchronous offer the rest is loaded or recomputed."""
        state = self._requests.get(request.request_id)
        if state is None or state.chain is None or not state.reads:
            return 0
        self.release_match(request)
        end = state.first + num_tokens // self._block_size
        ready = self._matcher.num_ready(state.chain, state.first, end)
        needed = self._matcher.needed(state.first, end if state.parked else ready)
        for group, ordinal in needed:
            entry = self._index.get(group, state.chain.hashes[ordinal])
            if entry is not None and entry.state is State.READY:
                self._index.claim(entry)
                state.claimed.append(entry)
        return num_tokens if state.parked else (ready - state.first) * self._block_size

    def release_match(self, request: RequestView) -> None:
        """Let go of what was claimed; it becomes most recently used."""
        state = self._requests.get(request.request_id)
        if state is not None:
            claimed, state.claimed = state.claimed, []
            self._index.release_chain(claimed)

    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        """Claim what the engine takes of the offer, for the next plan."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        self._lookup.forget(state.request_id)
        self._traffic.forget(state)
        held, state.held = state.held, []
        if num_external_tokens and state.chain is not None:
            end = state.first + num_external_tokens // self._block_size
            if state.parked:
                self._park(state, block_ids, state.first, end)
                self._index.release_chain(held)
                self.release_match(request)
                return
            for group, table in enumerate(block_ids):
                for ordinal in range(state.first, end):
                    if table[ordinal] >= 0:
                        state.loads.append(self._claim(state, state.chain, group, ordinal, table[ordinal]))
            self._counts["blocks_offered_and_taken"] += end - state.first
        self._index.release_chain(held)
        self.release_match(request)

    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        """Drop the planned loads of tokens ``[start, end)``."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        kept = []
        for load in state.loads:
            if start <= load.ordinal * self._block_size < end:
                if load.entry is not None:
                    self._index.release(load.entry)
            else:
                kept.append(load)
        state.loads = kept

    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Forget the request; True if a block of it was computed before its tokens were known, and is saved now."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return False
        self._drop(state)
        self._suspended.forget(state)
        if request.request_id in self._parked:  # its pages are free when the plan that says so is reported
            self._parked[request.request_id].drop()
            return False
        return self._saves.end(state, request, block_ids, self._ledger.last_step)

    def request_reset(self, request: RequestView) -> None:
        """Let go of what it held; it will be asked about again like a new one."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        self._drop(state)
        if request.request_id in self._parked:  # the engine has given it other pages
            self._parked[request.request_id].drop()
        self._suspended.end(state.request_id)
        state.looked_up = False
        state.loads_below = None
        state.planned_tokens = 0
        state.give_up_at = 0.0
        if state.chain is not None:
            state.extend(request.tokens[state.chain.num_tokens :])

    # -- suspended requests --------------------------------------------------------------------------------------

    def suspend(self, request: RequestView, block_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
        """Take slots for all of its pages that are not below yet, for the next plan to save; or change nothing."""
        state = self._requests.get(request.request_id)
        if self._off or state is None or request.request_id in self._suspended or request.request_id in self._parked:
            return False
        if state.chain is not None and not state.extend(request.tokens[state.chain.num_tokens :]):
            return False
        return self._suspended.suspend(state, block_ids, num_tokens)

    def prefetch(self, request: RequestView, tier: int) -> bool:
        """Take slots for its blocks that lie below `tier`, for the next plan to promote; or change nothing."""
        return not self._off and self._suspended.prefetch(request.request_id, tier)

    def resume(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Load its blocks into the pages, over as many steps as it takes; a block that is lost is named as failed."""
        state = self._requests.get(request.request_id)
        if self._off or state is None or not self._suspended.resume(request.request_id):
            return False
        if not self._park(state, block_ids, 0, max(map(len, block_ids), default=0)):
            self._suspended.end(request.request_id)
        return True

    def resize_tier(self, tier: int, num_bytes: int) -> bool:
        """Give the arena other slots, or a store another capacity; what is held is never evicted for it."""
        if self._off or num_bytes <= 0 or not 0 <= tier <= len(self._context.tiers):
            return False
        if tier:
            store = self._context.tiers[tier - 1]
            if not store.store_class.capabilities.resizes or "r" not in store.use.mode:
                return False
            return self._lookup.wait(tier - 1, lambda opened: opened.resize(num_bytes)) is True
        if not all(rank.slot_bytes for rank in self._ranks):
            return False
        gone = self._index.resize(min(num_bytes // rank.num_sharing // rank.slot_bytes for rank in self._ranks))
        if gone is not None:
            self._unused = gone  # after a grow none: what was put away before may be in use again
        return gone is not None

    # -- one step ------------------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        """Plan the step: loads that were claimed, blocks that become full, traffic with the stores."""
        if self._off:
            return Plan(step=scheduler_output.step).encode()
        self._lookup.poll()
        self._cost.step_planned(scheduler_output)
        opened = self._ledger.open(scheduler_output.step)
        draft = PlanDraft(opened)
        self._plan_loads(draft)
        ends = self._plan_parked(draft)
        self._suspended.plan(draft)
        for scheduled in (*scheduler_output.new_requests, *scheduler_output.cached_requests):
            state = self._requests.get(scheduled.request_id)
            if state is not None and self._learn_tokens(state, scheduled):
                self._saves.plan(draft, state, scheduled)
        self._saves.plan_ended(draft)
        self._counts["load_blocks"] += draft.num_loads
        self._counts["load_blocks_missing"] += draft.num_fails
        opened.promotes = self._traffic.plan_promotes()
        opened.demotes = self._traffic.down.plan()
        opened.ended += self._suspended.named
        unused, self._unused = self._unused, []
        return draft.encode(
            parked=self._parked, ends=ends, saved=opened.ended, drops=self._traffic.plan_drops(), unused=unused
        )

    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        """Commit or void the step's saves, and take what came of the traffic with the stores."""
        for rank, data in enumerate(reports):
            try:
                report = Report.decode(data)
                report.check()
            except MetadataError as error:
                self._counts["reports_unreadable"] += 1
                logger.warning("report of rank %d cannot be read; nothing of its step is committed: %s", rank, error)
                self._lose_report(rank, str(error))
                continue
            if report.step < 0:
                self._lose_report(rank, report.error, unbound=report.unbound_step)
                continue
            while self._ledger.skipped(rank, report.step):
                self._lose_report(rank, "its report never came")
            self._take_report(rank, report)
            self._cost.step_reported(report.step, report.step_us / 1e6)
        self._lookup.poll()

    def has_pending_work(self) -> bool:
        """Keep the engine stepping while blocks move between arena and stores."""
        waits = self._lookup.num_pending or self._parked or self._saves.ended or self._suspended.busy
        return bool(waits or self._traffic.busy or len(self._ledger))

    # -- whole cache ---------------------------------------------------------------------------------------------

    def take_events(self) -> Sequence[CacheEvent]:
        """Give out what was stored and removed, in the arena and in the stores."""
        return self._events.take()

    def get_stats(self) -> dict[str, Any]:
        """Return counters, and how the slots stand."""
        traffic = self._traffic
        return {
            **self._counts,
            "promoted_blocks": traffic.promoted,
            "promote_failures": traffic.not_promoted,
            "promotes_without_slot": traffic.no_slot,
            **traffic.down.counts,
            "lookup_failures": self._lookup.num_failed,
            "lookup_hits": self._lookup.num_found,
            "lookup_misses": self._lookup.num_missed,
            "breakers": self._lookup.breakers(),
            "evicted_blocks": self._index.num_evicted,
            "events_lost": self._events.num_lost,
            "arena": self._index.counts(),
            "levels": self._levels.get_stats(self._index),
            "load_policy": self._load_policy,
            "load_cost": self._cost.get_stats(),
            "requests": len(self._requests),
            "suspended": self._suspended.get_stats(),
            "off": self._off,
        }

    def reset_cache(self) -> bool:
        """Start a new epoch: no key from before matches again, in the arena or in a store."""
        self._epoch = secrets.token_bytes(16)
        for state in self._requests.values():  # their chains belong to the old epoch, and so does what they compute
            self._drop(state)
            state.stop_caching()
        self._saves.drop_ended()
        self._suspended.lose_all()
        for parked in self._parked.values():
            parked.give_up()
        self._ledger.void_open_steps()
        self._traffic.fail_promotions()
        self._index.clear()
        self._presence.clear()
        self._events.cleared()
        return True

    def shutdown(self) -> None:
        """Close the leader's stores."""
        self._lookup.close()

    def _check_integrity(self) -> None:
        """Compare the index with itself, see `BlockIndex.check_integrity`; private, for public methods are hooks."""
        self._index.check_integrity()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _new_chain(self, request: RequestView) -> BlockChain:
        chain = new_chain(request, self._block_size, secret=self._secret, epoch=self._epoch)
        started = time.perf_counter()
        chain.extend(request.tokens)
        self._counts["hash_us"] += round((time.perf_counter() - started) * 1e6)
        return chain

    def _park(self, state: RequestState, block_ids: Sequence[Sequence[int]], first: int, end: int) -> bool:
        """Take on the load of a request that the engine parks; False if there is no page to load into."""
        blocks = [
            (group, ordinal, table[ordinal])
            for ordinal in range(first, end)
            for group, table in enumerate(block_ids)
            if ordinal < len(table) and table[ordinal] >= 0
        ]
        if not blocks:
            return False
        patience_s = max((tier.use.timeout_s for tier in self._context.tiers), default=0.0) * 2
        self._parked[state.request_id] = ParkedLoad(state, blocks, patience_s)
        self._counts["parked_loads"] += 1
        return True

    def _plan_parked(self, draft: PlanDraft) -> list[str]:
        """Add what parked requests load in this step; return those whose load it ends."""
        ends: list[str] = []
        for request_id, parked in self._parked.items():
            if parked.ended:
                continue  # until the step that ends it is reported
            state = parked.request
            now, never = parked.plan(self._index, self._traffic)
            self._index.release_chain(state.held)  # what came up is claimed by its load now
            state.held = []
            self._suspended.loading(request_id, now)
            draft.load(state, now + never)
            if parked.ended:
                ends.append(request_id)
        return ends

    def _look_below(self, state: RequestState, chain: BlockChain, first: int, ready: int, limit: int) -> int | None:
        """Make the match longer than the arena's `ready` blocks.

        Returns:
            How many blocks to offer, more than `ready` only if they are to be loaded asynchronously; None if it is
            worth asking again.
        """
        if not state.looked_up:
            state.looked_up = True
            stops_early = self._matcher.stops_early
            self._lookup.start(
                state.request_id,
                chain.hashes[ready if len(self._groups) == 1 and stops_early else first : limit],
                namespace=self._namespace,
                shards=self._shards,
                stop_early=stops_early,
            )
        if self._lookup.is_pending(state.request_id) or self._traffic.waits(state):
            return None
        if state.loads_below is False or (state.give_up_at and time.monotonic() >= state.give_up_at):
            return ready  # it has waited long enough; what still comes up serves others
        below = self._matcher.below(state, chain, first, ready, limit)
        chosen = self._choose(state, below, ready)
        if self._context.engine.async_load and state.loads_below:
            return below.end  # it comes up while the request is parked
        if not chosen and not below.coming:
            return ready
        self._traffic.want(state, chosen, below.coming)
        return None

    def _choose(self, state: RequestState, below: Below, ready: int) -> Sequence[tuple[int, int, int]]:
        """Return which blocks to bring up from the stores now; decide for the request when enough is known."""
        if self._load_policy == "always" or state.loads_below:
            state.loads_below = True
            return below.wanted
        if not below.wanted:
            return ()
        num_tokens = (below.end - ready) * self._block_size
        chosen = self._cost.choose(below.wanted, self._traffic.num_promoting(), num_tokens)
        if len(chosen) in (0, len(below.wanted)):  # else a probe
            state.loads_below = bool(chosen)
        return chosen

    def _claim(self, state: RequestState, chain: BlockChain, group: int, ordinal: int, block_id: int) -> PlannedLoad:
        block_hash = chain.hashes[ordinal]
        entry = self._index.get(group, block_hash)
        if entry is None or entry.state is not State.READY:
            return PlannedLoad(None, block_hash, group, ordinal, block_id)
        self._index.claim(entry)
        state.retain(self._index, entry, ordinal)
        return PlannedLoad(entry, block_hash, group, ordinal, block_id)

    def _plan_loads(self, draft: PlanDraft) -> None:
        for state in self._requests.values():
            draft.load(state, state.loads)
            state.loads = []

    def _learn_tokens(self, state: RequestState, scheduled: ScheduledRequest) -> bool:
        """Extend the chain by what became known; False, and no caching any more, if the tokens have a gap."""
        if state.chain is None:
            return False
        known = scheduled.num_tokens - len(scheduled.new_tokens)
        missing = scheduled.num_tokens - state.chain.num_tokens
        if state.chain.num_tokens < known:
            self._counts["requests_with_token_gap"] += 1
            logger.warning(
                "request %s: tokens %d to %d were never told", state.request_id, state.chain.num_tokens, known
            )
            state.stop_caching()
            return False
        return missing <= 0 or state.extend(scheduled.new_tokens[-missing:])

    def _lose_report(self, rank: int, why: str, *, unbound: int | None = None) -> None:
        lost = self._ledger.lost_report(rank, why, unbound=unbound)
        if lost is not None:
            self._take_report(rank, lost)
            self._traffic.expect_later(rank, unpack_ints(lost.quarantined))

    def _take_report(self, rank: int, report: Report) -> None:
        self._drop_failed_loads(report)
        self._traffic.take_report(rank, report)
        reads = unpack_ints(report.reads)
        for tier, blocks, micros in zip(reads[::3], reads[1::3], reads[2::3], strict=True):
            self._cost.read_ended(tier, blocks, micros / 1e6)
        outcome = self._ledger.report(rank, report)
        if outcome is None:
            return
        for state, lost in outcome.lost:
            if state.request_id in self._parked:
                self._parked[state.request_id].fail_again(lost)
        for request_id in [name for name, parked in self._parked.items() if parked.ended]:
            if not self._ledger.loads_open(request_id):
                del self._parked[request_id]
                self._suspended.end(request_id)
        self._saves.reported(outcome.ended)
        self._suspended.reported(outcome.ended)
        for entry in outcome.voided:
            self._index.void(entry)
        for entry in outcome.committed:
            self._index.commit(entry)
        self._levels.count("saved", 0, outcome.committed)
        self._index.release_chain(outcome.loaded)
        # others were let go of before their step was reported: their slots may be somebody else's by now
        self._traffic.down.offer(entry for entry in outcome.committed if entry.state is State.READY)
        self._suspended.closed(outcome.committed, outcome.voided)
        self._counts["committed_blocks"] += len(outcome.committed)
        self._counts["voided_blocks"] += len(outcome.voided)

    def _drop_failed_loads(self, report: Report) -> None:
        """Forget arena blocks that could not be loaded: whatever was wrong with them would be wrong again."""
        for error in report.load_errors:
            bad = set(unpack_ints(error.ordinals))
            for load in self._ledger.loads_of(report.step, error.request_id):
                if load.group == error.group and load.ordinal in bad:
                    self._counts["load_errors"] += 1
                    if load.entry is not None and load.entry.state is State.READY:
                        self._index.void(load.entry)

    def _drop(self, state: RequestState) -> None:
        self._lookup.forget(state.request_id)
        self._traffic.forget(state)
        state.let_go(self._index)
