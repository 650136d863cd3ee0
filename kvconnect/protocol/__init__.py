"""The contract between engines and connectors: hooks, values, layout, keys, plans and reports. Imports no torch."""

from kvconnect.protocol.capabilities import Capabilities, EngineCapabilities, check_fit
from kvconnect.protocol.connector import Connector, LeaderContext, WorkerContext
from kvconnect.protocol.events import BlocksRemoved, BlocksStored, BlocksUpdated, CacheCleared, CacheEvent
from kvconnect.protocol.hookspecs import LeaderHooks, RegistrationHooks, WorkerHooks, hookimpl, hookspec
from kvconnect.protocol.identity import (
    adapter_digest,
    check_prefix_law,
    checkpoint_digest,
    model_identity,
    rope_settings,
)
from kvconnect.protocol.keys import (
    BlockChain,
    BlockHash,
    BlockKey,
    MediaSpan,
    Namespace,
    block_key,
    is_private,
    private_hash,
    split_key,
)
from kvconnect.protocol.layout import KVCacheLayout, LayerGroup, Region, first_needed_block, longest_match
from kvconnect.protocol.messages import Handshake, LoadError, Move, PackedMoves, Plan, Report
from kvconnect.protocol.retention import DEFAULT_PRIORITY, Retention, TokenRange
from kvconnect.protocol.types import (
    PROTOCOL_VERSION,
    CacheUse,
    Finished,
    Match,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)

__all__ = [
    "DEFAULT_PRIORITY",
    "PROTOCOL_VERSION",
    "BlockChain",
    "BlockHash",
    "BlockKey",
    "BlocksRemoved",
    "BlocksStored",
    "BlocksUpdated",
    "CacheCleared",
    "CacheEvent",
    "CacheUse",
    "Capabilities",
    "Connector",
    "EngineCapabilities",
    "Finished",
    "Handshake",
    "KVCacheLayout",
    "LayerGroup",
    "LeaderContext",
    "LeaderHooks",
    "LoadError",
    "Match",
    "MediaSpan",
    "Move",
    "Namespace",
    "PackedMoves",
    "Plan",
    "Region",
    "RegistrationHooks",
    "Report",
    "RequestView",
    "Retention",
    "ScheduledRequest",
    "SchedulerOutput",
    "TokenRange",
    "WorkerContext",
    "WorkerHooks",
    "adapter_digest",
    "block_key",
    "check_fit",
    "check_prefix_law",
    "checkpoint_digest",
    "first_needed_block",
    "hookimpl",
    "hookspec",
    "is_private",
    "longest_match",
    "model_identity",
    "private_hash",
    "rope_settings",
    "split_key",
]
