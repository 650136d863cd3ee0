"""What a leader says of blocks that came and went: for routers that send a request where its KV is.

Hashes are those of the keys, the same under every engine and in every process. With the parent's hash and the tokens, a
listener can follow a prefix without hashing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvconnect.protocol.keys import BlockHash
from kvconnect.protocol.retention import DEFAULT_PRIORITY

__all__ = ["BlocksRemoved", "BlocksStored", "BlocksUpdated", "CacheCleared", "CacheEvent"]


class BlocksStored(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that can be loaded from now on, consecutive in one sequence.

    Attributes:
        block_hashes: Their content names, in order.
        parent_hash: Of the block before the first, None if that begins the sequence.
        tokens: Theirs, ``len(block_hashes) * block_size``.
        block_size: Tokens a block.
        group: Their layer group.
        tier: 0 for host memory, then the stores in the order given; -1 for an engine's own pages.
        tier_name: ``"host"``, the store's name, or ``"device"``.
        priority: With which they are kept there; stores keep all alike.
    """

    block_hashes: tuple[BlockHash, ...]
    parent_hash: BlockHash | None
    tokens: Sequence[int]
    block_size: int
    group: int
    tier: int
    tier_name: str
    priority: int = DEFAULT_PRIORITY


class BlocksRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that cannot be loaded from a tier any more. What a store drops by itself is noticed when it is missed.

    Attributes:
        block_hashes: Their content names.
        group: Their layer group.
        tier: 0 for host memory, then the stores in the order given; -1 for an engine's own pages.
        tier_name: ``"host"``, the store's name, or ``"device"``.
    """

    block_hashes: tuple[BlockHash, ...]
    group: int
    tier: int
    tier_name: str


class BlocksUpdated(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that a request wants kept with another priority. That one reverts after its time is not told.

    Attributes:
        block_hashes: Their content names.
        group: Their layer group.
        tier: 0 for host memory, then the stores in the order given; -1 for an engine's own pages.
        tier_name: ``"host"``, the store's name, or ``"device"``.
        priority: The new one.
    """

    block_hashes: tuple[BlockHash, ...]
    group: int
    tier: int
    tier_name: str
    priority: int


class CacheCleared(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing that was stored before can be loaded by this engine any more: its cache was reset."""


CacheEvent = BlocksStored | BlocksRemoved | BlocksUpdated | CacheCleared
"""What `take_events` gives out."""
