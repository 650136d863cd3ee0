"""The log that all instances share, and the map that one instance makes of it.

    <prefix>/kvconnect-s3.json        the format and its version
    <prefix>/packs/<32 hex>           frames, one after the other; written once
    <prefix>/log/<20 digits>          an entry, created if it is absent: this alone orders everything
    <prefix>/checkpoints/<20 digits>  the map after the entry of that number

An instance learns by asking for the entry after the last it knows, until there is none. Whoever appends every 256th
entry writes a checkpoint, keeps the two newest, and deletes the entries that the older of these covers once they are an
hour old by the server's clock. An instance that has not looked for ten minutes makes sure that the last entry it knows
is still there, and otherwise begins again: it never takes a deleted entry for the log's end. So the log itself must not
be expired from outside.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from kvconnect.errors import ConfigError, KVConnectError, MetadataError, StoreUnavailable
from kvconnect.log import FailureLog
from kvconnect.protocol import BlockKey
from kvconnect_s3.bucket import Bucket
from kvconnect_s3.catalog import Catalog
from kvconnect_s3.loop import LoopThread, all_of
from kvconnect_s3.records import ID_BYTES, Checkpoint, Entry, Packed, Place, decode

__all__ = ["Journal"]

FORMAT_VERSION = 1
_MARKER = "kvconnect-s3.json"
_NAME = re.compile(r".*/(\d{20})\Z")
_MAX_ENTRY_BYTES = 64 << 20
_MAX_CHECKPOINT_BYTES = 1 << 30
_CHECKPOINT_EVERY = 256
_KEEP_LOG = timedelta(hours=1)
_UNSURE_S = 600.0
_AHEAD = 16  # entries that are fetched at once, by one that is behind


_EMPTY = Entry.of(b"")


class _Marker(msgspec.Struct):
    format: str
    version: int


class _Change(NamedTuple):
    packs: Sequence[Packed]
    removed: Sequence[BlockKey]
    lost: Sequence[tuple[BlockKey, Place]]
    done: asyncio.Future[None]


class Journal:
    """The log as one instance sees it. Everything runs on its loop."""

    def __init__(
        self, bucket: Bucket, catalog: Catalog, loop: LoopThread, failures: FailureLog, timeout_s: float
    ) -> None:
        """Send nothing yet.

        Args:
            bucket: Where the log is.
            catalog: The map to keep up to date.
            loop: Where what nobody waits for runs.
            failures: Told of entries that cannot be read, and of checkpoints that cannot be written.
            timeout_s: Seconds after which an append is given up.
        """
        self._bucket = bucket
        self._catalog = catalog
        self._loop = loop
        self._failures = failures
        self._timeout_s = timeout_s
        self._next = 0  # the first entry that is not known
        self._looked = -_UNSURE_S
        self._waiting: list[_Change] = []
        self._committing = False
        self._looking = False

    async def open(self) -> None:
        """See that the place can be used, and read the log.

        Raises:
            ConfigError: If conditional puts are not enforced, another version was here, or access is denied.
        """
        marker = msgspec.json.encode(_Marker("kvconnect-s3", FORMAT_VERSION))
        if await self._bucket.create(_MARKER, marker) and await self._bucket.create(_MARKER, marker):
            raise ConfigError(
                f"s3: {self._bucket.where} ignores If-None-Match: it has put an object over another that it was told "
                "to keep. Several writers would lose one another's blocks there; use a server with conditional puts"
            )
        found = await self._bucket.get(_MARKER, 4096)
        try:
            there = msgspec.json.decode(found or b"", type=_Marker)
        except msgspec.MsgspecError:
            raise ConfigError(f"s3: {_MARKER} of {self._bucket.where} cannot be read; use another prefix") from None
        if there != _Marker("kvconnect-s3", FORMAT_VERSION):
            raise ConfigError(
                f"s3: {self._bucket.where} is of another format than version {FORMAT_VERSION}, which this kvconnect "
                "writes; nothing was touched: use another prefix, or the version that made it"
            )
        await self._load()

    async def refresh(self) -> None:
        """Learn every entry that was there when this was called."""
        await self._be_sure()
        ahead = 1
        while await self._bucket.exists(_log(self._next)):
            first = self._next
            found = await all_of(self._fetch(first + i) for i in range(ahead))
            for i, entry in enumerate(found):
                if entry is not None:
                    self._learn(first + i, entry)
            ahead = min(2 * ahead, _AHEAD)
        self._looked = _now()

    def refresh_beside(self, at_most_every_s: float) -> None:
        """Refresh while others go on, unless that happened within the last `at_most_every_s` seconds."""
        if not self._looking and _now() - self._looked > at_most_every_s:
            self._looking = True
            self._loop.spawn(self._refresh_quietly())

    def tell_lost(self, lost: Sequence[tuple[BlockKey, Place]]) -> None:
        """Append, while others go on, that these keys are not where they were."""
        self._loop.spawn(self._tell_lost(lost))

    async def append(
        self,
        packs: Sequence[Packed] = (),
        removed: Sequence[BlockKey] = (),
        lost: Sequence[tuple[BlockKey, Place]] = (),
    ) -> None:
        """Write an entry, together with whoever else waits for one; when this returns, every instance sees it.

        Raises:
            StoreUnavailable: If that failed. It may be there all the same, or later.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Change(packs, removed, lost, done))
        if not self._committing:
            self._committing = True
            self._loop.spawn(self._commit_all())
        await done

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                changes, self._waiting = self._waiting, []
                error: KVConnectError | None = None
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await self._commit(changes)
                except KVConnectError as raised:
                    error = raised
                except TimeoutError:
                    error = StoreUnavailable(f"s3: {self._bucket.where} did not take a log entry in time")
                for change in changes:
                    if not change.done.done():
                        if error is None:
                            change.done.set_result(None)
                        else:
                            change.done.set_exception(error)
        finally:
            self._committing = False

    async def _commit(self, changes: Sequence[_Change]) -> None:
        """Write the next entry, behind those of others who were faster."""
        entry = Entry.of(
            secrets.token_bytes(ID_BYTES),
            [packed for change in changes for packed in change.packs],
            [key for change in changes for key in change.removed],
            [item for change in changes for item in change.lost],
        )
        data = msgspec.msgpack.encode(entry)
        await self._be_sure()
        tries = 0
        while True:
            number = self._next
            try:
                won = await self._bucket.create(_log(number), data)
            except StoreUnavailable:
                won = False  # or not: what is there will tell
                if tries > 2:
                    raise
            other = None if won else await self._fetch(number)
            if won or (other is not None and other.id == entry.id):
                break
            if other is not None:
                self._learn(number, other)
                if tries:  # far behind, or others are many
                    await self.refresh()
            # whoever lost waits a little, so that as many writers as there are do not run in step
            tries += 1
            await asyncio.sleep(random.uniform(0, min(0.2, 0.005 * 2 ** min(tries, 6))))
        self._learn(number, entry)
        self._looked = _now()
        if (number + 1) % _CHECKPOINT_EVERY == 0 and self._next == number + 1:
            self._loop.spawn(self._checkpoint(number, self._catalog.items()))

    def _learn(self, number: int, entry: Entry) -> None:
        if number == self._next:
            self._catalog.apply(entry)
            self._next = number + 1

    async def _fetch(self, number: int) -> Entry | None:
        """Return an entry, an empty one if it cannot be read, None if there is none."""
        data = await self._bucket.get(_log(number), _MAX_ENTRY_BYTES)
        if data is None:
            return None
        try:
            return decode(data, Entry)
        except MetadataError as error:
            self._failures.failed("s3 log entry", error)
            return _EMPTY

    async def _be_sure(self) -> None:
        """After a long time, see that the log has not been deleted up to what would be the next entry."""
        if _now() - self._looked <= _UNSURE_S:
            return
        if self._next and await self._bucket.exists(_log(self._next - 1)):
            self._looked = _now()
            return
        await self._load()

    async def _load(self) -> None:
        """Begin again: the newest checkpoint that can be read, then the entries after it."""
        checkpoint = await self._newest_checkpoint()
        after = None if checkpoint is None else checkpoint.number
        numbers = sorted([number async for number, _ in self._list("log", after)])
        entries: list[Entry | None] = []
        for i in range(0, len(numbers), _AHEAD):
            entries += await all_of(self._fetch(number) for number in numbers[i : i + _AHEAD])
        self._catalog.reset(checkpoint)
        self._next = 0 if after is None else after + 1
        for number, entry in zip(numbers, entries, strict=True):
            self._next = number  # what is missing before it has been deleted
            self._learn(number, entry or _EMPTY)
        self._looked = _now()

    async def _newest_checkpoint(self) -> Checkpoint | None:
        numbers = [number async for number, _ in self._list("checkpoints")]
        for number in sorted(numbers, reverse=True):
            data = await self._bucket.get(f"checkpoints/{number:020}", _MAX_CHECKPOINT_BYTES)
            try:
                checkpoint = decode(data or b"", Checkpoint)
                if checkpoint.number == number:
                    return checkpoint
                self._failures.failed("s3 checkpoint", "it has another's number")
            except MetadataError as error:
                self._failures.failed("s3 checkpoint", error)
        return None

    async def _checkpoint(self, number: int, places: list[tuple[BlockKey, Place]]) -> None:
        """Write down the map, for those who open the store later; the store works without."""
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await asyncio.to_thread(lambda: msgspec.msgpack.encode(Checkpoint.of(number, places)))
                await self._bucket.put(f"checkpoints/{number:020}", data)
                await self._clean()
        except (KVConnectError, TimeoutError) as error:
            self._failures.failed("s3 checkpoint", error)

    async def _clean(self) -> None:
        """Delete checkpoints but two, and entries that both of these cover, if they are old enough."""
        checkpoints = sorted([listed async for listed in self._list("checkpoints")])
        if len(checkpoints) < 2:
            return
        covered = checkpoints[-2][0]
        before = checkpoints[-1][1] - _KEEP_LOG
        paths = [f"checkpoints/{number:020}" for number, _ in checkpoints[:-2]]
        async for number, modified in self._list("log"):
            if number >= covered or modified > before:  # names are in order, so that the rest is newer
                break
            paths.append(_log(number))
        if paths:
            await self._bucket.delete(paths)

    async def _list(self, folder: str, after: int | None = None) -> AsyncIterator[tuple[int, datetime]]:
        """Yield number and time of a folder's objects, those of a number above `after` if it is given."""
        async for listed in self._bucket.listing(folder, None if after is None else f"{folder}/{after:020}"):
            if match := _NAME.match(listed.path):
                yield int(match[1]), listed.modified

    async def _refresh_quietly(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.refresh()
        except (KVConnectError, TimeoutError) as error:
            self._failures.failed("s3 log", error)
        finally:
            self._looking = False

    async def _tell_lost(self, lost: Sequence[tuple[BlockKey, Place]]) -> None:
        try:
            await self.append(lost=lost)
        except KVConnectError as error:
            self._failures.failed("s3 log", error)


def _log(number: int) -> str:
    return f"log/{number:020}"


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while a machine sleeps, when others do not
