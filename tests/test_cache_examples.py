"""The examples of host offloading and of prefetching, run as processes; the numbers come from their sizes alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

PROMPT_BLOCKS = 9  # 152 tokens in blocks of 16: the tenth is not full
DEVICE_BLOCKS = 16  # 256 tokens

CONVERSATION_BLOCKS = 30  # 480 tokens of prompt; the first token of the answer is not computed yet


def run(example: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example / f"{example}.py"), "--json", *arguments],
        # a connector of the environment's own must not answer in the place of what the example shows
        env={**os.environ, "KVCONNECT_CONNECTOR": "nonsense://"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def model_arguments(family: str | None, checkpoints: Callable[[str], Path]) -> list[str]:
    return ["--model", str(checkpoints(family))] if family else []


@pytest.mark.parametrize("family", [None, "gemma3"])
def test_without_offloading_nothing_is_found_again(family: str | None, checkpoints: Callable[[str], Path]) -> None:
    groups = 2 if family == "gemma3" else 1  # full attention, and the sliding window: blocks count in each
    result = run("host_offloading", *model_arguments(family, checkpoints))
    computed = {
        "reused_blocks": 0,
        "missed_blocks": PROMPT_BLOCKS * groups,
        "allocated_blocks": DEVICE_BLOCKS * groups,
    }
    assert result["requests"] == [{"prompt": name, **computed} for name in "ABAB"]
    assert result["cache_hit_rate"] == 0
    assert result["outputs_equal"] is True


@pytest.mark.parametrize(("flag", "family"), [("--enable-offloading", None), ("--enable_offloading", "gemma3")])
def test_with_offloading_all_comes_back(flag: str, family: str | None, checkpoints: Callable[[str], Path]) -> None:
    groups = 2 if family == "gemma3" else 1
    result = run("host_offloading", flag, *model_arguments(family, checkpoints))
    found = [(each["prompt"], each["reused_blocks"], each["missed_blocks"]) for each in result["requests"]]
    blocks = PROMPT_BLOCKS * groups
    assert found == [("A", 0, blocks), ("B", 0, blocks), ("A", blocks, 0), ("B", blocks, 0)]
    assert result["cache_hit_rate"] == 0.5
    assert result["outputs_equal"] is True


def test_host_memory_of_a_chosen_size_keeps_what_fits_there() -> None:
    result = run("host_offloading", "--enable-offloading", "--host-cache-bytes", "2MiB")
    again = result["requests"][2:]
    # a block of the embedded model has 96 KiB: twenty of them fit, and two prompts with their answers have thirty
    assert all(0 < each["reused_blocks"] < PROMPT_BLOCKS for each in again)
    assert all(each["reused_blocks"] + each["missed_blocks"] == PROMPT_BLOCKS for each in again)
    assert result["cache_hit_rate"] == sum(each["reused_blocks"] for each in again) / (4 * PROMPT_BLOCKS)
    assert result["outputs_equal"] is True


@pytest.mark.parametrize("family", [None, "gemma3"])
def test_prefetch_brings_a_suspended_conversation_up_again(
    family: str | None, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a window of 24 tokens: of the sliding layers only the last two blocks are still needed
    count = CONVERSATION_BLOCKS + (2 if family == "gemma3" else 0)
    temporary, kept = tmp_path / "temporary", tmp_path / "kept"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    folder = ["--cache-dir", str(kept)] if family else []
    result = run("prefetch", "--rounds", "1", *folder, *model_arguments(family, checkpoints))
    moments = {each["when"]: each["blocks"] for each in result["moments"]}
    assert list(moments) == ["running", "suspended", "others have run", "prefetched", "resumed"]
    assert moments["running"] == {"device": count, "host": 0, "disk": 0}
    assert sum(moments["suspended"].values()) == count
    assert moments["others have run"] == {"device": 0, "host": 0, "disk": count}
    assert moments["prefetched"] == {"device": 0, "host": count, "disk": 0}
    assert moments["resumed"]["device"] > count  # there is a page for its next token
    assert set(result["resume_s"]) == {"with_prefetch", "without_prefetch"}
    assert all(0 < seconds < 60 for seconds in result["resume_s"].values())
    assert result["outputs_equal"] is True
    assert not list(temporary.iterdir()), "what was temporary is gone"
    assert kept.exists() == bool(folder)
    assert not folder or any(path.is_file() for path in kept.rglob("*")), "--cache-dir keeps what was written"
