"""Runs the installed kits on a class, in this process, and returns what they came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def run_pytest(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run pytest in this process, without its own report; return its status and what the kits' tests came to."""

    class Keep:
        promises: list[dict[str, Any]]

        def pytest_configure(self, config: Any) -> None:
            self.promises = config.pluginmanager.getplugin("kvconnect-results").promises

    keep = Keep()
    (folder / "pytest.ini").write_text("[pytest]\n")
    alone = ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "--basetemp", str(folder / "tests")]
    alone += ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist", "--import-mode=importlib"]
    return int(pytest.main([*alone, *arguments], plugins=[keep])), keep.promises


def run_kit(target: str, chosen: str, folder: Path, *more: str) -> list[dict[str, Any]]:
    """Run the tests whose names match `chosen` (pytest's ``-k``) on ``module:Class``."""
    given = ["--pyargs", "kvconnect.testing.installed", "--kv-connector", target, "--kv-quick", "-k", chosen]
    status, promises = run_pytest(folder, *given, *more)
    assert status in (0, 1), f"the kit could not run: {status}"
    return [each for each in promises if each["outcome"] != "not run"]
