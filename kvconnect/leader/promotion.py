"""Brings blocks up from the stores before they are offered, and knows what is on its way between them and the arena.

Plans; moves nothing. What goes down is decided in `kvconnect.leader.demotion`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvconnect.leader.demotion import Demotions
from kvconnect.leader.events import EventLog
from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.leader.levels import LevelCounts
from kvconnect.leader.lookup import Presence
from kvconnect.leader.request import RequestState
from kvconnect.protocol.keys import BlockHash, is_private
from kvconnect.protocol.messages import Move, Report, unpack_ints
from kvconnect.store import Tier

__all__ = ["TierTraffic", "TrafficListener"]


class TrafficListener(Protocol):
    """Who is told of blocks that arrived."""

    def promoted(self, entry: Entry) -> None:
        """It is READY in the arena."""

    def demoted(self, tier: int, entry: Entry) -> None:
        """A store has it, on every rank."""


class TierTraffic:
    """Promotions and demotions that are wanted or on their way."""

    def __init__(
        self,
        index: BlockIndex,
        presence: Presence,
        tiers: Sequence[Tier],
        num_ranks: int,
        events: EventLog,
        levels: LevelCounts,
        payload_bytes: int = 1,
        is_away: Callable[[int], bool] = lambda tier: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with none.

        Args:
            index: The arena's.
            presence: What the stores are believed to hold.
            tiers: The stores, by number.
            num_ranks: All of which have to move a block.
            events: Told of what comes and goes.
            levels: Counts what arrives.
            payload_bytes: Of the largest block.
            is_away: Whether a tier's store is known not to answer.
            clock: Monotonic seconds.
        """
        self._is_away = is_away
        self._levels = levels
        self._events = events
        self._index = index
        self._presence = presence
        self._readable = [number for number, tier in enumerate(tiers) if "r" in tier.use.mode]
        self.down = Demotions(index, presence, tiers, payload_bytes, num_ranks, is_away, self, clock)
        self.listener: TrafficListener | None = None
        self._brought: list[Move] = []  # promotions that have their slots, for the next plan
        self._drops: list[Move] = []
        self._patience_s = max([tier.use.timeout_s for tier in tiers], default=0.0)
        self._num_ranks = num_ranks
        # (rank, slot) of lost reports: quarantined once for each move, until the rank has named them all
        self._later: Counter[tuple[int, int]] = Counter()
        self._promoting: dict[int, tuple[Entry, RequestState]] = {}  # by slot
        self._wanting: dict[str, RequestState] = {}
        self.promoted = self.not_promoted = self.no_slot = 0
        self.num_ended = 0  # promotions, one way or the other

    @property
    def busy(self) -> bool:
        """Whether anything is wanted or on its way."""
        return bool(self.down.busy or self._promoting or self._wanting or self._drops)

    def num_promoting(self) -> Counter[int]:
        """Count, by tier, the blocks that are on their way up or will be in the next plan."""
        counts = Counter(entry.source for entry, _ in self._promoting.values())
        counts.update(tier for request in self._wanting.values() for tier, _, _ in request.wanted)
        return counts

    def tier_of(self, group: int, block_hash: BlockHash) -> int:
        """Return the first readable tier that is believed to hold the block and to answer, -1 for none."""
        for tier in self._readable:
            if self._presence.holds(tier, group, block_hash) and not self._is_away(tier):
                return tier
        return -1

    def want(self, request: RequestState, blocks: Iterable[tuple[int, int, int]], coming: Iterable[Entry] = ()) -> None:
        """Remember what a request that will be asked about again waits for.

        Args:
            request: Whose blocks they are.
            blocks: To promote in the next plan, (tier, group, ordinal).
            coming: On their way up already, for another request.
        """
        request.wanted = list(blocks)
        request.tried.update(request.wanted)
        request.promoting.update(coming)
        if request.wanted:
            self._wanting[request.request_id] = request
        if not request.give_up_at:
            request.give_up_at = time.monotonic() + self._patience_s

    def waits(self, request: RequestState) -> bool:
        """Say whether promotions for the request are still to come, and worth waiting for."""
        request.promoting = {entry for entry in request.promoting if entry.state is State.PROMOTING}
        if not request.wanted and not request.promoting:
            return False
        if time.monotonic() < request.give_up_at:
            return True
        self.forget(request)
        return False

    def forget(self, request: RequestState) -> None:
        """Stop waiting: drop what was not planned yet, and do not hold what still comes up."""
        request.wanted = []
        request.promoting = set()
        self._wanting.pop(request.request_id, None)

    def plan_promotes(self) -> list[Move]:
        """Give slots to what is wanted; what finds none is given up."""
        moves, self._brought = self._brought, []
        for request in list(self._wanting.values()):
            for position, (tier, group, ordinal) in enumerate(request.wanted):
                block_hash = request.hash_of(group, ordinal)
                entry = self._index.get(group, block_hash)
                if entry is not None:
                    if entry.state is State.PROMOTING:  # another request's promotion serves this one too
                        request.promoting.add(entry)
                    continue
                wanted = request.new_block(group, ordinal)
                entry = self._index.reserve(block_hash, group, State.PROMOTING, wanted.parent, *wanted.rank)
                if entry is None:
                    self.no_slot += len(request.wanted) - position
                    if request.parked:  # it has pages and time: the next round will ask again
                        request.tried.difference_update(request.wanted[position:])
                    break
                self._events.remember(entry, request, ordinal)
                request.promoting.add(entry)
                moves.append(self._promotes(entry, tier, request))
            request.wanted = []
        self._wanting.clear()
        return moves

    def bring(self, blocks: Sequence[tuple[int, int, int]], request: RequestState) -> bool:
        """Take slots for blocks, (tier, group, ordinal), that the next plan promotes: all of them, or none (False).

        They are claimed by nobody when they arrive.
        """
        blocks = sorted(blocks)  # one batch a tier and layer group
        entries = self._index.reserve_all([request.new_block(*block[1:]) for block in blocks], State.PROMOTING)
        if entries is None:
            return False
        self._brought += [
            self._promotes(entry, tier, request) for entry, (tier, _, _) in zip(entries, blocks, strict=True)
        ]
        return True

    def _promotes(self, entry: Entry, tier: int, request: RequestState) -> Move:
        entry.waiting = set(range(self._num_ranks))
        entry.source = tier
        self._promoting[entry.slot] = (entry, request)
        return Move(entry.block_hash, entry.group, entry.slot, tier)

    def drop(self, group: int, block_hash: BlockHash) -> None:
        """Remove a block from every store that is believed to have it."""
        for tier in self.down.writable:
            if self._presence.holds(tier, group, block_hash):
                self._presence.discard(tier, group, block_hash)
                self._drops.append(Move(block_hash, group, -1, tier))

    def plan_drops(self) -> list[Move]:
        """Return the removals that were not planned yet."""
        drops, self._drops = self._drops, []
        return drops

    def expect_later(self, rank: int, slots: Iterable[int]) -> None:
        """Remember slots whose traffic `rank` may still be running although its report of it is lost."""
        self._later.update((rank, slot) for slot in slots)

    def fail_promotions(self) -> None:
        """Let nothing that is on its way up be matched when it arrives."""
        for entry, _ in self._promoting.values():
            entry.failed = True

    def take_report(self, rank: int, report: Report) -> None:
        """Take what one rank says of promotions, demotions and hung calls; slots it was never given are ignored."""
        for slot in unpack_ints(report.quarantined):
            if 0 <= slot < self._index.num_slots:
                self._index.quarantine(slot)
        for ok, packed in ((True, report.promoted), (False, report.not_promoted)):
            for slot in unpack_ints(packed):
                if not self._named_at_last(rank, slot):
                    self._promotion_ended(rank, slot, ok=ok)
        for ok, packed in ((True, report.demoted), (False, report.not_demoted)):
            pairs = unpack_ints(packed)
            for tier, slot in zip(pairs[::2], pairs[1::2], strict=True):
                if not self._named_at_last(rank, slot):
                    self.down.ended(rank, tier, slot, ok=ok)
        for slot in unpack_ints(report.released):
            self._index.unquarantine(slot)

    def _named_at_last(self, rank: int, slot: int) -> bool:
        """Say whether the rank names a slot whose report was lost: its traffic has ended, and nobody waits for it."""
        left = self._later.pop((rank, slot), 0)
        if not left:
            return False
        if left > 1:  # it was on its way to several stores
            self._later[rank, slot] = left - 1
        self._index.unquarantine(slot)
        return True

    def _promotion_ended(self, rank: int, slot: int, *, ok: bool) -> None:
        if slot not in self._promoting:
            return
        entry, request = self._promoting[slot]
        if rank not in entry.waiting:
            return
        entry.waiting.discard(rank)
        entry.failed = entry.failed or not ok
        if entry.waiting:
            return
        del self._promoting[slot]
        self.num_ended += 1
        wanted = entry in request.promoting
        if entry.failed:
            self.not_promoted += 1
            self._presence.discard(entry.source, entry.group, entry.block_hash)
            self._events.removed(entry, entry.source + 1)
            self._index.void(entry)
        elif entry.state is State.PROMOTING:
            self.promoted += 1
            self._levels.count("loaded", entry.source + 1, [entry])
            self._index.commit(entry)
            if wanted:
                self._index.claim(entry)
                request.held.append(entry)
            if self.listener is not None:
                self.listener.promoted(entry)
            self.down.offer([entry], above=entry.source)

    def demoted(self, tier: int, entry: Entry) -> None:
        """Learn that a store has a block."""
        self._levels.count("saved", tier + 1, [entry])
        self._events.stored(entry, tier + 1)
        if self.listener is not None:
            self.listener.demoted(tier, entry)
        if is_private(entry.block_hash) and entry.state is State.GONE:  # its request was resumed meanwhile
            self.drop(entry.group, entry.block_hash)

    def not_demoted(self, tier: int, entry: Entry, *, partly: bool) -> None:
        """Learn that a store has not, or not all of it."""
        if is_private(entry.block_hash) and partly:  # the others' shards are of no use
            self._drops.append(Move(entry.block_hash, entry.group, -1, tier))
