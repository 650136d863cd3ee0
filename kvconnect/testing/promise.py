"""What a kit's test says when a promise is broken, and when it cannot tell. Knows no connector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from kvconnect.errors import UnsupportedError

__all__ = ["BrokenPromise", "must", "must_equal", "must_refuse", "needs", "not_here", "not_shown"]

NOT_SHOWN = "not shown: "
NOT_DECLARED = "not declared: "
ENVIRONMENT = "env: "


class BrokenPromise(AssertionError):
    """A connector or store did not do what it must.

    Attributes:
        expected: What the contract says.
        got: What came.
        hint: Where its author should look; ``""`` for nothing.
    """

    def __init__(self, *, expected: str, got: str, hint: str = "") -> None:
        """Say what was expected and what came."""
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(f"expected {expected}; got {got}" + (f". {hint}" if hint else ""))


def must(condition: bool, *, expected: str, got: object, hint: str = "") -> None:
    """Break the promise unless `condition`.

    Args:
        condition: What must hold.
        expected: In words.
        got: Shown as it is if it is text, else its `repr`.
        hint: Where to look.

    Raises:
        BrokenPromise: If it does not hold.
    """
    if not condition:
        raise BrokenPromise(expected=expected, got=got if isinstance(got, str) else _short(got), hint=hint)


def must_equal(what: str, got: object, expected: object, hint: str = "") -> None:
    """Break the promise unless both are equal.

    Raises:
        BrokenPromise: If they are not.
    """
    must(got == expected, expected=f"{what} to be {_short(expected)}", got=got, hint=hint)


def must_refuse(what: str, call: Callable[[], Any]) -> None:
    """Break the promise unless `call` raises UnsupportedError."""
    try:
        result = call()
    except UnsupportedError:
        return
    except Exception as error:
        result = error
    raise BrokenPromise(
        expected=f"{what} to raise UnsupportedError: it is not declared",
        got=repr(result),
        hint="leave it to the base class, or declare the capability",
    )


def not_shown(why: str) -> NoReturn:
    """End a test that cannot be seen from outside here: the report says "not shown", never "passed"."""
    pytest.skip(NOT_SHOWN + why)


def needs(declared: bool, capability: str) -> None:
    """End a test of something that is not declared; its negative runs instead."""
    if not declared:
        pytest.skip(NOT_DECLARED + capability)


def not_here(why: str) -> NoReturn:
    """End a test that this machine cannot run; ``--kv-no-env-skips`` forbids it."""
    pytest.skip(ENVIRONMENT + why)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"
