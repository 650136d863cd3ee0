"""The engine's core without a model: pages hold what follows from their tokens, and every byte that is read is checked.

The runner is the conformance kit's; the connector under it is real.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from kvconnect.driver import LeaderDriver, WorkerDriver, open_connector
from kvconnect.engine.core import ENGINE_CAPABILITIES, EngineCore
from kvconnect.engine.pages import PagedCache
from kvconnect.engine.request import EngineRequest, FinishReason, SamplingParams
from kvconnect.protocol import Namespace
from kvconnect.testing.content import Pages
from kvconnect.testing.harness import SHAPES
from kvconnect.testing.simulation import ContentRunner

BLOCK = 4
SLOT = 4096  # bytes of an arena slot for the shapes used here


class PagedEngine:
    """A core, its pages, its leader and workers."""

    def __init__(self, core: EngineCore, leader: Any, runner: ContentRunner) -> None:
        self.core = core
        self.leader = leader
        self.cache = core.cache
        self.manager = core.manager
        self.scheduler = core.scheduler
        self._runner = runner
        self._ids = itertools.count()

    def request(self, prompt: Sequence[int], max_tokens: int = 1, **params: Any) -> EngineRequest:
        """Make a request that no queue has."""
        return EngineRequest(
            f"r{next(self._ids)}",
            prompt,
            SamplingParams(max_tokens=max_tokens, **params),
            block_size=BLOCK,
            num_groups=len(self.cache.pools),
        )

    def add(self, prompt: Sequence[int], max_tokens: int = 1, **params: Any) -> EngineRequest:
        """Queue a request."""
        request = self.request(prompt, max_tokens, **params)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        """Run a step and look at what was read."""
        self.core.step()
        self.check()

    def serve(self, prompt: Sequence[int], max_tokens: int = 1, **params: Any) -> EngineRequest:
        """Run one request to its end, and the connector until it is idle."""
        request = self.add(prompt, max_tokens, **params)
        self.run()
        return request

    def run(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(10_000):
            if not self.scheduler.has_requests and not self.core.has_connector_work:
                return
            self.step()
        raise AssertionError("no end")

    def settle(self) -> None:
        """Let the connector finish what it has begun; requests wait."""
        for _ in range(10_000):
            if not self.core.has_connector_work:
                return
            self.core.idle()
            self.check()
        raise AssertionError("no end")

    def check(self) -> None:
        """Compare the lists of pages and slots with one another, and say what was read wrongly."""
        assert not self._runner.wrong, self._runner.wrong
        for pool in self.cache.pools:
            pool.check_integrity()
        if self.leader is not None:
            self.offload._check_integrity()

    @property
    def offload(self) -> Any:
        """The offload leader behind the driver, for what only it knows."""
        return self.leader.hook("get_stats").__self__

    @property
    def num_held(self) -> int:
        """Pages that are held, in all groups."""
        return sum(pool.num_held for pool in self.cache.pools)

    def arena(self) -> dict[str, int]:
        """Return how the arena's slots stand."""
        counts: dict[str, int] = self.leader.get_stats()["arena"]
        return counts


@contextlib.contextmanager
def paged_engine(
    connector: Any = "host://?capacity=1MiB",
    *,
    shape: str = "full",
    num_pages: int = 32,
    max_batch_tokens: int = 64,
    max_num_seqs: int = 8,
    num_ranks: int = 1,
    async_load: bool = False,
    async_scheduling: bool = False,
    **manager: bool,
) -> Iterator[PagedEngine]:
    """Open an engine over a fresh cache; `connector` None for none."""
    geometry = SHAPES[shape]
    cache = PagedCache(geometry, block_size=BLOCK, num_pages=num_pages)
    leader: LeaderDriver | None = None
    workers: list[WorkerDriver] = []
    if connector is not None:
        leader, workers = open_connector(
            connector,
            [cache.layout(rank, num_ranks) for rank in range(num_ranks)],
            namespace=Namespace(model="id:paged", kv_dtype="float32"),
            engine=msgspec.structs.replace(
                ENGINE_CAPABILITIES, async_load=async_load, max_batch_tokens=max_batch_tokens
            ),
        )
    runner = ContentRunner(Pages(geometry, cache), workers)
    core = EngineCore(
        runner,
        cache,
        leader,
        workers,
        ends=_ends,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        async_scheduling=async_scheduling,
        **manager,
    )
    try:
        yield PagedEngine(core, leader, runner)
    finally:
        if leader is not None:
            leader.shutdown()
        for worker in workers:
            worker.shutdown()


def _ends(request: EngineRequest) -> FinishReason | None:
    return "length" if request.num_generated >= request.params.max_tokens else None
