"""The engine: ``LLM(...).generate(...)``. Reference, not for serving: small, exact, and the order of every hook's call.

Read `LLM.step`: it is one engine step, with every call that a connector gets, in order.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import msgspec
import torch

from kvconnect.driver import LeaderDriver, WorkerDriver, open_connector
from kvconnect.engine.model import load_model
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest, RequestOutput, SamplingParams, TokenOutput
from kvconnect.engine.runner import ModelRunner
from kvconnect.engine.sampling import choose_token
from kvconnect.engine.scheduler import Batch, Scheduler
from kvconnect.errors import Closed, ConfigError
from kvconnect.options import ByteSize, ConnectorConfig
from kvconnect.protocol import EngineCapabilities

__all__ = ["ENGINE_CAPABILITIES", "LLM"]

ENGINE_CAPABILITIES = EngineCapabilities(
    can_ask_again=True,
    load_errors="block",
    reports=True,
    handshake=True,
    steps_when_idle=True,
    layer_hooks=True,
)

_DRAIN_S = 30.0
_UNWRITTEN = "attention read KV that nobody wrote"
_IDLE_S = 0.0005  # between steps that compute nothing but wait for a store


class LLM:
    """A model, its paged KV cache, and a connector."""

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module | None = None,
        connector: ConnectorConfig = None,
        *,
        block_size: int = 16,
        kv_cache_bytes: int | str = "512MiB",
        max_batch_tokens: int = 2048,
        max_num_seqs: int = 16,
        num_ranks: int = 1,
        async_load: bool = False,
        dtype: str | torch.dtype = "float32",
        model_id: str | None = None,
    ) -> None:
        """Load the model and open the connector.

        Args:
            model: A checkpoint folder, a transformers model, or None for the embedded tiny Llama.
            connector: One URL or mapping, or a list of them. Without one, ``KVCONNECT_CONNECTOR`` is read; without that
                there is none.
            block_size: Tokens a block.
            kv_cache_bytes: Bytes of the paged cache, all layer groups together; ``"1GiB"`` or a number.
            max_batch_tokens: Tokens computed in one step; longer prompts are computed in chunks.
            max_num_seqs: Requests running at once.
            num_ranks: Workers of the connector, each with its share of the KV heads, as under tensor parallelism; the
                model itself runs once.
            async_load: Park requests while their blocks come up from stores, instead of asking again until they lie in
                host memory.
            dtype: ``"float32"`` or ``"bfloat16"``.
            model_id: An identity that replaces the digest of the weights in block keys.

        Raises:
            KVConnectError: If the model cannot be served or the connector does not fit, with the reason.
        """
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
        num_pages = ByteSize(kv_cache_bytes) // (loaded.geometry.bytes_per_token * block_size)
        if num_pages < 1:
            raise ConfigError(f"kv_cache_bytes={kv_cache_bytes!r} does not hold one block of {block_size} tokens")
        self.tokenizer = loaded.tokenizer
        self.block_size = block_size
        self._eos = _eos_tokens(loaded.model)
        self._max_model_len = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self._vocab_size = loaded.model.config.get_text_config().vocab_size
        self._num_pages = num_pages
        try:
            self._cache = PagedCache(loaded.geometry, block_size=block_size, num_pages=num_pages)
        except (MemoryError, RuntimeError) as error:
            raise ConfigError(f"kv_cache_bytes={kv_cache_bytes!r} cannot be had: {error}") from error
        self._leader: LeaderDriver | None = None
        self._workers: list[WorkerDriver] = []
        if connector or os.environ.get("KVCONNECT_CONNECTOR"):
            self._leader, self._workers = open_connector(
                connector,
                [self._cache.layout(rank, num_ranks) for rank in range(num_ranks)],
                namespace=loaded.namespace,
                engine=msgspec.structs.replace(ENGINE_CAPABILITIES, async_load=async_load),
            )
        self._scheduler = Scheduler(
            self._cache, self._leader, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs
        )
        self._runner = ModelRunner(loaded, self._cache, self._workers)
        self._ids = itertools.count()
        self._requests: dict[str, EngineRequest] = {}
        self._closed = False
        self.num_unwritten = 0

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
        self._scheduler.add(request)
        return request.request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at once, wherever it is.

        Returns:
            What it had generated; None for a request that is finished or unknown.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self._scheduler.abort(request)
        return request.output(self._decode(request.generated), "aborted")

    def step(self) -> list[TokenOutput]:
        """Run one engine step; return the tokens that it generated.

        Raises:
            Closed: After `close`.
        """
        if self._closed:
            raise Closed("this LLM is closed")
        batch = self._scheduler.schedule()
        self._cache.fill_fresh(batch.fresh)
        if self._leader is not None:
            meta = self._leader.build_connector_meta(self._scheduler.output(batch))
            for worker in self._workers:
                worker.bind(meta)
                worker.start_load_kv()
        try:
            logits = self._runner.forward(batch) if batch.entries else None
        except BaseException:
            self._abandon_step(batch, "the forward pass failed")
            raise
        unwritten = self._unwritten(batch, logits)
        if self._leader is not None:
            self._end_connector_step(self._leader, batch)
        for request in unwritten - batch.rejected:
            request.failed_loads = request.MAX_FAILED_LOADS
            self._scheduler.reset_request(batch, request)
        if logits is None:
            if self._scheduler.has_requests:
                time.sleep(_IDLE_S)
            return []
        return list(self._finish_step(batch, logits))

    def get_stats(self) -> dict[str, Any]:
        """Return the engine's counters, and the leader's and the workers' under their names."""
        stats: dict[str, Any] = {
            "pages": self._num_pages,
            "preemptions": self._scheduler.num_preemptions,
            "lost_saves": self._scheduler.num_lost_saves,
            "lost_loads": self._scheduler.num_lost_loads,
            "unwritten_kv_seen": self.num_unwritten,
        }
        if self._leader is not None:
            stats["leader"] = self._leader.get_stats()
            stats["workers"] = [worker.get_stats() for worker in self._workers]
        return stats

    def reset_prefix_cache(self) -> None:
        """Forget full pages on the device; the connector keeps what it has."""
        for pool in self._cache.pools:
            pool.forget_names()

    def close(self, drain_s: float = _DRAIN_S) -> None:
        """Finish what the connector has to save, and shut it down. Twice is fine.

        Args:
            drain_s: Seconds to wait for saves that are committed and on their way to a store.
        """
        if self._closed:
            return
        deadline = time.monotonic() + drain_s
        while self._has_connector_work() and time.monotonic() < deadline:
            self.step()
            time.sleep(_IDLE_S)
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

    def _has_connector_work(self) -> bool:
        return self._scheduler.num_saving > 0 or (self._leader is not None and self._leader.has_pending_work())

    def _end_connector_step(self, leader: LeaderDriver, batch: Batch) -> None:
        """Let saves read the pages, take what failed, and let the leader commit the rest."""
        bad_pages: list[set[int]] | None = [set() for _ in self._cache.pools]
        reports = []
        loaded: list[frozenset[str]] = []
        newly_saving = self._scheduler.take_newly_saving()
        for rank, worker in enumerate(self._workers):
            worker.wait_for_save()
            finished = worker.get_finished(newly_saving)
            self._scheduler.saves_ended(rank, finished.saved, num_ranks=len(self._workers))
            loaded.append(finished.loaded)
            failed = worker.get_block_ids_with_load_errors()
            bad_pages = None if failed is None or bad_pages is None else _union(bad_pages, failed)
            reports.append(worker.build_worker_report())
        leader.update_connector_output(reports)
        self._scheduler.note_bad_pages(bad_pages)
        for rank, request_ids in enumerate(loaded):
            self._scheduler.loads_ended(rank, request_ids, num_ranks=len(self._workers))
        self._scheduler.reject_failed_loads(batch, bad_pages)

    def _unwritten(self, batch: Batch, logits: torch.Tensor | None) -> set[EngineRequest]:
        """Return the requests that attended to KV that nobody wrote: fresh pages hold NaN, and NaN reaches the logits.

        A connector that says it loaded and did not is the way to get there; nothing of such a step is committed.

        Raises:
            RuntimeError: If a request with nothing from a connector got there: the engine or the model is wrong.
        """
        if logits is None:
            return set()
        finite = torch.isfinite(logits).all(dim=1).tolist()
        bad = {entry[0] for entry, good in zip(batch.entries, finite, strict=True) if not good}
        if bad:
            self.num_unwritten += len(bad)
            if self._leader is None or any(request.failed_loads >= request.MAX_FAILED_LOADS for request in bad):
                self._abandon_step(batch, _UNWRITTEN)
                raise RuntimeError(f"{_UNWRITTEN}, without a connector's part in it")
            for worker in self._workers:
                worker.fail_step(_UNWRITTEN)
        return bad

    def _abandon_step(self, batch: Batch, why: str) -> None:
        """Undo a step that did not complete: its requests go back to the queue, and the connector commits nothing."""
        for worker in self._workers:
            worker.fail_step(why)
        if self._leader is not None:
            self._end_connector_step(self._leader, batch)
        for request in {entry[0] for entry in batch.entries} - batch.rejected:
            self._scheduler.reset_request(batch, request)

    def _finish_step(self, batch: Batch, logits: torch.Tensor) -> Iterator[TokenOutput]:
        for row, (request, start, count) in zip(logits, batch.entries, strict=True):
            if request in batch.rejected:
                continue
            self._scheduler.advance(request, start, count)
            if request.num_computed == len(request.tokens):  # else a chunk of the prompt; its logits mean nothing
                yield self._next_token(request, row)

    def _next_token(self, request: EngineRequest, logits: torch.Tensor) -> TokenOutput:
        params = request.params
        token = choose_token(logits, params.temperature, params.top_p, request.generator)
        request.append(token)
        stopped = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        text = ""
        if params.stop and not stopped:
            text = self._decode(request.generated)
            found = [place for place in map(text.find, params.stop) if place >= 0]
            stopped = bool(found)
            text = text[: min(found)] if found else ""
        if not stopped and len(request.generated) < params.max_tokens:
            return TokenOutput(request_id=request.request_id, token_id=token)
        self._scheduler.finish(request)
        self._requests.pop(request.request_id, None)
        whole = text if params.stop and stopped else self._decode(request.generated)
        output = request.output(whole, "stop" if stopped else "length")
        return TokenOutput(request_id=request.request_id, token_id=token, finished=output)

    def _tokenize(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer and a vocabulary too small for bytes; give prompts as token ids"
            )
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _new_request(self, prompt: Sequence[int], params: SamplingParams) -> EngineRequest:
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise ConfigError("a prompt is a text or a list of token ids, and several are a list of those")
        if not prompt:
            raise ConfigError("a prompt needs at least one token")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, and this model has none; give stop_token_ids")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise ConfigError(f"prompt token ids must lie in [0, {self._vocab_size})")
        total = len(prompt) + params.max_tokens
        if -(-total // self.block_size) > self._num_pages:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} to generate need more than the "
                f"{self._num_pages} pages of {self.block_size} tokens; give LLM a larger kv_cache_bytes"
            )
        if self._max_model_len is not None and total > self._max_model_len:
            raise ConfigError(f"{total} tokens are more than the model's {self._max_model_len}")
        return EngineRequest(
            f"request-{next(self._ids)}",
            prompt,
            params,
            block_size=self.block_size,
            num_groups=len(self._cache.pools),
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        text: str = self.tokenizer.decode(tokens)
        return text


def _eos_tokens(model: Any) -> frozenset[int]:
    """Return the tokens that end a sequence, by the model's generation settings."""
    eos = model.generation_config.eos_token_id
    return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)


def _union(pages: list[set[int]], more: Sequence[set[int]]) -> list[set[int]]:
    return [mine | other for mine, other in zip(pages, more, strict=True)]
