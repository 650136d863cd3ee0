"""A pickle that runs code when somebody unpickles it: for the promise that nobody does."""

from __future__ import annotations

import pickle
from typing import Any

__all__ = ["set_trap", "trap_sprung"]


class _Trap:
    """Unpickling it runs code."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_spring, ())


def _spring() -> None:
    _Trap.sprung = True


def set_trap() -> bytes:
    """Return a pickle that runs code, which sees those too who call pickle by a name that `Kit.unpickled` misses."""
    _Trap.sprung = False
    return pickle.dumps(_Trap())


def trap_sprung() -> bool:
    """Say whether somebody has unpickled it."""
    return _Trap.sprung
