"""The arena: slots that do not overlap, and limits that are said at start."""

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
