"""Asks the stores which blocks they hold, off the scheduling path; the answers are beliefs, never promises."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvconnect.protocol.keys import BlockHash, block_key
from kvconnect.store import BlockStore, CallEvent, Outcome, StoreThreads, Tier
from kvconnect.store.threads import LOOKUP

__all__ = ["Presence", "StoreLookup"]

# Blocks asked for in one `contains`: a long prompt whose first blocks miss costs one batch.
_BATCH = 256

_POLL_S = 0.001


class Presence:
    """Which blocks each tier is believed to hold; bounded, least recently confirmed forgotten first."""

    def __init__(self, num_tiers: int, max_blocks: int) -> None:
        """Believe nothing; remember at most `max_blocks` a tier."""
        self._max_blocks = max_blocks
        self._tiers: list[OrderedDict[tuple[int, BlockHash], float]] = [OrderedDict() for _ in range(num_tiers)]

    def add(self, tier: int, group: int, block_hash: BlockHash) -> None:
        """Believe that `tier` holds the block."""
        known = self._tiers[tier]
        known[group, block_hash] = time.monotonic()
        known.move_to_end((group, block_hash))
        if len(known) > self._max_blocks:
            known.popitem(last=False)

    def discard(self, tier: int, group: int, block_hash: BlockHash) -> None:
        """Stop believing it."""
        self._tiers[tier].pop((group, block_hash), None)

    def holds(self, tier: int, group: int, block_hash: BlockHash) -> bool:
        """Say whether `tier` is believed to hold the block."""
        return (group, block_hash) in self._tiers[tier]

    def unsure(self, tier: int, hashes: Sequence[BlockHash], num_groups: int, max_age_s: float) -> list[BlockHash]:
        """Return the blocks that `tier` is not known to hold in every layer group since `max_age_s` seconds."""
        known = self._tiers[tier]
        oldest = time.monotonic() - max_age_s
        groups = range(num_groups)
        return [
            block_hash
            for block_hash in hashes
            if not all(known.get((group, block_hash), -math.inf) >= oldest for group in groups)
        ]

    def clear(self) -> None:
        """Believe nothing any more."""
        for known in self._tiers:
            known.clear()


_Answer = tuple[Sequence[BlockHash], list[list[bool]]]  # the blocks asked about; by group, whether each is there


class _Pending(NamedTuple):
    question: int
    tiers: set[int]
    hashes: Sequence[BlockHash]
    deadline: float


class StoreLookup:
    """The leader's opened stores."""

    def __init__(self, tiers: Sequence[Tier], presence: Presence) -> None:
        """Open every tier that may be read.

        Args:
            tiers: All tiers of the configuration, by number.
            presence: Where answers go.

        Raises:
            KVConnectError: What opening a store raised; those opened before are closed.
        """
        self._presence = presence
        self._stores: dict[int, StoreThreads] = {}
        self._pending: dict[str, _Pending] = {}
        self._questions = itertools.count()
        self.num_failed = 0
        self.num_found = 0
        self.num_missed = 0
        try:
            for number, tier in enumerate(tiers):
                if "r" in tier.use.mode:
                    self._stores[number] = StoreThreads(tier, "leader")
        except BaseException:
            self.close()
            raise

    @property
    def readable(self) -> bool:
        """Whether there is any store to ask."""
        return bool(self._stores)

    def is_away(self, tier: int) -> bool:
        """Say whether a tier's store is known not to answer; of one that is only written to nothing is known here."""
        store = self._stores.get(tier)
        return store is not None and store.breaker.is_open

    def breakers(self) -> dict[str, str]:
        """Return how each store's breaker stands, by the tier's name."""
        return {store.tier.name: store.breaker.state for store in self._stores.values()}

    @property
    def num_pending(self) -> int:
        """Requests whose answers are not all there."""
        return len(self._pending)

    def start(
        self,
        request_id: str,
        hashes: Sequence[BlockHash],
        *,
        namespace: bytes,
        shards: Sequence[Sequence[int]],
        stop_early: bool,
    ) -> None:
        """Ask for `hashes` every store that answers, except for what it said lately; `is_pending`: until when to wait.

        Args:
            request_id: Whose question it is; one at a time.
            hashes: The blocks, in sequence order; not changed while the lookup runs.
            namespace: What the keys start with.
            shards: For each layer group, the shard digests that make up the whole cache.
            stop_early: A block that misses makes those behind it useless.
        """
        if not hashes:
            return
        unsure = {
            number: self._presence.unsure(number, hashes, len(shards), store.tier.use.remember_s)
            for number, store in self._stores.items()
            if not store.breaker.is_open
        }
        unsure = {number: blocks for number, blocks in unsure.items() if blocks}
        if not unsure:
            return
        question = next(self._questions)
        longest = max(self._stores[number].timeout_s for number in unsure)
        self._pending[request_id] = _Pending(question, set(unsure), hashes, time.monotonic() + longest)
        for number, blocks in unsure.items():
            ask = partial(_ask, blocks, namespace, shards, stop_early)
            answer = partial(self._answer, request_id, question, ask)
            self._stores[number].submit((request_id, question), LOOKUP, answer)

    def is_pending(self, request_id: str) -> bool:
        """Say whether it is worth asking again; a lookup past its deadline is given up."""
        pending = self._pending.get(request_id)
        if pending is not None and time.monotonic() > pending.deadline:
            del self._pending[request_id]
            self.num_failed += 1
            return False
        return pending is not None

    def forget(self, request_id: str) -> None:
        """Drop a request's question; late answers still teach."""
        self._pending.pop(request_id, None)

    def poll(self) -> None:
        """Take the answers that have come."""
        for number, store in self._stores.items():
            for event in store.poll():
                if callable(event.tag):
                    event.tag(event)
                else:
                    self._take(number, event)

    def call(self, tier: int, work: Callable[[BlockStore], Any], done: Callable[[CallEvent], None]) -> None:
        """Run ``work(store)`` on a thread of one tier's store; `poll` hands every event of it to `done`."""
        self._stores[tier].submit(done, LOOKUP, work)

    def wait(self, tier: int, work: Callable[[BlockStore], Any]) -> Any:
        """Run ``work(store)`` and wait for its result, up to the tier's deadline. Not for the scheduling path.

        Raises:
            StoreUnavailable: If the deadline passed.
            Exception: What the store raised.
        """
        events: list[CallEvent] = []
        self.call(tier, work, events.append)
        while not events:
            time.sleep(_POLL_S)
            self.poll()
        if events[0].error is not None:
            raise events[0].error
        return events[0].result

    def close(self) -> None:
        """Close the leader's stores; twice is fine."""
        for store in self._stores.values():
            store.close()

    def _answer(
        self, request_id: str, question: int, ask: Callable[[BlockStore], _Answer], store: BlockStore
    ) -> _Answer:
        """Ask, unless nobody waits for the answer any more: a slow store must not fall behind further and further."""
        pending = self._pending.get(request_id)
        if pending is None or pending.question != question:
            return (), []
        return ask(store)

    def _take(self, number: int, event: CallEvent) -> None:
        request_id, question = event.tag
        pending = self._pending.get(request_id)
        if event.outcome is Outcome.DONE:
            hashes, answers = event.result
            for group, flags in enumerate(answers):
                for block_hash, there in zip(hashes, flags, strict=False):  # a lookup that stopped early is shorter
                    if there:
                        self._presence.add(number, group, block_hash)
                    else:
                        self._presence.discard(number, group, block_hash)
                self.num_found += sum(flags)
                self.num_missed += len(flags) - sum(flags)
        elif event.outcome is not Outcome.RETURNED:
            self.num_failed += 1
        if pending is not None and pending.question == question:
            pending.tiers.discard(number)
            if not pending.tiers:
                del self._pending[request_id]


def _ask(
    hashes: Sequence[BlockHash],
    namespace: bytes,
    shards: Sequence[Sequence[int]],
    stop_early: bool,
    store: BlockStore,
) -> _Answer:
    """Return, for each layer group, which of the first blocks the store has, every shard. Runs on a store thread."""
    found: list[list[bool]] = [[] for _ in shards]
    for start in range(0, len(hashes), _BATCH):
        batch = hashes[start : start + _BATCH]
        for group, digests in enumerate(shards):
            keys = [block_key(namespace, block_hash, group, shard) for block_hash in batch for shard in digests]
            answers = list(store.contains(keys))
            if len(answers) != len(keys):
                raise ValueError(f"contains answered {len(answers)} of {len(keys)} keys")
            count = len(digests)
            found[group] += [all(answers[i * count : (i + 1) * count]) for i in range(len(batch))]
        if stop_early and not all(found[0]):
            break
    return hashes, found
