"""Runs the installed kits on a class, in this process, and returns what they came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def run_kit(target: str, chosen: str, folder: Path, *more: str) -> list[dict[str, Any]]:
    """Run the tests whose names match `chosen` (pytest's ``-k``) on ``module:Class``."""

    class Keep:
        promises: list[dict[str, Any]]

        def pytest_configure(self, config: Any) -> None:
            self.promises = config.pluginmanager.getplugin("kvconnect-results").promises

    keep = Keep()
    (folder / "pytest.ini").write_text("[pytest]\n")
    arguments = ["--pyargs", "kvconnect.testing.installed", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    arguments += ["--basetemp", str(folder / "tests"), "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist"]
    status = pytest.main([*arguments, "--kv-connector", target, "--kv-quick", "-k", chosen, *more], plugins=[keep])
    assert status in (0, 1), f"the kit could not run: {status}"
    return [each for each in keep.promises if each["outcome"] != "not run"]
