"""Counts blocks: for each request, and for all of them. A block counts once a layer group and request's run."""

from __future__ import annotations

import msgspec

__all__ = ["BlockCounts"]


class BlockCounts(msgspec.Struct):
    """What became of blocks. Of a prompt's full blocks that leave a token to compute, each is reused, loaded or missed.

    A run counts when it begins: if it is given up for a load that failed, the next one counts anew.

    Attributes:
        allocated: Pages taken: to compute into, and to load into.
        new: Those of them that are computed into, what was copied into some before included.
        reused: Prompt blocks whose pages were on the device.
        partially_reused: Prompt blocks of which a part was copied from a page on the device.
        loaded: Prompt blocks that came through the connector.
        restored: Pages filled through the connector when a suspended request was resumed.
        missed: Prompt blocks that had to be computed.
        allocated_bytes: Of the pages taken, all ranks together.
        loaded_bytes: Of those among them that were loaded into, also by a resume.
    """

    allocated: int = 0
    new: int = 0
    reused: int = 0
    partially_reused: int = 0
    loaded: int = 0
    restored: int = 0
    missed: int = 0
    allocated_bytes: int = 0
    loaded_bytes: int = 0

    def add(self, other: BlockCounts) -> None:
        """Add another's counts."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def hit_rate(self) -> float:
        """Share of prompt blocks that were not missed; 0 if there were none."""
        hits = self.reused + self.loaded
        return hits / (hits + self.missed) if hits + self.missed else 0.0
