"""Writes the page about known offenders: ``python -m tests.kit.offenders.report docs/known-offenders.md``."""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.kit.offenders.described import CHANCE, OFFENDERS, Fault, Offender, Shown, expected_of, matches
from tests.kit.offenders.outcomes import Outcome, run_offender, surprises

__all__ = ["cell_of", "name_of", "page"]

Found = Mapping[str, Mapping[tuple[str, str], Outcome]]
"""Offender -> (test, parameters) -> what became of it."""

_INTRODUCTION = """\
# Known offenders

The conformance kits, run on five models of connectors with known weak points. Mutants show that a kit's test sees one
small mistake; this page shows what the kits see of whole designs, and what they do not see.

**What the models are.** Small connectors of our own, written from descriptions of how the versions named below behave:
the notes that we took when we read their documents, reviews and sources. No code of theirs was copied, and none was
run. Where a description says nothing, a model does what is right: it cleans up after a crash, for example. What those
runtimes have no word for (`cancel_load`, `reset_cache`, requests that must not be cached) the models do as well as
their design allows. The three file tiers have one leader and one worker, which are ours and keep every promise: only
the names of files, and how files are written and read, differ.

**What that means.** A connector with such names, such files or such a leader is found out by the tests named here.

**What it does not mean.** Nobody's product is judged. A product has more around its files than a model has, it may
have changed since, and it was written for another contract: some of these promises, such as to offer nothing before
its step is reported, are kvconnect's own. The persistent connector is an example, and its documents name several of
these limits themselves.

Made by `python -m tests.kit.offenders.report docs/known-offenders.md` (quick form, seed 0); a test compares. The test
that kills a process at some moment is left out: what it says of a model that can be torn is chance.
"""

_OLD = """\
## The persistent example, old form, fault by fault

Numbers are those of our notes. *Stated*: the project's documents, later examples or reviews say it. *Read*: it is our
reading.

With the kits as they are, {broken} of {total} tests are broken, {pickle} of them because something was unpickled:
plans are pickled, as they are in that runtime, and nothing moves when that is forbidden. The tables are of a run in
which unpickling was allowed, so that the other faults are seen. The description can be read as saving blocks of later
chunks before they are computed; the model has the milder reading, in which they are never saved.
"""

_KEEPS = """\
What they must be seen to keep, since the descriptions say it:

| model | keeps |
|---|---|"""

_TABLE = """\
## Promise by promise

Tests that at least one of them breaks. *Broken, too*: the test is about something else, and meets a fault that others
show. *Not declared*: it does not claim to do that, and the kit asks no more.
"""


_WORDS = """\
## In the kits' words

One message for each test by which a fault is shown.
"""

_BROKEN = "**BROKEN**"


def name_of(key: tuple[str, str]) -> str:
    """Return what the page calls a test with its parameters."""
    return f"`{key[0]}`" + (f" {key[1]}" if key[1] else "")


def cell_of(offender: Offender, each: Outcome | None) -> str:
    """Return what the page says became of a test."""
    if each is None:
        return "not run"
    if each.outcome != "broken":
        return each.outcome
    return _BROKEN if matches((each.test, each.parameters), expected_of(offender)[0]) else "broken, too"


def page(found: Found, strict: Iterable[Outcome]) -> str:
    """Return the page.

    Args:
        found: What the kits said of each offender, with unpickling allowed where it must be.
        strict: What they said of the old form without that.
    """
    asked = [each for each in strict if each.outcome in ("kept", "broken")]
    broken = [each for each in asked if each.outcome == "broken"]
    pickle = sum("pickle" in each.message for each in broken)
    lines = [_INTRODUCTION, *_models(found), ""]
    lines += [_OLD.format(broken=len(broken), total=len(asked), pickle=pickle), *_faults(), ""]
    lines += [*_others(), "", _TABLE, *_table(found), ""]
    lines += [_WORDS, *_messages(found)]
    return "\n".join(lines) + "\n"


def _models(found: Found) -> list[str]:
    lines = ["## The models", "", "| model | of what | kept | broken | not declared | not shown |"]
    lines.append("|---|---|---|---|---|---|")
    for name, offender in OFFENDERS.items():
        sums = Counter(each.outcome for each in found[name].values())
        numbers = " | ".join(str(sums[outcome]) for outcome in ("kept", "broken", "not declared", "not shown"))
        lines.append(f"| {offender.title} (`{offender.target.split(':')[1]}`) | {offender.source} | {numbers} |")
    return lines


def _faults() -> list[str]:
    lines = ["| | fault | | shown by |", "|---|---|---|---|"]
    for number, fault in OFFENDERS["old"].faults.items():
        stated = "stated" if fault.stated else "read"
        shown = number if number.isdigit() else ""
        lines.append(f"| {shown} | {fault.what} | {stated} | {_shown_by(fault)} |")
    return lines


def _others() -> list[str]:
    lines = ["## The others, by what is said of them", "", "| model | what is said | shown by |", "|---|---|---|"]
    for offender in list(OFFENDERS.values())[1:]:
        shown = ((fault.what, _shown_by(fault)) for fault in offender.faults.values())
        lines += [f"| {offender.title} | {what} | {by} |" for what, by in shown]
    keeps = (f"| {offender.title} | {', '.join(_named(offender.keeps))} |" for offender in OFFENDERS.values())
    return [*lines, "", _KEEPS, *keeps]


def _table(found: Found) -> list[str]:
    lines = ["| test | " + " | ".join(offender.title for offender in OFFENDERS.values()) + " |"]
    lines.append("|---|" + "---|" * len(OFFENDERS))
    for key in _rows(found):
        cells = " | ".join(cell_of(offender, found[name].get(key)) for name, offender in OFFENDERS.items())
        lines.append(f"| {name_of(key)} | {cells} |")
    return lines


def _rows(found: Found) -> list[tuple[str, str]]:
    """Return the tests, with their parameters, that some offender breaks, in the order of the kits."""
    every = dict.fromkeys(key for outcomes in found.values() for key in outcomes)
    return [key for key in every if any(_is_broken(outcomes, key) for outcomes in found.values())]


def _is_broken(outcomes: Mapping[tuple[str, str], Outcome], key: tuple[str, str]) -> bool:
    return key in outcomes and outcomes[key].outcome == "broken"


def _shown_by(fault: Fault) -> str:
    """Return the tests that show a fault, and what cannot be shown."""
    parts = _named(fault.shown_by)
    if not parts:
        return fault.why if fault.why.startswith(("nothing", "not ")) else f"not checkable here: {fault.why}"
    return ", ".join(parts) + (f"; not shown: {fault.why}" if fault.why else "")


def _named(tests: Iterable[Shown]) -> list[str]:
    """Return each test with those of its parameters that are meant."""
    by_test: dict[str, list[str]] = {}
    for test, parameter in tests:
        by_test.setdefault(test, []).extend([parameter] if parameter else [])
    return [f"`{test}`" + (f" ({', '.join(given)})" if given else "") for test, given in by_test.items()]


def _messages(found: Found) -> list[str]:
    lines, told = list[str](), set[str]()
    for key in _rows(found):
        for name, offender in OFFENDERS.items():
            each = found[name].get(key)
            if each and key[0] not in told and cell_of(offender, each) == _BROKEN:
                told.add(key[0])
                model = offender.title[0].upper() + offender.title[1:]
                lines += _wrapped(f"- `{each.test}`: {each.promise} {model}: {each.message}")
    return lines


def _wrapped(item: str) -> list[str]:
    return textwrap.wrap(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def main(path: Path) -> None:
    """Run the kits on every offender, and write the page.

    Raises:
        SystemExit: If one breaks or keeps what nobody said it would: then the model is wrong, or what is said of it.
    """
    found: dict[str, dict[tuple[str, str], Outcome]] = {}
    for name, offender in OFFENDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_offender(offender, Path(folder))
        found[name] = {(each.test, each.parameters): each for each in outcomes if each.test not in CHANCE}
        if strange := surprises(offender, outcomes):
            raise SystemExit("\n".join([f"{offender.title}:", *strange]))
    with tempfile.TemporaryDirectory() as folder:
        strict = run_offender(OFFENDERS["old"], Path(folder), kits="kvconnect.testing.installed")
    path.write_text(page(found, [each for each in strict if each.test not in CHANCE]), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
