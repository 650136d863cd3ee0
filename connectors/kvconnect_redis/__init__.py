"""Blocks in Redis or Valkey: ``redis://host:6379?prefix=kv:``. Many machines share them."""

from typing import Any

from kvconnect.protocol import hookimpl
from kvconnect_redis.store import RedisOptions, RedisStore

__all__ = ["RedisOptions", "RedisStore", "kvconnect_register"]


@hookimpl
def kvconnect_register(registry: Any) -> None:
    """Register ``redis``."""
    registry.add("redis", "kvconnect_redis:RedisStore", schemes=("rediss", "unix", "redis+cluster", "rediss+cluster"))
