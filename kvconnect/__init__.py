"""Load and save the paged KV cache of any LLM engine through connectors that anyone can write.

The leader decides, the worker moves, the engine calls both through one protocol. Importing this package imports no
torch: `Leader`, `Worker`, `LLM` and what goes with it are loaded when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from kvconnect.options import ByteSize, Options, Secret, specs_from_toml
from kvconnect.protocol import (
    Capabilities,
    Connector,
    EngineCapabilities,
    LeaderContext,
    Retention,
    TokenRange,
    WorkerContext,
    hookimpl,
)
from kvconnect.store import BlockStore, StoreCapabilities, StoreContext, WrapperStore

if TYPE_CHECKING:
    from kvconnect.engine import LLM, CacheLevel, KVCacheConfig, SamplingParams
    from kvconnect.leader import Leader
    from kvconnect.worker import Worker

__all__ = [
    "LLM",
    "BlockStore",
    "ByteSize",
    "CacheLevel",
    "Capabilities",
    "Connector",
    "EngineCapabilities",
    "KVCacheConfig",
    "Leader",
    "LeaderContext",
    "Options",
    "Retention",
    "SamplingParams",
    "Secret",
    "StoreCapabilities",
    "StoreContext",
    "TokenRange",
    "Worker",
    "WorkerContext",
    "WrapperStore",
    "hookimpl",
    "specs_from_toml",
]

_LAZY = {
    "LLM": "kvconnect.engine",
    "CacheLevel": "kvconnect.engine",
    "KVCacheConfig": "kvconnect.engine",
    "SamplingParams": "kvconnect.engine",
    "Leader": "kvconnect.leader",
    "Worker": "kvconnect.worker",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch, or is rarely needed, when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'kvconnect' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
