"""Decides which blocks go down to which stores, how many at a time, and which are dropped. Plans; moves nothing.

Every block on its way down keeps its slot. So a store that is slower than the engine saves must not fill the arena with
blocks that wait for it: the oldest of them are dropped, and offered again when they are used again.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvconnect.leader.holds import holding_tiers
from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.leader.lookup import Presence
from kvconnect.protocol.keys import BlockHash, is_private
from kvconnect.protocol.messages import Move
from kvconnect.protocol.retention import DEFAULT_PRIORITY
from kvconnect.store import Tier

__all__ = ["Demotions"]

_SHARE = 4  # of the slots in use, one in so many may be on its way to one store, and as many wait for it
_CALLS = 4  # but always as many calls for each of its threads
_REMEMBERED = 1 << 18  # blocks that were seen once, a tier: about 60 MB of Python objects at the limit


class DemotionListener(Protocol):
    """Who is told of blocks that arrived."""

    def demoted(self, tier: int, entry: Entry) -> None:
        """A store has it, on every rank."""

    def not_demoted(self, tier: int, entry: Entry, *, partly: bool) -> None:
        """Some rank could not write it; `partly` if others could."""


class _Down:
    """One tier's part."""

    def __init__(self, tier: Tier, call_blocks: int) -> None:
        self.use = tier.use
        self.call_blocks = call_blocks
        self.gather_s = tier.store_class.capabilities.gather_s
        self.all_calls = _CALLS * tier.store_class.capabilities.concurrency * call_blocks
        self.waiting: deque[tuple[Entry, float]] = deque()  # with when each was offered
        self.in_flight: dict[int, tuple[set[int], set[int]]] = {}  # slot -> silent ranks, failed ranks
        self.queued: set[int] = set()  # slots of those that wait
        self.seen: OrderedDict[tuple[int, BlockHash], None] = OrderedDict()


class Demotions:
    """Blocks that wait for a store or are on their way there."""

    def __init__(
        self,
        index: BlockIndex,
        presence: Presence,
        tiers: Sequence[Tier],
        payload_bytes: int,
        num_ranks: int,
        is_away: Callable[[int], bool],
        listener: DemotionListener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with none.

        Args:
            index: Whose slots they lie in.
            presence: What the stores are believed to hold.
            tiers: The stores, by number.
            payload_bytes: Of the largest block.
            num_ranks: All of which have to write a block.
            is_away: Whether a tier's store is known not to answer.
            listener: Told how each ended.
            clock: Monotonic seconds.
        """
        self._index = index
        self._presence = presence
        self._num_ranks = num_ranks
        self._is_away = is_away
        self._listener = listener
        self._clock = clock
        self._holding = set(holding_tiers(tiers))
        self._tiers = {
            number: _Down(tier, tier.blocks_a_call(payload_bytes))
            for number, tier in enumerate(tiers)
            if "w" in tier.use.mode
        }
        self.counts: Counter[str] = Counter(
            {"demoted_blocks": 0, "demote_failures": 0, "demotes_dropped": 0, "demotes_refused": 0}
        )

    @property
    def writable(self) -> Iterable[int]:
        """The tiers that blocks go down to."""
        return self._tiers

    @property
    def busy(self) -> bool:
        """Whether anything waits or is on its way."""
        return any(down.waiting or down.in_flight for down in self._tiers.values())

    def offer(self, entries: Iterable[Entry], *, above: int | None = None) -> None:
        """Send blocks down to every tier that takes them and is not believed to hold them.

        Private ones go only where they can be held, and are never dropped: anywhere else they would be litter.

        Args:
            entries: READY.
            above: Only to tiers before this one.
        """
        now = self._clock()
        away = {tier for tier in self._tiers if self._is_away(tier)}
        for entry in entries:
            if self._index.is_quarantined(entry.slot):
                continue  # how its last move ended would be taken for how this one did
            private = is_private(entry.block_hash)
            for tier, down in self._tiers.items():
                if (above is not None and tier >= above) or entry.slot in down.queued or entry.slot in down.in_flight:
                    continue
                if self._presence.holds(tier, entry.group, entry.block_hash):
                    continue
                if private:
                    if tier in self._holding:
                        self._wait(down, entry, now)
                elif not entry.refused >> tier & 1 and self._takes(down, entry):
                    if tier in away:
                        self.counts["demotes_dropped"] += 1
                    else:
                        self._wait(down, entry, now)
        for down in self._tiers.values():
            most = max(self._share, down.call_blocks) + self._room(down)
            self._drop_oldest(down, len(down.waiting) - most)

    def plan(self) -> list[Move]:
        """Return what goes down now: what has waited, as much as may be on its way at once."""
        moves = []
        for tier, down in self._tiers.items():
            if self._is_away(tier):
                self._drop_oldest(down, len(down.waiting))
            if not down.waiting or self._gathers(down):
                continue
            for _ in range(min(len(down.waiting), self._room(down))):
                entry, _ = down.waiting.popleft()
                down.queued.discard(entry.slot)
                if entry.state is not State.READY:
                    self._index.release(entry)
                    continue
                down.in_flight[entry.slot] = (set(range(self._num_ranks)), set())
                moves.append(Move(entry.block_hash, entry.group, entry.slot, tier))
        return moves

    def ended(self, rank: int, tier: int, slot: int, *, ok: bool) -> None:
        """Take what a rank says of one; what it was never given is ignored."""
        down = self._tiers.get(tier)
        silent, failed = down.in_flight.get(slot, (set(), set())) if down is not None else (set(), set())
        if down is None or rank not in silent:
            return
        silent.discard(rank)
        if not ok:
            failed.add(rank)
        if silent:
            return
        del down.in_flight[slot]
        entry = self._index.at_slot(slot)
        assert entry is not None, "a slot was given away while it was being written to a store"
        if failed:
            self.counts["demote_failures"] += 1
            entry.refused |= 1 << tier  # once is enough: it is saved anew when it is computed anew
            self._listener.not_demoted(tier, entry, partly=len(failed) < self._num_ranks)
        else:
            self.counts["demoted_blocks"] += 1
            self._presence.add(tier, entry.group, entry.block_hash)
            self._listener.demoted(tier, entry)
        self._index.release(entry)

    def _takes(self, down: _Down, entry: Entry) -> bool:
        """Say whether the tier's options let a block in."""
        use = down.use
        priority = entry.priority if self._clock() < entry.until else DEFAULT_PRIORITY
        if priority < use.min_priority or (use.blocks != "all" and entry.decoded != (use.blocks == "decoded")):
            self.counts["demotes_refused"] += 1
            return False
        if use.write == "through":
            return True
        if entry.key in down.seen:
            return True
        down.seen[entry.key] = None
        if len(down.seen) > _REMEMBERED:
            down.seen.popitem(last=False)
        return False

    def _wait(self, down: _Down, entry: Entry, now: float) -> None:
        self._index.claim(entry)
        down.waiting.append((entry, now))
        down.queued.add(entry.slot)

    @property
    def _share(self) -> int:
        return self._index.num_usable // _SHARE  # not of those in reserve

    def _room(self, down: _Down) -> int:
        return max(0, max(self._share, down.all_calls) - len(down.in_flight))

    def _gathers(self, down: _Down) -> bool:
        """Say whether there are too few for a call yet, and time to wait for more."""
        return len(down.waiting) < down.call_blocks and self._clock() - down.waiting[0][1] < down.gather_s

    def _drop_oldest(self, down: _Down, count: int) -> None:
        kept = []
        while count > 0 and down.waiting:
            entry, since = down.waiting.popleft()
            if is_private(entry.block_hash) and entry.state is State.READY:
                kept.append((entry, since))
                continue
            down.queued.discard(entry.slot)
            self._index.release(entry)
            self.counts["demotes_dropped"] += 1
            count -= 1
        down.waiting.extendleft(reversed(kept))
