"""Options and reports for the conformance kits under pytest. Imports nothing of kvconnect: pytest loads it always.

`pytest --pyargs kvconnect.testing.installed --kv-connector disk`; with kits of your own, any pytest command.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Generator
from typing import Any

import pytest

__all__ = ["Results"]

_SKIPS = {"not shown: ": "not shown", "not declared: ": "not declared", "env: ": "environment"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--kv-...``."""
    group = parser.getgroup("kvconnect", "conformance kits")
    group.addoption(
        "--kv-connector", action="append", default=[], metavar="TARGET", help="a name, URL or module:Class; repeat it"
    )
    group.addoption("--kv-options", default="{}", metavar="JSON", help="options of every --kv-connector")
    group.addoption("--kv-kit", default="all", metavar="KIT", help="store, leader, worker, connector or all")
    group.addoption("--kv-seed", type=int, default=0, metavar="N", help="repeats a run")
    group.addoption("--kv-seeds", type=int, default=1, metavar="N", help="run random schedules under this many seeds")
    group.addoption("--kv-patience", type=float, default=30.0, metavar="SECONDS", help='"not yet" becomes "never" (30)')
    group.addoption("--kv-quick", action="store_true", help="the shortest form of each test")
    group.addoption("--kv-report", metavar="FILE", help="write what was kept and broken as JSON")
    group.addoption("--kv-no-env-skips", action="store_true", help="a test that this machine cannot run is a failure")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to collect results."""
    config.pluginmanager.register(Results(config), "kvconnect-results")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run random schedules, which ask for the seed itself, once for each; the rest only draws other tokens."""
    seeds = metafunc.config.option.kv_seeds
    if seeds > 1 and getattr(metafunc.cls, "kv_kit", "") and "seed" in inspect.signature(metafunc.function).parameters:
        first = metafunc.config.option.kv_seed
        metafunc.parametrize("seed", range(first, first + seeds), ids=lambda seed: f"seed{seed}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the kits that were not asked for, and turn `expected_failures` into strict xfails.

    Raises:
        pytest.UsageError: If one names no test, or has no link.
    """
    chosen = config.option.kv_kit
    if chosen != "all":
        others = [item for item in items if getattr(getattr(item, "cls", None), "kv_group", chosen) != chosen]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)
    known: dict[Any, set[str]] = {}
    for item in items:
        kind = getattr(item, "cls", None)
        if kind is None or not getattr(kind, "kv_kit", ""):
            continue
        name = getattr(item, "originalname", item.name)
        known.setdefault(kind, set()).add(name)
        if name in kind.expected_failures:
            item.add_marker(pytest.mark.xfail(strict=True, reason=kind.expected_failures[name]))
    for kind, names in known.items():
        for name, link in kind.expected_failures.items():
            if name not in names and not hasattr(kind, name):
                raise pytest.UsageError(f"{kind.__name__}.expected_failures: there is no test {name!r}")
            if "/" not in link:
                raise pytest.UsageError(f"{kind.__name__}.expected_failures[{name!r}] needs a link to the bug")


class Results:
    """What each promise came to."""

    def __init__(self, config: pytest.Config) -> None:
        """Start with none."""
        self._config = config
        self.promises: list[dict[str, Any]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """Note the outcome of a kit's test."""
        report = yield
        kind = getattr(item, "cls", None)
        kit = getattr(kind, "kv_kit", "")
        if not kit:
            return report
        reason = str(call.excinfo.value) if report.skipped and call.excinfo is not None else ""
        if reason.startswith("env: ") and self._config.option.kv_no_env_skips:
            report.outcome = "failed"
            report.longrepr = reason
        decided = report.when == "call" or report.outcome != "passed"
        if decided:
            self._note(item, report, call, reason)
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        path = self._config.option.kv_report
        if path and self.promises:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"promises": self.promises}, file, indent=1)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print a line for each broken promise."""
        broken = [each for each in self.promises if each["outcome"] == "broken"]
        if broken:
            terminalreporter.section("broken promises")
        for each in broken:
            terminalreporter.line(line_of(each))

    def _note(self, item: pytest.Item, report: Any, call: pytest.CallInfo[None], reason: str) -> None:
        error = None if call.excinfo is None else call.excinfo.value
        outcome = {"passed": "kept", "failed": "broken", "skipped": "not run"}[report.outcome]
        if hasattr(report, "wasxfail"):
            outcome = "known bug" if report.skipped else "broken"
        for prefix, name in _SKIPS.items():
            if report.skipped and reason.startswith(prefix):
                outcome, reason = name, reason[len(prefix) :]
        parameters = dict(getattr(getattr(item, "callspec", None), "params", {}))
        function: Any = getattr(item, "function", None)
        promise = (getattr(function, "__doc__", "") or "").strip().split("\n")[0]
        entry = {
            "kit": _kit_of(item),
            "test": getattr(item, "originalname", item.name),
            "parameters": {name: str(value) for name, value in parameters.items() if name not in ("connector", "seed")},
            "promise": promise,
            "outcome": outcome,
            "seed": parameters.get("seed", self._config.option.kv_seed),
        }
        if outcome == "broken" and error is not None:
            entry["expected"] = getattr(error, "expected", "the test to end without an error")
            entry["got"] = getattr(error, "got", f"{type(error).__name__}: {error}")
            entry["hint"] = getattr(error, "hint", "")
        elif outcome == "broken":  # a strict xfail that passed, or a skip that is forbidden
            entry["expected"] = "the test to run" if reason else "the known bug to be there"
            entry["got"] = reason or "none: take it out of expected_failures"
        elif reason:
            entry["why"] = reason
        self.promises.append(entry)


def line_of(entry: dict[str, Any]) -> str:
    """Return one line that says which promise was broken, what was expected, what came, and the seed."""
    parameters = ", ".join(entry["parameters"].values())
    where = f"{entry['kit']}.{entry['test']}" + (f"[{parameters}]" if parameters else "")
    hint = f". {entry['hint']}" if entry.get("hint") else ""
    return (
        f"BROKEN {where}: {entry['promise']} Expected {entry['expected']}; got {entry['got']}{hint} "
        f"(seed {entry['seed']})"
    )


def _kit_of(item: pytest.Item) -> str:
    """Return the kit that a test comes from: the class that defines it, not the one that inherits it."""
    name = getattr(item, "originalname", item.name)
    for kind in getattr(item, "cls", object).__mro__:
        if name in vars(kind):
            return str(kind.__name__)
    return ""
