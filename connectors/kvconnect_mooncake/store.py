"""A block store over a Mooncake Store pool: blocks go from arena slots to the pool's memory and back without a copy.

Objects there are written once: writing a present key does nothing. The pool evicts what was not looked up or read for
some seconds (its lease) when it is full; what cannot be placed is declined. A pool that lost a provider of memory says
for about 10 s that its objects are there: reading them is a miss. After a restart of the master, which forgets
everything, clients find it again by themselves.

A removal ignores leases, so its memory may be written anew while somebody still reads it. `MooncakeStore.read`
therefore compares where an object lies before and after: what moved, or is gone, is a miss. It cannot see a removal
that is followed, during one read, by another object in its place, a second removal, and the first key again, in the
same place and of the same length; frames have checksums for that.
"""

from __future__ import annotations

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
_RPC = range(-999, -899)  # the master did not answer

_Place = tuple[tuple[str, int, int], ...]  # an object's copies: who has them, where, how many bytes


class _Part(NamedTuple):
    """One object on its way between the pool and the caller's memory."""

    number: int
    name: str
    memory: memoryview


class MooncakeStore(BlockStore):
    """One client of a pool that many processes and machines share."""

    Options = MooncakeOptions
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(shared=True, concurrency=2)

    def __init__(self, options: MooncakeOptions, context: StoreContext) -> None:
        """Set up a client; see `MooncakeClient`."""
        self._closed = False
        self._prefix = options.prefix
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
        filled: list[int | None] = [None] * len(keys)
        names = self._names(keys)
        with self._client.calling() as client:
            before = self._places(client, list(dict.fromkeys(names)))
            parts: dict[str, _Part] = {}
            again: list[_Part] = []  # Mooncake fills one buffer of those that one call names for the same object
            for index, (name, buffer) in enumerate(zip(names, buffers, strict=True)):
                if name in before and before[name][0][2] <= len(buffer):
                    part = _Part(index, name, buffer[: before[name][0][2]])
                    if parts.setdefault(name, part) is not part:
                        again.append(part)
            moved = self._move(list(parts.values()), client.batch_get_into, copies_out=True)
            came = [part for part, code in zip(parts.values(), moved, strict=True) if code == len(part.memory)]
            after = self._places(client, [part.name for part in came])
        for part in came:
            if after.get(part.name) == before[part.name]:
                filled[part.number] = len(part.memory)
        for part in again:
            first = parts[part.name]
            if filled[first.number] is not None:
                part.memory[:] = first.memory
                filled[part.number] = len(part.memory)
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
        """Remove objects at once, read a moment ago or not.

        Raises:
            StoreError: If the master does not answer, or refuses.
        """
        if not keys:
            return
        with self._client.calling() as client:
            codes = set(client.batch_remove(self._names(keys), True)) - {0, _NOT_FOUND, _NOT_COMPLETE}
        if codes:
            kind = StoreUnavailable if any(code in _RPC for code in codes) else StoreError
            raise kind(f"Mooncake at {self._client.master} did not remove everything, codes {sorted(codes)}")

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

    def _places(self, client: Any, names: Sequence[str]) -> dict[str, _Place]:
        """Return where the objects lie that are there and complete.

        Raises:
            StoreUnavailable: If the master does not answer.
        """
        if not names:
            return {}
        places = {name: _place(copies) for name, copies in client.batch_get_replica_desc(names).items()}
        if not places:  # the answer is the same when nothing is there and when nobody answers
            self._exist(client, names[:1])
        return {name: place for name, place in places.items() if place}

    def _move(self, parts: Sequence[_Part], call: Any, *, copies_out: bool = False) -> list[int]:
        """Put or get objects, registered memory as it lies and all other in runs through the staging buffer.

        Args:
            parts: What to move.
            call: Takes names, addresses and lengths; returns a code for each.
            copies_out: Objects come into the memory; else they are made from it.

        Returns:
            Mooncake's codes, parallel to `parts`.
        """
        codes: dict[int, int] = {}
        lie = [part for part in parts if self._memory.holds(part.memory)]
        if lie:
            moved = call(
                [part.name for part in lie],
                [address_of(part.memory) for part in lie],
                [len(part.memory) for part in lie],
            )
            codes.update(zip((part.number for part in lie), moved, strict=True))
        direct = set(codes)
        for run in _runs([part for part in parts if part.number not in direct], self._memory.staging_bytes):
            lengths = [len(part.memory) for part in run]
            ends = [sum(lengths[: number + 1]) for number in range(len(run))]
            with self._memory.staged(ends[-1]) as staging:
                rooms = [staging[end - length : end] for end, length in zip(ends, lengths, strict=True)]
                if not copies_out:
                    for room, part in zip(rooms, run, strict=True):
                        room[:] = part.memory
                moved = call([part.name for part in run], [address_of(room) for room in rooms], lengths)
                for room, part, code in zip(rooms, run, moved, strict=True):
                    if copies_out and code == len(room):
                        part.memory[:] = room
                    codes[part.number] = code
        return [codes[part.number] for part in parts]


def _replicas(count: int) -> Any:
    from mooncake.store import ReplicateConfig

    config = ReplicateConfig()
    config.replica_num = count
    return config


def _place(copies: Sequence[Any]) -> _Place:
    """Return where copies in memory lie; those that the pool has moved to disks are not read."""
    return tuple(
        (found.transport_endpoint, found.buffer_address, found.size)
        for found in (copy.get_memory_descriptor().buffer_descriptor for copy in copies if copy.is_memory_replica())
    )


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
