"""The engine: ``LLM(...).generate(...)``. Reference, not for serving: small and exact.

What a step is, and when each hook is called, is in `kvconnect.engine.core`.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import msgspec
import torch

from kvconnect.driver import LeaderDriver, WorkerDriver, open_connector
from kvconnect.engine.config import KVCacheConfig
from kvconnect.engine.core import ENGINE_CAPABILITIES, EngineCore
from kvconnect.engine.events import EventSnapshot, NumberedEvent
from kvconnect.engine.levels import level_stats
from kvconnect.engine.model import load_model
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest, RequestOutput, SamplingParams, TokenOutput
from kvconnect.engine.runner import ModelRunner
from kvconnect.engine.sequence import Sequence as CacheSequence
from kvconnect.engine.stopping import StopRule
from kvconnect.errors import Closed, ConfigError
from kvconnect.options import ByteSize, ConnectorConfig, ConnectorSpec, parse_specs, specs_from_environment

__all__ = ["LLM"]

logger = logging.getLogger(__name__)

_DRAIN_S = 30.0


class LLM:
    """A model, its paged KV cache, and a connector."""

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module | None = None,
        connector: ConnectorConfig = None,
        *,
        kv_cache_config: KVCacheConfig | None = None,
        block_size: int | None = None,
        kv_cache_bytes: int | str | None = None,
        max_batch_tokens: int = 2048,
        max_num_seqs: int = 16,
        num_ranks: int = 1,
        async_load: bool = False,
        async_scheduling: bool = False,
        dtype: str | torch.dtype = "float32",
        model_id: str | None = None,
    ) -> None:
        """Load the model and open the connector.

        Args:
            model: A checkpoint folder, a transformers model, or None for the embedded tiny Llama.
            connector: One URL or mapping, or a list of them. Without one, ``KVCONNECT_CONNECTOR`` is read; without that
                there is none.
            kv_cache_config: Sizes of the paged cache and of host memory, and what is reused; the default one if None.
            block_size: Tokens a block, in place of the configuration's.
            kv_cache_bytes: Bytes of the paged cache, all layer groups together, in place of the configuration's.
            max_batch_tokens: Tokens computed in one step; longer prompts are computed in chunks.
            max_num_seqs: Requests running at once.
            num_ranks: Workers of the connector, each with its share of the KV heads, as under tensor parallelism; the
                model itself runs once.
            async_load: Park requests while their blocks come up from stores, instead of asking again until they lie in
                host memory.
            async_scheduling: Plan and run each step before the results of the one before it are seen, as engines do
                that keep a GPU busy; tokens come one step later.
            dtype: ``"float32"`` or ``"bfloat16"``.
            model_id: An identity that replaces the digest of the weights in block keys.

        Raises:
            KVConnectError: If the model cannot be served or the connector does not fit, with the reason.
        """
        config = kv_cache_config or KVCacheConfig()
        if block_size is not None:
            config = msgspec.structs.replace(config, block_size=block_size)
        if kv_cache_bytes is not None:
            config = msgspec.structs.replace(config, max_bytes=kv_cache_bytes, max_tokens=None)
        block_size = config.block_size
        connector = _with_host(connector, config)
        counts = {"block_size": block_size, "max_batch_tokens": max_batch_tokens, "max_num_seqs": max_num_seqs}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if isinstance(dtype, str):
            dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
            if dtype not in dtypes:
                raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(dtypes)}")
            dtype = dtypes[dtype]
        if num_ranks < 1:
            raise ConfigError(f"num_ranks must be at least 1, not {num_ranks}")
        loaded = load_model(model, dtype=dtype, model_id=model_id)
        if loaded.geometry.num_kv_heads % num_ranks:
            raise ConfigError(f"{loaded.geometry.num_kv_heads} KV heads cannot be shared among {num_ranks} ranks")
        num_pages = config.num_pages(loaded.geometry.bytes_per_token)
        reserved = max(num_pages, config.reserve_tokens // block_size)
        self.tokenizer = loaded.tokenizer
        self.block_size = block_size
        self._rule = StopRule(loaded.model, loaded.tokenizer)
        self._max_model_len = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self._vocab_size = loaded.model.config.get_text_config().vocab_size
        try:
            cache = PagedCache(loaded.geometry, block_size=block_size, num_pages=reserved)
        except (MemoryError, RuntimeError) as error:
            raise ConfigError(f"{reserved} pages of {block_size} tokens cannot be had: {error}") from error
        cache.resize(num_pages)
        self._leader: LeaderDriver | None = None
        self._workers: list[WorkerDriver] = []
        if connector or os.environ.get("KVCONNECT_CONNECTOR"):
            self._leader, self._workers = open_connector(
                connector,
                [cache.layout(rank, num_ranks) for rank in range(num_ranks)],
                namespace=loaded.namespace,
                engine=msgspec.structs.replace(
                    ENGINE_CAPABILITIES,
                    async_load=async_load,
                    max_batch_tokens=max_batch_tokens,
                    takes_events=config.event_buffer_max_size > 0,
                ),
            )
        self._core = EngineCore(
            ModelRunner(loaded, cache, self._workers),
            cache,
            self._leader,
            self._workers,
            ends=self._rule.reason,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            async_scheduling=async_scheduling,
            enable_block_reuse=config.enable_block_reuse,
            enable_partial_reuse=config.enable_partial_reuse,
            max_events=config.event_buffer_max_size,
        )
        self._config = config
        self._warned_of_retention = False
        names = ("device", "host", *self._leader.tier_names) if self._leader is not None else ("device",)
        self._level_names = tuple(names)
        self._ids = itertools.count()
        self._requests: dict[str, EngineRequest] = {}
        self._closed = False

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them in flight at once, and return the results in their order.

        Args:
            prompts: Texts, or lists of token ids.
            params: For all prompts, or one for each.

        Raises:
            ConfigError: If a prompt is empty, too long for the pages or the model, or has ids out of the vocabulary.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        elif len(params) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts and {len(params)} sampling parameters")
        ids = [self.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        finished: dict[str, RequestOutput] = {}
        try:
            while len(finished) < len(ids):
                for output in self.step():
                    if output.finished is not None and output.request_id in ids:
                        finished[output.request_id] = output.finished
        finally:
            for request_id in ids:
                self.abort(request_id)
        return [finished[request_id] for request_id in ids]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[TokenOutput]:
        """Complete one prompt and yield its tokens as they come; leaving the loop early aborts the request.

        Raises:
            ConfigError: As `add_request`.
        """
        request_id = self.add_request(prompt, params)
        try:
            while request_id in self._requests:
                yield from (output for output in self.step() if output.request_id == request_id)
        finally:
            self.abort(request_id)

    def add_request(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> str:
        """Queue a prompt; `step` computes it together with what runs already.

        Returns:
            The id under which `step` tells of it.

        Raises:
            ConfigError: If the prompt is empty, too long for the pages or the model, or has ids out of the vocabulary.
        """
        request = self._new_request(self._tokenize(prompt), params or SamplingParams())
        self._requests[request.request_id] = request
        self._core.scheduler.add(request)
        return request.request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at once, wherever it is.

        Returns:
            What it had generated; None for a request that is finished or unknown.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self._core.scheduler.abort(request)
        return request.output(self._rule.text(request), "aborted")

    def step(self) -> list[TokenOutput]:
        """Run one engine step; return the tokens that came out.

        Raises:
            Closed: After `close`.
            BaseException: What the model raised; the requests that it ran for are computed again.
        """
        if self._closed:
            raise Closed("this LLM is closed")
        outputs = []
        for request, token, reason in self._core.step():
            finished = None
            if reason is not None:
                del self._requests[request.request_id]
                finished = request.output(self._rule.text(request), reason)
            outputs.append(TokenOutput(request_id=request.request_id, token_id=token, finished=finished))
        return outputs

    def sequence(self, request_id: str) -> CacheSequence:
        """Return the handle by which a request's KV is suspended, prefetched and resumed.

        Raises:
            ConfigError: If there is no such request, or it is finished.
        """
        request = self._requests.get(request_id)
        if request is None:
            raise ConfigError(f"there is no request {request_id!r}, or it is finished")
        return CacheSequence(self._core, request, self._level_names)

    def resize(self, level: int, num_bytes: int | str) -> bool:
        """Grow or shrink a level of the cache while no request runs; suspended ones stay.

        What is cached and does not fit is dropped, what suspended requests need never. The device and host memory grow
        up to `KVCacheConfig.reserve_tokens` and `reserve_host_bytes`.

        Args:
            level: A `CacheLevel`, or the number of a store below DISK.
            num_bytes: All layer groups and all ranks together; ``"1GiB"`` or a number.

        Returns:
            False if what is needed does not fit, a request that waits or is suspended never could, or the level cannot
            be so large; then all is as it was.

        Raises:
            ConfigError: If a request runs, or there is no such level.
        """
        if not 0 <= level < len(self._level_names):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(self._level_names))
            raise ConfigError(f"there is no level {int(level)} to resize; levels: {known}")
        running = [*self._core.scheduler.running, *self._core.scheduler.parked.values()]
        if running:
            names = ", ".join(request.request_id for request in running)
            raise ConfigError(f"a level is resized while no request holds pages; suspend or finish {names} first")
        return self._core.resize(level, ByteSize(num_bytes))

    def warm_up(self, num_tokens: int | None = None) -> None:
        """Compute a prompt that is not cached and of which no connector hears, so that the first real one pays nothing.

        Args:
            num_tokens: How long it is; as many tokens as a step computes if None.

        Raises:
            ConfigError: If there are requests already, or it is too long.
        """
        if self._requests:
            raise ConfigError("warm up before the first request, or when all are finished")
        most = min(self._core.scheduler.max_batch_tokens, self._core.cache.pools[0].num_usable * self.block_size - 1)
        if self._max_model_len is not None:
            most = min(most, self._max_model_len - 1)
        count = most if num_tokens is None else num_tokens
        request = self._new_request([0] * count, SamplingParams(max_tokens=1, ignore_eos=True), dummy=True)
        self._core.scheduler.add(request)
        while request in self._core.scheduler.waiting or request in self._core.scheduler.running:
            self._core.step()

    def get_stats(self) -> dict[str, Any]:
        """Return the engine's counters, and the leader's and the workers' under their names.

        ``blocks`` adds up what `RequestOutput.blocks` says of each request; ``dropped`` is of the device's pages.
        ``levels`` says of the device, of host memory and of each store, by name, what was loaded from it, saved to it,
        dropped from it for other blocks, is used now and fits into it, in blocks and bytes of all layer groups and
        ranks; None where nobody knows, as of what a store drops and holds.
        """
        scheduler, totals = self._core.scheduler, self._core.manager.totals
        dropped = sum(pool.num_evicted for pool in self._core.cache.pools)
        stats: dict[str, Any] = {
            "pages": self._core.cache.pools[0].num_usable,
            "blocks": {**msgspec.structs.asdict(totals), "dropped": dropped},
            "cache_hit_rate": totals.hit_rate,
            "preemptions": scheduler.num_preemptions,
            "lost_saves": scheduler.num_lost_saves,
            "lost_loads": scheduler.num_lost_loads,
            "unwritten_kv_seen": self._core.num_unwritten,
        }
        if self._leader is not None:
            stats["leader"] = self._leader.get_stats()
            stats["workers"] = [worker.get_stats() for worker in self._workers]
        leader, workers = stats.get("leader", {}), stats.get("workers", ())
        stats["levels"] = level_stats(self._level_names, self._core.manager, leader, workers)
        return stats

    def take_events(self) -> list[NumberedEvent]:
        """Return what came, went or changed its priority since the last call, on the device and below; each once.

        Their numbers have no holes unless more than `KVCacheConfig.event_buffer_max_size` came between two calls: then
        the oldest are gone, and `snapshot_events` is where to begin anew. `EventFollower` does both. Empty if that size
        is 0.
        """
        return self._core.take_events()

    def snapshot_events(self) -> EventSnapshot:
        """Return what can be found on the device now, and the number that the next event will have.

        What lies in host memory and in stores is not in it: no hook enumerates that, and a listener must take it as
        unknown until it is told of. Events that were not taken yet stay; they have lower numbers.

        Raises:
            ConfigError: If no events are kept.
        """
        snapshot = self._core.snapshot_events()
        if snapshot is None:
            raise ConfigError("no events are kept; give KVCacheConfig(event_buffer_max_size=...)")
        return snapshot

    def reset_prefix_cache(self) -> None:
        """Forget full pages on the device; the connector keeps what it has."""
        for pool in self._core.cache.pools:
            pool.forget_names()

    def close(self, drain_s: float = _DRAIN_S) -> None:
        """Abort what runs, finish what the connector has to save, and shut it down. Twice is fine.

        Args:
            drain_s: Seconds to wait for saves that are committed and on their way to a store.
        """
        if self._closed:
            return
        for request_id in list(self._requests):
            self.abort(request_id)
        deadline = time.monotonic() + drain_s
        try:
            while self._core.has_connector_work and time.monotonic() < deadline:
                self.step()
        finally:
            self._closed = True
            if self._leader is not None:
                self._leader.shutdown()
            for worker in self._workers:
                worker.shutdown()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _tokenize(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer and a vocabulary too small for bytes; give prompts as token ids"
            )
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _new_request(self, prompt: Sequence[int], params: SamplingParams, *, dummy: bool = False) -> EngineRequest:
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise ConfigError("a prompt is a text or a list of token ids, and several are a list of those")
        if not prompt:
            raise ConfigError("a prompt needs at least one token")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, and this model has none; give stop_token_ids")
        if params.retention is not None and not self._config.enable_block_reuse and not self._warned_of_retention:
            self._warned_of_retention = True
            logger.warning("retention has no effect: enable_block_reuse is off")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise ConfigError(f"prompt token ids must lie in [0, {self._vocab_size})")
        total = len(prompt) + params.max_tokens
        num_pages = self._core.cache.pools[0].num_usable
        if -(-total // self.block_size) > num_pages:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} to generate need more than the "
                f"{num_pages} pages of {self.block_size} tokens; give LLM a larger kv_cache_bytes"
            )
        if self._max_model_len is not None and total > self._max_model_len:
            raise ConfigError(f"{total} tokens are more than the model's {self._max_model_len}")
        return EngineRequest(
            f"request-{next(self._ids)}",
            prompt,
            params,
            block_size=self.block_size,
            num_groups=len(self._core.cache.pools),
            dummy=dummy,
        )


def _with_host(connector: ConnectorConfig, config: KVCacheConfig) -> ConnectorConfig:
    """Put the host memory of the configuration before the connector's stores.

    Raises:
        ConfigError: If the connector has host memory already.
    """
    capacity = ByteSize(config.host_cache_bytes)
    if not capacity:
        return connector
    specs = parse_specs(connector) or specs_from_environment()
    if any(spec.name == "host" for spec in specs):
        raise ConfigError("host_cache_bytes and a host:// connector both size host memory; give one of them")
    options: dict[str, Any] = {"capacity": capacity}
    if config.host_min_priority:
        options["min_priority"] = config.host_min_priority
    if ByteSize(config.reserve_host_bytes):
        options["reserve"] = ByteSize(config.reserve_host_bytes)
    return [ConnectorSpec("host", options), *specs]
