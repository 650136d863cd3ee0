"""A block store over any S3 API: frames together in packs, and a log that says which key lies where.

Whole blocks or none: a pack's keys are named only when all of it is there, by one conditional put. After a crash there
may be a pack that nobody names.
"""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from kvconnect.log import FailureLog
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, StoreCapabilities, StoreContext
from kvconnect_s3.bucket import Bucket
from kvconnect_s3.catalog import Catalog
from kvconnect_s3.journal import Journal
from kvconnect_s3.loop import LoopThread, all_of
from kvconnect_s3.options import S3Options
from kvconnect_s3.records import ID_BYTES, MAX_PACK_BYTES, Packed, Place, pack_of

__all__ = ["S3Options", "S3Store"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Ceph's gateway gave 16 MiB at 0.35 GB/s in one request, at 0.44 in two or four.
_RANGE_BYTES = 4 << 20
_GAP_BYTES = 256 << 10  # costs less than another request
_LOOK_S = 1.0
_REMOVED = 1 << 16  # keys that one entry removes, 5 MB
_SPENT = 0.9  # of the time that a call has; the rest is for the caller to hear of it


class _Wanted(NamedTuple):
    """A frame that was asked for: its place, the key, and where to copy it."""

    place: Place
    key: BlockKey
    number: int


class _Range(NamedTuple):
    """What has come, and the frames in it."""

    wanted: Sequence[_Wanted]
    start: int
    data: memoryview


class S3Store(BlockStore):
    """One prefix of an S3 bucket, used by any number of machines at once.

    Nothing is deleted but the log's own beginning. How long blocks are kept is for a lifecycle rule of the bucket to
    say, on ``<prefix>/packs/`` and nowhere else: an expired pack is a miss. It should also end multipart uploads that
    were abandoned. The store needs the rights to list the bucket and to get its objects, and unless the tier is
    read only (``mode=r``) to put and delete them. See `docs/security.md` for whom that trusts.
    """

    Options = S3Options
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(
        durable=True, shared=True, scans=True, concurrency=4, call_bytes=16 << 20, call_blocks=256, gather_s=0.25
    )

    def __init__(self, options: S3Options, context: StoreContext) -> None:
        """Look whether the place can be used, and read the log.

        Raises:
            ConfigError: If the bucket is absent, access is denied, or conditional puts are not enforced.
            StoreUnavailable: If the endpoint does not answer.
        """
        self._timeout_s = _SPENT * context.timeout_s
        self._failures = FailureLog(logger)
        self._catalog = Catalog(options.index_blocks)
        self._bucket = Bucket(options, self._timeout_s)
        self._loop = LoopThread(f"{context.name} store {self._bucket.where}")
        self._journal = Journal(self._bucket, self._catalog, self._loop, self._failures, self._timeout_s)
        try:
            self._call(self._journal.open(writes="w" in context.mode))
        except BaseException:
            self.close()
            raise

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Say which keys are in the log."""
        return self._call(self._contains(keys)) if keys else []

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        """Get ranges of packs, those that lie together at once; what has expired is forgotten, and others are told."""
        lengths: list[int | None] = [None] * len(keys)
        S3Store.read_each(self, keys, buffers, lengths.__setitem__)  # a subclass' may call this
        return lengths

    def read_each(
        self,
        keys: Sequence[BlockKey],
        buffers: Sequence[memoryview],
        arrived: Callable[[int, int | None], None],
    ) -> None:
        """Read as `read` does: copy each range to where it is wanted while others are on their way."""
        if not keys:
            return
        rooms = [len(buffer) for buffer in buffers]
        missed = set(range(len(keys)))

        def take(part: _Range) -> None:
            for place, _, number in part.wanted:
                first = place.offset - part.start
                buffers[number][: place.length] = part.data[first : first + place.length]
                missed.discard(number)
                arrived(number, place.length)

        self._loop.call_each(lambda hand_over: self._read(keys, rooms, hand_over), self._timeout_s, take)
        for number in sorted(missed):
            arrived(number, None)

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        """Put the frames as one object, then say so in the log; False for a frame of more than 1 GiB."""
        taken = [len(frame) <= MAX_PACK_BYTES for frame in frames]
        packs = list(_packs([pair for pair, fits in zip(zip(keys, frames, strict=True), taken, strict=True) if fits]))
        if packs:
            self._call(self._write(packs))
        return taken

    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Say in the log that keys are gone; their packs stay."""
        for i in range(0, len(keys), _REMOVED):
            self._call(self._journal.append(removed=keys[i : i + _REMOVED]))

    def scan(self) -> Iterator[BlockKey]:
        """Yield the known keys whose pack a listing names."""
        yield from self._call(self._scan())

    def close(self) -> None:
        """End the requests and the thread."""
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.call(work, self._timeout_s)

    async def _contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        await self._journal.refresh()
        return [self._catalog.get(key) is not None for key in keys]

    async def _read(self, keys: Sequence[BlockKey], rooms: Sequence[int], hand_over: Callable[[_Range], None]) -> None:
        if any(self._catalog.get(key) is None for key in keys):
            await self._journal.refresh()
        else:  # what was removed or replaced meanwhile: known for the next call
            self._journal.refresh_beside(_LOOK_S)
        lost: list[tuple[BlockKey, Place]] = []
        packs: dict[bytes, list[_Wanted]] = defaultdict(list)
        for number, (key, room) in enumerate(zip(keys, rooms, strict=True)):
            place = self._catalog.get(key)
            if place is not None and place.length <= room:
                packs[place.pack].append(_Wanted(place, key, number))
        requests = [together for wanted in packs.values() for together in _ranges(wanted)]
        await all_of(self._read_range(together, hand_over, lost) for together in requests)
        if lost:
            self._journal.tell_lost(lost)

    async def _read_range(
        self, wanted: Sequence[_Wanted], hand_over: Callable[[_Range], None], lost: list[tuple[BlockKey, Place]]
    ) -> None:
        """Get one range, and hand its frames over; add to `lost` what is not there."""
        start = wanted[0].place.offset
        end = max(each.place.offset + each.place.length for each in wanted)
        data: memoryview | None = memoryview(b"")
        if end > start:
            data = await self._bucket.get_range(_path(wanted[0].place.pack), start, end)
        there = []
        for each in wanted:
            if data is None or each.place.offset - start + each.place.length > len(data):
                self._catalog.forget(each.key, each.place)
                lost.append((each.key, each.place))
            else:
                there.append(each)
        if data is not None:
            hand_over(_Range(there, start, data))

    async def _write(self, packs: Sequence[tuple[Packed, bytes | memoryview]]) -> None:
        await all_of(self._bucket.put(_path(packed.name), data) for packed, data in packs)
        await self._journal.append([packed for packed, _ in packs])

    async def _scan(self) -> list[BlockKey]:
        await self._journal.refresh()
        there = {listed.path async for listed in self._bucket.listing("packs")}
        return [key for key, place in self._catalog.items() if _path(place.pack) in there]


def _path(pack: bytes) -> str:
    return f"packs/{pack.hex()}"


def _packs(blocks: Sequence[tuple[BlockKey, memoryview]]) -> Iterator[tuple[Packed, bytes | memoryview]]:
    """Put frames one behind the other, and describe what that makes: one pack, unless it would be too long."""
    begin = size = 0
    for i, (_, frame) in enumerate(blocks):
        if size + len(frame) > MAX_PACK_BYTES:
            yield _pack(blocks[begin:i])
            begin, size = i, 0
        size += len(frame)
    if begin < len(blocks):
        yield _pack(blocks[begin:])


def _pack(blocks: Sequence[tuple[BlockKey, memoryview]]) -> tuple[Packed, bytes | memoryview]:
    spans = []
    offset = 0
    for _, frame in blocks:
        spans.append((offset, len(frame)))
        offset += len(frame)
    data = blocks[0][1] if len(blocks) == 1 else b"".join([frame for _, frame in blocks])
    return pack_of(secrets.token_bytes(ID_BYTES), [key for key, _ in blocks], spans), data


def _ranges(wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
    """Split what is wanted of one pack into requests: what lies together goes together, up to some megabytes."""
    wanted.sort()
    together = [wanted[0]]
    end = wanted[0].place.offset + wanted[0].place.length
    for each in wanted[1:]:
        offset, length = each.place.offset, each.place.length
        if offset > end + _GAP_BYTES or end - together[0].place.offset >= _RANGE_BYTES:
            yield together
            together, end = [], offset
        together.append(each)
        end = max(end, offset + length)
    yield together
