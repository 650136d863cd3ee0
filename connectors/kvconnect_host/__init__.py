"""The offload connector, and with it the host tier: ``host://?capacity=4GiB``. The smallest connector to read.

Alone it keeps blocks in host memory; with stores behind it in the list, they lie below that memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from kvconnect.options import ByteSize, Options, Secret
from kvconnect.protocol import Capabilities, Connector, LeaderContext, WorkerContext, hookimpl
from kvconnect.protocol.retention import check_priority
from kvconnect.store import FrameTagger

if TYPE_CHECKING:
    from kvconnect.leader import OffloadLeader
    from kvconnect.worker import OffloadWorker

__all__ = ["HostConnector", "HostOptions", "kvconnect_register"]


class HostOptions(Options, frozen=True):
    """Options of ``host://``.

    Attributes:
        capacity: Host bytes of the whole engine, divided by the ranks on the machine.
        reserve: Host bytes that the tier may be resized to while the engine runs; 0 for no more than `capacity`. On a
            machine without a GPU they are addresses, and take memory only when they are used.
        key_secret: Keys the block hashes, so that who can list a store cannot confirm a guessed prompt; the same for
            everyone who shares it.
        frame_secret: Tags every frame, so that who can write to a store but does not know it cannot make us load forged
            KV; the same for everyone who shares it, 16 bytes or more. Needs the extra ``keyed``.
        load_policy: ``always`` loads what the stores have; ``cost`` computes what they would take longer to bring, by
            the measured rates of stores and prefill.
        min_priority: 0 to 100; blocks of requests that want less for them are not saved (TensorRT-LLM's
            ``secondary_offload_min_priority``).
    """

    capacity: ByteSize = ByteSize("2GiB")
    reserve: ByteSize = ByteSize(0)
    key_secret: Secret = Secret("")
    frame_secret: Secret = Secret("")
    load_policy: Literal["always", "cost"] = "always"
    min_priority: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If `min_priority` is none.
        """
        check_priority("min_priority", self.min_priority)


class HostConnector(Connector):
    """One leader and one worker for every store."""

    Options = HostOptions
    capabilities = Capabilities(
        async_load=True,
        several_groups=True,
        several_ranks=True,
        batch_claim=True,
        suspend=True,
        needs=("handshake", "reports"),
    )

    def make_leader(self, options: HostOptions, context: LeaderContext) -> OffloadLeader:
        """Make the offload leader."""
        from kvconnect.leader import OffloadLeader  # late: listing connectors needs no leader

        return OffloadLeader(
            context,
            key_secret=options.key_secret.encode(),
            load_policy=options.load_policy,
            min_priority=options.min_priority,
        )

    def make_worker(self, options: HostOptions, context: WorkerContext) -> OffloadWorker:
        """Make one rank's offload worker."""
        from kvconnect.worker import OffloadWorker  # late: it imports torch

        tagger = FrameTagger(options.frame_secret.encode()) if options.frame_secret else None
        return OffloadWorker(context, capacity=options.capacity, reserve=options.reserve, tagger=tagger)


@hookimpl
def kvconnect_register(registry: Any) -> None:
    """Register ``host``."""
    registry.add("host", "kvconnect_host:HostConnector")
