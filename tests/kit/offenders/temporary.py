"""Removes temporary files of processes that have died. The descriptions do not say who does; the models do."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

__all__ = ["SUFFIX", "hold", "sweep"]

SUFFIX = ".tmp"


def hold(handle: int) -> None:
    """Mark an open temporary file as somebody's, until it is closed."""
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(folder: Path) -> None:
    """Remove temporary files that nobody holds."""
    for path in folder.rglob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                hold(handle)
                path.unlink()
            finally:
                os.close(handle)
