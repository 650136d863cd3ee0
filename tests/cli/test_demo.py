"""``kvconnect demo``: two real processes, compared with a third; and an exit status that means something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvconnect.cli.demo import Verdict, compare_tokens, read_prompts
from kvconnect.cli.main import main
from kvconnect.errors import ConfigError


def demo(*arguments: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "kvconnect.cli.main", "demo", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def check(result: dict[str, Any]) -> None:
    for phase in ("cold", "warm"):
        row = result[phase]
        assert row["computed_tokens"] + row["reused_tokens"] + row["loaded_tokens"] == row["prompt_tokens"]
        assert row["ttft_s"] > 0
    assert result["cold"]["loaded_tokens"] == 0
    assert result["warm"]["loaded_tokens"] > 0
    assert result["outputs_equal"] is True
    assert result["reference_equal"] is True
    assert result["excused"] == 0
    assert result["warm_blocks_loaded_or_reused"] >= 0.9 * result["full_blocks"]


def test_default_demo_succeeds() -> None:
    status, result, said = demo("--max-tokens", "4")
    assert status == 0, said
    check(result)
    assert result["prompts"] >= 5


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of two short prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("A paragraph\nof two lines, long enough for some blocks.\n\nAnother one, which is shorter.\n")
    return str(file)


def test_checkpoint_folder_and_prompt_file(checkpoints: Callable[[str], Path], prompts: str) -> None:
    model = str(checkpoints("mistral"))
    status, result, said = demo("--model", model, "--prompts", prompts, "--block-size", "8", "--max-tokens", "4")
    assert status == 0, said
    check(result)
    assert result["prompts"] == 2


def test_cache_that_does_not_outlive_its_process_fails_the_demo(prompts: str) -> None:
    status, result, _ = demo("--connector", "host://?capacity=64MiB", "--max-tokens", "2", "--prompts", prompts)
    assert status == 1
    assert result["outputs_equal"] is True
    assert result["warm"]["loaded_tokens"] == 0


def test_whole_connector_with_no_counters_of_ours_runs_in_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: str
) -> None:
    (tmp_path / "plain_connector.py").write_text(
        "from kvconnect import Capabilities, Connector, Options, hookimpl\n"
        "class Plain(Connector):\n"
        "    Options, capabilities = Options, Capabilities()\n"
        "    def make_leader(self, options, context):\n"
        "        from kvconnect import Leader\n"
        "        return Leader()\n"
        "    def make_worker(self, options, context):\n"
        "        from kvconnect import Worker\n"
        "        return Worker()\n"
        "@hookimpl\n"
        "def kvconnect_register(registry):\n"
        "    registry.add('plain', 'plain_connector:Plain')\n"
    )
    monkeypatch.setenv("KVCONNECT_PLUGINS", "plain_connector")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, result, said = demo("--connector", "plain://", "--max-tokens", "2", "--prompts", prompts)
    assert status == 1, said
    assert result["outputs_equal"] is True
    assert result["reference_equal"] is True


def test_process_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("a file")
    status, _, said = demo("--connector", f"disk://{tmp_path}/kv")
    assert status == 2
    assert "disk store cannot use" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--connector", "dsik:///x"], "did you mean 'disk'"),
        (["--prompts", "/nowhere"], "cannot read prompts"),
        (["--connector", "disk:///x?capcity=1"], "did you mean 'capacity'"),
    ],
)
def test_bad_arguments_are_said_before_anything_runs(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_prompts_are_paragraphs_or_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"input": "one", "output": "x"}\n\n{"input": ""}\n{"input": "two"}\n')
    assert read_prompts(str(file)) == ["one", "two"]
    file.write_text('{"output": "x"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        read_prompts(str(file))
    file.write_text("\n\n")
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts(str(file))
    assert len(read_prompts(None)) >= 5


def test_difference_is_excused_only_where_the_reference_ties() -> None:
    reference = [1, 2, 3, 4]
    gaps = [1.0, 5e-5, 1.0, 1.0]
    assert compare_tokens(reference, reference, reference, gaps) == Verdict(True, False)
    assert compare_tokens([1, 9, 8, 7], reference, reference, gaps) == Verdict(False, True)
    assert compare_tokens([9, 2, 3, 4], reference, reference, gaps) == Verdict(False, False)
    assert compare_tokens([1, 2, 9, 4], reference, reference, gaps) == Verdict(False, False)
    assert compare_tokens([1, 9, 8, 7], [1, 9, 8, 6], reference, gaps) == Verdict(False, False)
    assert compare_tokens([1, 2], reference, reference, gaps) == Verdict(False, False)


def test_plugins_json_names_owners_versions_and_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["connectors"]}
    assert rows["disk"]["kind"] == "store"
    assert rows["disk"]["capabilities"]["durable"] is True
    assert rows["disk"]["owner"] == "kvconnect"
    assert rows["disk"]["version"]
    assert rows["host"]["kind"] == "connector"
    assert "capacity" in rows["host"]["options"]
