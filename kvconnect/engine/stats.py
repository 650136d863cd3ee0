"""Counts blocks: for each request, and for all of them. A block counts once a layer group and request's run."""

from __future__ import annotations

import msgspec

__all__ = ["BlockCounts"]


class BlockCounts(msgspec.Struct):
    """What became of blocks. Of a prompt's full blocks that leave a token to compute, each is reused, loaded or missed.

    Attributes:
        allocated: Pages taken: to compute into, to load into, to copy into.
        reused: Prompt blocks whose pages were on the device.
        partially_reused: Prompt blocks of which a part was copied from a page on the device.
        loaded: Prompt blocks that came through the connector.
        missed: Prompt blocks that had to be computed.
    """

    allocated: int = 0
    reused: int = 0
    partially_reused: int = 0
    loaded: int = 0
    missed: int = 0

    def add(self, other: BlockCounts) -> None:
        """Add another's counts."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def hit_rate(self) -> float:
        """Share of prompt blocks that were not missed; 0 if there were none."""
        hits = self.reused + self.loaded
        return hits / (hits + self.missed) if hits + self.missed else 0.0
