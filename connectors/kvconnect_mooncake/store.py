"""A block store over a Mooncake Store pool: blocks go from arena slots to the pool's memory and back without a copy.

Objects there are written once: writing a present key does nothing. The pool evicts what was not looked up or read for
some seconds (its lease) when it is full; what cannot be placed is declined. A pool that lost a provider of memory says
for about 10 s that its objects are there: reading them is a miss. After a restart of the master, which forgets
everything, clients find it again by themselves.

What was looked up or read has a lease, for which its memory stays as it is: nobody reads memory that is given away.
`MooncakeStore.remove` therefore waits for leases to end, and ignores those that are renewed for as long as a call may
take; frames have checksums beside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from kvconnect.errors import StoreError, StoreUnavailable
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, StoreCapabilities, StoreContext
from kvconnect_mooncake.client import MooncakeClient, MooncakeOptions
from kvconnect_mooncake.memory import RegisteredMemory, address_of

__all__ = ["MooncakeOptions", "MooncakeStore"]

_NO_SPACE = -200
_NOT_COMPLETE = -703  # somebody is writing it, or died doing so: its name is free again after 30 s
_NOT_FOUND = -704
_LEASE_ENDED = -707  # before all bytes had come: they may be another object's by now
_MOST_GETS = 3
_IN_USE = (-706, -708)  # leased, or being copied
_DEADLINE = 0.9  # of the tier's timeout
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.2  # between looks whether a lease has ended; it lasts 10 s by default
_RPC = range(-999, -899)  # the master did not answer


class _Part(NamedTuple):
    """One object on its way between the pool and the caller's memory."""

    number: int
    name: str
    memory: memoryview


class MooncakeStore(BlockStore):
    """The memory pool of a Mooncake Store, which many processes and machines use at once."""

    Options = MooncakeOptions
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(
        shared=True, concurrency=2, call_bytes=16 << 20, call_blocks=64
    )

    def __init__(self, options: MooncakeOptions, context: StoreContext) -> None:
        """Set up a client; see `MooncakeClient`."""
        self._closed = False
        self._prefix = options.prefix
        self._timeout_s = context.timeout_s * _DEADLINE
        self._client = MooncakeClient(options, context)
        self._config = _replicas(options.replicas)
        self._memory = RegisteredMemory(self._client, options.local_buffer)

    def attach(self, memory: memoryview) -> None:
        """Register the arena, once.

        Raises:
            ConfigError: If Mooncake cannot; over RDMA the process may not lock that much memory.
        """
        self._memory.attach(memory)

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Ask the master; it takes up to 10 s to learn that a provider died."""
        if not keys:
            return []
        with self._client.calling() as client:
            return self._exist(client, self._names(keys))

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        """Get each object whole; one that cannot be had misses alone.

        Raises:
            StoreUnavailable: If the master does not answer.
        """
        parts: dict[str, _Part] = {}
        again: list[_Part] = []  # Mooncake fills one buffer of those that one call names for the same object
        for index, (name, buffer) in enumerate(zip(self._names(keys), buffers, strict=True)):
            part = _Part(index, name, buffer)
            if parts.setdefault(name, part) is not part:
                again.append(part)
        if not parts:
            return []
        with self._client.calling() as client:
            lengths = self._get(client, list(parts.values()))
            if all(code < 0 for code in lengths.values()):  # is nothing there, or does nobody answer?
                self._exist(client, [next(iter(parts))])
        filled: list[int | None] = [None] * len(keys)
        for part in (*parts.values(), *again):
            length, first = lengths[part.name], parts[part.name]
            if 0 < length <= len(part.memory):
                if part is not first:
                    part.memory[:length] = first.memory[:length]
                filled[part.number] = length
        return filled

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        """Put each frame; False when the pool has no room for it, or another writer of its key has not finished.

        Raises:
            StoreUnavailable: If nothing was kept, for another reason than that.
        """
        names = self._names(keys)
        parts: dict[str, _Part] = {}
        for index, (name, frame) in enumerate(zip(names, frames, strict=True)):
            if len(frame):  # Mooncake has no empty objects
                parts.setdefault(name, _Part(index, name, frame))
        if not parts:
            return [False] * len(keys)
        with self._client.calling() as client:
            moved = self._move(list(parts.values()), lambda *batch: client.batch_put_from(*batch, self._config))
            put = [name for name, code in zip(parts, moved, strict=True) if code == 0]
            if not put and any(code != _NO_SPACE for code in moved):
                raise StoreUnavailable(f"Mooncake at {self._client.master} kept nothing, codes {sorted(set(moved))}")
            # a put of a name that somebody else has begun to write answers 0 too, and does nothing
            there = dict(zip(put, self._exist(client, put), strict=True))
        return [there.get(name, False) for name in names]

    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Remove objects, once nobody reads them; those that are read without end, at the call's deadline.

        Raises:
            StoreError: If the master does not answer, or refuses.
        """
        deadline = time.monotonic() + self._timeout_s
        pause_s = _FIRST_PAUSE_S
        left = self._names(keys)
        while left:
            late = time.monotonic() + pause_s >= deadline
            with self._client.calling() as client:
                codes = dict(zip(left, client.batch_remove(left, late), strict=True))
            failed = set(codes.values()) - {0, _NOT_FOUND, _NOT_COMPLETE, *_IN_USE}
            if failed:
                kind = StoreUnavailable if any(code in _RPC for code in failed) else StoreError
                raise kind(f"Mooncake at {self._client.master} did not remove everything, codes {sorted(failed)}")
            left = [name for name, code in codes.items() if code in _IN_USE]
            if left:
                if late:
                    raise StoreError(f"Mooncake at {self._client.master} does not let go of {len(left)} objects")
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Unregister the memory and end the client, with the memory it gave to the pool."""
        if self._closed:
            return
        self._closed = True
        self._memory.close()
        self._client.close()

    def _names(self, keys: Sequence[BlockKey]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]

    def _exist(self, client: Any, names: Sequence[str]) -> list[bool]:
        if not names:
            return []
        codes = client.batch_is_exist(names)
        if min(codes) < 0:
            raise StoreUnavailable(f"Mooncake's master at {self._client.master} did not answer, code {min(codes)}")
        return [code == 1 for code in codes]

    def _get(self, client: Any, parts: Sequence[_Part]) -> dict[str, int]:
        """Get objects, again where a slow transfer outlived the lease; return the length or the code for each name."""
        deadline = time.monotonic() + self._timeout_s
        codes: dict[str, int] = {}
        left = parts
        for _ in range(_MOST_GETS):
            moved = self._move(left, client.batch_get_into, copies_out=True)
            codes.update(zip((part.name for part in left), moved, strict=True))
            left = [part for part in left if codes[part.name] == _LEASE_ENDED]
            if not left or time.monotonic() >= deadline:
                break
        return codes

    def _move(self, parts: Sequence[_Part], call: Any, *, copies_out: bool = False) -> list[int]:
        """Put or get objects, registered memory as it lies and all other in runs through the staging buffer.

        Args:
            parts: What to move.
            call: Takes names, addresses and lengths; returns a code for each.
            copies_out: Objects come into the memory; else they are made from it.

        Returns:
            Mooncake's codes, parallel to `parts`.
        """
        addresses = [self._memory.address_in_attached(part.memory) for part in parts]
        lie = [(part, address) for part, address in zip(parts, addresses, strict=True) if address is not None]
        others = [part for part, address in zip(parts, addresses, strict=True) if address is None]
        codes: dict[int, int] = {}
        if lie:
            moved = call(
                [part.name for part, _ in lie], [address for _, address in lie], [len(part.memory) for part, _ in lie]
            )
            codes.update(zip((part.number for part, _ in lie), moved, strict=True))
        for run in _runs(others, self._memory.staging_bytes):
            lengths = [len(part.memory) for part in run]
            ends = [sum(lengths[: number + 1]) for number in range(len(run))]
            with self._memory.staged(ends[-1]) as staging:
                rooms = [staging[end - length : end] for end, length in zip(ends, lengths, strict=True)]
                if not copies_out:
                    for room, part in zip(rooms, run, strict=True):
                        room[:] = part.memory
                moved = call([part.name for part in run], [address_of(room) for room in rooms], lengths)
                for room, part, code in zip(rooms, run, moved, strict=True):
                    if copies_out and 0 < code <= len(room):
                        part.memory[:code] = room[:code]
                    codes[part.number] = code
        return [codes[part.number] for part in parts]


def _replicas(count: int) -> Any:
    from mooncake.store import ReplicateConfig

    config = ReplicateConfig()
    config.replica_num = count
    return config


def _runs(parts: Sequence[_Part], limit: int) -> Iterator[list[_Part]]:
    """Split parts into runs of at most `limit` bytes; one that is longer comes alone."""
    run: list[_Part] = []
    size = 0
    for part in parts:
        if run and size + len(part.memory) > limit:
            yield run
            run, size = [], 0
        run.append(part)
        size += len(part.memory)
    if run:
        yield run
