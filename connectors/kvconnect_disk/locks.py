"""Files whose lock tells whether the process that made them lives."""

from __future__ import annotations

import fcntl
import os

__all__ = ["try_lock"]


def try_lock(path: str | os.PathLike[str]) -> int:
    """Lock a file, making it; return its descriptor, -1 if another process, or another part of this one, holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
