"""Keys and frames for tests, the same for the same number."""

from __future__ import annotations

import random

from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore

__all__ = ["frame", "key", "read", "write"]


def key(number: int) -> BlockKey:
    """Return a key."""
    return BlockKey(random.Random(number).randbytes(72))


def frame(number: int, size: int = 5000) -> bytes:
    """Return a frame."""
    return random.Random(-number - 1).randbytes(size)


def write(store: BlockStore, *numbers: int, size: int = 5000) -> None:
    """Write blocks in one call."""
    taken = store.write([key(n) for n in numbers], [memoryview(frame(n, size)) for n in numbers])
    assert list(taken) == [True] * len(numbers)


def read(store: BlockStore, *numbers: int, size: int = 8192) -> list[bytes | None]:
    """Read blocks in one call."""
    buffers = [bytearray(size) for _ in numbers]
    lengths = store.read([key(n) for n in numbers], [memoryview(buffer) for buffer in buffers])
    found = zip(buffers, lengths, strict=True)
    return [None if length is None else bytes(buffer[:length]) for buffer, length in found]
