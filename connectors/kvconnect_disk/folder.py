"""The folder of a disk store: its format marker, its locks, its temporary files. Knows no frames.

    <root>/kvconnect-disk.json   {"format": "kvconnect-disk", "version": 1}; written last when a folder is made
    <root>/lock                  flock: taken for set-up, clean-up, accounting and eviction
    <root>/usage                 bytes in use, 8 bytes little-endian, under the lock
    <root>/blocks/<hh>/<key>     one file a block; <key> is the block key in hex, <hh> the hash's first byte
    <root>/tmp/<random>/         one folder a living process, its `lock` held; files move from here to blocks/

A process that died leaves a tmp folder whose lock can be taken; the next start removes it. Nothing else is ever deleted
that this store did not write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvconnect.errors import ConfigError

__all__ = ["FORMAT_VERSION", "StoreFolder"]

FORMAT_VERSION = 1
_MARKER = "kvconnect-disk.json"
_UNFINISHED = {"lock", ".marker"}  # what a crash while the folder was being made leaves


class _Marker(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int


class StoreFolder:
    """An opened folder.

    Attributes:
        root: The folder.
        blocks: Where block files are.
        tmp: This process's folder for files on their way.
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
            names = set(os.listdir(root))
            if _MARKER not in names and names - _UNFINISHED:
                raise ConfigError(
                    f"{os.fspath(root)!r} holds other files and no {_MARKER}; give the disk store a folder of its own"
                )
            self._lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with self.locked():
                if not (root / _MARKER).exists():
                    self._make()
                self._check_marker()
                self._remove_litter()
                self.tmp = root / "tmp" / secrets.token_hex(8)
                self.tmp.mkdir(mode=0o700)
                self._tmp_fd = _try_lock(self.tmp / "lock")
                self._usage_fd = os.open(root / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
    def usage(self) -> int:
        """Bytes in use by everyone, as last accounted; read it under the lock."""
        return int.from_bytes(os.pread(self._usage_fd, 8, 0), "little")

    @usage.setter
    def usage(self, value: int) -> None:
        os.pwrite(self._usage_fd, max(0, value).to_bytes(8, "little"), 0)

    def bytes_on_their_way(self) -> int:
        """Return the size of everybody's temporary files; a file that moves meanwhile may be missed."""
        total = 0
        for path in (self.root / "tmp").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def close(self) -> None:
        """Remove this process's temporary folder and let the locks go; twice is fine."""
        if self._lock_fd < 0:
            return
        shutil.rmtree(self.tmp, ignore_errors=True)
        for fd in (self._tmp_fd, self._usage_fd, self._lock_fd):
            os.close(fd)
        self._lock_fd = -1

    def _make(self) -> None:
        os.chmod(self.root, 0o700)
        for name in ("blocks", "tmp", *(f"blocks/{byte:02x}" for byte in range(256))):
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

    def _remove_litter(self) -> None:
        """Remove the temporary folders whose owner is gone: their lock can be taken. Under the lock."""
        for entry in os.scandir(self.root / "tmp"):
            fd = _try_lock(Path(entry.path) / "lock")
            if fd >= 0:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(fd)


def _try_lock(path: Path) -> int:
    """Lock a file, making it; return its descriptor, -1 if another process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
