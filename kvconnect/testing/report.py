"""What a run of the kits came to: lines for people, JSON for machines, the README's table, and the list of promises."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvconnect.options import ByteSize
from kvconnect.testing.engine import EngineTests
from kvconnect.testing.installed import KITS
from kvconnect.testing.mutants.base import Mutant
from kvconnect.testing.mutants.table import MUTANTS

__all__ = [
    "connector_table",
    "describe",
    "document",
    "mutant_list",
    "mutants_by_rule",
    "promise_list",
    "replace_between",
    "rules",
    "summary_lines",
]

FORMAT = 1

_KINDS = {"durable": "survives restarts", "shared": "shared by processes"}


def document(
    target: str, version: str, settings: Mapping[str, Any], promises: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the JSON report of a run.

    Args:
        target: What was tested.
        version: Of kvconnect.
        settings: ``seed``, ``seeds``, ``quick``, ``kit``, ``capabilities``, and what `describe` says.
        promises: One entry a test that ran, see `kvconnect_pytest.Results`.
    """
    counts = Counter(each["outcome"] for each in promises)
    return {
        "format": FORMAT,
        "target": target,
        "kvconnect": version,
        **settings,
        "summary": dict(sorted(counts.items())),
        "promises": list(promises),
    }


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a line a kit, then what could not be shown, then the sum."""
    by_kit: dict[str, Counter[str]] = {}
    for each in report["promises"]:
        by_kit.setdefault(each["kit"], Counter())[each["outcome"]] += 1
    lines = []
    for kit, counts in by_kit.items():
        others = ", ".join(
            f"{number} {name}" for name, number in sorted(counts.items()) if name not in ("kept", "not run")
        )
        lines.append(f"{kit:18} {counts['kept']:3} kept" + (f", {others}" if others else ""))
    reasons = Counter(each["why"] for each in report["promises"] if each["outcome"] in ("not shown", "environment"))
    lines += [f"not shown ({number} tests): {why}" for why, number in reasons.items()]
    return lines


def promise_list() -> str:
    """Return Markdown: every promise, by kit, with the test that shows it and the mutants that it catches."""
    mutants = mutants_by_rule()
    lines = []
    for kit in (*(kit for kits in KITS.values() for kit in kits), EngineTests):
        about = (kit.__doc__ or "").strip().split("\n")[0]
        lines += [f"### {kit.__name__}", "", about, "", "| promise | test | mutants that it catches |", "|---|---|---|"]
        for name in rules(kit):
            promise = " ".join((getattr(kit, name).__doc__ or "").split("\n\n")[0].split())
            caught = ", ".join(f"`{mutant.kind.__name__}`" for mutant in mutants.get((kit.__name__, name), ()))
            lines.append(f"| {promise} | `{name}` | {caught} |")
        lines.append("")
    return "\n".join(lines)


def mutant_list() -> str:
    """Return Markdown: every mutant, the mistake that it makes, and the tests that must catch it."""
    lines = ["| mutant | its mistake | caught by |", "|---|---|---|"]
    by_kind: dict[type, list[Mutant]] = {}
    for mutant in MUTANTS:
        by_kind.setdefault(mutant.kind, []).append(mutant)
    for kind, mutants in sorted(by_kind.items(), key=lambda item: item[0].__name__):
        tests = sorted({f"`{mutant.kit}.{mutant.rule.__name__}`" for mutant in mutants})
        lines.append(f"| `{kind.__name__}` | {mutants[0].mistake} | {', '.join(tests)} |")
    return "\n".join(lines) + "\n"


def rules(kit: type) -> list[str]:
    """Return the names of a kit's own tests, in their order."""
    return [name for name, member in vars(kit).items() if name.startswith("test_") and inspect.isfunction(member)]


def mutants_by_rule() -> dict[tuple[str, str], list[Mutant]]:
    """Return the mutants that each rule must catch, by (kit, test); each class once a rule."""
    found: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in MUTANTS:
        mine = found.setdefault((mutant.kit, mutant.rule.__name__), [])
        if all(each.kind is not mutant.kind for each in mine):
            mine.append(mutant)
    return found


def describe(kind: type) -> dict[str, Any]:
    """Return what the table says of a class under test: its docstring's first line, and its options."""
    about = (inspect.getdoc(kind) or kind.__name__).split("\n")[0].rstrip(".")
    return {"about": about, "options": [_option(field) for field in msgspec.structs.fields(kind.Options)]}  # type: ignore[attr-defined]


def connector_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: each tested connector, what it is, its options, and what the kits said."""
    lines = ["| name | what it is | options | conformance |", "|---|---|---|---|"]
    for report in reports:
        reach = "".join(f", {text}" for field, text in _KINDS.items() if report["capabilities"].get(field))
        counts = report["summary"]
        said = f"{counts.get('kept', 0)} promises kept, {counts.get('broken', 0)} broken"
        said += "".join(f", {counts[each]} {each}" for each in ("known bug", "not shown") if counts.get(each))
        lines.append(
            f"| `{report['target']}://` | {report['about']}{reach} | {', '.join(report['options'])} | {said} |"
        )
    return "\n".join(lines)


def _option(field: Any) -> str:
    """Return an option's name, and what it is if it is not given."""
    shown = "" if field.required or field.default == "" else f" ({str(field.default).lower()})"
    if isinstance(field.default, ByteSize):
        shown = f" ({field.default})"
    return f"`{field.encode_name}`{shown}"


def replace_between(path: Path, marker: str, text: str) -> bool:
    """Put `text` between ``<!-- marker -->`` and ``<!-- /marker -->``; return whether the page changed.

    Raises:
        ValueError: If the page has no such markers.
    """
    page = path.read_text("utf-8")
    start, end = f"<!-- {marker} -->\n", f"\n<!-- /{marker} -->"
    page = page.replace(start + end.lstrip("\n"), start + end)  # an empty place
    if start not in page or end not in page:
        raise ValueError(f"{path} has no {start.strip()} ... {end.strip()}")
    before, rest = page.split(start, 1)
    after = rest.split(end, 1)[1]
    made = before + start + text + end + after
    if made != page:
        path.write_text(made, "utf-8")
    return made != page
