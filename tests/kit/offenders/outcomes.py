"""Runs the kits on an offender, and says what came of each test in words that do not change from run to run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.kit.offenders.described import Offender, expected_of, matches
from tests.kit.running import run_pytest

__all__ = ["Outcome", "run_offender", "surprises"]

_LONGEST = 230

_CHANGING = (
    (re.compile(r"(?:/[\w.~@%:+-]+)+/(?=[\w.@%:+-])"), ""),  # folders
    (re.compile(r"\btmp\w{8}\b"), "tmp"),
    (re.compile(r"\b[0-9a-f]{16,}\b|\b\d{12,}\b"), "<hash>"),
    (re.compile(r" at [\w.]+\.py:\d+"), ""),
    (re.compile(r"; (?:leader|worker)\..*", re.DOTALL), "; and more"),  # the first failure says enough
    (re.compile(r"\s+"), " "),
)


class Outcome(NamedTuple):
    """What became of one test.

    Attributes:
        test: Its name.
        parameters: Their values, numbers with their name, joined by commas.
        promise: Its docstring's first line.
        outcome: ``"kept"``, ``"broken"``, ``"not declared"`` or ``"not shown"``.
        message: What was expected and what came, if it is broken.
    """

    test: str
    parameters: str
    promise: str
    outcome: str
    message: str


def run_offender(offender: Offender, folder: Path, *more: str, kits: str = "tests.kit.offenders.kits") -> list[Outcome]:
    """Run the quick form of the kits, or what further arguments choose, in this process."""
    given = ["--pyargs", kits, "--kv-connector", offender.target, "--kv-quick"]
    status, promises = run_pytest(folder, *given, *more)
    assert status in (0, 1), f"the kits could not run on {offender.target}: {status}"
    outcomes: dict[tuple[str, str], Outcome] = {}
    for entry in promises:
        each = _outcome_of(entry)
        before = outcomes.setdefault((each.test, each.parameters), each)
        if each.outcome == "broken" and before.outcome != "broken":  # at its end
            outcomes[each.test, each.parameters] = each
    return [each for each in outcomes.values() if each.outcome != "not run"]


def surprises(offender: Offender, outcomes: Iterable[Outcome]) -> list[str]:
    """Return what is broken or kept against what is said of the offender; tests that were not run are none."""
    must, may = expected_of(offender)
    found = []
    for each in outcomes:
        key = (each.test, each.parameters)
        name = f"{each.test}[{each.parameters}]"
        if each.outcome == "broken" and not matches(key, [*must, *may]):
            found.append(f"{name} is broken, and nobody said so: {each.message}")
        if each.outcome == "kept" and matches(key, must):
            found.append(f"{name} is kept, and should be broken")
        if each.outcome in ("broken", "not shown") and matches(key, offender.keeps):
            found.append(f"{name} is {each.outcome}, and should be kept: {each.message}")
    return found


def _outcome_of(entry: dict[str, Any]) -> Outcome:
    message = ""
    if entry["outcome"] == "broken":
        message = f"expected {entry['expected']}; got {entry['got']}"
        for pattern, instead in _CHANGING:
            message = pattern.sub(instead, message)
        if len(message) > _LONGEST:
            message = message[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    given = (f"{name} {value}" if value.isdigit() else value for name, value in entry["parameters"].items())
    return Outcome(entry["test"], ",".join(given), entry["promise"], entry["outcome"], message)
