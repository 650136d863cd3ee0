"""`kvconnect conformance` and the pytest plugin: what they print, write and return."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kvconnect_pytest import line_of

from kvconnect.cli.main import main
from kvconnect.testing.target import Target
from tests.kit.running import run_kit, run_pytest


def test_right_store_gives_status_0_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["conformance", "disk", "--kit", "store", "--quick", "--json", str(report), "--seed", "5"]) == 0
    said = capsys.readouterr().out
    assert "32 promises kept, 0 broken" in said
    written = json.loads(report.read_text())
    assert (written["target"], written["seed"], written["format"]) == ("disk", 5, 1)
    assert written["summary"] == {"kept": 32, "not declared": 3}
    assert {each["kit"] for each in written["promises"]} == {"StoreTests"}
    assert all(each["promise"].endswith(".") for each in written["promises"])


def test_broken_store_gives_status_1_and_a_line_that_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = json.dumps({"path": "{tmp}/here"})
    target = "kvconnect.testing.mutants.stores:FillsWhatFits"
    assert main(["conformance", target, "--kit", "store", "--quick", "--options", options, "--seed", "3"]) == 1
    said = capsys.readouterr().out
    (line,) = [each for each in said.splitlines() if each.startswith("BROKEN")]
    assert "StoreTests.test_frame_longer_than_its_buffer_is_a_miss" in line
    assert "A buffer that is too small gets None" in line
    assert "5000 bytes into 4999 to be None; got 4999" in line
    assert "(seed 3)" in line
    assert f"again: kvconnect conformance {target} --seed 3" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nope"], "unknown connector 'nope'"),
        (["disk", "--options", "{"], "--options is not JSON"),
        (["disk", "--options", "[]"], "must be a JSON object"),
        (["disk", "--options", '{"capcity": 1}'], "did you mean 'capacity'"),
        (["disk", "--options", '{"path": "/proc/x"}'], "disk store cannot use"),
        (["os:path"], "unknown connector 'os'"),
        (["os:PathLike"], "neither a BlockStore nor a Connector"),
    ],
)
def test_what_cannot_be_run_gives_status_2(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert main(["conformance", *arguments]) == 2
    assert re.search(why, capsys.readouterr().err)


def test_host_says_that_it_has_no_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "host", "--kit", "store", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "host has no store of its own" in said
    assert "0 promises kept, 0 broken" in said


def test_seeds_run_what_depends_on_them_and_the_rest_once(tmp_path: Path) -> None:
    chosen = "test_absent_key_is_a_miss or test_hundred_requests_leave_nothing"
    found = run_kit("disk", chosen, tmp_path, "--kv-seed", "5", "--kv-seeds", "3")
    assert [(each["test"], each["seed"]) for each in found] == [
        ("test_absent_key_is_a_miss", 5),
        *(("test_hundred_requests_leave_nothing", seed) for seed in (5, 6, 7)),
    ]


@pytest.fixture
def few_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a self-test collect one mutant and what it was made from: `make test-kits` runs all of them."""
    from kvconnect.testing.mutants import cases, table

    some: dict[str, type] = {}
    for name, kind in list(vars(cases).items()):
        if not name.startswith("Test"):
            continue
        if kind.about["name"] in ("ShortensKeys", "FolderStore") and "never_mixed_up" in kind.about["rule"]:
            some[name] = kind
        else:
            monkeypatch.delattr(cases, name)
    assert len(some) == 2
    monkeypatch.setattr(table, "MUTANTS", [each for each in table.MUTANTS if each.kind.__name__ == "ShortensKeys"])


@pytest.mark.usefixtures("few_mutants")
def test_self_test_says_what_was_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing_at_all")  # other runs' options are not this one's
    assert main(["conformance", "--self-test", "--json", str(tmp_path / "report.json")]) == 0
    said = capsys.readouterr().out
    assert "caught 1 / 1" in said
    assert "right ones that pass the same tests: 1 / 1" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert {case["name"] for case in report["cases"]} == {"ShortensKeys", "FolderStore"}


@pytest.mark.usefixtures("few_mutants")
def test_kit_that_lost_a_rule_fails_its_self_test(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promise that nothing can break any more: the mutant survives."""
    monkeypatch.setattr("kvconnect.testing.store.must", lambda *_, **__: None)
    assert main(["conformance", "--self-test"]) == 1
    said = capsys.readouterr().out
    assert "ShortensKeys survives" in said
    assert "caught 0 / 1" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--self-test", "disk"], "takes no target"),
        ([], "name what to test"),
        (["--self-test", "--json", "/no/x"], "/no/x"),
    ],
)
def test_self_test_that_cannot_run_says_why(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_plugin_imports_nothing_of_ours() -> None:
    program = (
        "import sys, kvconnect_pytest; "
        "sys.exit(any(m.split('.')[0] in ('kvconnect', 'torch', 'msgspec') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


KIT = """
import pytest
from kvconnect.testing import StoreTests
from kvconnect.testing.promise import not_here
class TestMine(StoreTests):
    expected_failures = {failures}
    @pytest.fixture
    def connector(self, tmp_path):
        return ("kvconnect.testing.mutants.stores:{store}", {{"path": str(tmp_path)}})
    def test_needs_a_machine(self):
        not_here("no such device")
"""


LONGER = "test_frame_longer_than_its_buffer_is_a_miss"


@pytest.mark.parametrize(
    ("store", "failures", "arguments", "status", "outcomes"),
    [
        ("FillsWhatFits", {LONGER: "https://bugs/1"}, [], 0, {"kept": 2, "known bug": 1, "environment": 1}),
        ("FolderStore", {LONGER: "https://bugs/1"}, [], 1, {"kept": 2, "broken": 1, "environment": 1}),
        ("FolderStore", {"test_no_such": "https://bugs/1"}, [], 4, {}),
        ("FolderStore", {LONGER: "some day"}, [], 4, {}),
        ("FolderStore", {}, ["--kv-no-env-skips"], 1, {"kept": 3, "broken": 1}),
        ("FolderStore", {}, [], 0, {"kept": 3, "environment": 1}),
        ("ShortensKeys", {}, [], 1, {"kept": 2, "broken": 1, "environment": 1}),
    ],
)
def test_kit_of_ones_own(
    tmp_path: Path,
    store: str,
    failures: dict[str, str],
    arguments: list[str],
    status: int,
    outcomes: dict[str, int],
) -> None:
    module = tmp_path / f"test_{tmp_path.name}.py"  # this process imports each of them
    module.write_text(KIT.format(store=store, failures=failures))
    ended, promises = run_pytest(tmp_path, "-k", "absent or longer or machine or mixed", str(module), *arguments)
    assert ended == status
    assert Counter(each["outcome"] for each in promises) == outcomes
    assert all(line_of(each).startswith("BROKEN") for each in promises if each["outcome"] == "broken")


@pytest.mark.parametrize(
    ("given", "name", "kind"),
    [
        ("disk", "disk", "DiskStore"),
        ("disk://?path={tmp}/x", "disk", "DiskStore"),
        ({"name": "disk"}, "disk", "DiskStore"),
        ("kvconnect_disk.store:DiskStore", "diskstore", "DiskStore"),
        (["host://?capacity=1MiB", "disk"], "host+disk", "DiskStore"),
        ("host", "host", "HostConnector"),
    ],
)
def test_target_is_named_in_any_way(tmp_path: Path, given: Any, name: str, kind: str) -> None:
    target = Target(given, tmp_path)
    assert (target.name, target.kind.__name__) == (name, kind)
    if kind == "DiskStore":
        assert str(tmp_path) in target.resolved.tiers[0].options.path
    again = Target(target.portable() if len(target.portable()) > 1 else target.portable()[0], tmp_path)
    assert again.resolved.tiers == target.resolved.tiers
