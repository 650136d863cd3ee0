"""How large the engine's KV cache is, and what it reuses."""

from __future__ import annotations

import enum

import msgspec

from kvconnect.errors import ConfigError
from kvconnect.options import ByteSize

__all__ = ["CacheLevel", "KVCacheConfig"]


class CacheLevel(enum.IntEnum):
    """Where a block lies; TensorRT-LLM's name for a tier. The connector's stores come in their order, from DISK on."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class KVCacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV cache of an `LLM`.

    Attributes:
        max_tokens: Tokens whose KV the device holds, whole blocks; None for `max_bytes`.
        max_bytes: Bytes of the device's pages, all layer groups together; ``"1GiB"`` or a number.
        block_size: Tokens a block.
        host_cache_bytes: Bytes of host memory that take what leaves the device; 0 for none. The same as ``host://`` as
            the connector.
        host_min_priority: Blocks of a lower retention priority are not kept in host memory.
        enable_block_reuse: Whether requests find the blocks of earlier ones.
        enable_partial_reuse: Whether a block that begins like one on the device gets a copy of what they share.
        reserve_tokens: Tokens that `LLM.resize` can grow the device to; 0 for no more than it has at first.
        reserve_host_bytes: Bytes that it can grow host memory to; 0 for no more than `host_cache_bytes`.
        event_buffer_max_size: Events kept for `LLM.take_events`, and then forgotten, oldest first; 0 for none.
    """

    max_tokens: int | None = None
    max_bytes: int | str = "512MiB"
    block_size: int = 16
    host_cache_bytes: int | str = 0
    host_min_priority: int = 0
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    reserve_tokens: int = 0
    reserve_host_bytes: int | str = 0
    event_buffer_max_size: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be built.

        Raises:
            ConfigError: Names the field.
        """
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, not {self.block_size}")
        if self.max_tokens is not None and self.max_tokens < self.block_size:
            raise ConfigError(f"max_tokens={self.max_tokens} does not hold one block of {self.block_size} tokens")
        for name in ("host_min_priority", "reserve_tokens", "event_buffer_max_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.host_min_priority > 100:
            raise ConfigError(f"host_min_priority must lie in [0, 100], not {self.host_min_priority}")
        if ByteSize(self.host_cache_bytes) and not self.enable_block_reuse:
            raise ConfigError(
                "enable_block_reuse=False leaves nothing to do for host_cache_bytes; leave one of them out"
            )
        if ByteSize(self.reserve_host_bytes) and not ByteSize(self.host_cache_bytes):
            raise ConfigError("reserve_host_bytes needs host_cache_bytes: there is no host memory to grow")

    def num_pages(self, bytes_per_token: int) -> int:
        """Return how many pages a group has at first.

        Raises:
            ConfigError: If it is none.
        """
        if self.max_tokens is not None:
            return self.max_tokens // self.block_size
        count = ByteSize(self.max_bytes) // (bytes_per_token * self.block_size)
        if count < 1:
            raise ConfigError(f"max_bytes={self.max_bytes!r} does not hold one block of {self.block_size} tokens")
        return count
