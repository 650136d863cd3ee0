"""What a connector is: a torch-free class that makes one leader and, a rank, one worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from kvconnect.protocol.capabilities import Capabilities, EngineCapabilities
from kvconnect.protocol.keys import Namespace

if TYPE_CHECKING:
    from kvconnect.protocol.hookspecs import LeaderHooks, WorkerHooks

__all__ = ["Connector", "LeaderContext", "WorkerContext"]


class LeaderContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a leader is told when it is made.

    Attributes:
        namespace: What the keys of this engine's blocks start with, still without the block size: that comes with the
            handshake.
        engine: What the engine can do.
        num_ranks: Workers that will speak in the handshake.
        tiers: The stores below the arena (`kvconnect.store.tier.Tier`), in order; empty for connectors of their own.
    """

    namespace: Namespace
    engine: EngineCapabilities
    num_ranks: int = 1
    tiers: tuple[Any, ...] = ()


class WorkerContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told when it is made.

    Attributes:
        namespace: The same as the leader's.
        engine: What the engine can do.
        rank: This worker's number.
        num_ranks: Workers of the engine.
        local_ranks: Workers of the engine on this machine; they share its memory.
        tiers: The same as the leader's.
    """

    namespace: Namespace
    engine: EngineCapabilities
    rank: int = 0
    num_ranks: int = 1
    local_ranks: int = 1
    tiers: tuple[Any, ...] = ()


class Connector(ABC):
    """Base of connectors that bring their own halves; import torch in `make_worker`, not at the top.

    Attributes:
        Options: What users may set.
        capabilities: What it can do; read before anything is made.
    """

    Options: ClassVar[type[msgspec.Struct]]
    capabilities: ClassVar[Capabilities]

    @abstractmethod
    def make_leader(self, options: Any, context: LeaderContext) -> LeaderHooks:
        """Make the scheduler-side half: a `kvconnect.leader.Leader`."""

    @abstractmethod
    def make_worker(self, options: Any, context: WorkerContext) -> WorkerHooks:
        """Make one rank's half: a `kvconnect.worker.Worker`."""
