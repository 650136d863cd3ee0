"""The worker's half of the adapter: one rank's worker in vLLM's step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from kvconnect.driver import WorkerDriver, open_worker
from kvconnect_vllm.config import EngineSetup
from kvconnect_vllm.layout import describe_caches, layer_indices
from kvconnect_vllm.messages import Handshake, StepPlan, StepReports

__all__ = ["Ended", "WorkerSide"]

_IDLE_S = 0.0005


class Ended(NamedTuple):
    """Requests whose transfers ended on this rank, as vLLM wants to hear it: each once."""

    saved: set[str]
    loaded: set[str]
    failed: set[str]


class WorkerSide:
    """One rank's worker under vLLM's model runner. One thread calls it."""

    def __init__(self, setup: EngineSetup, vllm_config: Any, kv_cache_config: Any, rank: int) -> None:
        """Open the worker.

        Raises:
            KVConnectError: If the connector cannot work as configured.
        """
        self.worker: WorkerDriver = open_worker(
            setup.resolved,
            namespace=setup.namespace,
            engine=setup.capabilities,
            rank=rank,
            num_ranks=setup.num_ranks,
            local_ranks=setup.local_ranks,
        )
        self._setup = setup
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._rank = rank
        self._layers = layer_indices(kv_cache_config)
        self._now = StepPlan(step=-1, plan=None)
        self._saved = True
        self._saving: set[str] = set()  # vLLM waits for each of these, and for nobody else
        self._parked: set[str] = set()
        self._bad_pages: list[set[int]] | None = []  # by layer group; None if no load of the step can be trusted
        self._loaded: frozenset[str] = frozenset()  # ended in this step

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Hand over the cache.

        Raises:
            KVConnectError: If it cannot be used; the engine does not start.
        """
        layout = describe_caches(kv_caches, self._kv_cache_config, self._vllm_config, self._rank)
        self.worker.register_kv_caches(layout)

    def get_handshake(self) -> Handshake:
        """Return what the leader must know of this rank's cache."""
        return Handshake(self.worker.get_handshake_metadata(), self._setup.configuration)

    def bind(self, plan: StepPlan) -> None:
        """Begin a step, before anything of it writes to a page."""
        self._now = plan
        self._saved = False
        self._saving |= plan.saving
        self._parked |= plan.parking
        self._loaded = frozenset()
        self.worker.bind(plan.plan, plan.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait until the layer may be attended to; layers that use another's cache wait with that one."""
        layer = self._layers.get(layer_name)
        if layer is not None:
            self.worker.wait_for_layer_load(layer)

    def save_kv_layer(self, layer_name: str) -> None:
        """Tell that the layer's KV is in the pages; layers that use another's cache have none."""
        layer = self._layers.get(layer_name)
        if layer is not None:
            self.worker.save_kv_layer(layer)

    def wait_for_save(self) -> None:
        """Return when the pages may be written again; once a step.

        With speculative decoding vLLM asks for the step's report first, and calls this after the drafts were made. They
        come from no model that writes pages, so that the saves need not wait for that.
        """
        if not self._saved:
            self._saved = True
            self.worker.wait_for_save()

    @property
    def is_idle(self) -> bool:
        """Whether the step computes nothing."""
        return self._now.idle

    def get_ended(self) -> Ended:
        """Return whose transfers ended, lost ones among them.

        vLLM repeats empty steps as fast as it can while something is on its way; the threads that bring it need the
        interpreter too, so that such a step takes a moment.
        """
        now = self._now
        for layer in sorted(self._layers.values()) if now.loading else ():
            self.worker.wait_for_layer_load(layer)
        self.wait_for_save()
        if now.idle:
            time.sleep(_IDLE_S)
        saved, loaded, failed = self.worker.get_finished(now.saving)
        self._bad_pages = self.worker.get_block_ids_with_load_errors()
        loaded |= now.loading.keys()
        failed |= {request_id for request_id, pages in now.loading.items() if self._is_bad(pages)}
        self._loaded = frozenset(loaded)
        told_saved = (saved | now.lost_saves) & self._saving
        told_loaded = (loaded | now.lost_loads) & self._parked
        self._saving -= told_saved
        self._parked -= told_loaded
        told_failed = (failed | now.lost_loads) & told_loaded
        if self._setup.page_errors:  # those of this very step are told by page: the good ones before stay
            told_failed -= now.loading.keys()
        return Ended(set(told_saved), set(told_loaded), set(told_failed))

    def get_bad_pages(self) -> set[int]:
        """Return the pages of this step's loads that vLLM must take back, after `get_ended`.

        Empty where vLLM can only begin again: there `get_ended` names the requests that failed.
        """
        if not self._setup.page_errors:
            return set()
        if self._bad_pages is None:
            bad = {page for pages in self._now.loading.values() for page in pages[0]}
        else:
            bad = self._bad_pages[0]
        return (bad | self._now.lost_pages) - {-1}

    def build_reports(self) -> StepReports:
        """Return this rank's report, for the leader."""
        return StepReports(
            reports={self._rank: self.worker.build_worker_report()},
            bad_pages=frozenset(self.get_bad_pages()),
            loads_ended={self._rank: self._loaded},
        )

    def _is_bad(self, pages: tuple[frozenset[int], ...]) -> bool:
        if self._bad_pages is None:
            return True
        return any(not bad.isdisjoint(mine) for bad, mine in zip(self._bad_pages, pages, strict=True))
