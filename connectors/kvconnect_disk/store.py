"""A block store over a file system: one file a block, published by rename.

Whole blocks or none: a file is written under a temporary name, then renamed. After kill -9 the rename either happened
or did not; after a power cut a file may be torn, which its frame's checksum shows, unless ``sync`` is set.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from kvconnect.options import ByteSize, Options
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, StoreCapabilities, StoreContext
from kvconnect_disk.folder import StoreFolder

__all__ = ["DiskOptions", "DiskStore"]

_HASH_BYTE = 32  # first byte of the hash in a key: spreads over the 256 folders, as the namespace would not
_PAGE = 4096
_TOUCH_S = 1.0  # a block read again sooner keeps its place: one system call less for each
_DECLINED = (errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR)  # full, or something else has the name
_KEEP = 0.95  # an eviction frees a twentieth of what is not held, so that scans are rare
_FULL_S = 1.0  # nor does every write that holds leave no room for pay for a scan


class DiskOptions(Options, frozen=True):
    """Options of ``disk://``.

    Attributes:
        path: The folder.
        capacity: Bytes that all processes together keep there, until `DiskStore.resize` says otherwise; the least
            recently read blocks go first.
        sync: Wait until each file is on the medium before it is published; survives power cuts, and is slow.
    """

    path: str
    capacity: ByteSize = ByteSize("10GiB")
    sync: bool = False


class DiskStore(BlockStore):
    """One folder, used by any number of processes at once."""

    Options = DiskOptions
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(
        durable=True, shared=True, scans=True, holds=True, resizes=True, concurrency=4
    )

    def __init__(self, options: DiskOptions, context: StoreContext) -> None:
        """Open the folder; see `StoreFolder`."""
        self._options = options
        self._folder = StoreFolder(Path(options.path).expanduser().absolute())
        self._blocks = os.fspath(self._folder.blocks)
        self._numbers = itertools.count()
        self._full: tuple[int, int, float] | None = (
            None  # capacity, size and time of a write that holds left no room for
        )
        with self._folder.locked():
            _Census(self._files(), self._folder).evict(self._folder.limit or self._options.capacity)

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Look for each key's file."""
        return [_is_file(self._path(key)) for key in keys]

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        """Read each file whole; one that cannot be read misses alone."""
        return [self._read(self._path(key), buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        """Publish each frame; False when there is no room for it or its name is taken by something else."""
        return [self._write(self._path(key), frame) for key, frame in zip(keys, frames, strict=True)]

    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Delete each key's file, held or not, and end its holds; what is no file is left alone."""
        with self._folder.locked():
            self._full = None
            self._folder.holds.drop_all(keys)  # first: a hold must not outlive its block, and keep one written later
            for key in keys:
                path = self._path(key)
                with contextlib.suppress(OSError):
                    freed = _charged(os.lstat(path).st_size)
                    os.unlink(path)
                    self._folder.published -= freed

    def scan(self) -> Iterator[BlockKey]:
        """Yield the keys that have a file."""
        for path in self._files():
            with contextlib.suppress(ValueError):
                yield BlockKey(bytes.fromhex(os.path.basename(path)))

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        """Put down, for all processes, until when keys are held by the wall clock; False also on a full medium."""
        with self._folder.locked():  # nobody evicts meanwhile
            there = {key for key in keys if _is_file(self._path(key))}
            held = iter(self._folder.holds.put([key for key in keys if key in there], ttl_s))
            return [key in there and next(held) for key in keys]

    def release(self, keys: Sequence[BlockKey]) -> None:
        """Take back what this instance put down."""
        with self._folder.locked():
            self._full = None
            self._folder.holds.drop(keys)

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """Look for each key's records; a holder that was closed or has died lives no longer."""
        with self._folder.locked():
            return self._folder.holds.living(keys)

    def resize(self, num_bytes: int) -> bool:
        """Set the limit that all processes share, until the folder is opened with nobody else there."""
        if num_bytes < 0:
            raise ValueError(f"{num_bytes} bytes are no capacity")
        with self._folder.locked():
            self._folder.remove_litter()
            census = _Census(self._files(), self._folder)
            if census.held_bytes > num_bytes:
                return False
            self._folder.limit = min(max(num_bytes, 1), 2**63)  # 0 would be none; no block fits into one byte
            census.evict(num_bytes - self._folder.on_their_way)
            return True

    def close(self) -> None:
        """Close the folder; what this instance holds stays held until its time is over."""
        self._folder.close()

    def _path(self, key: BlockKey) -> str:
        return f"{self._blocks}/{key[_HASH_BYTE]:02x}/{key.hex()}"

    def _read(self, path: str, buffer: memoryview) -> int | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            if found.st_size > len(buffer):
                return None
            filled = 0
            while count := os.readv(fd, [buffer[filled:]]):
                filled += count
                if filled >= found.st_size:
                    break
            if time.time() - found.st_mtime > _TOUCH_S:
                os.utime(fd)  # the order of eviction, shared by all processes
            return filled
        except OSError:
            return None
        finally:
            os.close(fd)

    def _write(self, path: str, frame: memoryview) -> bool:
        size = _charged(len(frame))
        if not self._take_room(size):
            return False
        temporary = os.fspath(self._folder.tmp / str(next(self._numbers)))
        added = 0
        try:
            self._write_file(temporary, frame)
            replaced = _charged_at(path)
            os.replace(temporary, path)
            added = size - replaced
            return True
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if error.errno in _DECLINED:
                return False
            raise
        finally:
            with self._folder.locked():
                self._folder.book(-size)
                self._folder.published += added
                if 0 < self._folder.limit < self._folder.published:  # it was on its way when the store became smaller
                    _Census(self._files(), self._folder).evict(self._folder.limit)

    def _write_file(self, path: str, frame: memoryview) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            written = 0
            while written < len(frame):
                written += os.write(fd, frame[written:])
            if self._options.sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def _take_room(self, size: int) -> bool:
        """Account for `size` more bytes, evicting if they do not fit; False if they never will."""
        with self._folder.locked():
            published, on_their_way, limit = self._folder.accounts()
            capacity = limit or self._options.capacity
            if published + on_their_way + size > capacity:
                self._folder.remove_litter()  # what the dead had booked is free again
                if not self._make_room(size, capacity):
                    return False
            self._folder.book(size)
            return True

    def _make_room(self, size: int, capacity: int) -> bool:
        """Evict until `size` more bytes fit into `capacity`, and some more; False, evicting nothing, if they cannot."""
        coming = self._folder.on_their_way + size
        if coming > int(capacity * _KEEP):
            return False
        if self._full is not None:
            full_capacity, full_size, since = self._full
            if capacity == full_capacity and size >= full_size and time.monotonic() - since < _FULL_S:
                return False
        census = _Census(self._files(), self._folder)
        room = int((capacity - census.held_bytes) * _KEEP) - coming
        if room < 0:
            self._full = (capacity, size, time.monotonic())
            return False
        return census.evict(census.held_bytes + room)

    def _files(self) -> Iterator[str]:
        for byte in range(256):
            with contextlib.suppress(FileNotFoundError), os.scandir(f"{self._blocks}/{byte:02x}") as entries:
                yield from (entry.path for entry in entries if entry.is_file(follow_symlinks=False))


class _Census:
    """What is there at one moment, and which of it is held. Under the lock."""

    def __init__(self, paths: Iterable[str], folder: StoreFolder) -> None:
        """Count block files."""
        self._folder = folder
        held = folder.holds.in_force()
        self._evictable: list[tuple[int, int, str]] = []  # last read, bytes, path
        self.held_bytes = 0
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(path)
                if held and os.path.basename(path) in held:
                    self.held_bytes += _charged(info.st_size)
                else:
                    self._evictable.append((info.st_mtime_ns, _charged(info.st_size), path))

    def evict(self, limit: int) -> bool:
        """Evict down to `limit` bytes, if it is more, and account for the rest; say whether that was enough."""
        used = self.held_bytes + sum(size for _, size, _ in self._evictable)
        if used > limit:
            for _, size, path in sorted(self._evictable):
                if used <= limit:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    used -= size
        self._folder.published = used
        return used <= limit


def _charged(size: int) -> int:
    """Return the bytes that a file of `size` takes on the medium, by the page."""
    return -(-size // _PAGE) * _PAGE


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _charged_at(path: str) -> int:
    """Return what the file at `path` takes, 0 if there is none: others may remove it at any moment."""
    try:
        found = os.stat(path)
    except OSError:
        return 0
    return _charged(found.st_size) if stat.S_ISREG(found.st_mode) else 0
