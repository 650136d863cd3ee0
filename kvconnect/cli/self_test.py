"""``kvconnect conformance --self-test``: are the kits that are installed here able to find mistakes?"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvconnect.errors import ConfigError

__all__ = ["run_self_test"]


def run_self_test(json_file: str | None = None) -> int:
    """Run every mutant against the test named for it, and what it was made from against the same test.

    Args:
        json_file: Where to write what came of each.

    Returns:
        0 if every mutant was caught and everything right passed, else 1.

    Raises:
        ConfigError: If the kits cannot be run.
    """
    import pytest  # late: other commands need none of it

    from kvconnect.testing.mutants.table import MUTANTS

    started = time.monotonic()
    watch = _Watch()
    if json_file:
        _must_be_writable(Path(json_file))
    with _without_options(), tempfile.TemporaryDirectory(prefix="kvconnect-self-test-") as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n")
        arguments = ["--pyargs", "kvconnect.testing.mutants.cases", "-c", str(folder / "pytest.ini")]
        arguments += ["--rootdir", name, "--basetemp", str(folder / "tests"), "-p", "no:cacheprovider"]
        arguments += ["-p", "no:terminal", "-p", "no:logging", "-p", "no:xdist"]
        status = pytest.main(arguments, plugins=[watch])
    if status not in (0, 1) or not watch.cases:
        raise ConfigError(watch.trouble or f"the mutants could not be run (pytest ended with {int(status)})")
    mutants = [case for case in watch.cases if case["mutant"]]
    right = [case for case in watch.cases if not case["mutant"]]
    if len(mutants) != len(MUTANTS):
        raise ConfigError(
            f"{len(mutants)} of {len(MUTANTS)} mutants were run; {watch.trouble or 'why, pytest did not say'}"
        )
    caught = sum(case["good"] for case in mutants)
    passed = sum(case["good"] for case in right)
    rules = {case["rule"] for case in mutants if case["good"]}
    print(f"caught {caught} / {len(mutants)} (mutant and test), by {len(rules)} tests")
    print(f"right ones that pass the same tests: {passed} / {len(right)}, in {time.monotonic() - started:.0f} s")
    if json_file:
        report = {
            "caught": caught,
            "total": len(mutants),
            "right": passed,
            "controls": len(right),
            "cases": watch.cases,
        }
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0 if caught == len(mutants) and passed == len(right) else 1


def _must_be_writable(path: Path) -> None:
    """Find out before minutes have passed.

    Raises:
        ConfigError: If the report could not be written.
    """
    try:
        path.touch()
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from error


@contextlib.contextmanager
def _without_options() -> Iterator[None]:
    """Keep options for other runs of pytest away from this one."""
    given = os.environ.pop("PYTEST_ADDOPTS", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["PYTEST_ADDOPTS"] = given


class _Watch:
    """Collects what came of each case, and prints those that went wrong."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.trouble = ""
        self._broken: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Remember what any phase of a test had to say against it."""
        if report.skipped:
            self._broken.setdefault(report.nodeid, "it was skipped, and not looked at")
        elif report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self._broken.setdefault(report.nodeid, message.strip().split("\n")[0])

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Note the case that ends."""
        self.cases.append(dict(item.cls.about))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Judge it."""
        case = self.cases[-1]
        case["said"] = self._broken.get(nodeid, "")
        case["good"] = not case["said"]
        if not case["good"]:
            print(f"{case['name']}, {case['rule']}: {case['said']}", flush=True)
        elif sys.stdout.isatty():
            print(f"\r{len(self.cases)} cases", end="\r", flush=True)

    def pytest_collectreport(self, report: Any) -> None:
        """Remember why something could not be collected."""
        if report.failed:
            self.trouble = str(report.longrepr).strip().splitlines()[-1]
