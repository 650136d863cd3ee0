"""One store of a configuration: its class, its options, and how the offload connector uses it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kvconnect.errors import ConfigError
from kvconnect.options import Options
from kvconnect.protocol.retention import check_priority
from kvconnect.store.base import BlockStore, StoreContext

__all__ = ["Tier", "TierOptions"]


class TierOptions(Options, frozen=True):
    """Options that every store takes beside its own.

    Attributes:
        mode: ``r`` only promotes from it, ``w`` only demotes to it, ``rw`` both.
        codec: How payloads rest in it; ``zstd`` costs more time than a local disk does, it is for capacity.
        timeout_s: Seconds after which a call to it counts as failed.
        write: ``through`` sends a block down as soon as it is computed; ``second_hit`` when a second request has it,
            for media on which writing costs more than reading.
        blocks: Which go down: ``all``, those of ``prompts`` only, or only ``decoded`` ones, of which some tokens were
            generated; a decoded block becomes a prompt's with the first request that sends it.
        min_priority: 0 to 100; blocks of a lower retention priority do not go down.
        remember_s: Seconds for which an answer that a block is there is taken for granted.
        hold_s: Seconds for which blocks of a suspended request are held there without a renewal: what a process that
            died had suspended can be evicted after that.
    """

    mode: Literal["r", "w", "rw"] = "rw"
    codec: Literal["none", "zstd"] = "none"
    timeout_s: float = 10.0
    write: Literal["through", "second_hit"] = "through"
    blocks: Literal["all", "prompts", "decoded"] = "all"
    min_priority: int = 0
    remember_s: float = 10.0
    hold_s: float = 3600.0

    def __post_init__(self) -> None:
        """Refuse a time that has passed before it begins, and a priority that is none.

        Raises:
            ConfigError: If the timeout or the hold's length is not positive, or the priority is none.
        """
        check_priority("min_priority", self.min_priority)
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be more than 0, not {self.timeout_s}")
        if not self.hold_s > 0:
            raise ConfigError(f"hold_s must be more than 0, not {self.hold_s}")


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """A store, ready to be opened in any process.

    Attributes:
        name: The name or scheme it was configured under.
        store_class: What to open.
        options: Its converted options.
        use: How it is used.
    """

    name: str
    store_class: type[BlockStore]
    options: Any
    use: TierOptions = TierOptions()

    def open(self) -> BlockStore:
        """Open the store in this process, on the calling thread."""
        return self.store_class(self.options, StoreContext(name=self.name, timeout_s=self.use.timeout_s))

    def blocks_a_call(self, payload_bytes: int) -> int:
        """Return how many blocks of that size a worker moves in one call.

        It is bounded, so that several threads share a long list and a deadline stays fair.
        """
        can = self.store_class.capabilities
        return max(1, min(can.call_blocks, can.call_bytes // payload_bytes))
