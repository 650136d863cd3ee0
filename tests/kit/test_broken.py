"""What is broken in one thing fails the test that is named for it, with a message from which its author sees why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit.running import run_kit

STORES = {
    "ReadsInItsOwnOrder": ("test_results_are_parallel_to_the_keys", "read"),
    "ShortensKeys": ("test_keys_are_any_bytes_and_never_mixed_up", "under key"),
    "KeepsTheCallersMemory": ("test_memory_is_the_callers_again_when_a_call_returns", "kept the caller's memory"),
    "WritesInPlace": ("test_readers_see_whole_frames_while_others_write", "publish a frame in one step"),
    "RaisesWhenAbsent": ("test_absent_key_is_a_miss", "FileNotFoundError"),
    "FillsWhatFits": ("test_frame_longer_than_its_buffer_is_a_miss", "5000 bytes into 4999"),
    "AnswersNothing": ("test_empty_lists_are_fine", "NoneType"),
    "ForgetsWhenClosed": ("test_what_was_confirmed_is_there_after_closing", "after close and a new instance"),
    "Unpickles": ("test_read_gives_back_what_was_written", "pickle.loads"),
    "ScansNothing": ("test_undeclared_scan_is_refused", "UnsupportedError"),
    "IgnoresItsCapacity": ("test_capacity_is_kept", "evict or decline"),
    "TakesAnyOption": ("test_unknown_option_is_refused", "ConfigError|frozen"),
}

CONNECTORS = {
    "ForgetsTheParent": ("test_blocks_of_two_prompts_do_not_join", "chain the parent's hash"),
    "IgnoresTheSalt": ("test_requests_that_differ_share_nothing", "another cache salt"),
    "OffersTheWholePrompt": ("test_offer_leaves_a_token_to_compute", "none is left|tokens offered"),
    "CountsFromZero": ("test_offer_counts_from_what_is_computed", "count from num_computed_tokens"),
    "CommitsWhenItPlans": ("test_block_is_visible_only_when_its_step_is_reported", "commit when the report"),
    "CommitsOnAFailedLoad": ("test_nothing_computed_on_a_failed_load_is_committed", "the commit rule"),
    "VoidsOnlyWhoLoaded": (
        "test_nothing_computed_on_a_shared_page_of_a_failed_load_is_committed",
        "not only the one that loaded",
    ),
    "LoadsInTheStep": (
        "test_engine_without_loads_in_a_step_is_offered_parked_ones_or_refused",
        "could not take it back",
    ),
    "TellsOfNobodysTokens": ("test_events_tell_once_what_can_be_loaded", "prefix told of"),
    "NeverAnswers": ("test_saved_prefix_is_offered", "again and again"),
    "RaisesOnAnEmptyStep": ("test_empty_step_has_a_plan", "IndexError|bytes"),
    "SwapsKeysAndValues": ("test_loaded_blocks_hold_what_was_computed", "value of layer 0|key of layer"),
    "SavesAfterTheStep": ("test_pages_are_the_engines_again_after_wait_for_save", "nobody wrote it|it is position"),
    "ReplaysItsPlan": ("test_plan_is_applied_once", "applied before"),
    "LoadsLater": ("test_saved_prefix_is_offered", "nobody wrote it"),
    "LeavesAThread": ("test_nothing_is_left_after_shutdown", "forgotten"),
    "UnpicklesPlans": ("test_plan_of_nonsense_is_refused_and_moves_nothing", "pickle.loads"),
    "ReportsIdsTwice": ("test_saved_prefix_is_offered", "named r0"),
}


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvconnect.testing.harness._PATIENCE_S", 1.0)


@pytest.mark.parametrize("name", STORES)
def test_store_that_is_broken_in_one_thing_is_caught(name: str, tmp_path: Path) -> None:
    test, message = STORES[name]
    caught(f"tests.kit.broken_stores:{name}", test, message, tmp_path)


@pytest.mark.parametrize("name", CONNECTORS)
def test_connector_that_is_broken_in_one_thing_is_caught(name: str, tmp_path: Path) -> None:
    test, message = CONNECTORS[name]
    caught(f"tests.kit.broken_connectors:{name}", test, message, tmp_path)


def caught(target: str, test: str, message: str, tmp_path: Path) -> None:
    found = run_kit(target, test, tmp_path)
    broken = [each for each in found if each["outcome"] == "broken"]
    assert broken, found
    said = " ".join(f"{each['expected']} | {each['got']} | {each['hint']}" for each in broken)
    assert re.search(message, said), said


@pytest.mark.parametrize("target", ["tests.kit.broken_stores:FolderStore", "tests.kit.broken_connectors:Right"])
def test_what_they_were_made_from_is_right(target: str, tmp_path: Path) -> None:
    """So that each of the above fails for its one mistake and nothing else."""
    tests = sorted({test for test, _ in [*STORES.values(), *CONNECTORS.values()]})
    found = run_kit(target, " or ".join(tests), tmp_path)
    assert [each for each in found if each["outcome"] == "broken"] == []
    assert sum(each["outcome"] == "kept" for each in found) >= len(CONNECTORS)
