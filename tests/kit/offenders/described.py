"""What the descriptions say of each offender, and which of the kit's tests must show it.

A test is named with one of its parameters, or ``""`` for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "CHANCE",
    "FAULTS",
    "MAY_UNPICKLE",
    "OFFENDERS",
    "Fault",
    "Offender",
    "Shown",
    "expected_of",
    "matches",
]

Shown = tuple[str, str]
"""A kit's test and a parameter of it."""


class Fault(NamedTuple):
    """Something that a description says.

    Attributes:
        what: In a sentence.
        shown_by: Tests that it must break.
        may_break: Tests of random schedules, or of several things at once, that it breaks in some runs.
        why: What of it the kit cannot see, and why; empty if it sees all.
        stated: Whether the peer's own documents say so; else it is our reading of its code.
    """

    what: str
    shown_by: tuple[Shown, ...] = ()
    may_break: tuple[Shown, ...] = ()
    why: str = ""
    stated: bool = True


class Offender(NamedTuple):
    """A model and what is said of what it is a model of.

    Attributes:
        target: ``module:Class``.
        title: What the page calls it.
        source: What it is a model of.
        faults: What it leaves out.
        keeps: Tests that it must be seen to keep, since the description says what they ask for.
    """

    target: str
    title: str
    source: str
    faults: dict[str, Fault]
    keeps: tuple[Shown, ...]


def expected_of(offender: Offender) -> tuple[list[Shown], list[Shown]]:
    """Return what an offender must break, and what it may."""
    faults = offender.faults.values()
    return [each for fault in faults for each in fault.shown_by], [each for fault in faults for each in fault.may_break]


def matches(given: tuple[str, str], wanted: Iterable[Shown]) -> bool:
    """Say whether a test and its parameters, joined by commas, are among those that are wanted."""
    test, parameters = given
    return any(test == name and each in ("", *parameters.split(",")) for name, each in wanted)


CHANCE = {"test_killed_process_leaves_whole_blocks_or_none"}
"""Tests whose word on the same offender may be another the next time: they kill at some moment."""

_NO_TIME = "the kit measures no time"
_NO_POWER_CUT = "it takes a power cut; the kit kills processes, and what they wrote stays"
_NO_BOUND = "the kit has no promise about how large a medium may grow"

_PREFIX_LAW: tuple[Shown, ...] = (
    ("test_block_after_another_prefix_is_another_block", ""),
    ("test_blocks_of_two_prompts_do_not_join", ""),
    ("test_same_block_elsewhere_is_another_block", ""),
    ("test_keys_are_wide", ""),
)

_SALT: tuple[Shown, ...] = (
    ("test_requests_that_differ_share_nothing", "cache salt"),
    ("test_requests_that_differ_share_nothing", "cache salt or none"),
)

_RANKS: tuple[Shown, ...] = (
    ("test_ranks_do_not_read_each_others_shards", ""),
    ("test_loaded_blocks_hold_what_was_computed", "num_ranks 2"),
)

_MODEL: tuple[Shown, ...] = (
    ("test_engines_that_differ_share_nothing", "model"),
    ("test_engines_that_differ_share_nothing", "block size"),
)

_WHOLE_FILES: tuple[Shown, ...] = (
    ("test_write_that_is_cut_off_leaves_whole_blocks_or_none", ""),
    ("test_damaged_medium_is_a_miss", "half of it"),
    ("test_damaged_medium_is_a_miss", "nothing in it"),
    ("test_nothing_is_unpickled", ""),
)

_SCHEDULES: tuple[Shown, ...] = (
    ("test_steps_that_fail_cost_no_byte", ""),
    ("test_hundred_requests_leave_nothing", ""),
    ("test_hundred_requests_leave_room_for_one_more", ""),
    ("test_any_schedule_reads_right_bytes", ""),
    ("test_any_program_of_operations_reads_right_bytes", ""),
)

FAULTS: dict[int, Fault] = {
    1: Fault(
        "The name of a block covers its own tokens and not its prefix: behind another prefix it is wrong KV.",
        (
            ("test_block_after_another_prefix_is_another_block", ""),
            ("test_blocks_of_two_prompts_do_not_join", ""),
            ("test_same_block_elsewhere_is_another_block", ""),
        ),
        _SCHEDULES,
    ),
    2: Fault(
        "Python's `hash()` has 64 bits and does not resist collisions; `abs` takes one away.",
        (("test_keys_are_wide", ""),),
        stated=False,
    ),
    3: Fault(
        "The name has no model, dtype, layout, LoRA or salt, and all ranks write the same path.",
        (
            ("test_requests_that_differ_share_nothing", ""),
            ("test_engines_that_differ_share_nothing", "model"),
            ("test_engines_that_differ_share_nothing", "KV dtype"),
            ("test_engines_that_differ_share_nothing", "layers and heads"),
            ("test_engines_that_differ_share_nothing", "heads of another width"),
            ("test_ranks_do_not_read_each_others_shards", ""),
            ("test_loaded_blocks_hold_what_was_computed", "num_ranks 2"),
        ),
        (*_SCHEDULES, ("test_save_that_failed_on_a_rank_is_never_offered", "")),
        why="the block size; a block of another size has other tokens, and so another name",
    ),
    4: Fault(
        "Files are unpickled: who can write to the folder can run code. (So are plans: the runtime's doing.)",
        (("test_nothing_is_unpickled", ""), ("test_plan_of_nonsense_is_refused_and_moves_nothing", "")),
    ),
    5: Fault(
        "A file is written under its final name: a reader sees half of it, and after a crash half of it stays.",
        (("test_write_that_is_cut_off_leaves_whole_blocks_or_none", ""),),
        (
            ("test_killed_process_leaves_whole_blocks_or_none", ""),
            ("test_crashes_leave_no_litter", ""),
        ),
    ),
    6: Fault(
        "Nothing checks what was read, a wrong tensor is broadcast or cast, and errors of files end the engine's loop. "
        "No time to live, quota or eviction.",
        (
            ("test_damaged_medium_is_a_miss", "a flipped bit"),
            ("test_damaged_medium_is_a_miss", "half of it"),
            ("test_damaged_medium_is_a_miss", "nothing in it"),
            ("test_damaged_medium_is_a_miss", "another one's bytes"),
            ("test_damaged_medium_is_a_miss", "noise"),
            ("test_medium_that_vanishes_is_survived", ""),
            ("test_full_disk_is_survived", ""),
            ("test_damaged_block_is_stored_again", "half of it"),
            ("test_damaged_block_is_stored_again", "nothing in it"),
        ),
        (("test_nothing_is_unpickled", ""), ("test_damaged_block_is_stored_again", "a flipped bit")),
        why=f"growth: {_NO_BOUND}",
        stated=False,
    ),
    7: Fault(
        "Later chunks of a prompt and decoded blocks are never saved; loads of requests that are not in the next batch "
        "are forgotten.",
        (
            ("test_chunks_and_decoded_blocks_are_saved", ""),
            ("test_tokens_that_were_not_accepted_are_not_saved", ""),
            ("test_load_waits_for_its_request", ""),
            ("test_load_touches_its_pages_and_no_other", ""),
            ("test_block_without_a_page_is_skipped", ""),
            ("test_loads_may_start_after_the_forward_pass", ""),
            ("test_engine_may_take_less", ""),
        ),
        _SCHEDULES,
    ),
    8: Fault("Files are read and written on the engine's thread, one a block.", why=_NO_TIME),
    9: Fault(
        "A block is copied from the GPU before anybody looks whether its file is there.", why=_NO_TIME, stated=False
    ),
    10: Fault(
        "A prompt that is stored whole is offered whole: no token is left to compute.",
        (("test_offer_leaves_a_token_to_compute", ""),),
        (*_SCHEDULES, ("test_engines_that_differ_share_nothing", "")),
        stated=False,
    ),
    11: Fault(
        "With more pages than the prompt has blocks, an index runs past the end.",
        (("test_more_pages_than_tokens_are_fine", ""),),
        stated=False,
    ),
    12: Fault(
        "The folder comes from an environment variable that does not reach the workers of other processes.",
        why="the kit hands over options, and starts no launcher of ranks",
    ),
    13: Fault(
        "The leader asks the file system about each block of each request while the engine schedules.",
        why=_NO_TIME,
        stated=False,
    ),
}
"""The old form's, by their numbers in our notes."""

_NO_COMMIT = Fault(
    "(no number) A file that is there is offered: nothing waits for a report, and a step that failed stays.",
    (
        ("test_block_is_visible_only_when_its_step_is_reported", ""),
        ("test_save_that_failed_on_a_rank_is_never_offered", ""),
        ("test_nothing_computed_on_a_failed_load_is_committed", ""),
        ("test_nothing_computed_on_a_shared_page_of_a_failed_load_is_committed", ""),
        ("test_reports_that_are_lost_commit_nothing", ""),
    ),
    stated=False,
)

_LAYOUT: tuple[Shown, ...] = (
    ("test_engines_that_differ_share_nothing", "KV dtype"),
    ("test_engines_that_differ_share_nothing", "heads of another width"),
)

_SHORT: tuple[Shown, ...] = (("test_engines_that_differ_share_nothing", "layers and heads"),)
"""Offered, but too short to be loaded: no harm, but no right answer."""

_RAW_DAMAGE: tuple[Shown, ...] = (
    ("test_damaged_medium_is_a_miss", "a flipped bit"),
    ("test_damaged_medium_is_a_miss", "another one's bytes"),
    ("test_damaged_medium_is_a_miss", "noise"),
)

OFFENDERS: dict[str, Offender] = {
    "old": Offender(
        "tests.kit.offenders.persistent_old:PersistentOld",
        "persistent, old form",
        "TensorRT-LLM, persistent connector example, old form",
        {**{str(number): fault for number, fault in FAULTS.items()}, "files": _NO_COMMIT},
        (
            ("test_saved_prefix_is_offered", ""),
            ("test_another_process_finds_what_this_one_saved", ""),
            ("test_loaded_blocks_hold_what_was_computed", "num_ranks 1"),
        ),
    ),
    "new": Offender(
        "tests.kit.offenders.persistent_new:PersistentNew",
        "persistent, newest form",
        "TensorRT-LLM, persistent connector example, newest form",
        {
            "key": Fault(
                "The name has no model, dtype, layout or LoRA: it is made of the salt and the prompt's tokens.",
                (
                    ("test_requests_that_differ_share_nothing", "adapter"),
                    ("test_requests_that_differ_share_nothing", "adapter or none"),
                    ("test_requests_that_differ_share_nothing", "media"),
                    ("test_requests_that_differ_share_nothing", "media or plain tokens"),
                    ("test_requests_that_differ_share_nothing", "place of the media"),
                    ("test_engines_that_differ_share_nothing", ""),
                ),
            ),
            "chunks": FAULTS[7]._replace(
                what="Not for chunked prefill. (What is forgotten, as in the old form.)",
            ),
            "ranks": Fault(
                "Not for sharded tensor parallelism.",
                why="nothing to show: it declares one rank",
            ),
            "rehash": Fault("The whole prefix is hashed again for each block; synchronous.", why=_NO_TIME),
            "eviction": Fault("No eviction.", why=_NO_BOUND),
            "6": FAULTS[6]._replace(what="(as in the old form) Nothing checks what was read; errors end the loop."),
            "10": FAULTS[10]._replace(what="(as in the old form) No token is left to compute."),
            "11": FAULTS[11]._replace(what="(as in the old form) With more pages than blocks, an index runs too far."),
            "files": _NO_COMMIT._replace(what="(as in the old form) A file that is there is offered."),
        },
        (
            *_PREFIX_LAW,
            *_SALT,
            ("test_requests_that_differ_share_nothing", "empty cache salt or none"),
            ("test_plan_of_nonsense_is_refused_and_moves_nothing", ""),
            ("test_write_that_is_cut_off_leaves_whole_blocks_or_none", ""),
        ),
    ),
    "vllm": Offender(
        "tests.kit.offenders.file_tiers:VllmFs",
        "vLLM fs tier",
        "vLLM 0.33.0, fs tier of its offloading",
        {
            "checksum": Fault("Raw bytes, no checksum: a bit flip is served.", _RAW_DAMAGE),
            "fsync": Fault("No fsync.", why=_NO_POWER_CUT),
            "cap": Fault("No size cap.", why=_NO_BOUND),
            "short": Fault(
                "A short file is deleted, and a miss; 48 bits of a digest of model, dtype, block size and shape name "
                "the folder; each writer has its own temporary file.",
                why="nothing to show: that keeps the promises",
            ),
        },
        (
            *_PREFIX_LAW,
            *_RANKS,
            *_WHOLE_FILES,
            ("test_requests_that_differ_share_nothing", ""),
            ("test_engines_that_differ_share_nothing", ""),
            ("test_damaged_block_is_stored_again", ""),
        ),
    ),
    "lmcache": Offender(
        "tests.kit.offenders.file_tiers:LmcacheFs",
        "LMCache fs",
        "LMCache 0.5.6, fs adapter of its L2",
        {
            "checksum": Fault("Raw bytes, no header, no checksum.", _RAW_DAMAGE),
            "lora": Fault(
                "LoRA is not in the name.",
                (
                    ("test_requests_that_differ_share_nothing", "adapter"),
                    ("test_requests_that_differ_share_nothing", "adapter or none"),
                ),
            ),
            "layout": Fault(
                "The name has the model, and neither dtype nor layout.",
                _LAYOUT,
                _SHORT,
            ),
            "rewrite": Fault(
                "A file that is there is never written again: a bad one keeps its place.",
                (("test_damaged_block_is_stored_again", ""),),
            ),
            "temporary": Fault(
                "All writers of a block use one temporary name.", why="it takes two writers at the same instant"
            ),
            "write": Fault(
                "Nobody looks whether all bytes were written (with O_DIRECT).",
                why="not modelled: there is no O_DIRECT",
            ),
            "delete": Fault("A load may meet a delete.", why="not modelled: nothing is deleted"),
            "cap": Fault("No size cap, no fsync.", why=f"{_NO_BOUND}; {_NO_POWER_CUT}"),
        },
        (*_PREFIX_LAW, *_SALT, *_RANKS, *_MODEL, *_WHOLE_FILES),
    ),
    "sglang": Offender(
        "tests.kit.offenders.file_tiers:SglangFile",
        "SGLang file",
        "SGLang 0.5.23, file backend of HiCache, legacy names",
        {
            "checksum": Fault("Raw bytes, no checksum.", _RAW_DAMAGE),
            "layout": Fault(
                "The name has model, rank and number of ranks, and neither dtype nor layout.",
                _LAYOUT,
                _SHORT,
            ),
            "extra": Fault(
                "The LoRA's id is put behind the salt as plain text: one can spell the other.",
                (("test_requests_that_differ_share_nothing", "salt that spells the adapter"),),
            ),
            "fsync": Fault("No fsync.", why=_NO_POWER_CUT),
            "cap": Fault("A size cap only if asked for.", why=_NO_BOUND),
        },
        (
            *_PREFIX_LAW,
            *_SALT,
            *_RANKS,
            *_MODEL,
            *_WHOLE_FILES,
            ("test_requests_that_differ_share_nothing", "adapter"),
            ("test_requests_that_differ_share_nothing", "adapter or none"),
        ),
    ),
}

MAY_UNPICKLE = {OFFENDERS["old"].target}
"""Those that unpickle each plan: forbidden to, as the kit has it, they could show nothing else."""
