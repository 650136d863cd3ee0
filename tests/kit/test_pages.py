"""What is generated in our pages is not stale, and the author's path leads where it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvconnect
from kvconnect.cli.main import main
from kvconnect.testing.engine import EngineTests
from kvconnect.testing.installed import KITS
from kvconnect.testing.report import connector_table, mutant_list, mutants_by_rule, promise_list, replace_between, rules

ROOT = Path(__file__).parents[2]
NAMES = ("host", "disk", "redis", "s3", "mooncake", "sqlite")
REPORTS = [ROOT / "docs" / "conformance" / f"{name}.json" for name in NAMES]
AGAIN = f"python -m kvconnect.testing.pages README.md docs/conformance.md docs/conformance/{{{','.join(NAMES)}}}.json"


def between(page: str, marker: str) -> str:
    return page.split(f"<!-- {marker} -->\n")[1].split(f"\n<!-- /{marker} -->")[0]


def test_table_of_connectors_is_that_of_the_reports() -> None:
    reports = [json.loads(path.read_text()) for path in REPORTS]
    assert between((ROOT / "README.md").read_text(), "connectors") == connector_table(reports), f"stale: {AGAIN}"
    for report in reports:
        assert report["summary"].get("broken", 0) == 0
        assert (report["kit"], report["quick"]) == ("all", False)
        assert report["kvconnect"] == kvconnect.__dict__.get("__version__", report["kvconnect"])


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_reports_are_of_the_tests_that_there_are(path: Path) -> None:
    """A test that came, went or changed its promise makes them stale: run `kvconnect conformance` with --json again."""
    reported = {(each["test"], each["promise"]) for each in json.loads(path.read_text())["promises"]}
    first_lines = set()
    for row in promise_list().splitlines():
        match = re.fullmatch(r"\| (.*) \| `(test_\w+)` \| .*", row)
        if match:
            first_lines.add(match[2])
    first_lines -= set(rules(EngineTests))  # the target of a report is a connector
    assert {test for test, _ in reported} == first_lines


def test_list_of_promises_is_that_of_the_kits() -> None:
    assert between((ROOT / "docs" / "conformance.md").read_text(), "promises") == promise_list(), f"stale: {AGAIN}"


def test_list_of_mutants_is_that_of_the_package() -> None:
    assert between((ROOT / "docs" / "conformance.md").read_text(), "mutants") == mutant_list(), f"stale: {AGAIN}"


def test_every_rule_has_a_mutant_that_it_must_catch() -> None:
    caught = mutants_by_rule()
    kits = [*(kit for kits in KITS.values() for kit in kits), EngineTests]
    assert [f"{kit.__name__}.{name}" for kit in kits for name in rules(kit) if (kit.__name__, name) not in caught] == []


def test_no_two_kits_have_a_test_of_one_name() -> None:
    """One class may inherit from all of them, and would lose one of the two."""
    names = [name for kits in KITS.values() for kit in kits for name in vars(kit) if name.startswith("test_")]
    assert len(names) == len(set(names))


def test_page_without_its_markers_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing here")
    with pytest.raises(ValueError, match="connectors"):
        replace_between(tmp_path / "page.md", "connectors", "x")


def files_of_the_page() -> dict[str, str]:
    page = (ROOT / "docs" / "writing-a-connector.md").read_text()
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in blocks] == ["kvconnect_mine.py", "kvconnect_memo.py", "kvconnect_memo_halves.py"]
    return dict(blocks)


def conformance(folder: Path, module: str, *arguments: str) -> str:
    environ = {**os.environ, "KVCONNECT_PLUGINS": module, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "kvconnect.cli.main", "conformance", *arguments, "--quick"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=folder,
        env=environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_skeleton_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "mine"]) == 0
    assert "pip install -e ." in capsys.readouterr().out
    assert main(["new", "mine"]) == 2
    assert main(["new", "Not a name"]) == 2
    assert "0 broken" in conformance(tmp_path / "kvconnect-mine", "kvconnect_mine", "mine", "--kit", "store")
    files = [path for path in (tmp_path / "kvconnect-mine").rglob("*.py") if "__pycache__" not in path.parts]
    assert sum(len(path.read_text().splitlines()) for path in files) < 100


def test_store_of_the_page_passes(tmp_path: Path) -> None:
    (tmp_path / "kvconnect_mine.py").write_text(files_of_the_page()["kvconnect_mine.py"])
    assert "0 broken" in conformance(tmp_path, "kvconnect_mine", "mine", "--kit", "store")


def test_connector_of_the_page_passes(tmp_path: Path) -> None:
    written = files_of_the_page()
    lines = 0
    for name in ("kvconnect_memo.py", "kvconnect_memo_halves.py"):
        (tmp_path / name).write_text(written[name])
        lines += sum(bool(line.strip()) for line in written[name].splitlines())
    assert lines < 100
    assert "0 broken" in conformance(tmp_path, "kvconnect_memo", "memo")
