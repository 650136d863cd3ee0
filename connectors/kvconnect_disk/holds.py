"""Holds as files, so that every process honours them and they survive the process that made them.

    <root>/holds/<holder>/<key>   empty; its mtime is when the hold ends, by the wall clock
    <root>/holds/<holder>/lock    flock: kept while the holder lives

A holder is one opened store; it has a folder from its first hold on. Records that have ended, and folders without
records whose holder is gone, are removed when a store is opened and when one evicts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvconnect.protocol import BlockKey
from kvconnect_disk.locks import try_lock

__all__ = ["HoldRecords"]

_LOCK = "lock"
_LONGEST_S = 100 * 365 * 86400.0  # file systems end some time after that, and infinity is no time


class HoldRecords:
    """One holder's records, and a view of everybody's. Every call is made under the lock of the store's folder."""

    def __init__(self, folder: Path, holder: str) -> None:
        """Touch nothing yet.

        Args:
            folder: Of all holders; need not exist.
            holder: This one's name, which nobody else has.
        """
        self._folder = os.fspath(folder)
        self._own = f"{self._folder}/{holder}"
        self._lock_fd = -1

    def put(self, keys: Sequence[BlockKey], ttl_s: float) -> list[bool]:
        """Hold keys for `ttl_s` seconds from now, also those that are held already; False where the medium is full."""
        if not keys:
            return []
        if self._lock_fd < 0:
            for path in (self._folder, self._own):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
            self._lock_fd = try_lock(f"{self._own}/{_LOCK}")
        end = time.time_ns() + int(min(max(ttl_s, 0.0), _LONGEST_S) * 1e9)
        return [self._put(f"{self._own}/{key.hex()}", end) for key in keys]

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """End this holder's holds."""
        if self._lock_fd >= 0:
            _unlink(f"{self._own}/{key.hex()}" for key in keys)

    def drop_all(self, keys: Sequence[BlockKey]) -> None:
        """End everybody's holds."""
        for holder in self._holders():
            _unlink(f"{holder}/{key.hex()}" for key in keys)

    def living(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Say which keys are held by somebody who lives."""
        now = time.time_ns()
        found = [False] * len(keys)
        for holder in self._holders():
            places = [i for i, key in enumerate(keys) if _end_of(f"{holder}/{key.hex()}") > now]
            if places and self._lives(holder):
                for i in places:
                    found[i] = True
        return found

    def in_force(self) -> set[str]:
        """Return the hex of every key that is held, and remove what has ended and what the dead left."""
        now = time.time_ns()
        found: set[str] = set()
        for holder in self._holders():
            names = [name for name in os.listdir(holder) if name != _LOCK]
            ended = {name for name in names if _end_of(f"{holder}/{name}") <= now}
            _unlink(f"{holder}/{name}" for name in ended)
            found.update(name for name in names if name not in ended)
            if len(ended) == len(names) and not self._lives(holder):
                _remove(holder)
        return found

    def close(self) -> None:
        """Live no longer; what is held stays so until its end."""
        if self._lock_fd < 0:
            return
        with contextlib.suppress(OSError):  # somebody has removed the folder
            if os.listdir(self._own) == [_LOCK]:
                _remove(self._own)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def _put(self, path: str, end: int) -> bool:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False
            raise
        try:
            os.utime(fd, ns=(end, end))
        finally:
            os.close(fd)
        return True

    def _holders(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:  # a folder that an older version made
            return []

    def _lives(self, holder: str) -> bool:
        if holder == self._own and self._lock_fd >= 0:
            return True
        fd = try_lock(f"{holder}/{_LOCK}")
        if fd >= 0:
            os.close(fd)
        return fd < 0


def _end_of(path: str) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns
    except FileNotFoundError:
        return 0


def _unlink(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # it is not there, or has to wait for its end
            os.unlink(path)


def _remove(holder: str) -> None:
    """Remove a folder without records."""
    os.unlink(f"{holder}/{_LOCK}")
    with contextlib.suppress(OSError):  # somebody put a file there that is not ours
        os.rmdir(holder)
