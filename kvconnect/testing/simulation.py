"""Random schedules from a seed: the reference engine's core over pages without a model, and a connector under it.

Whatever comes together (chunks, preemption, aborts, suspension, eviction, several ranks, asynchronous loads, steps
planned ahead), every byte that a layer reads is compared with what it must be. A mistake names the request, the
position and the bytes; the seed repeats it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from kvconnect.driver import WorkerDriver
from kvconnect.engine.core import EngineCore
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest, FinishReason, SamplingParams
from kvconnect.engine.scheduler import Batch
from kvconnect.protocol import Namespace
from kvconnect.store import HEADER_BYTES
from kvconnect.testing.content import Pages, prefix_states
from kvconnect.testing.harness import SHAPES
from kvconnect.testing.promise import BrokenPromise, must
from kvconnect.testing.target import ENGINE, Target

__all__ = ["ContentRunner", "Setting", "make_prompts", "simulate"]

_PAGE_BYTES = 4096
_VOCABULARY = 97
_MAX_TOKENS = 6


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a simulation.

    Attributes:
        shape: A name in `SHAPES`.
        block_size: Tokens a block.
        num_pages: Pages a group.
        max_batch_tokens: Tokens a step.
        num_ranks: Workers.
        async_load: Requests may be parked.
        async_scheduling: Steps are planned before the results of the one before are taken.
        aborts: Requests are aborted now and then.
        suspends: Requests are suspended, prefetched and resumed now and then.
    """

    shape: str = "full"
    block_size: int = 4
    num_pages: int = 40
    max_batch_tokens: int = 24
    num_ranks: int = 1
    async_load: bool = False
    async_scheduling: bool = False
    aborts: bool = True
    suspends: bool = False

    @classmethod
    def draw(
        cls,
        rng: random.Random,
        *,
        several_groups: bool,
        several_ranks: bool,
        async_load: bool,
        suspends: bool = False,
    ) -> Setting:
        """Choose one at random among those that a connector declares."""
        block_size = rng.choice([2, 4, 8])
        return cls(
            shape=rng.choice(["full", "full-bf16", "window", *(["mixed"] * 2 if several_groups else [])]),
            block_size=block_size,
            num_pages=rng.randrange(64, 160) // block_size + 1,
            max_batch_tokens=rng.randrange(3, 60),
            num_ranks=rng.choice([1, 2]) if several_ranks else 1,
            async_load=async_load and rng.random() < 0.5,
            async_scheduling=rng.random() < 0.5,
            aborts=rng.random() < 0.7,
            suspends=suspends,
        )

    def arena_bytes(self, num_blocks: int) -> int:
        """Return the capacity of an arena for that many blocks, all ranks together; frames lie on page boundaries."""
        cache = PagedCache(SHAPES[self.shape], block_size=self.block_size, num_pages=1)
        payload = max(group.payload_bytes for group in cache.layout(0, self.num_ranks).groups)
        return num_blocks * self.num_ranks * -(-(HEADER_BYTES + payload) // _PAGE_BYTES) * _PAGE_BYTES


class ContentRunner:
    """Computes KV without a model: the next token, and every byte, follow from the tokens before."""

    def __init__(self, pages: Pages, workers: Sequence[WorkerDriver]) -> None:
        """Compute into `pages`, and call the workers before and after each layer."""
        self._pages = pages
        self._workers = workers
        self.wrong: dict[str, str] = {}  # request -> the first wrong bytes that it read

    def forward(self, batch: Batch, sampled: Mapping[EngineRequest, int]) -> torch.Tensor:
        """Check what each layer reads, write what it computes; NaN for a request that read wrong bytes."""
        logits = torch.zeros(len(batch.parts), _VOCABULARY)
        sequences = []
        for part in batch.parts:
            tokens = part.request.tokens[: part.start + part.num_tokens].tolist()
            tokens += [sampled.get(part.request, 0)] * (part.start + part.num_tokens - len(tokens))
            states = prefix_states(tokens)
            self._pages.remember(part.request.request_id, states)
            sequences.append(states)
        for layer, cache in enumerate(self._pages.cache.layers):
            for worker in self._workers:
                worker.wait_for_layer_load(layer)
            for row, (part, states) in enumerate(zip(batch.parts, sequences, strict=True)):
                table = part.request.tables[cache.group]
                first = 0 if cache.window is None else max(0, part.start - cache.window + 1)
                wrong = self._pages.check(states, table, cache.group, layer, first, part.start)
                if wrong:
                    logits[row] = torch.nan
                    self.wrong.setdefault(part.request.request_id, str(wrong[0]))
                self._pages.write(states, table, layer, part.start, part.start + part.num_tokens)
            for worker in self._workers:
                worker.save_kv_layer(layer)
        for row, states in enumerate(sequences):
            logits[row, _next_token(states)] += 1
        return logits


def simulate(target: Target, seed: int, setting: Setting, prompts: Sequence[Sequence[int]], rounds: int = 2) -> int:
    """Run prompts through one engine with the target under it; return how many tokens were loaded.

    Args:
        target: A new connector is opened, and shut down at the end.
        seed: Decides arrivals, aborts, suspensions and evictions.
        setting: The engine.
        prompts: Each is served once a round, in random order.
        rounds: Between them the engine forgets its own pages.

    Raises:
        BrokenPromise: If a layer read wrong bytes, a token came out wrong, a hook raised, or something was left over.
    """
    rng = random.Random(seed)
    geometry = SHAPES[setting.shape]
    cache = PagedCache(geometry, block_size=setting.block_size, num_pages=setting.num_pages)
    pages = Pages(geometry, cache)
    failures: list[str] = []
    leader, workers = target.open(
        [cache.layout(rank, setting.num_ranks) for rank in range(setting.num_ranks)],
        namespace=Namespace(model=target.model, kv_dtype=str(geometry.dtype).removeprefix("torch.")),
        engine=msgspec.structs.replace(
            ENGINE, async_load=setting.async_load, max_batch_tokens=setting.max_batch_tokens
        ),
        on_failure=lambda hook, error: failures.append(f"{hook}: {error!r}"),
    )
    runner = ContentRunner(pages, workers)
    core = EngineCore(
        runner,
        cache,
        leader,
        workers,
        ends=_ends,
        max_batch_tokens=setting.max_batch_tokens,
        max_num_seqs=4,
        async_scheduling=setting.async_scheduling,
    )
    try:
        run = _Run(core, runner, rng, setting, 2 * target.patience_s)
        for _ in range(rounds):
            run.serve(prompts)
            for pool in cache.pools:
                pool.forget_names()
        run.drain()
    finally:
        leader.shutdown()
        for worker in workers:
            worker.shutdown()
    must(not failures, expected="no hook to raise or to answer against its contract", got="; ".join(failures[:3]))
    return run.loaded


class _Run:
    """One engine's life in a simulation."""

    def __init__(
        self, core: EngineCore, runner: ContentRunner, rng: random.Random, setting: Setting, patience_s: float
    ) -> None:
        self.loaded = 0
        self._patience_s = patience_s
        self._core = core
        self._runner = runner
        self._rng = rng
        self._setting = setting
        self._count = 0

    def serve(self, prompts: Sequence[Sequence[int]]) -> None:
        """Let prompts arrive while others run; compare what comes out."""
        waiting = list(prompts)
        self._rng.shuffle(waiting)
        running: dict[str, EngineRequest] = {}
        deadline = time.monotonic() + self._patience_s
        while waiting or running:
            must(
                time.monotonic() < deadline,
                expected=f"every request to be answered within {self._patience_s:.0f} s",
                got=f"{len(running)} that are not: {sorted(running)}",
                hint="an answer of Match(None, False) without end, or a load that is never reported",
            )
            while waiting and self._rng.random() < 0.4:
                request = self._arrive(waiting.pop())
                running[request.request_id] = request
            if self._setting.aborts and running and self._rng.random() < 0.08:
                gone = running.pop(self._rng.choice(list(running)))
                self._core.scheduler.abort(gone)
            if self._setting.suspends:
                self._move(running)
            self._step(running)

    def drain(self) -> None:
        """Step until nothing is left to do, and look for what is left over all the same."""
        deadline = time.monotonic() + self._patience_s
        while self._core.has_connector_work:
            must(
                time.monotonic() < deadline,
                expected=f"has_pending_work() to be False within {self._patience_s:.0f} s of empty steps",
                got="work without end",
            )
            self._step({})
            time.sleep(0.0002)
        for pool in self._core.cache.pools:
            pool.check_integrity()
            must(
                pool.num_held == 0,
                expected="every page to be let go when its request has ended",
                got=f"{pool.num_held} pages held",
                hint="request_finished answered True, or a load was parked, and get_finished never named the request",
            )

    def _move(self, running: dict[str, EngineRequest]) -> None:
        """Suspend a request, and have others brought up or resumed; one that is refused is asked for again later."""
        scheduler = self._core.scheduler
        for request in list(scheduler.suspended.values()):
            if self._rng.random() < 0.1:
                self._core.prefetch(request, self._rng.randrange(1, 4))
            if self._rng.random() < 0.2:
                scheduler.resume(request)
        going = [request for request in running.values() if request in (*scheduler.running, *scheduler.waiting)]
        if going and self._rng.random() < 0.25:
            self._core.suspend(self._rng.choice(going))
            if self._rng.random() < 0.5:  # else it may find all of its pages again where they were
                for pool in self._core.cache.pools:
                    pool.forget_names()

    def _arrive(self, prompt: Sequence[int]) -> EngineRequest:
        self._count += 1
        request = EngineRequest(
            f"s{self._count}",
            prompt,
            SamplingParams(max_tokens=_MAX_TOKENS),
            block_size=self._setting.block_size,
            num_groups=len(self._core.cache.pools),
        )
        self._core.scheduler.add(request)
        return request

    def _step(self, running: dict[str, EngineRequest]) -> None:
        for request, _, reason in self._core.step():
            self._check_tokens(request)
            if reason is not None:
                self.loaded += request.first_counts[1]
                running.pop(request.request_id, None)
        if self._core.num_unwritten:
            raise BrokenPromise(
                expected="each layer to read what was computed for these tokens, or the page among the load errors",
                got="; ".join(f"{name}: {what}" for name, what in sorted(self._runner.wrong.items())[:3]),
                hint="the bytes of a load were wrong, late, or in another place",
            )

    def _check_tokens(self, request: EngineRequest) -> None:
        known = request.tokens.tolist()
        expected = _next_token(prefix_states(known[:-1]))
        must(
            known[-1] == expected,
            expected=f"token {expected} at position {len(known) - 1} of {request.request_id}",
            got=f"token {known[-1]}",
        )


def make_prompts(rng: random.Random, count: int = 8, longest: int = 40) -> list[list[int]]:
    """Return prompts of which some begin alike."""
    stems = [[rng.randrange(_VOCABULARY) for _ in range(rng.randrange(4, longest // 2))] for _ in range(2)]
    tails = [[rng.randrange(_VOCABULARY) for _ in range(rng.randrange(1, longest // 2))] for _ in range(count)]
    return [rng.choice([[], *stems]) + tail for tail in tails]


def _ends(request: EngineRequest) -> FinishReason | None:
    return "length" if request.num_generated >= request.params.max_tokens else None


def _next_token(states: np.ndarray[Any, Any]) -> int:
    return int(states[-1]) % _VOCABULARY
