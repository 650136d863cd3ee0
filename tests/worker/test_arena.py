"""The arena: slots that do not overlap, and limits that are said at start."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvconnect.errors import ConfigError
from kvconnect.worker.arena import PAGE_BYTES, Arena, available_memory


def test_slots_are_aligned_and_apart() -> None:
    arena = Arena(10 * 8192, 5000, pinned=False)
    assert arena.num_slots == 10
    assert arena.slot_bytes == 8192
    assert arena.slots.data_ptr() % PAGE_BYTES == 0
    for number in range(10):
        arena.slot(number)[:] = bytes([number]) * 8192
    assert [set(arena.slot(number)) for number in range(10)] == [{number} for number in range(10)]


@pytest.mark.parametrize("number", [-1, 10])
def test_slot_that_is_none_is_never_an_index(number: int) -> None:
    with pytest.raises(IndexError):
        Arena(10 * 8192, 5000, pinned=False).slot(number)


def test_capacity_below_a_block_or_above_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="smaller than one block of"):
        Arena(8191, 5000, pinned=False)
    with pytest.raises(ConfigError, match="of memory that are free"):
        Arena(available_memory() * 2, 5000, pinned=False)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14), reason="this kernel has no MADV_POPULATE_WRITE"
)
def test_pages_that_come_next_are_made_ahead_once_and_keep_what_they_hold() -> None:
    arena = Arena(256 << 20, 60 << 10, pinned=False)
    asked: list[Callable[[], Any]] = []
    before = resident_bytes()
    arena.touch_ahead([], asked.append)
    arena.slot(3)[:5] = b"bytes"
    asked.pop()()
    made = resident_bytes() - before
    assert made == pytest.approx(16 << 20, rel=0.2)  # not the whole arena
    assert bytes(arena.slot(3)[:5]) == b"bytes"
    arena.touch_ahead([0, 1], asked.append)
    assert not asked  # enough is there
    arena.touch_ahead(range(200), asked.append)
    asked.pop()()
    assert resident_bytes() - before > 200 * arena.slot_bytes
    arena.touch_ahead([arena.num_slots - 1], asked.append)
    asked.pop()()
    arena.touch_ahead([arena.num_slots - 1], asked.append)
    assert not asked  # all of it is there
    assert resident_bytes() - before == pytest.approx(arena.num_slots * arena.slot_bytes, rel=0.1)


def test_memory_of_slots_that_are_not_used_is_given_back_and_can_be_had_again() -> None:
    arena = Arena(8 * PAGE_BYTES, 100, pinned=False, reserve=32 * PAGE_BYTES)
    assert (arena.usable_slots, arena.num_slots) == (8, 32)
    for number in range(32):
        arena.slot(number)[:4] = b"kvkv"
    arena.give_back([3, 31])
    assert [bytes(arena.slot(number)[:4]) for number in (2, 3, 4, 30, 31)] == [
        b"kvkv",
        b"\0\0\0\0",
        b"kvkv",
        b"kvkv",
        b"\0\0\0\0",
    ]
    arena.slot(31)[:4] = b"back"
    assert bytes(arena.slot(31)[:4]) == b"back"


def test_memory_that_was_given_back_is_not_made_ahead() -> None:
    arena = Arena(64 * PAGE_BYTES, 100, pinned=False)
    made: list[object] = []
    arena.give_back(range(60))
    arena.touch_ahead([0, 1], made.append)
    assert made == []
