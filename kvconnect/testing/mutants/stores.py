"""Stores that are right but for one mistake, as real authors make them."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvconnect import BlockStore, Options, StoreCapabilities
from kvconnect.protocol import BlockKey


class FolderOptions(Options, frozen=True):
    path: str


class FolderStore(BlockStore):
    """One file a block; the right one, from which the others differ in one thing."""

    Options = FolderOptions
    capabilities = StoreCapabilities(durable=True, shared=True)

    def __init__(self, options: Any, context: Any) -> None:
        self.folder = Path(options.path)
        self.folder.mkdir(parents=True, exist_ok=True)

    def name(self, key: BlockKey) -> Path:
        return self.folder / key.hex()

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return [self.name(key).exists() for key in keys]

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        return [self.read_one(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        try:
            frame = self.name(key).read_bytes()
        except FileNotFoundError:
            return None
        if len(frame) > len(buffer):
            return None
        buffer[: len(frame)] = frame
        return len(frame)

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        for key, frame in zip(keys, frames, strict=True):
            temporary = self.folder / f".{key.hex()}.{os.getpid()}.{id(self)}"
            temporary.write_bytes(frame)
            temporary.replace(self.name(key))
        return [True] * len(keys)

    def remove(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self.name(key).unlink()

    def close(self) -> None:
        pass


class ReadsInItsOwnOrder(FolderStore):
    def read(self, keys: Any, buffers: Any) -> Any:
        return [self.read_one(key, buffer) for key, buffer in sorted(zip(keys, buffers, strict=True))]


class ShortensKeys(FolderStore):
    def name(self, key: BlockKey) -> Path:
        return self.folder / key[:64].hex()


class KeepsTheCallersMemory(FolderStore):
    kept: Any = None

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.kept = {}

    def write(self, keys: Any, frames: Any) -> Any:
        self.kept.update(zip(keys, frames, strict=True))
        return super().write(keys, frames)

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        frame = self.kept.get(key)
        if frame is None or len(frame) > len(buffer):
            return super().read_one(key, buffer)
        buffer[: len(frame)] = frame
        return len(frame)


class WritesInPlace(FolderStore):
    def write(self, keys: Any, frames: Any) -> Any:
        for key, frame in zip(keys, frames, strict=True):
            with open(self.name(key), "wb", buffering=0) as file:
                for start in range(0, len(frame), 1024):
                    file.write(frame[start : start + 1024])
        return [True] * len(keys)


class RaisesWhenAbsent(FolderStore):
    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        frame = self.name(key).read_bytes()
        buffer[: len(frame)] = frame
        return len(frame)


class FillsWhatFits(FolderStore):
    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        try:
            frame = self.name(key).read_bytes()[: len(buffer)]
        except FileNotFoundError:
            return None
        buffer[: len(frame)] = frame
        return len(frame)


class AnswersNothing(FolderStore):
    def write(self, keys: Any, frames: Any) -> Any:
        super().write(keys, frames)


class ForgetsWhenClosed(FolderStore):
    def close(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


class Unpickles(FolderStore):
    def write(self, keys: Any, frames: Any) -> Any:
        return super().write(keys, [memoryview(pickle.dumps(bytes(frame))) for frame in frames])

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        try:
            frame = pickle.loads(self.name(key).read_bytes())  # noqa: S301  # that is its mistake
        except FileNotFoundError:
            return None
        if len(frame) > len(buffer):
            return None
        buffer[: len(frame)] = frame
        return len(frame)


class ScansNothing(FolderStore):
    def scan(self) -> Iterator[BlockKey]:
        return iter(())


class CapacityOptions(Options, frozen=True):
    path: str
    capacity: int = 1 << 30


class IgnoresItsCapacity(FolderStore):
    Options = CapacityOptions  # type: ignore[assignment]


class LooseOptions(Options, frozen=True, forbid_unknown_fields=False):
    path: str


class TakesAnyOption(FolderStore):
    Options = LooseOptions  # type: ignore[assignment]
