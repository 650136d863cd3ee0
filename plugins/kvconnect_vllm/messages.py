"""What travels between vLLM's scheduler and its workers beside our plan and report. vLLM carries it its own way."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

__all__ = ["Handshake", "StepPlan", "StepReports"]


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # Any where vLLM is not installed
    """One rank's `get_handshake_metadata`, and whose it is: `MultiConnector` gives every child the first one's."""

    data: bytes
    configuration: str


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers of one step get.

    Attributes:
        step: Its number.
        plan: The leader's plan, None if there is none.
        idle: Whether the step computes nothing.
        loading: Parked requests whose load ends with this step, and the pages that it fills, by layer group.
        lost_pages: Pages that nobody will load although vLLM counts on them.
        parking: Requests that vLLM parks from this step on.
        lost_loads: Parked requests whose load nobody waits for any more.
        saving: Requests that ended since the last step and whose pages wait for their saves.
        lost_saves: Requests that ended and whose saves nobody waits for any more.
    """

    step: int
    plan: bytes | None
    idle: bool = False
    loading: dict[str, tuple[frozenset[int], ...]] = field(default_factory=dict)
    lost_pages: frozenset[int] = frozenset()
    parking: frozenset[str] = frozenset()
    lost_loads: frozenset[str] = frozenset()
    saving: frozenset[str] = frozenset()
    lost_saves: frozenset[str] = frozenset()


@dataclass
class StepReports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the ranks of one step say.

    Attributes:
        reports: By rank, `build_worker_report`.
        bad_pages: Pages that the ranks' own loads did not fill, where vLLM takes back single pages.
        loads_ended: By rank, requests whose asynchronous load touches no page any more.
    """

    reports: dict[int, bytes] = field(default_factory=dict)
    bad_pages: frozenset[int] = frozenset()
    loads_ended: dict[int, frozenset[str]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReports:
        """Join the words of different ranks."""
        assert isinstance(other, StepReports), f"a report of another connector: {type(other).__name__}"
        return StepReports(
            reports=self.reports | other.reports,
            bad_pages=self.bad_pages | other.bad_pages,
            loads_ended=self.loads_ended | other.loads_ended,
        )
