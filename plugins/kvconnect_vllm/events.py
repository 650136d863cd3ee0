"""Our events as vLLM publishes them, for routers that send a request where its KV is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, AllBlocksCleared, BlockRemoved, BlockStored

from kvconnect.protocol import BlocksRemoved, BlocksStored, CacheCleared

__all__ = ["to_vllm_events"]


def to_vllm_events(events: Sequence[Any]) -> list[Any]:
    """Translate what a leader's `take_events` gave; what is no event of the protocol is left out.

    So is `BlocksUpdated`, for vLLM has no event of priorities.

    The hashes are ours: with the parent's hash and the tokens in the event, a subscriber can follow a prefix, under any
    engine and in any process.
    """
    translated: list[Any] = []
    for event in events:
        with contextlib.suppress(TypeError, AttributeError):  # fields of no shape that could be published
            translated += _translate(event)
    return translated


def _translate(event: Any) -> list[Any]:
    if isinstance(event, BlocksStored):
        return [
            BlockStored(
                block_hashes=list(event.block_hashes),
                parent_block_hash=event.parent_hash,
                token_ids=list(event.tokens),
                block_size=event.block_size,
                lora_id=None,
                medium=_medium(event.tier),
                lora_name=None,
                group_idx=event.group,
                ownership=event.tier_name,
            )
        ]
    if isinstance(event, BlocksRemoved):
        return [
            BlockRemoved(
                block_hashes=list(event.block_hashes),
                medium=_medium(event.tier),
                group_idx=event.group,
                ownership=event.tier_name,
            )
        ]
    return [AllBlocksCleared()] if isinstance(event, CacheCleared) else []


def _medium(tier: int) -> str:
    return str(MEDIUM_STORAGE if tier else MEDIUM_CPU)
