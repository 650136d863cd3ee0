"""The offload connector's leader: one for every store. Decides what is loaded, saved, promoted and evicted.

It offers only blocks that lie in the arena, verified on every rank. What a store holds is looked up off the scheduling
path and promoted first, while the engine asks again. Read `get_num_new_matched_tokens`, `update_state_after_alloc`,
`build_connector_meta` and `update_connector_output` in that order: it is the life of a block.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvconnect.errors import MetadataError, UnsupportedError
from kvconnect.leader.base import Leader
from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.leader.ledger import OpenStep, StepLedger
from kvconnect.leader.lookup import Presence, StoreLookup
from kvconnect.leader.parked import ParkedLoad
from kvconnect.leader.promotion import TierTraffic
from kvconnect.leader.request import PlannedLoad, RequestState
from kvconnect.protocol import (
    BlockChain,
    Handshake,
    LeaderContext,
    Match,
    Move,
    PackedMoves,
    Plan,
    Report,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
    first_needed_block,
    longest_match,
)
from kvconnect.protocol.messages import GroupHandshake, unpack_ints

__all__ = ["OffloadLeader"]

logger = logging.getLogger(__name__)

# Store beliefs remembered a tier: about 250 MB of Python objects at the limit, 16M tokens of block size 16.
_MAX_BELIEFS = 1 << 20


class OffloadLeader(Leader):
    """Index, planner and policies of the arena and the stores below it."""

    def __init__(self, context: LeaderContext, *, key_secret: bytes = b"") -> None:
        """Open the stores for lookups; offer nothing before the handshake.

        Args:
            context: What the engine and the configuration say.
            key_secret: Keys the block hashes, see `BlockChain`.

        Raises:
            ConfigError: If the secret is too long.
            KVConnectError: If a store cannot be opened.
        """
        BlockChain(1, secret=key_secret)  # a secret that cannot key the hash is refused here, not at every request
        self._context = context
        self._secret = key_secret
        self._epoch = b""
        self._off = "no handshake yet"
        self._requests: dict[str, RequestState] = {}
        self._parked: dict[str, ParkedLoad] = {}
        self._counts: Counter[str] = Counter()
        self._presence = Presence(len(context.tiers), _MAX_BELIEFS)
        self._lookup = StoreLookup(context.tiers, self._presence)
        self._index = BlockIndex(0, 0)
        self._traffic = TierTraffic(self._index, self._presence, (), context.num_ranks)
        self._ledger = StepLedger(context.num_ranks)
        self._groups: tuple[GroupHandshake, ...] = ()
        self._windows: tuple[int | None, ...] = ()
        self._shards: list[list[int]] = []
        self._block_size = 0
        self._namespace = b""

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
        self._groups = ranks[0].groups
        self._windows = tuple(group.window or None for group in self._groups)
        self._block_size = self._groups[0].block_size
        self._shards = [sorted({rank.groups[g].shard for rank in ranks}) for g in range(len(self._groups))]
        self._namespace = self._context.namespace.digest(self._block_size)
        self._index = BlockIndex(len(self._groups), min(rank.num_slots for rank in ranks))
        self._traffic = TierTraffic(self._index, self._presence, self._context.tiers, len(ranks))

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
        chain: BlockChain | None = None
        if request.uncacheable or request.cache == "none":
            self._counts["requests_not_cached"] += 1
        else:
            try:
                chain = self._new_chain(request)
            except UnsupportedError as error:
                self._counts["requests_not_cached"] += 1
                logger.debug("request %s is not cached: %s", request.request_id, error)
        self._requests[request.request_id] = RequestState(request, chain)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        """Offer what lies in the arena; ask for time while a store is looked up or a block comes up."""
        state = self._requests.get(request.request_id)
        if state is None or not state.reads or state.chain is None or num_computed_tokens % self._block_size:
            return Match(0, False)
        chain = state.chain
        if chain.num_tokens < len(request.tokens) and not self._extend(
            state, chain, request.tokens[chain.num_tokens :]
        ):
            return Match(0, False)
        first = state.first = num_computed_tokens // self._block_size
        limit = (len(request.tokens) - 1) // self._block_size  # leaves a token to compute
        if limit <= first:
            return Match(0, False)
        state.parked = False
        ready = self._num_ready(chain, first, limit)
        if ready < limit and self._lookup.readable and self._context.engine.can_ask_again:
            if self._must_wait(state, chain, first, ready, limit):
                self._counts["asked_again"] += 1
                return Match(None, False)
            now = self._num_ready(chain, first, limit)
            ready = self._num_loadable(state, chain, first, now, limit)
            state.parked = ready > now
        return Match((ready - first) * self._block_size, state.parked)

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
                self._park(state, block_ids, end)
                self._index.release_chain(held)
                return
            for group, table in enumerate(block_ids):
                for ordinal in range(state.first, end):
                    if table[ordinal] >= 0:
                        state.loads.append(self._claim_load(state.chain, group, ordinal, table[ordinal]))
            self._counts["blocks_offered_and_taken"] += end - state.first
        self._index.release_chain(held)

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
        """Forget the request; its saves were planned with the steps that computed them."""
        state = self._requests.pop(request.request_id, None)
        if state is not None:
            self._drop(state)
            if request.request_id in self._parked:  # its pages are free when the plan that says so is reported
                self._parked[request.request_id].drop()
        return False

    def request_reset(self, request: RequestView) -> None:
        """Let go of what it held; it will be asked about again like a new one."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        self._drop(state)
        state.looked_up = False
        state.give_up_at = 0.0
        if state.chain is not None and state.chain.num_tokens < len(request.tokens):
            self._extend(state, state.chain, request.tokens[state.chain.num_tokens :])

    # -- one step ------------------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        """Plan the step: loads that were claimed, blocks that become full, traffic with the stores."""
        if self._off:
            return Plan(step=scheduler_output.step).encode()
        self._lookup.poll()
        opened = self._ledger.open(scheduler_output.step)
        ids: dict[str, int] = {}
        loads, fails = self._plan_loads(opened, ids)
        ends = self._plan_parked(opened, ids, loads, fails)
        saves: list[Move] = []
        for scheduled in (*scheduler_output.new_requests, *scheduler_output.cached_requests):
            saves += self._plan_saves(opened, ids, scheduled)
        opened.promotes = self._traffic.plan_promotes()
        opened.demotes = self._traffic.plan_demotes()
        return Plan(
            step=scheduler_output.step,
            request_ids=tuple(ids),
            saves=PackedMoves.pack(saves),
            loads=PackedMoves.pack(loads),
            promotes=PackedMoves.pack(opened.promotes),
            demotes=PackedMoves.pack(opened.demotes),
            fails=PackedMoves.pack(fails),
            parked=tuple(self._parked),
            ends=ends,
        ).encode()

    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        """Commit or void the step's saves, and take what came of the traffic with the stores."""
        for rank, data in enumerate(reports):
            try:
                report = Report.decode(data)
                report.check()
            except MetadataError as error:
                self._counts["reports_unreadable"] += 1
                logger.warning("report of rank %d cannot be read; nothing of its step is committed: %s", rank, error)
                self._lose_report(rank, str(error), started=True)
                continue
            if report.step < 0:  # its plan never reached the worker
                self._lose_report(rank, report.error, started=False)
                continue
            while self._ledger.skipped(rank, report.step):
                self._lose_report(rank, "its report never came", started=True)
            self._take_report(rank, report)
        self._lookup.poll()

    def has_pending_work(self) -> bool:
        """Keep the engine stepping while blocks move between arena and stores."""
        return bool(self._traffic.busy or self._lookup.num_pending or self._parked or len(self._ledger))

    # -- whole cache ---------------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Return counters, and how the slots stand."""
        traffic = self._traffic
        return {
            **self._counts,
            "promoted_blocks": traffic.promoted,
            "promote_failures": traffic.not_promoted,
            "promotes_without_slot": traffic.no_slot,
            "demoted_blocks": traffic.demoted,
            "demote_failures": traffic.not_demoted,
            "lookup_failures": self._lookup.num_failed,
            "lookup_hits": self._lookup.num_found,
            "lookup_misses": self._lookup.num_missed,
            "evicted_blocks": self._index.num_evicted,
            "arena": self._index.counts(),
            "requests": len(self._requests),
            "off": self._off,
        }

    def reset_cache(self) -> bool:
        """Start a new epoch: no key from before matches again, in the arena or in a store."""
        self._epoch = secrets.token_bytes(16)
        for state in self._requests.values():  # their chains belong to the old epoch, and so does what they compute
            self._drop(state)
            state.stop_caching()
        self._ledger.void_open_steps()
        self._traffic.fail_promotions()
        self._index.clear()
        self._presence.clear()
        return True

    def shutdown(self) -> None:
        """Close the leader's stores."""
        self._lookup.close()

    def _check_integrity(self) -> None:
        """Compare the index with itself, see `BlockIndex.check_integrity`; private, for public methods are hooks."""
        self._index.check_integrity()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _new_chain(self, request: RequestView) -> BlockChain:
        chain = BlockChain(
            self._block_size,
            salt=request.cache_salt,
            adapter=request.adapter,
            media=request.media,
            secret=self._secret,
            epoch=self._epoch,
        )
        started = time.perf_counter()
        chain.extend(request.tokens)
        self._counts["hash_us"] += round((time.perf_counter() - started) * 1e6)
        return chain

    def _num_ready(self, chain: BlockChain, first: int, limit: int) -> int:
        """Return how many blocks, from the sequence's start, could be at hand if the arena's were loaded."""
        hashes = itertools.islice(chain.hashes, first, limit)
        if self._windows == (None,):  # one full-attention group: up to the first miss, without a loop of ours
            return first + len(list(itertools.takewhile(self._index.ready(0).__contains__, hashes)))
        known = list(hashes)
        present = [
            [False] * first + [block_hash in ready for block_hash in known]
            for ready in (self._index.ready(group) for group in range(len(self._groups)))
        ]
        return longest_match(present, self._block_size, self._windows, first, limit)

    def _num_loadable(self, state: RequestState, chain: BlockChain, first: int, ready: int, limit: int) -> int:
        """Return how many blocks could be at hand: the `ready` ones, and with asynchronous loads those in stores."""
        if not self._context.engine.async_load or ready == limit:
            return ready
        return self._blocks_below(state, chain, first, ready, limit)[2]

    def _park(self, state: RequestState, block_ids: Sequence[Sequence[int]], end: int) -> None:
        """Take on the load of a request that the engine parks."""
        blocks = [
            (group, ordinal, table[ordinal])
            for ordinal in range(state.first, end)
            for group, table in enumerate(block_ids)
            if table[ordinal] >= 0
        ]
        patience_s = max(tier.use.timeout_s for tier in self._context.tiers) * 2
        self._parked[state.request_id] = ParkedLoad(state, blocks, patience_s)
        self._counts["parked_loads"] += 1

    def _plan_parked(
        self, opened: OpenStep, ids: dict[str, int], loads: list[Move], fails: list[Move]
    ) -> tuple[str, ...]:
        """Add what parked requests load in this step; return those whose load it ends."""
        ends: list[str] = []
        for request_id, parked in self._parked.items():
            if parked.ended:
                continue  # until the step that ends it is reported
            state = parked.request
            now, never = parked.plan(self._index, self._traffic)
            self._index.release_chain(state.held)  # what came up is claimed by its load now
            state.held = []
            request = ids.setdefault(request_id, len(ids))
            for planned, moves in ((now, loads), (never, fails)):
                for load in planned:
                    slot = -1 if load.entry is None else load.entry.slot
                    moves.append(Move(load.block_hash, load.group, slot, load.block_id, request, load.ordinal))
            opened.loads.append((state, now + never))
            self._counts["load_blocks"] += len(now)
            self._counts["load_blocks_missing"] += len(never)
            if parked.ended:
                ends.append(request_id)
        return tuple(ends)

    def _must_wait(self, state: RequestState, chain: BlockChain, first: int, ready: int, limit: int) -> bool:
        """Start what would make the match longer than `ready`; say whether it is worth asking again."""
        if not state.looked_up:
            state.looked_up = True
            stop_early = self._windows[0] is None
            self._lookup.start(
                state.request_id,
                chain.hashes[ready if len(self._groups) == 1 and stop_early else first : limit],
                namespace=self._namespace,
                shards=self._shards,
                stop_early=stop_early,
            )
        if self._lookup.is_pending(state.request_id):
            return True
        if self._context.engine.async_load:
            return False  # what lies in stores is offered, and comes up while the request is parked
        if self._traffic.waits(state):
            return True
        if state.give_up_at and time.monotonic() >= state.give_up_at:
            return False  # it has waited long enough; what still comes up serves others
        wanted, coming, _ = self._blocks_below(state, chain, first, ready, limit)
        if wanted or coming:
            self._traffic.want(state, wanted, coming)
        return bool(wanted or coming)

    def _blocks_below(
        self, state: RequestState, chain: BlockChain, first: int, ready: int, limit: int
    ) -> tuple[list[tuple[int, int, int]], list[Entry], int]:
        """Return what would make the match longer, and how long it would be.

        Returns:
            (tier, group, ordinal) of blocks in stores; entries on their way up, another request's promotions that serve
            this one too; the number of blocks that would be at hand.
        """
        sources: list[list[int]] = []  # by group and block: -2 in the arena, -1 nowhere, else the tier
        coming: dict[tuple[int, int], Entry] = {}
        for group in range(len(self._groups)):
            get = self._index.group(group).get
            row = [-1] * first
            for ordinal in range(first, limit):
                entry = get(chain.hashes[ordinal])
                if entry is not None and entry.state is not State.RESERVED:
                    row.append(-2)
                    if entry.state is State.PROMOTING:
                        coming[group, ordinal] = entry
                    continue
                tier = self._traffic.tier_of(group, chain.hashes[ordinal])
                row.append(-1 if (tier, group, ordinal) in state.tried else tier)
                if row[-1] == -1 and len(self._groups) == 1 and self._windows[0] is None:
                    break  # nothing behind a gap is of use
            sources.append(row + [-1] * (limit - len(row)))
        present = [[source != -1 for source in row] for row in sources]
        best = longest_match(present, self._block_size, self._windows, first, limit)
        if best <= ready:
            return [], [], ready
        needed = [
            (group, ordinal)
            for ordinal in range(first, best)
            for group, window in enumerate(self._windows)
            if ordinal >= first_needed_block(best * self._block_size, self._block_size, window)
        ]
        wanted = [
            (sources[group][ordinal], group, ordinal) for group, ordinal in needed if sources[group][ordinal] >= 0
        ]
        return wanted, [coming[place] for place in needed if place in coming], best

    def _claim_load(self, chain: BlockChain, group: int, ordinal: int, block_id: int) -> PlannedLoad:
        block_hash = chain.hashes[ordinal]
        entry = self._index.get(group, block_hash)
        if entry is None or entry.state is not State.READY:
            return PlannedLoad(None, block_hash, group, ordinal, block_id)
        self._index.claim(entry)
        return PlannedLoad(entry, block_hash, group, ordinal, block_id)

    def _plan_loads(self, opened: OpenStep, ids: dict[str, int]) -> tuple[list[Move], list[Move]]:
        loads: list[Move] = []
        fails: list[Move] = []
        for state in self._requests.values():
            if not state.loads:
                continue
            request = ids.setdefault(state.request_id, len(ids))
            for load in state.loads:
                slot = -1 if load.entry is None else load.entry.slot
                move = Move(load.block_hash, load.group, slot, load.block_id, request, load.ordinal)
                (fails if load.entry is None else loads).append(move)
            opened.loads.append((state, state.loads))
            state.loads = []
        self._counts["load_blocks"] += len(loads)
        self._counts["load_blocks_missing"] += len(fails)
        return loads, fails

    def _plan_saves(self, opened: OpenStep, ids: dict[str, int], scheduled: ScheduledRequest) -> list[Move]:
        """Reserve a slot for every block that this step fills, or that it finds full and unsaved."""
        state = self._requests.get(scheduled.request_id)
        if state is None or state.chain is None or not self._learn_tokens(state, state.chain, scheduled):
            return []
        if not state.writes:
            return []
        start = scheduled.num_computed_tokens // self._block_size
        after = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
        end = min(after // self._block_size, len(state.chain.hashes))
        # what lies on the device already was saved by whoever computed it; what a reset took back is computed anew
        start = min(start, state.next_save) if state.next_save else start
        state.next_save = end
        moves: list[Move] = []
        entries: list[Entry] = []
        opened.saves.append((state, entries))  # before the first slot is taken, so that none is lost if this raises
        for ordinal in range(start, end):
            block_hash = state.chain.hashes[ordinal]
            for group, table in enumerate(scheduled.block_ids):
                if table[ordinal] < 0 or self._index.get(group, block_hash) is not None:
                    continue
                entry = self._index.reserve(block_hash, group, State.RESERVED)
                if entry is None:
                    self._counts["saves_without_slot"] += 1
                    continue
                entries.append(entry)
                request = ids.setdefault(state.request_id, len(ids))
                moves.append(Move(block_hash, group, entry.slot, table[ordinal], request, ordinal))
        self._counts["save_blocks"] += len(entries)
        return moves

    def _learn_tokens(self, state: RequestState, chain: BlockChain, scheduled: ScheduledRequest) -> bool:
        """Extend the chain by what became known; False, and no caching any more, if the tokens have a gap."""
        known = scheduled.num_tokens - len(scheduled.new_tokens)
        missing = scheduled.num_tokens - chain.num_tokens
        if chain.num_tokens < known:
            self._counts["requests_with_token_gap"] += 1
            logger.warning("request %s: tokens %d to %d were never told", state.request_id, chain.num_tokens, known)
            state.stop_caching()
            return False
        return missing <= 0 or self._extend(state, chain, scheduled.new_tokens[-missing:])

    def _extend(self, state: RequestState, chain: BlockChain, tokens: Sequence[int]) -> bool:
        """Hash `tokens`; False, and no caching any more, if one is none."""
        try:
            chain.extend(tokens)
        except UnsupportedError as error:
            logger.debug("request %s is not cached any more: %s", state.request_id, error)
            state.stop_caching()
            return False
        return True

    def _lose_report(self, rank: int, why: str, *, started: bool) -> None:
        lost = self._ledger.lost_report(rank, why, started=started)
        if lost is not None:
            self._take_report(rank, lost)
            self._traffic.expect_later(rank, unpack_ints(lost.quarantined))

    def _take_report(self, rank: int, report: Report) -> None:
        self._drop_failed_loads(report)
        self._traffic.take_report(rank, report)
        outcome = self._ledger.report(rank, report)
        if outcome is None:
            return
        for state, lost in outcome.lost:
            if state.request_id in self._parked:
                self._parked[state.request_id].fail_again(lost)
        for request_id in [name for name, parked in self._parked.items() if parked.ended]:
            if not self._ledger.loads_open(request_id):
                del self._parked[request_id]
        for entry in outcome.voided:
            self._index.void(entry)
        for entry in outcome.committed:
            self._index.commit(entry)
        self._index.release_chain(outcome.loaded)
        self._traffic.demote(outcome.committed)
        self._counts["committed_blocks"] += len(outcome.committed)
        self._counts["voided_blocks"] += len(outcome.voided)

    def _drop_failed_loads(self, report: Report) -> None:
        """Forget arena blocks that could not be loaded: whatever was wrong with them would be wrong again."""
        for error in report.load_errors:
            state = self._requests.get(error.request_id)
            if state is None or state.chain is None or not 0 <= error.group < len(self._groups):
                continue
            for ordinal in unpack_ints(error.ordinals):
                if 0 <= ordinal < len(state.chain.hashes):
                    self._counts["load_errors"] += 1
                    entry = self._index.get(error.group, state.chain.hashes[ordinal])
                    if entry is not None and entry.state is State.READY:
                        self._index.void(entry)

    def _drop(self, state: RequestState) -> None:
        self._lookup.forget(state.request_id)
        self._traffic.forget(state)
        state.let_go(self._index)
