"""vLLM's real scheduler with our halves and no model: pages hold bytes that follow from the tokens, and are compared.

A token is a function of the tokens before it, and of garbage if its request read KV that is not what it must be; so
what comes out is right only if every page that was read was. `expected` computes the same without pages.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kvconnect_vllm import KVConnect
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvconnect.engine.pages import KVGeometry, PagedCache
from kvconnect.testing.content import Pages, prefix_states
from tests.vllm.models import VOCABULARY

__all__ = ["SIZE", "SteppedEngine", "expected"]

SIZE = 32  # tokens a block: the CPU platform's smallest

_GEOMETRIES = {
    "full": KVGeometry(((0, 1),), (None,), 2, 4, torch.float32),
    "mixed": KVGeometry(((0, 2), (1,)), (None, 70), 2, 4, torch.float32),
    "window": KVGeometry(((0, 1),), (70,), 2, 4, torch.float32),
}
_numbers = itertools.count()


def next_token(tokens: Sequence[int]) -> int:
    """Return the token that follows."""
    return int(prefix_states(tokens)[-1]) % (VOCABULARY - 1)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """Return the `count` tokens that must come out."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class _InFlight(NamedTuple):
    scheduled: Any
    output: Any
    sampled: dict[str, int]


class SteppedEngine:
    """A scheduler, one connector a rank, and pages."""

    def __init__(
        self,
        folder: Path,
        connector: Any,
        *,
        shape: str = "full",
        num_ranks: int = 1,
        num_blocks: int = 64,
        max_batch_tokens: int = 512,
        async_scheduling: bool = False,
        prefix_caching: bool = True,
        events: bool = False,
    ) -> None:
        self.geometry = _GEOMETRIES[shape]
        transfer = KVTransferConfig(
            kv_connector="KVConnect",
            kv_connector_module_path="kvconnect_vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connector": connector, "model_id": "stepped"},
        )
        config = EngineArgs(
            model=str(folder),
            dtype="float32",
            block_size=SIZE,
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=max_batch_tokens,
            enable_prefix_caching=prefix_caching,
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_transfer_config=transfer,
        ).create_engine_config()
        config.parallel_config.tensor_parallel_size = num_ranks
        config.parallel_config.world_size = num_ranks
        config.scheduler_config.async_scheduling = async_scheduling
        config.cache_config.num_gpu_blocks = num_blocks
        if events:
            from vllm.config import KVEventsConfig

            config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        groups = []
        for layers, window in zip(self.geometry.layers, self.geometry.windows, strict=True):
            shape_of = {"block_size": SIZE, "num_kv_heads": 2, "head_size": 4, "dtype": torch.float32}
            spec = (
                FullAttentionSpec(**shape_of)
                if window is None
                else SlidingWindowSpec(**shape_of, sliding_window=window)
            )
            groups.append(KVCacheGroupSpec([f"model.layers.{i}.self_attn.attn" for i in layers], spec))
        self.cache_config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        sizes = resolve_kv_cache_block_sizes(self.cache_config, config)
        scheduler_class = AsyncScheduler if async_scheduling else Scheduler
        self.scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=self.cache_config,
            structured_output_manager=StructuredOutputManager(config),
            log_stats=True,
            block_size=sizes[0],
            hash_block_size=sizes[1],
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(sizes[1], sha256)
        self.leader: KVConnect = self.scheduler.connector
        self.cache = PagedCache(self.geometry, block_size=SIZE, num_pages=num_blocks)
        for layer in self.cache.layers:
            layer.key.fill_(torch.nan)
            layer.value.fill_(torch.nan)
        self.pages = Pages(self.geometry, self.cache)
        self.workers: list[KVConnect] = []
        for rank in range(num_ranks):
            mine = copy.copy(config)
            mine.parallel_config = copy.copy(config.parallel_config)
            mine.parallel_config.rank = rank
            worker = KVConnect(mine, KVConnectorRole.WORKER, self.cache_config)
            worker.worker_side.worker.register_kv_caches(self.cache.layout(rank, num_ranks))
            self.workers.append(worker)
        self.leader.set_xfer_handshake_metadata_pp_aware(
            {(0, rank): worker.get_handshake_metadata() for rank, worker in enumerate(self.workers)}
        )
        self._aggregator = KVOutputAggregator.from_connector(self.leader, num_ranks)
        self._async = async_scheduling
        self._in_flight: deque[_InFlight] = deque()
        self.before_loads: Callable[[], None] = lambda: None
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.cached: dict[str, int] = {}
        self.events: list[Any] = []
        self.garbage_read = 0
        self._num_preemptions = 0
        self.check_pages = True
        self.num_scheduled_last = 0  # the most tokens of a step since a request was added
        self.scheduler.kv_event_publisher.publish = lambda batch: self.events.extend(batch.events)

    # -- requests ----------------------------------------------------------------------------------------------

    def add(self, prompt: Sequence[int], count: int = 4, **fields: Any) -> str:
        """Queue a prompt that asks for `count` tokens."""
        self.num_scheduled_last = 0
        request_id = f"r{next(_numbers)}"
        extra = fields.pop("kv_transfer_params", None)
        params = SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            stop_token_ids=fields.pop("stop", None),
            extra_args=extra and {"kv_transfer_params": extra},
        )
        params.update_from_generation_config({}, None)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._hasher,
            **fields,
        )
        self.outputs[request_id] = []
        self.scheduler.add_request(request)
        return request_id

    def run(self, *request_ids: str, seconds: float = 15.0) -> list[list[int]]:
        """Step until these are finished; return their tokens."""
        deadline = time.monotonic() + seconds
        while not self.finished.issuperset(request_ids):
            assert time.monotonic() < deadline, f"stuck: {set(request_ids) - self.finished}"
            self.step()
        return [self.outputs[request_id] for request_id in request_ids]

    def generate(self, *prompts: Sequence[int], count: int = 4, **fields: Any) -> list[list[int]]:
        """Run prompts together and compare what comes out with `expected`."""
        ids = [self.add(prompt, count, **fields) for prompt in prompts]
        found = self.run(*ids)
        assert found == [expected(prompt, count) for prompt in prompts]
        return found

    def loads_known(self, request_id: str) -> bool:
        """Say whether a request was admitted."""
        return request_id in self.cached

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its pages to another."""
        return self._num_preemptions

    @property
    def holds_pages(self) -> bool:
        """Whether pages wait for a transfer: then vLLM cannot forget its prefix cache."""
        side = self.leader.scheduler_side
        return bool(side._parked or side._saving or self.scheduler.kv_holding_waiting)

    def failures(self) -> dict[str, int]:
        """Return what every half counted of hooks that failed."""
        halves = [self.leader.scheduler_side.leader, *(worker.worker_side.worker for worker in self.workers)]
        return {hook: count for half in halves for hook, count in half.get_stats()["hooks"]["failures"].items()}

    def loaded(self, request_id: str) -> int:
        """Return how many tokens vLLM counts as loaded for a request, when it was admitted."""
        return self.cached[request_id]

    def abort(self, request_id: str) -> None:
        """End a request as a client that hangs up does."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.finished.add(request_id)

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule and run a step; take it, or with asynchronous scheduling the one before it."""
        scheduled = self.scheduler.schedule()
        self._num_preemptions += len(scheduled.preempted_req_ids or ())
        self.num_scheduled_last = max(scheduled.total_num_scheduled_tokens, self.num_scheduled_last)
        self._in_flight.append(self._run(scheduled))
        keep = 1 if self._async and scheduled.total_num_scheduled_tokens else 0
        while len(self._in_flight) > keep:
            self._take(self._in_flight.popleft())
        if not scheduled.total_num_scheduled_tokens:
            time.sleep(0.0005)

    def take_all(self) -> None:
        """Take every step that has run."""
        while self._in_flight:
            self._take(self._in_flight.popleft())

    def settle(self, seconds: float = 15.0, *, check: bool = True) -> None:
        """Step as vLLM's engine does while anything is left, then look whether anything was kept."""
        deadline = time.monotonic() + seconds
        while self._in_flight or self.scheduler.has_requests():
            assert time.monotonic() < deadline, "the connector never comes to rest"
            self.step()
        if check:
            self.check_nothing_left()

    def check_nothing_left(self) -> None:
        """Look for stuck requests, leaked pages, and what the adapter still remembers."""
        scheduler, side = self.scheduler, self.leader.scheduler_side
        assert not scheduler.requests
        assert not scheduler.running
        assert not scheduler.waiting
        if not self.check_pages:
            return
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pages leaked"
        assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null), "pages are still held"
        assert not side._known
        assert not self.holds_pages
        for worker in self.workers:
            assert not worker.worker_side._parked | worker.worker_side._saving

    def close(self) -> None:
        """Shut down as vLLM does: workers first."""
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()

    def __enter__(self) -> SteppedEngine:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self.close()

    # -- parts -------------------------------------------------------------------------------------------------

    def _run(self, scheduled: Any) -> _InFlight:
        """Do what vLLM's runner does, in its order (`KVConnectorModelRunnerMixin._get_kv_connector_output`)."""
        for worker in self.workers:
            worker.bind_connector_metadata(scheduled.kv_connector_metadata)
        self.before_loads()
        if scheduled.has_sync_kv_loads:
            for worker in self.workers:
                worker.start_load_kv(None)
        sampled = self._forward(scheduled)
        outputs = []
        for worker in self.workers:
            if not scheduled.has_sync_kv_loads:
                worker.start_load_kv(None)
            worker.wait_for_save()
            results = worker.get_transfer_results(scheduled.finished_req_ids)
            said = KVConnectorOutput(
                finished_sending=results.finished_sending,
                finished_recving=results.finished_recving,
                failed_recving=results.failed_recving,
                invalid_block_ids=worker.get_block_ids_with_load_errors(),
                kv_connector_stats=worker.get_kv_connector_stats(),
                kv_connector_worker_meta=worker.build_connector_worker_meta(),
            )
            worker.clear_connector_metadata()
            ids = list(scheduled.num_scheduled_tokens)
            outputs.append(
                ModelRunnerOutput(
                    req_ids=ids,
                    req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
                    sampled_token_ids=[[sampled[i]] if i in sampled else [] for i in ids],
                    kv_connector_output=said,
                )
            )
        return _InFlight(scheduled, self._aggregator.aggregate(outputs), sampled)

    def _forward(self, scheduled: Any) -> dict[str, int]:
        """Write what the step computes, after a look at all that it stands on; return the tokens that come out."""
        sampled: dict[str, int] = {}
        work = []
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            # the scheduler has moved on already: the step began where it will be without it
            start = request.num_computed_tokens - count
            tokens = list(request.all_token_ids)
            before = self._in_flight[-1].sampled if self._in_flight else {}
            if start + count > len(tokens) and request_id in before:
                tokens.append(before[request_id])
            tables = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            work.append((request_id, tokens, tables, start, count))
        garbage: set[str] = set()
        names = {layer: name for name, layer in self.workers[0].worker_side._layers.items()}
        for layer in sorted(names) if work else ():
            for worker in self.workers:
                worker.wait_for_layer_load(names[layer])
            before_layer = set(garbage)
            for _ in range(2):  # first everybody writes: a page can be shared with one that is computed in this step
                garbage = {job[0] for job in work if not self._compute(layer, job[0] not in before_layer, *job)}
            for worker in self.workers:
                worker.save_kv_layer(names[layer], None, None)
        for request_id, tokens, _, start, count in work:
            if start + count == len(tokens):
                token = next_token(tokens)
                sampled[request_id] = VOCABULARY - 1 if request_id in garbage else token
        self.garbage_read += len(garbage)
        return sampled

    def _compute(
        self, layer: int, good: bool, request_id: str, tokens: list[int], tables: Any, start: int, count: int
    ) -> bool:
        """Compute positions ``[start, start + count)`` of a layer; False if they stand on what is not what it must be.

        What is computed on garbage, in this layer or one before it, is garbage of its own.
        """
        states = prefix_states(tokens)
        group = self.cache.layers[layer].group
        window = self.geometry.windows[group]
        first = 0 if window is None else max(0, start + 1 - window)
        if self.pages.check(states, tables[group], group, layer, first, start):
            good = False
        written = states if good else prefix_states([*tokens[:start], *([VOCABULARY] * len(tokens[start:]))])
        self.pages.write(written, tables[group], layer, start, min(start + count, len(tokens)))
        return good

    def _take(self, ran: _InFlight) -> None:
        for request_id in ran.scheduled.num_scheduled_tokens:
            request = self.scheduler.requests.get(request_id)
            if request is not None and request.prefill_stats is not None:
                self.cached[request_id] = request.prefill_stats.num_external_cached_tokens
        outputs = self.scheduler.update_from_output(ran.scheduled, ran.output)
        for client in outputs.values():
            for output in client.outputs:
                self.outputs[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.finished.add(output.request_id)
