"""The worker's host memory: page-aligned slots of one block each. The host tier, and the staging for every store."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvconnect.errors import ConfigError
from kvconnect.options import ByteSize
from kvconnect.store import HEADER_BYTES

__all__ = ["PAGE_BYTES", "Arena", "available_memory"]

PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGE_BYTES = 2 << 20

# A first write to a page costs more than the copy: 8 blocks of 96 KiB took 0.6 to 0.9 ms, 0.1 ms on pages made before.
_AHEAD_BYTES = 16 << 20
_AHEAD_STEPS = 4  # or as much as this many steps like the largest one will fill, but no more than
_MAX_AHEAD_BYTES = 256 << 20
_DONTNEED = 4  # MADV_DONTNEED: what was there is gone, the addresses stay
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: faults pages in without changing what they hold


class Arena:
    """Slots of equal size in one allocation, each big enough for a frame of the largest layer group.

    Attributes:
        num_slots: How many there can be: address space, of which only slots that were written to take memory.
        usable_slots: How many the capacity allows until the leader resizes the tier.
        slot_bytes: Bytes a slot, a multiple of the page size.
        slots: uint8 ``(num_slots, slot_bytes)``; pinned when the cache lies on a GPU.
    """

    def __init__(self, capacity: int, payload_bytes: int, *, pinned: bool, reserve: int = 0) -> None:
        """Take the memory; what lies far ahead of the slots in use costs nothing yet.

        Args:
            capacity: Bytes to stay within.
            payload_bytes: Of the largest block.
            pinned: Page-lock it for transfers from and to a GPU.
            reserve: Bytes that a later resize may grow to; pinned memory is taken for them at once.

        Raises:
            ConfigError: If it is more than the machine has left, or smaller than one block.
        """
        self.slot_bytes = -(-(HEADER_BYTES + payload_bytes) // PAGE_BYTES) * PAGE_BYTES
        self.usable_slots = capacity // self.slot_bytes
        self.num_slots = max(capacity, reserve) // self.slot_bytes
        if not self.usable_slots:
            raise ConfigError(
                f"host capacity {ByteSize(capacity)} is smaller than one block of {ByteSize(self.slot_bytes)}"
            )
        left = available_memory()
        if (max(capacity, reserve) if pinned else capacity) > left:
            raise ConfigError(
                f"host capacity {ByteSize(capacity)} is more than the {ByteSize(left)} of memory that are free; "
                "give host://?capacity= a smaller size"
            )
        total = self.num_slots * self.slot_bytes
        self._pinned = pinned
        if pinned:
            self.slots = torch.empty(total, dtype=torch.uint8, pin_memory=True).view(self.num_slots, self.slot_bytes)
        else:
            memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if self.slot_bytes >= _HUGE_PAGE_BYTES // 8:  # first touch is twice as fast; tiny slots would only waste
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.slots = torch.frombuffer(memory, dtype=torch.uint8).view(self.num_slots, self.slot_bytes)
        self._bytes = self.slots.view(-1).numpy().data
        self._ahead = 0 if pinned else -(-_AHEAD_BYTES // self.slot_bytes)
        self._touched = self.num_slots if pinned else 0  # slots whose pages are there, or are being made

    @property
    def memory(self) -> memoryview:
        """All slots' bytes, those in reserve too; they stay where they are."""
        return self._bytes

    def touch_ahead(self, slots: Sequence[int], submit: Callable[[Callable[[], Any]], Any]) -> None:
        """Have the pages of slots that come next made in the background; low slots are handed out first.

        Args:
            slots: Those that a step fills.
            submit: Runs a function on another thread; not called once the whole arena was written to.
        """
        if self._touched >= self.usable_slots:
            return
        most = -(-_MAX_AHEAD_BYTES // self.slot_bytes)
        self._ahead = max(self._ahead, min(_AHEAD_STEPS * len(slots), most))
        end = min(self.usable_slots, max(slots, default=-1) + 1 + self._ahead)
        if end <= self._touched + self._ahead // 2 and end < self.usable_slots:
            return
        start, self._touched = self._touched, end
        submit(lambda: self._populate(start, end))

    def _populate(self, start: int, end: int) -> None:
        """Fault in slots ``[start, end)``; where the kernel cannot, their first write does."""
        self._madvise(start, end, _POPULATE_WRITE)

    def _madvise(self, start: int, end: int, advice: int) -> None:
        address = self.slots.data_ptr() + start * self.slot_bytes
        ctypes.CDLL(None).madvise(  # not mmap.madvise, which would stop every thread meanwhile
            ctypes.c_void_p(address), ctypes.c_size_t((end - start) * self.slot_bytes), advice
        )

    def give_back(self, slots: Sequence[int]) -> None:
        """Return the memory of slots that hold nothing; it reads as zeros, and is taken again by the first write.

        From then on no slot's pages are made ahead: who gave some back does not want them made again.
        """
        self._touched = self.num_slots
        for number in () if self._pinned else slots:
            self._madvise(number, number + 1, _DONTNEED)

    def slot(self, number: int) -> memoryview:
        """Return the writable bytes of one slot.

        Raises:
            IndexError: If there is no such slot; a negative number is none.
        """
        if not 0 <= number < self.num_slots:
            raise IndexError(f"slot {number} of {self.num_slots}")
        start = number * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]


def available_memory() -> int:
    """Return how many bytes can still be used: the machine's, or the control group's if that is less."""
    meminfo = Path("/proc/meminfo").read_text("ascii")
    left = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text("ascii").strip()
        used = int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):  # no control group, or none with a limit
        return left
    return left if limit == "max" else min(left, max(0, int(limit) - used))
