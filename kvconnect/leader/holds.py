"""Keeps blocks of suspended requests in the stores below: holds that are asked for, confirmed, renewed and let go.

A hold is a store's word that nobody evicts a key (`BlockStore.hold`). All calls run on the store's threads, many blocks
at once; the answers come with `StoreLookup.poll`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kvconnect.leader.lookup import StoreLookup
from kvconnect.protocol.keys import BlockHash, BlockKey, block_key, is_private, split_key
from kvconnect.store import BlockStore, CallEvent, Outcome, Tier

__all__ = ["StoreHolds", "holding_tiers"]

logger = logging.getLogger(__name__)

_Block = tuple[int, BlockHash]
"""Layer group and hash."""

# Holds are asked for anew when a sixth of their life is over: some renewals may fail before one ends.
_RENEWALS = 6


def holding_tiers(tiers: Sequence[Tier]) -> list[int]:
    """Return the tiers that suspended blocks may go down to: written, read back, and able to hold."""
    return [n for n, tier in enumerate(tiers) if tier.store_class.capabilities.holds and tier.use.mode == "rw"]


class StoreHolds:
    """What this leader holds in its stores."""

    def __init__(
        self,
        lookup: StoreLookup,
        tiers: Sequence[Tier],
        namespace: bytes,
        shards: Sequence[Sequence[int]],
        answered: Callable[[int, _Block, bool], None],
    ) -> None:
        """Hold nothing.

        Args:
            lookup: The leader's opened stores.
            tiers: All tiers of the configuration, by number.
            namespace: What the keys start with.
            shards: For each layer group, the shard digests that make up the whole cache.
            answered: Told (tier, block, held) of each block that was asked for, from within `StoreLookup.poll`.
        """
        self.tiers = holding_tiers(tiers)
        self._lookup = lookup
        self._tiers = tiers
        self._ttl_s = {tier: tiers[tier].use.hold_s for tier in self.tiers}
        self._namespace = namespace
        self._shards = shards
        self._answered = answered
        self._held: dict[int, dict[_Block, int]] = {tier: {} for tier in self.tiers}  # block -> who counts on it
        self._asking: dict[int, list[_Block]] = defaultdict(list)
        self._releasing: dict[int, list[_Block]] = defaultdict(list)
        self._renew_at = {tier: time.monotonic() + ttl / _RENEWALS for tier, ttl in self._ttl_s.items()}
        self._under_way: set[int] = set()  # tiers with a call that has not ended

    @property
    def busy(self) -> bool:
        """Whether anything was asked for and not answered."""
        return bool(self._under_way or any(self._asking.values()) or any(self._releasing.values()))

    @property
    def num_held(self) -> int:
        """Blocks that are held, in all tiers."""
        return sum(len(held) for held in self._held.values())

    def ask(self, tier: int, block: _Block) -> None:
        """Ask for a hold; the answer comes later, once for each time that it was asked."""
        self._asking[tier].append(block)

    def let_go(self, tier: int, block: _Block) -> None:
        """Count on a hold no longer; the last one that does releases it."""
        held = self._held[tier]
        left = held.get(block, 0) - 1
        if left > 0:
            held[block] = left
        elif left == 0:
            del held[block]
            self._releasing[tier].append(block)

    def submit(self) -> None:
        """Send what was collected to the stores, and renew what would end. Never blocks.

        One call a tier at a time: a release that overtook a later hold would end it.
        """
        now = time.monotonic()
        for tier, ttl in self._ttl_s.items():
            renews = now >= self._renew_at[tier]
            if tier in self._under_way or not (renews or self._asking[tier] or self._releasing[tier]):
                continue
            held = self._held[tier]
            asked, self._asking[tier] = self._asking[tier], []
            gone, self._releasing[tier] = [block for block in self._releasing[tier] if block not in held], []
            again = [block for block in held if renews]
            if renews:
                self._renew_at[tier] = now + ttl / _RENEWALS
            if asked or gone or again:
                self._under_way.add(tier)
                work = partial(_exchange, self._keys(gone), self._keys(asked + again), ttl)
                self._lookup.call(tier, work, partial(self._take, tier, asked))

    def clean(self) -> None:
        """Remove what suspended requests of processes that are gone left behind under private names."""
        for tier in self.tiers:
            if self._tiers[tier].store_class.capabilities.scans:
                budget_s = self._tiers[tier].use.timeout_s / 2
                self._lookup.call(tier, partial(_remove_private, budget_s), self._cleaned)

    def _keys(self, blocks: Sequence[_Block]) -> list[list[BlockKey]]:
        return [
            [block_key(self._namespace, block_hash, group, shard) for shard in self._shards[group]]
            for group, block_hash in blocks
        ]

    def _take(self, tier: int, asked: Sequence[_Block], event: CallEvent) -> None:
        if event.outcome is Outcome.RETURNED:
            return
        self._under_way.discard(tier)
        answers = event.result if event.outcome is Outcome.DONE else [False] * len(asked)
        if event.outcome is not Outcome.DONE:  # some may be held all the same
            self._releasing[tier] += asked
        for block, held in zip(asked, answers, strict=False):  # renewed ones stand behind those that were asked for
            if held:
                self._held[tier][block] = self._held[tier].get(block, 0) + 1
            self._answered(tier, block, held)

    def _cleaned(self, event: CallEvent) -> None:
        if event.outcome is Outcome.DONE and event.result:
            logger.info("kvconnect: removed %d blocks that suspended requests had left behind", event.result)


def _exchange(
    gone: Sequence[Sequence[BlockKey]], wanted: Sequence[Sequence[BlockKey]], ttl_s: float, store: BlockStore
) -> list[bool]:
    """Let keys go, hold others; return, for each of these, whether every shard is held. Runs on a store thread."""
    if gone:
        store.release([key for each in gone for key in each])
    flat = [key for each in wanted for key in each]
    answers = iter(_whole(store.hold(flat, ttl_s), len(flat), "hold") if flat else ())
    by_block = [[next(answers) is True for _ in each] for each in wanted]
    halves = [
        key
        for keys, shards in zip(wanted, by_block, strict=True)
        if not all(shards)
        for key, held in zip(keys, shards, strict=True)
        if held
    ]
    if halves:  # what is there of a block that is not whole is of no use to anybody
        store.release(halves)
    return [all(shards) for shards in by_block]


def _remove_private(budget_s: float, store: BlockStore) -> int:
    """Remove private keys that nobody who lives holds, for `budget_s` seconds; return how many. On a store thread."""
    until = time.monotonic() + budget_s
    private = [key for key in _within(store.scan(), until) if is_private(split_key(key)[1])]
    held = _whole(store.held(private), len(private), "held") if private else ()
    dead = [key for key, alive in zip(private, held, strict=True) if not alive]
    if dead:
        store.remove(dead)
    return len(dead)


def _within(keys: Iterator[BlockKey], until: float) -> Iterator[BlockKey]:
    """Yield keys until the time is over: a store with millions of them is not worth its deadline."""
    for key in keys:
        if time.monotonic() > until:
            return
        yield key


def _whole(answers: Sequence[bool], count: int, name: str) -> Sequence[bool]:
    if len(answers) != count:
        raise ValueError(f"{name} answered {len(answers)} of {count} keys")
    return answers
