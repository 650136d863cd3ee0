"""The examples run as a newcomer would run them: the third party's distribution is built, installed and tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build and install the custom connector into a folder of its own; return the environment that sees it."""
    root = tmp_path_factory.mktemp("custom")
    shutil.copytree(EXAMPLES / "custom_connector", root / "source", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--no-build-isolation", "--target", str(root / "site"), str(root / "source")),
        ],
        check=True,
    )
    return {**os.environ, "PYTHONPATH": str(root / "site"), "SOURCE": str(root / "source")}


def test_custom_connector_passes_its_own_test(installed: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--kv-quick", installed["SOURCE"]],
        env=installed,
        cwd=installed["SOURCE"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_custom_connector_serves_the_demo(installed: dict[str, str], tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/kv.sqlite"
    done = subprocess.run(
        [sys.executable, "-m", "kvconnect.cli.main", "demo", "--json", "--max-tokens", "2", "--connector", url],
        env=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_custom_store_is_about_forty_lines() -> None:
    lines = (EXAMPLES / "custom_connector" / "kvconnect_sqlite.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 45


def test_persistent_cache_loads_in_its_second_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "persistent_cache" / "persistent_cache.py"), str(tmp_path / "kv"), "--once"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = (
        int(line.split()[3]) for line in done.stdout.splitlines() if line.startswith("this process loaded")
    )
    assert first == 0
    assert second > 1000
    tokens = [line.split("[")[1] for line in done.stdout.splitlines() if "[" in line]
    assert tokens[:3] == tokens[3:]
