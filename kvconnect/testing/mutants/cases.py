"""A test class for each mutant, which fails if it survives, and one for what it was made from, which must pass.

pytest collects this module: ``pytest --pyargs kvconnect.testing.mutants.cases``; `kvconnect conformance --self-test`
does, and so does our own suite.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvconnect.protocol import Connector
from kvconnect.store import BlockStore
from kvconnect.testing.kit import Kit
from kvconnect.testing.mutants.base import Mutant
from kvconnect.testing.mutants.table import MUTANTS

__all__ = ["caught_class", "right_class"]

_PATIENCE_S = 1.0  # of mutants: what a right connector does in milliseconds, a wrong one may never do


def caught_class(mutant: Mutant) -> type:
    """Return a test class that passes if the mutant's rule breaks, and says what it must."""

    def catch(run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            assert re.search(mutant.says, said), f"{mutant.kind.__name__} is caught, but the message misleads: {said}"
        except pytest.skip.Exception as skipped:
            raise AssertionError(f"{mutant.kind.__name__} was not looked at: {skipped}") from None
        else:
            raise AssertionError(f"{mutant.kind.__name__} survives {mutant.kit}.{mutant.rule.__name__}")

    return _case(mutant, mutant.kind, catch, _PATIENCE_S)


def right_class(mutant: Mutant) -> type:
    """Return a test class that passes if what the mutant was made from keeps the promise."""

    def keep(run: Callable[[], None]) -> None:
        try:
            run()
        except pytest.skip.Exception as skipped:
            if not str(skipped).startswith("not declared"):
                raise AssertionError(f"{mutant.right.__name__} was not looked at: {skipped}") from None

    return _case(mutant, mutant.right, keep, 30.0)


def _case(mutant: Mutant, kind: type, judge: Callable[[Callable[[], None]], None], patience_s: float) -> type:
    """Make the class: the mutant's kit with its own fixtures, and of its tests only the rule, judged."""
    kit: type[Kit] = getattr(importlib.import_module(mutant.rule.__module__), mutant.kit)
    rule = mutant.rule
    parameters = {**_first_parameters(rule), **mutant.parameters}
    seed = parameters.pop("seed", 0)
    signature = inspect.signature(rule)

    def test(self: Any, **fixtures: Any) -> None:
        judge(lambda: rule(self, **fixtures, **parameters))

    test.__signature__ = signature.replace(  # type: ignore[attr-defined]  # pytest asks it for the fixtures
        parameters=[each for name, each in signature.parameters.items() if name not in parameters]
    )
    members: dict[str, Any] = {name: None for name in dir(kit) if name.startswith("test_")}
    members |= {rule.__name__: test, "kv_kit": False, "__module__": __name__}
    name = "connector" if issubclass(kind, (BlockStore, Connector)) else "engine"
    members[name] = _fixture(name, under(mutant, kind))
    members |= {"quick": _fixture("quick", True), "patience_s": _fixture("patience_s", patience_s)}
    rule_name = f"{mutant.kit}.{rule.__name__}"
    members["about"] = {"name": kind.__name__, "rule": rule_name, "mutant": kind is mutant.kind}
    members["seed"] = _fixture("seed", seed)
    members["no_pickle"] = _fixture("no_pickle", None)  # it speaks at the end, when the judge has spoken
    members["deadline_s"] = _fixture("deadline_s", mutant.deadline_s if patience_s < 30 else 90.0)
    return type(f"Test{kind.__name__}", (kit,), members)


def under(mutant: Mutant, kind: type) -> Any:
    """Return what a kit's fixture gives: a store alone, a connector over the mutant's stores, an engine."""
    if not issubclass(kind, Connector):
        return kind
    if "capacity" not in kind.Options.__struct_fields__:  # it has halves of its own
        return kind
    return [{"class": kind, "as": "host"}, *mutant.over]


def _fixture(name: str, value: Any) -> Any:
    def give(self: Any) -> Any:
        return value

    return pytest.fixture(name=name)(give)


def _first_parameters(rule: Callable[..., None]) -> dict[str, Any]:
    """Return the first value of each parameter of a parametrized test."""
    first = {}
    for mark in getattr(rule, "pytestmark", ()):
        if mark.name == "parametrize":
            first[mark.args[0]] = next(iter(mark.args[1]))
    return first


def _cases() -> Iterator[tuple[str, type]]:
    known = set()
    for number, mutant in enumerate(MUTANTS):
        yield f"Test{number:03d}_{mutant.kind.__name__}", caught_class(mutant)
        control = (mutant.right, mutant.rule, tuple(sorted(mutant.parameters.items())), mutant.over)
        if control not in known:
            known.add(control)
            yield f"TestRight{number:03d}_{mutant.right.__name__}", right_class(mutant)


globals().update(_cases())
