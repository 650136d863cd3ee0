"""Base of workers: every hook with a harmless body. Override what yours does; no decorator, no default values."""

from __future__ import annotations

from typing import Any

from kvconnect.errors import MetadataError
from kvconnect.protocol import Finished, Handshake, KVCacheLayout, Plan, Report
from kvconnect.protocol.messages import GroupHandshake

__all__ = ["Worker"]

_NOTHING: frozenset[str] = frozenset()


class Worker:
    """A worker that moves nothing; the contract of each hook is in `kvconnect.protocol.hookspecs`."""

    _rank = 0
    _layout: KVCacheLayout | None = None
    _step = -1

    def register_kv_caches(self, layout: KVCacheLayout) -> None:
        """Keep the layout."""
        self._layout = layout

    def get_handshake_metadata(self) -> bytes:
        """Describe the layout; one slot, so that a leader that looks does not take it for a refusal."""
        groups = self._layout.groups if self._layout is not None else ()
        described = tuple(
            GroupHandshake(group.block_size, group.window or 0, len(group.layers), group.payload_bytes, 0)
            for group in groups
        )
        return Handshake(rank=self._rank, num_slots=1, groups=described).encode()

    def handle_preemptions(self, meta: bytes) -> None:
        """Have no transfer running."""

    def bind_connector_meta(self, meta: bytes) -> None:
        """Remember the step, if the plan is one of ours."""
        try:
            self._step = Plan.decode(meta).step
        except MetadataError:  # a leader may speak a format of its own to its worker
            self._step = -1

    def start_load_kv(self) -> None:
        """Load nothing."""

    def wait_for_layer_load(self, layer: int) -> None:
        """Have nothing to wait for."""

    def save_kv_layer(self, layer: int) -> None:
        """Save nothing."""

    def wait_for_save(self) -> None:
        """Have nothing to wait for."""

    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        """Have finished nothing."""
        return Finished(_NOTHING, _NOTHING, _NOTHING)

    def get_block_ids_with_load_errors(self) -> list[set[int]]:
        """Have failed at nothing."""
        return [set() for _ in self._layout.groups] if self._layout is not None else []

    def build_worker_report(self) -> bytes:
        """Report the step and nothing else."""
        return Report(step=self._step, rank=self._rank).encode()

    def get_stats(self) -> dict[str, Any]:
        """Have none."""
        return {}

    def shutdown(self) -> None:
        """Have nothing to let go of."""
