"""A store around a store: override what you watch or change, the rest goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvconnect.protocol.keys import BlockKey
from kvconnect.store.base import BlockStore, StoreContext

__all__ = ["WrapperStore"]


class WrapperStore(BlockStore):
    """Forwards every call to `inner`. Subclass it, naming the wrapped class's `Options` and `capabilities`."""

    inner_class: type[BlockStore]

    def __init__(self, options: Any, context: StoreContext) -> None:
        """Open the wrapped store with the same options."""
        self.inner = self.inner_class(options, context)

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Forward."""
        return self.inner.contains(keys)

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        """Forward."""
        return self.inner.read(keys, buffers)

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        """Forward."""
        return self.inner.write(keys, frames)

    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Forward."""
        self.inner.remove(keys)

    def close(self) -> None:
        """Forward."""
        self.inner.close()

    def attach(self, memory: memoryview) -> None:
        """Forward."""
        self.inner.attach(memory)

    def scan(self) -> Iterator[BlockKey]:
        """Forward."""
        return self.inner.scan()

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        """Forward."""
        return self.inner.hold(keys, ttl_s)

    def release(self, keys: Sequence[BlockKey]) -> None:
        """Forward."""
        self.inner.release(keys)

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Forward."""
        return self.inner.held(keys)

    def resize(self, num_bytes: int) -> bool:
        """Forward."""
        return self.inner.resize(num_bytes)
