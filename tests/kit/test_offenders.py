"""Models of known connectors break the promises that their descriptions say they break, and keep the others.

What is said of them, and which test must show it, is in `tests.kit.offenders.described`; `docs/known-offenders.md` has
all of it, made by `python -m tests.kit.offenders.report docs/known-offenders.md`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvconnect.testing.installed import KITS
from tests.kit.offenders.described import FAULTS, MAY_UNPICKLE, OFFENDERS, expected_of
from tests.kit.offenders.outcomes import run_offender, surprises
from tests.kit.offenders.report import cell_of, name_of
from tests.kit.running import run_kit

PAGE = Path(__file__).parents[2] / "docs" / "known-offenders.md"

STALE = "stale: python -m tests.kit.offenders.report docs/known-offenders.md"

LONG = "test_full_disk or TestRestart or TestSchedule or TestStateful or test_hundred"  # the page has them
CRASH = "test_write_that_is_cut_off"


def page_cells(name: str) -> dict[str, str]:
    """Return what the page says became of each test with an offender."""
    lines = PAGE.read_text("utf-8").split("## Promise by promise")[1].splitlines()
    cells = [re.split(r" ?\| ?", line)[1:-1] for line in lines if line.startswith("| `")]
    return {row[0]: row[1 + list(OFFENDERS).index(name)] for row in cells}


@pytest.mark.parametrize("name", OFFENDERS)
def test_offender_breaks_what_is_said_of_it_and_nothing_else(name: str, tmp_path: Path) -> None:
    chosen = f"not ({LONG})" + (f" or {CRASH}" if name in ("old", "new") else "")
    outcomes = run_offender(OFFENDERS[name], tmp_path, "-k", chosen)
    assert surprises(OFFENDERS[name], outcomes) == []
    if name == "new":
        assert not any("pickle." in each.message for each in outcomes)
    said = page_cells(name)
    for each in outcomes:
        row = name_of((each.test, each.parameters))
        assert (row in said) or each.outcome != "broken", STALE
        assert said.get(row) in (None, cell_of(OFFENDERS[name], each)), STALE


def test_each_fault_is_shown_or_it_is_said_why_not() -> None:
    """All 13 of the persistent example's old form; whether the tests show them, the test above sees."""
    assert list(FAULTS) == list(range(1, 14))
    assert {number for number, fault in FAULTS.items() if not fault.shown_by} == {8, 9, 12, 13}
    assert all(fault.shown_by or fault.why for offender in OFFENDERS.values() for fault in offender.faults.values())


def test_whatever_is_expected_names_a_test() -> None:
    there = {name for kits in KITS.values() for kit in kits for name in dir(kit) if name.startswith("test_")}
    wanted = {test for each in OFFENDERS.values() for shown in (*expected_of(each), each.keeps) for test, _ in shown}
    assert wanted <= there


def test_old_form_unpickles(tmp_path: Path) -> None:
    """As the kit is, unpickling is what it says first: only a kit that allows it comes to the other faults."""
    (target,) = MAY_UNPICKLE
    found = run_kit(target, "test_saved_prefix_is_offered or test_nothing_is_unpickled", tmp_path)
    assert {each["outcome"] for each in found} == {"broken"}
    assert all("pickle" in each["expected"] + each["got"] for each in found)
