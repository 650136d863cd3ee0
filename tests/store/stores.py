"""Stores for tests: an in-memory one, and ones that misbehave. They exist only here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from kvconnect import BlockStore, Options, StoreCapabilities, StoreContext
from kvconnect.protocol import BlockKey
from kvconnect.store import Tier, TierOptions


class DictStore(BlockStore):
    """Frames in a dictionary that every instance of a test shares."""

    Options = Options
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(shared=True)
    frames: ClassVar[dict[BlockKey, bytes]]

    def __init__(self, options: Any, context: StoreContext) -> None:
        self.context = context
        self.thread = threading.get_ident()

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return [key in self.frames for key in keys]

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        lengths: list[int | None] = []
        for key, buffer in zip(keys, buffers, strict=True):
            frame = self.frames.get(key)
            if frame is None or len(frame) > len(buffer):
                lengths.append(None)
            else:
                buffer[: len(frame)] = frame
                lengths.append(len(frame))
        return lengths

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        self.frames.update((key, bytes(frame)) for key, frame in zip(keys, frames, strict=True))
        return [True] * len(keys)

    def remove(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self.frames.pop(key, None)

    def close(self) -> None:
        pass


def dict_store(**members: Any) -> type[DictStore]:
    """Return a store class with a dictionary of its own, and whatever `members` change."""
    return type("TestStore", (DictStore,), {"frames": {}, **members})


def tier(
    store: type[BlockStore], *, name: str = "test", timeout_s: float = 5.0, options: Any = None, **use: Any
) -> Tier:
    """Return a tier over a store class."""
    return Tier(
        name=name,
        store_class=store,
        options=options if options is not None else Options(),
        use=TierOptions(timeout_s=timeout_s, **use),
    )
