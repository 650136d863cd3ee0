"""The folder of a disk store: its format marker, its locks, its accounts, its temporary files. Knows no frames.

    <root>/kvconnect-disk.json   {"format": "kvconnect-disk", "version": 1}; written last when a folder is made
    <root>/lock                  flock: taken for set-up, clean-up, accounting and eviction
    <root>/usage                 bytes published, bytes on their way, and the limit that all share (0: each process's
                                 own applies), 8 bytes little-endian each, under the lock
    <root>/blocks/<hh>/<key>     one file a block; <key> is the block key in hex, <hh> the hash's first byte
    <root>/tmp/<random>/         one folder a living process, its `lock` held; files move from here to blocks/
    <root>/tmp/<random>/lock     holds what that process has booked, 8 bytes little-endian
    <root>/holds/                who holds which block until when, see `holds.py`

A process that died leaves a tmp folder whose lock can be taken; the next start removes it. Nothing else is ever deleted
that this store did not write.

The limit and the holds came later and left the version at 1: where they are missing there are none. A process of an
older version that uses the folder at the same time knows neither: it evicts held blocks, and keeps to its own capacity.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvconnect.errors import ConfigError
from kvconnect_disk.holds import HoldRecords
from kvconnect_disk.locks import try_lock

__all__ = ["FORMAT_VERSION", "StoreFolder"]

FORMAT_VERSION = 1
_MARKER = "kvconnect-disk.json"
# what is there while a folder is being made, or after a crash
_UNFINISHED = {"lock", ".marker", "blocks", "tmp", "holds"}


class _Marker(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int


class StoreFolder:
    """An opened folder.

    Attributes:
        root: The folder.
        blocks: Where block files are.
        tmp: This process's folder for files on their way.
        holds: The hold records; under the lock.
    """

    def __init__(self, root: Path) -> None:
        """Open the folder, making it if it is absent or empty, and clean up after processes that died.

        Raises:
            ConfigError: If it is no folder, holds something else, is of another format version, or is not writable.
        """
        self.root = root
        self.blocks = root / "blocks"
        self._thread_lock = threading.Lock()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_foreign()  # before anything is written there
            self._lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with self.locked():
                if not (root / _MARKER).exists():
                    self._refuse_foreign()
                    self._make()
                self._check_marker()
                self.tmp = root / "tmp" / secrets.token_hex(8)
                self.tmp.mkdir(mode=0o700)
                self._tmp_fd = try_lock(self.tmp / "lock")
                self.holds = HoldRecords(root / "holds", self.tmp.name)
                self._booked = 0
                self._usage_fd = os.open(root / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if self.remove_litter():  # nobody else lives: nothing is on its way
                    self._write_usage(8, 0)
                    self.limit = 0
        except OSError as error:
            raise ConfigError(f"disk store cannot use {os.fspath(root)!r}: {error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other threads and other processes."""
        with self._thread_lock:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    @property
    def published(self) -> int:
        """Bytes of everybody's block files, as last accounted. Under the lock."""
        return self._read_usage(0)

    @published.setter
    def published(self, value: int) -> None:
        self._write_usage(0, value)

    @property
    def on_their_way(self) -> int:
        """Bytes that everybody has been given room for and has not published yet. Under the lock."""
        return self._read_usage(8)

    @property
    def limit(self) -> int:
        """Bytes that everybody together may keep, 0 if nobody has said so. Under the lock."""
        return self._read_usage(16)

    @limit.setter
    def limit(self, value: int) -> None:
        self._write_usage(16, value)

    def accounts(self) -> tuple[int, int, int]:
        """Return `published`, `on_their_way` and `limit` in one system call. Under the lock."""
        found = os.pread(self._usage_fd, 24, 0).ljust(24, b"\0")  # shorter as older versions left it
        published, on_their_way, limit = struct.unpack("<3Q", found)
        return published, on_their_way, limit

    def book(self, size: int) -> None:
        """Add `size` (negative to take back) to what this process has on its way. Under the lock."""
        self._booked += size
        os.pwrite(self._tmp_fd, self._booked.to_bytes(8, "little"), 0)
        self._write_usage(8, self.on_their_way + size)

    def _read_usage(self, offset: int) -> int:
        return int.from_bytes(os.pread(self._usage_fd, 8, offset), "little")

    def _write_usage(self, offset: int, value: int) -> None:
        os.pwrite(self._usage_fd, max(0, value).to_bytes(8, "little"), offset)

    def close(self) -> None:
        """Remove this process's temporary folder and let the locks go; twice is fine."""
        if self._lock_fd < 0:
            return
        with self.locked():  # a newcomer must not look for litter in a folder that is half gone
            self.book(-self._booked)
            self.holds.close()
            shutil.rmtree(self.tmp, ignore_errors=True)
        for fd in (self._tmp_fd, self._usage_fd, self._lock_fd):
            os.close(fd)
        self._lock_fd = -1

    def _refuse_foreign(self) -> None:
        names = set(os.listdir(self.root))
        if _MARKER not in names and names - _UNFINISHED:
            raise ConfigError(
                f"{os.fspath(self.root)!r} holds other files and no {_MARKER}; give the disk store a folder of its own"
            )

    def _make(self) -> None:
        os.chmod(self.root, 0o700)
        for name in ("blocks", "tmp", "holds", *(f"blocks/{byte:02x}" for byte in range(256))):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        unfinished = self.root / ".marker"
        unfinished.write_bytes(msgspec.json.encode(_Marker("kvconnect-disk", FORMAT_VERSION)))
        os.chmod(unfinished, 0o600)
        os.replace(unfinished, self.root / _MARKER)

    def _check_marker(self) -> None:
        path = self.root / _MARKER
        try:
            marker = msgspec.json.decode(path.read_bytes(), type=_Marker)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{os.fspath(path)!r} cannot be read: {error}; nothing was touched") from error
        if marker.format != "kvconnect-disk" or marker.version != FORMAT_VERSION:
            raise ConfigError(
                f"{os.fspath(self.root)!r} is of format {marker.format} version {marker.version}, this kvconnect "
                f"writes version {FORMAT_VERSION}; nothing was touched: use another folder, or the version that made it"
            )

    def remove_litter(self) -> bool:
        """Remove the temporary folders whose owner is gone, and what they had booked. Under the lock.

        Returns:
            Whether no other process is left.
        """
        alone = True
        for entry in list(os.scandir(self.root / "tmp")):
            if entry.path == os.fspath(self.tmp) or not entry.is_dir(follow_symlinks=False):
                continue
            fd = try_lock(f"{entry.path}/lock")
            if fd < 0:
                alone = False
                continue
            self._write_usage(8, self.on_their_way - int.from_bytes(os.pread(fd, 8, 0), "little"))
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(fd)
        return alone
