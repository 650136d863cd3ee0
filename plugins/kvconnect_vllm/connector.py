"""vLLM's connector: every method of `KVConnectorBase_V1` that concerns us, in one line each.

Read `scheduler_side.py` and `worker_side.py` for what they do; vLLM makes one object of this class in its scheduler's
process and one in each worker's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvconnect_vllm.config import read_setup, uses_layer_hooks
from kvconnect_vllm.drain import LocalEngines
from kvconnect_vllm.events import to_vllm_events
from kvconnect_vllm.logs import join_vllm_log
from kvconnect_vllm.messages import Handshake, StepPlan, StepReports
from kvconnect_vllm.metrics import KVConnectProm, KVConnectStats, StatsSource
from kvconnect_vllm.scheduler_side import SchedulerSide
from kvconnect_vllm.worker_side import WorkerSide

__all__ = ["KVConnect"]

logger = logging.getLogger(__name__)


class KVConnect(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # Any where vLLM is not installed
    """Any kvconnect connector, as vLLM calls it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Open one half.

        Raises:
            KVConnectError: If vLLM is set up in a way that cannot be served, or the connector is configured wrongly;
                the message says what to change.
        """
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        join_vllm_log()
        setup = read_setup(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._local = LocalEngines.of(f"{vllm_config.kv_transfer_config.engine_id} {setup.configuration}")
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._local.scheduler = SchedulerSide(setup)
            self._stats = StatsSource("leader", self._scheduler.leader)
            logger.info("kvconnect: connector %s under vLLM, %d rank(s)", setup.resolved.name, setup.num_ranks)
            if setup.resolved.tiers and not vllm_config.shutdown_timeout:
                logger.info(
                    "kvconnect: with shutdown_timeout=0 a stopping server does not wait for blocks on their way to a "
                    "store; --shutdown-timeout 30 lets them arrive"
                )
        else:
            rank = vllm_config.parallel_config.rank
            self._worker = self._local.worker = WorkerSide(setup, vllm_config, kv_cache_config, rank)
            self._stats = StatsSource("worker", self._worker.worker)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what is saved: a lost save is a miss later."""
        return False

    @property
    def scheduler_side(self) -> SchedulerSide:
        """The half that lives in the scheduler's process."""
        assert self._scheduler is not None, "this is a worker's connector"
        return self._scheduler

    @property
    def worker_side(self) -> WorkerSide:
        """The half that lives in a worker's process."""
        assert self._worker is not None, "this is the scheduler's connector"
        return self._worker

    # -- worker ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take the cache."""
        self.worker_side.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> Handshake:
        """Say what the leader must know of it."""
        return self.worker_side.get_handshake()

    def bind_connector_metadata(self, connector_metadata: StepPlan) -> None:
        """Begin a step: this comes before anything of it writes to a page."""
        super().bind_connector_metadata(connector_metadata)
        self.worker_side.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's loads."""
        self.worker_side.worker.start_load_kv()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for one layer's loads."""
        self.worker_side.wait_for_layer_load(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Learn that one layer is in the pages."""
        self.worker_side.save_kv_layer(layer_name)

    def wait_for_save(self) -> None:
        """Return when the pages may be written again."""
        self.worker_side.wait_for_save()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Say whose asynchronous transfers ended."""
        saved, loaded, failed = self.worker_side.get_ended()
        return KVConnectorTransferResults(finished_sending=saved, finished_recving=loaded, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Say which pages to take back."""
        return self.worker_side.get_bad_pages()

    def build_connector_worker_meta(self) -> StepReports:
        """Report the step to the leader."""
        return self.worker_side.build_reports()

    # -- scheduler -------------------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Learn where the block tables are."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler_side.bind_kv_cache_manager(kv_cache_manager)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Take what every rank said of its cache."""
        self.scheduler_side.set_handshakes(metadata)

    def on_new_request(self, request: Any) -> None:
        """Learn of a request."""
        self.scheduler_side.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say what could be loaded."""
        return self.scheduler_side.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Learn of pages."""
        self.scheduler_side.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """Plan the step."""
        return self.scheduler_side.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take the step's reports."""
        self.scheduler_side.update_connector_output(
            connector_output.kv_connector_worker_meta,
            connector_output.invalid_block_ids or set(),
            connector_output.failed_recving or set(),
        )
        self.scheduler_side.saves_ended(connector_output.finished_sending or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Learn that a request ended."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Learn that a request ended."""
        return self.scheduler_side.request_finished(request, block_ids), None

    def has_pending_push_work(self) -> bool:
        """Say whether vLLM should keep stepping."""
        return self.scheduler_side.has_pending_work

    def take_events(self) -> Iterable[Any]:
        """Give out what was stored and removed."""
        return to_vllm_events(self.scheduler_side.leader.take_events())

    def reset_cache(self) -> bool:
        """Make what was saved so far unmatchable, as after new weights."""
        return self.scheduler_side.leader.reset_cache()

    # -- both ------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectStats | None:
        """Return what this half counted since the last call; now and then, and when there may be no later step."""
        half = self._worker or self._scheduler
        return self._stats.take(at_once=half is None or half.is_idle)

    def shutdown(self) -> None:
        """Finish what is on its way to the stores, if both halves are in this process, and close this one."""
        self._local.drain()
        if self._worker is not None:
            self._worker.worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.leader.shutdown()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Say whether the connector needs a call for every layer."""
        return uses_layer_hooks(extra_config)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectStats:
        """Make stats of what another process sent."""
        return KVConnectStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectProm:
        """Make the counters that vLLM's ``/metrics`` shows."""
        return KVConnectProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)
