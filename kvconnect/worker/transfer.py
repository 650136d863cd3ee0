"""Moves frames between arena slots and stores, in the background. Seals and verifies; decides nothing.

Slots are memory that a store call may touch: from `promote` or `demote` until `poll` tells how it ended, and, for a
call that missed its deadline, until `poll` tells that it has returned.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, overload

from kvconnect.errors import FrameCorrupt
from kvconnect.log import FailureLog
from kvconnect.protocol import BlockKey
from kvconnect.store import (
    HEADER_BYTES,
    BlockStore,
    CallEvent,
    FrameHeader,
    FrameTagger,
    Outcome,
    StoreThreads,
    Tier,
    compress_frame,
    decompress_payload,
    open_frame,
    seal_frame,
)
from kvconnect.store.threads import READ, WRITE

__all__ = ["Endings", "SlotFrame", "StoreTransfers"]

logger = logging.getLogger(__name__)

_ZSTD_LEVEL = 1
_SEAL_LOCKS = 64  # so that threads seldom wait for one another: sealing reads the whole block


class SlotFrame(NamedTuple):
    """One slot's part of a transfer: everything a store thread needs to seal or verify it."""

    slot: int
    key: BlockKey
    memory: memoryview
    payload_bytes: int
    fingerprint: bytes
    order: str


class Endings:
    """What ended and was not reported yet; slots, and ``(tier, slot)`` pairs for demotions."""

    __slots__ = ("demoted", "not_demoted", "not_promoted", "promoted", "quarantined", "reads", "released")

    def __init__(self) -> None:
        """Start empty."""
        self.promoted: list[tuple[int, str]] = []  # slot and the payload's order
        self.not_promoted: list[int] = []
        self.demoted: list[tuple[int, int]] = []
        self.not_demoted: list[tuple[int, int]] = []
        self.quarantined: list[int] = []
        self.released: list[int] = []
        self.reads: list[tuple[int, int, int]] = []  # tier, blocks, microseconds


class _Batch(NamedTuple):
    reads: bool
    frames: Sequence[SlotFrame]


class StoreTransfers:
    """A worker's opened stores."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        role: str,
        memory: memoryview,
        can_read: Callable[[str, SlotFrame], bool],
        tagger: FrameTagger | None = None,
    ) -> None:
        """Open every tier.

        Args:
            tiers: All tiers of the configuration, by number.
            role: Whose they are, for thread names.
            memory: The arena, in which the frames lie.
            can_read: Whether a payload of that order can be loaded in place of the slot's own.
            tagger: Tags frames and demands tags; None for frames without.

        Raises:
            KVConnectError: What opening a store raised; those opened before are closed.
        """
        self._can_read = can_read
        self._tagger = tagger
        self._log = FailureLog(logger)
        self.counts: Counter[str] = Counter()
        self._stores: list[StoreThreads] = []
        self._sealed: dict[int, BlockKey] = {}
        self._seal_locks = [threading.Lock() for _ in range(_SEAL_LOCKS)]
        try:
            for tier in tiers:
                self._stores.append(StoreThreads(tier, role, memory))
        except BaseException:
            self.close()
            raise

    @property
    def failures(self) -> Counter[str]:
        """Failures by kind, such as ``"disk read"``."""
        return self._log.counts

    @property
    def breakers(self) -> dict[str, str]:
        """How each store's breaker stands, by the tier's name."""
        return {store.tier.name: store.breaker.state for store in self._stores}

    @property
    def busy(self) -> bool:
        """Whether any call is queued or running within its deadline."""
        return any(store.num_unfinished for store in self._stores)

    def promote(self, tier: int, frames: Sequence[SlotFrame]) -> None:
        """Read frames into their slots and verify them there."""
        store = self._stores[tier]
        for batch in _batches(store.tier, frames):
            store.submit(_Batch(True, batch), READ, partial(self._read, batch))

    def demote(self, tier: int, frames: Sequence[SlotFrame]) -> None:
        """Seal committed slots and write them."""
        store = self._stores[tier]
        packs = store.tier.use.codec == "zstd"
        for batch in _batches(store.tier, frames):
            store.submit(_Batch(False, batch), WRITE, partial(self._write, batch, packs))

    def drop(self, tier: int, keys: Sequence[BlockKey]) -> None:
        """Remove keys from a store."""
        self._stores[tier].submit(_Batch(False, ()), WRITE, lambda opened: opened.remove(keys))

    def poll(self, endings: Endings) -> None:
        """Add what ended to `endings`. Never blocks."""
        for tier, store in enumerate(self._stores):
            for event in store.poll():
                self._take(endings, tier, store.tier.name, event)

    def close(self) -> None:
        """Close the stores after what is queued; each waits at most its own deadline. Twice is fine."""
        for store in self._stores:
            if not store.close():
                self._log.failed(f"{store.tier.name} close", "threads that hang were left behind")

    def _take(self, endings: Endings, tier: int, name: str, event: CallEvent) -> None:
        batch: _Batch = event.tag
        slots = [frame.slot for frame in batch.frames]
        if event.outcome is Outcome.RETURNED:
            endings.released += slots
            return
        if batch.reads and event.seconds:  # failed ones too; one that missed its deadline took at least that long
            endings.reads.append((tier, len(slots), round(event.seconds * 1e6)))
        results: Sequence[object] = [None] * len(slots)
        if event.outcome is Outcome.DONE:
            results = event.result if batch.frames else ()
        else:
            if event.outcome is Outcome.TIMED_OUT:
                endings.quarantined += slots
            assert event.error is not None
            self._log.failed(f"{name} {'read' if batch.reads else 'write'}", event.error, max(1, len(slots)))
        bad = [
            frame.key for frame, result in zip(batch.frames, results, strict=True) if isinstance(result, FrameCorrupt)
        ]
        if bad and "w" in self._stores[tier].tier.use.mode:
            self.drop(tier, bad)  # so that the block can be saved again: a store may keep what it has
        for frame, result in zip(batch.frames, results, strict=True):
            if batch.reads:
                if isinstance(result, str):
                    endings.promoted.append((frame.slot, result))
                    self.counts["promoted_bytes"] += frame.payload_bytes
                else:
                    endings.not_promoted.append(frame.slot)
                    if isinstance(result, FrameCorrupt):
                        self._log.failed(f"{name} verify", result)
            elif result is True:
                endings.demoted.append((tier, frame.slot))
                self.counts["demoted_bytes"] += frame.payload_bytes
            else:
                endings.not_demoted.append((tier, frame.slot))
                self.counts["demotes_declined"] += event.outcome is Outcome.DONE

    def refill(self, slot: int) -> None:
        """Learn that other bytes are put into `slot`: what was sealed there is gone."""
        self._sealed.pop(slot, None)

    def _write(self, batch: Sequence[SlotFrame], packs: bool, store: BlockStore) -> list[bool]:
        """Return, for each frame, whether the store took it. Runs on a store thread."""
        taken = list(store.write([frame.key for frame in batch], _Sealed(batch, self._pack if packs else self._seal)))
        if len(taken) != len(batch):
            raise ValueError(f"write answered {len(taken)} of {len(batch)} keys")
        return [result is True for result in taken]

    def _pack(self, frame: SlotFrame) -> memoryview:
        return compress_frame(self._seal(frame), _ZSTD_LEVEL, self._tagger)

    def _seal(self, frame: SlotFrame) -> memoryview:
        """Seal a slot once: another tier's thread may be reading the header that a second time would rewrite."""
        with self._seal_locks[frame.slot % _SEAL_LOCKS]:
            if self._sealed.get(frame.slot) != frame.key:
                seal_frame(
                    frame.memory,
                    frame.payload_bytes,
                    key=frame.key,
                    fingerprint=frame.fingerprint,
                    order=frame.order,
                    tagger=self._tagger,
                )
                self._sealed[frame.slot] = frame.key
        return frame.memory[: HEADER_BYTES + frame.payload_bytes]

    def _read(self, batch: Sequence[SlotFrame], store: BlockStore) -> list[str | FrameCorrupt | None]:
        """Return, for each frame, the payload's order, or why it is a miss. Runs on a store thread."""
        results: list[str | FrameCorrupt | None] = [None] * len(batch)
        told = set()

        def verify(index: int, length: object) -> None:
            told.add(index)
            frame = batch[index]
            if length is not None:
                try:
                    results[index] = self._verify(frame, length)
                except FrameCorrupt as error:
                    results[index] = error

        store.read_each([frame.key for frame in batch], [frame.memory for frame in batch], verify)
        if len(told) != len(batch):
            raise ValueError(f"read answered {len(told)} of {len(batch)} keys")
        return results

    def _verify(self, frame: SlotFrame, length: object) -> str:
        if not isinstance(length, int) or not 0 <= length <= len(frame.memory):
            raise FrameCorrupt(f"store says it filled {length!r} of {len(frame.memory)} bytes")
        stored = frame.memory[:length]
        header: FrameHeader = open_frame(
            stored,
            key=frame.key,
            fingerprint=frame.fingerprint,
            payload_bytes=frame.payload_bytes,
            tagger=self._tagger,
        )
        if header.codec:
            payload = decompress_payload(stored, header)
            frame.memory[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
        if not self._can_read(header.order, frame):
            raise FrameCorrupt(f"payload packed as {header.order!r} cannot be read as {frame.order!r}")
        return header.order


class _Sealed(Sequence[memoryview]):
    """Frames that are made when a store takes them: their bytes are then still in the CPU's caches when they move."""

    def __init__(self, batch: Sequence[SlotFrame], make: Callable[[SlotFrame], memoryview]) -> None:
        self._batch = batch
        self._make = make
        self._made: list[memoryview | None] = [None] * len(batch)

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[memoryview]: ...

    def __getitem__(self, index: int | slice) -> memoryview | Sequence[memoryview]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        frame = self._made[index]
        if frame is None:
            frame = self._made[index] = self._make(self._batch[index])
        return frame


def _batches(tier: Tier, frames: Sequence[SlotFrame]) -> list[Sequence[SlotFrame]]:
    if not frames:
        return []
    size = tier.blocks_a_call(max(frame.payload_bytes for frame in frames))
    return [frames[i : i + size] for i in range(0, len(frames), size)]
