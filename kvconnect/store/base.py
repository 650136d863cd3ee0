"""What a store author writes: bytes under keys. Knows no tokens, tensors, frames or engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from kvconnect.errors import UnsupportedError
from kvconnect.protocol.keys import BlockKey

__all__ = ["BlockStore", "StoreCapabilities", "StoreContext"]


class StoreCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a store promises beyond the five methods.

    Attributes:
        durable: What `write` confirmed is there after a restart.
        shared: Other instances, other processes too, read what one wrote.
        scans: `scan` works.
        holds: `hold`, `release` and `held` work.
        resizes: `resize` works.
        concurrency: Calls that may run at once; with 1, opening, every call and closing run on one thread.
        call_bytes: About what one `read` or `write` moves at most: more where a call costs more than its bytes, less
            where others wait for it.
        call_blocks: Keys of one `read` or `write` at most.
        gather_s: Seconds for which blocks wait for others, so that a `write` has more of them.
    """

    durable: bool = False
    shared: bool = False
    scans: bool = False
    holds: bool = False
    resizes: bool = False
    concurrency: int = 1
    call_bytes: int = 8 << 20
    call_blocks: int = 32
    gather_s: float = 0.0


class StoreContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a store is told when it is opened.

    Attributes:
        name: The name it was configured under, for messages.
        timeout_s: Seconds after which a call counts as failed; give it to the client library where it takes one.
        mode: What it is used for: ``r``, ``w`` or ``rw``. A store that is only read from should need no more rights.
    """

    name: str
    timeout_s: float
    mode: Literal["r", "w", "rw"] = "rw"


class BlockStore(ABC):
    """Bytes under keys.

    Results are parallel to `keys`. A frame is opaque, of any length. Memory is the caller's again on return. Any
    exception means that the whole batch missed. A store is opened once in each process that uses it, never carried over
    a fork, and may drop anything at any time, except what is held.

    Attributes:
        Options: What users may set: a frozen msgspec Struct, see `kvconnect.Options`.
        capabilities: See `StoreCapabilities`.
    """

    Options: ClassVar[type[msgspec.Struct]]
    capabilities: ClassVar[StoreCapabilities]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class that changes `read` the `read_each` that calls it, unless it changes that too."""
        super().__init_subclass__(**kwargs)
        if "read" in vars(cls) and "read_each" not in vars(cls):
            cls.read_each = BlockStore.read_each  # type: ignore[method-assign] # else what it inherits would pass it by

    @abstractmethod
    def __init__(self, options: Any, context: StoreContext) -> None:
        """Open the store.

        Raises:
            ConfigError: If it cannot work as configured; the engine does not start.
        """

    @abstractmethod
    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Say which keys are there; a belief, not a promise."""

    @abstractmethod
    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        """Fill each buffer from its start with the key's frame.

        Returns:
            Bytes filled; None for a miss. A frame longer than its buffer is a miss.
        """

    @abstractmethod
    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        """Keep each frame under its key, or decline it (False): full, or not admitted.

        True means that other instances read it whole; a crash before that leaves nothing. Writing a present key
        replaces it or does nothing.

        `frames` may make each frame when it is taken from there, at any time during the call and in any order; taken
        just before its bytes move, they are in the CPU's caches.
        """

    @abstractmethod
    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Forget keys; absent ones are fine."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the medium; twice is fine."""

    def read_each(
        self,
        keys: Sequence[BlockKey],
        buffers: Sequence[memoryview],
        arrived: Callable[[int, int | None], None],
    ) -> None:
        """Read as `read` does, and tell of each frame when it is there; the default calls `read`.

        A class that defines `read` and not this gets the default, whatever it derives from.

        Worth its own way where frames come one by one: who is told at once finds them in the CPU's caches, and the next
        come meanwhile.

        Args:
            keys: What to read.
            buffers: Where to.
            arrived: Called in this thread with each index of `keys` once, in any order, and what `read` would return
                for it. The buffer is the caller's again by then. What it raises ends the call.
        """
        for index, length in enumerate(self.read(keys, buffers)):
            arrived(index, length)

    def attach(self, memory: memoryview) -> None:  # noqa: B027 - optional: most media gain nothing
        """Learn of the memory in which buffers and frames will lie, to prepare it where the medium gains by that.

        Called at most once, after opening and before any other call, in processes that read and write. Not a promise:
        other memory comes too, such as a packed copy of a frame.

        Args:
            memory: Writable bytes that stay where they are until `close` has returned. Not all of it need be in use.
        """

    def scan(self) -> Iterator[BlockKey]:
        """Yield the keys that are there; capability `scans`.

        Raises:
            UnsupportedError: If the store does not declare it.
        """
        raise UnsupportedError(f"{type(self).__name__} does not declare 'scans'")

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        """Keep keys from being dropped; capability `holds`.

        A hold belongs to this instance and is in force until it releases the key, until `ttl_s` seconds have passed
        since it last held the key, or until anybody removes the key. It does not end with the instance or its process:
        what was put down by one that died can be taken up again by another. Several may hold one key.

        Args:
            keys: What to hold; holding a key again begins its time anew.
            ttl_s: Seconds.

        Returns:
            For each key, True: it is there, and no instance evicts or drops it while the hold is in force. False: it is
            absent, or cannot be held.

        Raises:
            UnsupportedError: If the store does not declare it.
        """
        raise UnsupportedError(f"{type(self).__name__} does not declare 'holds'")

    def release(self, keys: Sequence[BlockKey]) -> None:
        """End this instance's holds; those of others stay; keys that are absent or not held are fine; `holds`.

        Raises:
            UnsupportedError: If the store does not declare it.
        """
        raise UnsupportedError(f"{type(self).__name__} does not declare 'holds'")

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Say for each key whether a hold is in force whose holder may still live; capability `holds`.

        False for a key that was held lets a leader remove what a dead process left. A store that cannot tell the dead
        from the living says True until the hold's time is over.

        Raises:
            UnsupportedError: If the store does not declare it.
        """
        raise UnsupportedError(f"{type(self).__name__} does not declare 'holds'")

    def resize(self, num_bytes: int) -> bool:
        """Make `num_bytes` the capacity of the medium, for everybody who uses it; capability `resizes`.

        It holds from now on, until it is resized again or nobody uses it any more; then what is configured applies.
        What does not fit is evicted, least recently used first, never what is held.

        Args:
            num_bytes: Bytes, by the store's own count of what a frame takes.

        Returns:
            False if what is held does not fit; nothing has changed then.

        Raises:
            UnsupportedError: If the store does not declare it.
        """
        raise UnsupportedError(f"{type(self).__name__} does not declare 'resizes'")
