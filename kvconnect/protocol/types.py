"""The values that cross between an engine and a connector. Own types, never an engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from kvconnect.protocol.keys import MediaSpan
from kvconnect.protocol.retention import Retention

__all__ = ["PROTOCOL_VERSION", "CacheUse", "Finished", "Match", "RequestView", "ScheduledRequest", "SchedulerOutput"]

PROTOCOL_VERSION = 1
"""The protocol that hooks, plans and reports follow; a plugin written for another one is refused."""

CacheUse = Literal["both", "read", "write", "none"]
"""What a request may do with the cache: load and save, only load, only save, neither."""


class Match(NamedTuple):
    """Answer to `get_num_new_matched_tokens`.

    Attributes:
        num_tokens: Tokens that could be loaded beyond those already computed, whole blocks; None = ask again next step.
        load_async: They arrive after this step; the engine parks the request until its load is reported.
    """

    num_tokens: int | None
    load_async: bool


class Finished(NamedTuple):
    """Request ids whose asynchronous transfers ended; each id is reported once a rank.

    Attributes:
        saved: Their saves have read the pages; the engine may free them.
        loaded: Their loads have ended, well or not.
        failed: Those of `loaded` that did not get all they asked for.
    """

    saved: frozenset[str]
    loaded: frozenset[str]
    failed: frozenset[str]


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """What a connector may know of a request.

    Attributes:
        request_id: Unique among the engine's living requests.
        tokens: All tokens known now, the prompt and what was decoded and accepted. The engine's own sequence: valid
            during the call, not to be changed or kept. An ``array("I")`` is hashed without a conversion.
        num_prompt_tokens: How many of them are the prompt.
        cache_salt: Keeps callers apart; None for none.
        adapter: Content digest of the adapter (LoRA) in use, None for none.
        media: What fills positions that are not plain tokens.
        cache: What the request may do with the cache.
        uncacheable: Why this request must not be cached (something in it that no key covers), ``""`` if it may.
        retention: Which of its blocks to keep longer or to give up sooner than others; None if it says nothing. It
            changes no token: a connector may ignore it.
    """

    request_id: str
    tokens: Sequence[int]
    num_prompt_tokens: int
    cache_salt: str | None = None
    adapter: bytes | None = None
    media: tuple[MediaSpan, ...] = ()
    cache: CacheUse = "both"
    uncacheable: str = ""
    retention: Retention | None = None


class ScheduledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request's part of a step.

    Attributes:
        request_id: As in its `RequestView`.
        num_computed_tokens: Tokens whose KV is in the pages before this step: found on the device, whole blocks or the
            first part of one, loaded, or computed.
        num_scheduled_tokens: Tokens that this step computes, from there on. With an engine that plans ahead the last of
            them may be one that nobody knows yet: then they reach beyond `num_tokens`. Drafts of speculative decoding
            that may still be rejected do not count; those that were accepted are computed tokens of the next step.
        num_tokens: Tokens of the request that are known now, all of them.
        new_tokens: The last of those: what became known since the last output that named the request (or since its
            `on_new_request` or `request_reset`), so that a leader misses none.
        block_ids: For each layer group, the page of block ``i`` at index ``i``; -1 where a block has no page. The
            engine's own lists: valid during the call.
    """

    request_id: str
    num_computed_tokens: int
    num_scheduled_tokens: int
    num_tokens: int
    new_tokens: Sequence[int]
    block_ids: Sequence[Sequence[int]]


class SchedulerOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step is going to do; may be empty.

    Attributes:
        step: Counts steps from 0, never repeats.
        new_requests: Requests scheduled for the first time since they arrived or were reset; each exactly once.
        cached_requests: Requests that an earlier step named already.
        preempted: Requests that lost their pages since the last step.
    """

    step: int
    new_requests: tuple[ScheduledRequest, ...] = ()
    cached_requests: tuple[ScheduledRequest, ...] = ()
    preempted: tuple[str, ...] = ()
