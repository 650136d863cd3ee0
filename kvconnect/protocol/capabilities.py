"""What each side can do, said before the first step; what does not fit is refused at start, with the reason."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvconnect.errors import UnsupportedError

__all__ = ["Capabilities", "EngineCapabilities", "check_fit"]


class EngineCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine offers to a connector.

    Attributes:
        can_ask_again: ``Match(None, False)`` is understood: the request is asked about again next step.
        load_errors: How finely a failed load can be reported: not at all, a whole request, or single blocks.
        sync_load: A step can load what it computes on, and take it back if the load fails. Without it only asynchronous
            loads are offered.
        async_load: A request can be parked while its blocks arrive.
        reports: Worker reports reach the leader after every step.
        handshake: Worker handshakes reach the leader before the first request.
        steps_when_idle: The engine keeps stepping while `has_pending_work` says so.
        layer_hooks: `wait_for_layer_load` and `save_kv_layer` are called for every layer.
        batch_claim: `claim_match` is called for a whole batch before anything is allocated.
        takes_events: `take_events` is called; without it nothing is collected for it.
        max_batch_tokens: Tokens that one step computes at most; 0 if the engine does not say.
    """

    can_ask_again: bool = False
    load_errors: Literal["none", "request", "block"] = "none"
    sync_load: bool = True
    async_load: bool = False
    reports: bool = False
    handshake: bool = False
    steps_when_idle: bool = False
    layer_hooks: bool = False
    batch_claim: bool = False
    takes_events: bool = False
    max_batch_tokens: int = 0


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a connector offers to an engine, and what it cannot do without.

    Attributes:
        durable: Blocks survive the process.
        shared: Blocks that one process saved, another can load.
        async_load: May answer ``Match(n, True)``.
        several_groups: Serves caches with more than one layer group.
        several_ranks: Serves more than one rank.
        batch_claim: Implements `claim_match` and `release_match`.
        suspend: Implements `suspend`, `prefetch`, `resume` and `resize_tier`.
        needs: Names of `EngineCapabilities` fields that must be true.
    """

    durable: bool = False
    shared: bool = False
    async_load: bool = False
    several_groups: bool = False
    several_ranks: bool = False
    batch_claim: bool = False
    suspend: bool = False
    needs: tuple[str, ...] = ()


def check_fit(
    name: str, connector: Capabilities, engine: EngineCapabilities, *, num_ranks: int, num_groups: int = 1
) -> None:
    """Refuse a connector that cannot work under this engine.

    Raises:
        UnsupportedError: Names the connector and what is missing.
    """
    missing = [need for need in connector.needs if not getattr(engine, need, False)]
    if missing:
        raise UnsupportedError(f"connector {name!r} needs an engine with {', '.join(missing)}; this one has not")
    if num_ranks > 1 and not connector.several_ranks:
        raise UnsupportedError(f"connector {name!r} serves one rank, and this engine has {num_ranks}")
    if num_groups > 1 and not connector.several_groups:
        raise UnsupportedError(f"connector {name!r} serves one layer group, and this cache has {num_groups}")
    if not engine.sync_load and not connector.async_load:
        raise UnsupportedError(
            f"connector {name!r} loads within the step that needs the blocks, and this engine could not take such a "
            "load back if it failed; it needs one that loads asynchronously"
        )
