"""vLLM's own offloading on a CPU: the stock specs with another copy worker, for `vllm_ttft.py` to measure against.

    KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config={
        "spec_name": "TieringHostSpec", "spec_module_path": "vllm_offload_cpu", "cpu_bytes_to_use": 1 << 30,
        "secondary_tiers": [{"type": "fs", "root_dir": FOLDER}]})

The stock worker copies on CUDA streams and refuses a CPU. This one copies page by page, at once, on the thread that
asks, which leaves the peer's scheduler, its index, its eviction and its files as they are.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.fs import manager as fs_manager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

__all__ = ["HostSpec", "TieringHostSpec"]


class CopyWorker(OffloadingWorker):  # type: ignore[misc]  # Any where vLLM is not installed
    """Copies between the cache's pages and the primary tier's chunks. One thread calls it."""

    def __init__(self, pages: list[Any], chunks: list[Any], region: Any = None) -> None:
        """Take one pair of ``(count, bytes)`` tensors a layer, and the region that the chunks lie in."""
        self._layers = [(page.numpy(), chunk.numpy()) for page, chunk in zip(pages, chunks, strict=True)]
        self._page_bytes = sum(page.shape[1] for page in pages)
        self._region = region
        self._finished: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy pages to chunks."""
        started = time.perf_counter()
        for page, chunk in zip(src_spec.block_ids.tolist(), dst_spec.block_ids.tolist(), strict=True):
            for pages, chunks in self._layers:
                chunks[chunk] = pages[page]
        return self._done(job_id, len(src_spec.block_ids), started)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy chunks to pages."""
        started = time.perf_counter()
        for chunk, page in zip(src_spec.block_ids.tolist(), dst_spec.block_ids.tolist(), strict=True):
            for pages, chunks in self._layers:
                pages[page] = chunks[chunk]
        return self._done(job_id, len(src_spec.block_ids), started)

    def get_finished(self) -> list[Any]:
        """Return what was copied since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        """Give the region back."""
        self._layers.clear()
        if self._region is not None:
            self._region.cleanup()

    def _done(self, job_id: int, count: int, started: float) -> bool:
        self._finished.append(TransferResult(job_id, True, count * self._page_bytes, time.perf_counter() - started))
        return True


def _pages(spec: Any, kv_caches: Any) -> list[Any]:
    assert spec.blocks_per_chunk == 1, "the chunk is the block here"
    assert len(kv_caches.group_data_refs) == 1, "one layer group"
    return [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in kv_caches.tensors]


class HostSpec(CPUOffloadingSpec):  # type: ignore[misc]
    """``CPUOffloadingSpec`` with the worker above."""

    def get_worker(self, kv_caches: Any) -> Any:
        """Make the worker; called once."""
        pages = _pages(self, kv_caches)
        return CopyWorker(pages, [torch.zeros((self.num_chunks, page.shape[1]), dtype=torch.int8) for page in pages])


class TieringHostSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """``TieringOffloadingSpec`` with the worker above.

    With ``page_cache`` in the extra configuration the ``fs`` tier reads and writes through the page cache; without it
    it does what it always does, O_DIRECT where the file system takes it.
    """

    def get_manager(self) -> Any:
        """Make the manager and its tiers."""
        if self.extra_config.get("page_cache"):
            fs_manager.probe_o_direct = lambda directory: False
        return super().get_manager()

    def get_worker(self, kv_caches: Any) -> Any:
        """Make the worker; called once."""
        pages = _pages(self, kv_caches)
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyWorker(pages, [region.create_next_worker_view(page.shape[1]) for page in pages], region)
