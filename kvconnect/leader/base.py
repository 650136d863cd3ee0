"""Base of leaders: every hook with a harmless body. Override what yours does; no decorator, no default values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvconnect.errors import UnsupportedError
from kvconnect.protocol import CacheEvent, Match, RequestView, SchedulerOutput
from kvconnect.protocol.messages import Plan

__all__ = ["Leader"]


class Leader:
    """A leader that never offers anything; the contract of each hook is in `kvconnect.protocol.hookspecs`."""

    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        """Ignore it."""

    def on_new_request(self, request: RequestView) -> None:
        """Ignore it."""

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        """Offer nothing."""
        return Match(0, False)

    def claim_match(self, request: RequestView, num_tokens: int) -> int:
        """Refuse: the capability `batch_claim` is not declared."""
        raise UnsupportedError(f"{type(self).__name__} does not declare 'batch_claim'")

    def release_match(self, request: RequestView) -> None:
        """Refuse: the capability `batch_claim` is not declared."""
        raise UnsupportedError(f"{type(self).__name__} does not declare 'batch_claim'")

    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        """Ignore it."""

    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        """Ignore it."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        """Plan nothing."""
        return Plan(step=scheduler_output.step).encode()

    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        """Ignore it."""

    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Need none of its pages."""
        return False

    def request_reset(self, request: RequestView) -> None:
        """Ignore it."""

    def suspend(self, request: RequestView, block_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
        """Refuse: the capability `suspend` is not declared."""
        raise UnsupportedError(f"{type(self).__name__} does not declare 'suspend'")

    def prefetch(self, request: RequestView, tier: int) -> bool:
        """Refuse: the capability `suspend` is not declared."""
        raise UnsupportedError(f"{type(self).__name__} does not declare 'suspend'")

    def resume(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Refuse: the capability `suspend` is not declared."""
        raise UnsupportedError(f"{type(self).__name__} does not declare 'suspend'")

    def resize_tier(self, tier: int, num_bytes: int) -> bool:
        """Refuse: the capability `suspend` is not declared."""
        raise UnsupportedError(f"{type(self).__name__} does not declare 'suspend'")

    def has_pending_work(self) -> bool:
        """Have none."""
        return False

    def take_events(self) -> Sequence[CacheEvent]:
        """Have none."""
        return ()

    def get_stats(self) -> dict[str, Any]:
        """Have none."""
        return {}

    def reset_cache(self) -> bool:
        """Have nothing to forget."""
        return True

    def shutdown(self) -> None:
        """Have nothing to let go of."""
