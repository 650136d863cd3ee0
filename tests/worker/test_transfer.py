"""Transfers between slots and stores: when frames are sealed and verified, and stores that tell nonsense."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kvconnect.protocol import BlockKey
from kvconnect.store import HEADER_BYTES
from kvconnect.worker.transfer import Endings, SlotFrame, StoreTransfers
from tests.store.stores import DictStore, dict_store, tier

PAYLOAD = 1000
SLOT = HEADER_BYTES + PAYLOAD
KEYS = [BlockKey(bytes([number]) * 72) for number in range(4)]

Told = Callable[[int, Any], None]


class Memory:
    """Slots, and what is moved between them and one store."""

    def __init__(self, store: type[DictStore], **use: Any) -> None:
        self.memory = memoryview(bytearray(len(KEYS) * SLOT))
        self.transfers = StoreTransfers([tier(store, **use)], "test", self.memory, lambda order, frame: True)
        self.frames = [
            SlotFrame(slot, key, self.memory[slot * SLOT : (slot + 1) * SLOT], PAYLOAD, bytes(32), "dense")
            for slot, key in enumerate(KEYS)
        ]

    def fill(self) -> None:
        for slot, frame in enumerate(self.frames):
            frame.memory[:] = bytes(HEADER_BYTES) + bytes([100 + slot]) * PAYLOAD
            self.transfers.refill(slot)

    def ended(self) -> Endings:
        """Wait for all that was asked for."""
        endings = Endings()
        deadline = time.monotonic() + 10
        while self.transfers.busy:
            assert time.monotonic() < deadline
            self.transfers.poll(endings)
            time.sleep(0.001)
        self.transfers.poll(endings)
        return endings

    def save(self) -> None:
        self.fill()
        self.transfers.demote(0, self.frames)
        assert sorted(self.ended().demoted) == [(0, slot) for slot in range(len(KEYS))]
        self.memory[:] = bytes(len(self.memory))

    def load(self) -> Endings:
        self.transfers.promote(0, self.frames)
        return self.ended()


@pytest.fixture
def opened() -> Iterator[Callable[..., Memory]]:
    memories: list[Memory] = []

    def make(store: type[DictStore], **use: Any) -> Memory:
        memories.append(Memory(store, **use))
        return memories[-1]

    yield make
    for memory in memories:
        memory.transfers.close()


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_frames_are_sealed_when_the_store_takes_them(opened: Callable[..., Memory], codec: str) -> None:
    seen: list[list[bool]] = []

    def write(self: DictStore, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        taken = []
        for number in reversed(range(len(frames))):
            taken.append((keys[number], bytes(frames[number])))
            seen.append([bytes(frame.memory[:7]) == b"KVFRAME" for frame in memory.frames])
        assert [bytes(frame) for frame in frames] == [frame for _, frame in reversed(taken)]
        assert [bytes(frame) for frame in frames[1:3]] == [bytes(frames[-3]), bytes(frames[-2])]
        with pytest.raises(IndexError):
            frames[len(keys)]
        self.frames.update(taken)
        return [True] * len(keys)

    memory = opened(dict_store(write=write), codec=codec)
    memory.save()
    assert seen == [[slot >= first for slot in range(4)] for first in (3, 2, 1, 0)]
    assert sorted(memory.load().promoted) == [(slot, "dense") for slot in range(4)]
    assert [frame.memory[HEADER_BYTES] for frame in memory.frames] == [100, 101, 102, 103]


def read_each(order: Callable[[int], list[tuple[int, Any]]]) -> Any:
    """Return a `read_each` that reads everything, and then tells of what `order` says for so many bytes."""

    def method(self: DictStore, keys: Sequence[BlockKey], buffers: Sequence[memoryview], arrived: Told) -> None:
        lengths = self.read(keys, buffers)
        for index, length in order(lengths[0] or 0):
            arrived(index, length)

    return method


def test_frames_may_be_told_of_in_any_order(opened: Callable[..., Memory]) -> None:
    memory = opened(dict_store(read_each=read_each(lambda size: [(2, size), (0, None), (3, size), (1, size)])))
    memory.save()
    endings = memory.load()
    assert endings.promoted == [(1, "dense"), (2, "dense"), (3, "dense")]
    assert endings.not_promoted == [0]
    assert not memory.transfers.failures


@pytest.mark.parametrize(
    "order",
    [
        lambda size: [(0, size), (1, size), (2, size)],
        lambda size: [(0, size), (1, size), (2, size), (2, size)],
        lambda size: [(0, size), (1, size), (2, size), (3, size), (4, size)],
        lambda size: [("0", size)],
    ],
    ids=["one less", "one twice", "one too many", "no index"],
)
def test_store_that_tells_nonsense_has_read_nothing(
    opened: Callable[..., Memory], order: Callable[[int], list[tuple[int, Any]]]
) -> None:
    memory = opened(dict_store(read_each=read_each(order)))
    memory.save()
    endings = memory.load()
    assert endings.promoted == []
    assert sorted(endings.not_promoted) == [0, 1, 2, 3]
    assert memory.transfers.failures == {"test read": 4}


@pytest.mark.parametrize("length", [SLOT + 1, -1, "all", 1.0, SLOT - 1], ids=str)
def test_length_that_cannot_be_is_a_miss_of_that_frame_alone(opened: Callable[..., Memory], length: object) -> None:
    store = dict_store(read_each=read_each(lambda size: [(0, size), (1, length), (2, size), (3, size)]))
    memory = opened(store)
    memory.save()
    endings = memory.load()
    assert [slot for slot, _ in endings.promoted] == [0, 2, 3]
    assert endings.not_promoted == [1]
    assert memory.transfers.failures == {"test verify": 1}
    memory.ended()
    assert KEYS[1] not in store.frames  # it is dropped, so that it can be saved again


def test_class_that_changes_read_alone_is_not_passed_by(opened: Callable[..., Memory]) -> None:
    telling = dict_store(read_each=read_each(lambda size: [(slot, size) for slot in range(4)]))

    class Loses(telling):  # type: ignore[misc, valid-type] # made by a function
        def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
            found = super().read(keys, buffers)
            return [None if index == 2 else length for index, length in enumerate(found)]

    class LosesStill(Loses):
        pass

    memory = opened(LosesStill)
    memory.save()
    endings = memory.load()
    assert [slot for slot, _ in endings.promoted] == [0, 1, 3]
    assert endings.not_promoted == [2]
