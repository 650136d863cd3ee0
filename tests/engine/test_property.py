"""Whatever comes together: the engine answers with `generate()`'s tokens, and nothing is left over.

Prompts with shared prefixes, arrivals and aborts at any step, chunk sizes, pools that force preemption, arenas that
force rounds, synchronous and asynchronous loads, one and two ranks, and a store that is healthy or fails in some way.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvconnect import LLM, SamplingParams
from tests.conftest import Reference, make_model
from tests.engine.test_connectors import foreign, half, noise, raises, threads_of_ours, use_store
from tests.engine.test_generate import check_pages
from tests.store.stores import DictStore, dict_store

assert use_store  # a fixture

PAGE = 2 * 2 * 2 * 16 * 4 * 8
TOKENS = 4
PARAMS = SamplingParams(max_tokens=TOKENS)
FAULTS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "raises": {"contains": raises, "read": raises, "write": raises},
    "half": {"read": half},
    "foreign": {"read": foreign},
    "noise": {"read": noise},
    "loses": {"read": lambda self, keys, buffers: [None] * len(keys)},
    "declines": {"write": lambda self, keys, frames: [False] * len(keys)},
}


def batch_of(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    stems = [[rng.randrange(300) for _ in range(rng.randrange(8, 60))] for _ in range(2)]
    return [rng.choice([[], *stems]) + [rng.randrange(300) for _ in range(rng.randrange(1, 40))] for _ in range(6)]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: make_model(family) for family in ("llama", "gemma3")}


def serve(llm: LLM, batch: list[list[int]], expected: list[list[int]], rng: random.Random, aborts: bool) -> None:
    """Let the prompts arrive while others run, abort some, and compare what finishes."""
    waiting = list(range(len(batch)))
    running: dict[str, int] = {}
    deadline = time.monotonic() + 60
    while waiting or running:
        assert time.monotonic() < deadline, "a request was not answered in time"
        while waiting and rng.random() < 0.4:
            number = waiting.pop(0)
            running[llm.add_request(batch[number], PARAMS)] = number
        if aborts and running and rng.random() < 0.1:
            request_id = rng.choice(list(running))
            number = running.pop(request_id)
            aborted = llm.abort(request_id)
            assert aborted is not None
            assert aborted.token_ids == expected[number][: len(aborted.token_ids)]
        for output in llm.step():
            if output.finished is not None:
                assert output.finished.token_ids == expected[running.pop(output.request_id)]


@settings(
    max_examples=int(__import__("os").environ.get("EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    family=st.sampled_from(["llama", "gemma3"]),
    seed=st.integers(0, 9),
    order=st.integers(0, 2**16),
    chunk=st.integers(3, 120),
    pages=st.integers(16, 60),
    slots=st.integers(3, 80),
    async_load=st.booleans(),
    async_scheduling=st.booleans(),
    num_ranks=st.sampled_from([1, 2]),
    aborts=st.booleans(),
    fault=st.sampled_from(sorted(FAULTS)),
    codec=st.sampled_from(["none", "zstd"]),
)
def test_any_schedule_gives_the_same_tokens_and_leaves_nothing(
    use_store: Any,
    references: dict[str, Reference],
    models: dict[str, Any],
    family: str,
    seed: int,
    order: int,
    chunk: int,
    pages: int,
    slots: int,
    async_load: bool,
    async_scheduling: bool,
    num_ranks: int,
    aborts: bool,
    fault: str,
    codec: str,
) -> None:
    batch = batch_of(seed)
    expected = [references[family](prompt, TOKENS) for prompt in batch]
    healthy = dict_store()
    bad: type[DictStore] = dict_store(**FAULTS[fault], frames=healthy.frames)
    before = threads_of_ours()
    rng = random.Random(order)
    width = 2 if family == "gemma3" else 1  # twice the layers
    slot = -(-(256 + PAGE // num_ranks) // 4096) * 4096
    for store in (healthy, bad):
        connector = [f"host://?capacity={slot * slots * num_ranks}", f"{use_store(store)}&codec={codec}"]
        with LLM(
            models[family],
            connector,
            block_size=8,
            kv_cache_bytes=PAGE * pages * width,
            max_batch_tokens=chunk,
            max_num_seqs=4,
            num_ranks=num_ranks,
            async_load=async_load,
            async_scheduling=async_scheduling,
        ) as llm:
            for _ in range(2):
                serve(llm, batch, expected, rng, aborts)
                llm.reset_prefix_cache()
            llm.close()
            check_pages(llm)
            leader = llm.get_stats()["leader"]
            arena = leader["arena"]
            assert [arena[name] for name in ("claimed", "reserved", "promoting", "quarantined")] == [0] * 4
            assert leader["requests"] == 0
            assert leader["off"] == ""
            assert leader["hooks"]["failures"] == {}
            assert all(stats["hooks"]["failures"] == {} for stats in llm.get_stats()["workers"])
    assert threads_of_ours() == before
