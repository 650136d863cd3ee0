"""Real vLLM engines in this process: opened, asked, looked through for leaks, and closed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvconnect_vllm import KVConnect
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from tests.vllm.prompts import prompts_of

__all__ = ["BLOCK_SIZE", "Engine", "open_engine", "prompts_of", "transfer_config"]

BLOCK_SIZE = 32


def transfer_config(connector: Any, **extra: Any) -> KVTransferConfig:
    """Return what a user writes."""
    return KVTransferConfig(
        kv_connector="KVConnect",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connector": connector, **extra},
    )


class Engine:
    """An ``LLM`` and what tests ask of it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], count: int = 8, **options: Any) -> list[list[int]]:
        """Return the tokens that follow each prompt; how many of it were not computed is in `cached`."""
        lora = options.pop("lora_request", None)
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False, lora_request=lora
        )
        self.cached = [output.num_cached_tokens for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def forget_device(self) -> None:
        """Make vLLM forget its own prefix cache."""
        assert self.llm.reset_prefix_cache()

    @property
    def scheduler(self) -> Any:
        """VLLM's."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def leader(self) -> KVConnect:
        """The scheduler's connector."""
        connector: KVConnect = self.scheduler.connector
        return connector

    @property
    def stats(self) -> dict[str, Any]:
        """Of the leader."""
        found: dict[str, Any] = self.leader.scheduler_side.leader.get_stats()
        return found

    def failures(self) -> dict[str, int]:
        """Return the hooks that failed, of both halves."""
        worker = get_kv_transfer_group().worker_side.worker
        return {**self.stats["hooks"]["failures"], **worker.get_stats()["hooks"]["failures"]}

    def check_nothing_left(self) -> None:
        """Look for stuck requests and leaked pages."""
        scheduler = self.scheduler
        for _ in range(100):  # what vLLM's own loop does while something is left
            if not (scheduler.requests or scheduler.has_finished_requests()):
                break
            self.llm.llm_engine.step()
        assert not scheduler.requests
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pages leaked"
        if isinstance(scheduler.connector, KVConnect):
            side = scheduler.connector.scheduler_side
            assert not side._known
            assert not (side._parked.keys() | side._saving.keys())


@contextlib.contextmanager
def open_engine(folder: Path, connector: Any = None, **options: Any) -> Iterator[Engine]:
    """Open vLLM over a checkpoint, with a connector if there is one; afterwards nothing may be left."""
    transfer = options.pop("kv_transfer_config", None) or (connector and transfer_config(connector))
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": BLOCK_SIZE,
        "skip_tokenizer_init": True,
        **options,
    }
    llm = LLM(model=str(folder), kv_transfer_config=transfer, **settings)
    engine = Engine(llm)
    try:
        yield engine
        engine.check_nothing_left()
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()
