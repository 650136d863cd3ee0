"""Whatever comes together: the engine answers with `generate()`'s tokens, and nothing is left over.

Prompts with shared prefixes, arrivals and aborts at any step, chunk and block sizes, pools that force preemption,
arenas that force rounds, synchronous and asynchronous loads and scheduling, one and two ranks, and a store that is
healthy or fails in some way: raises, hangs, answers late, lies, loses, declines, fills up.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
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

TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of one token's KV in the smallest model
TOKENS = 4
PARAMS = SamplingParams(max_tokens=TOKENS)
TIMEOUT_S = 0.1
FAULTS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "raises": {"contains": raises, "read": raises, "write": raises},
    "half": {"read": half},
    "foreign": {"read": foreign},
    "noise": {"read": noise},
    "loses": {"read": lambda self, keys, buffers: [None] * len(keys)},
    "declines": {"write": lambda self, keys, frames: [False] * len(keys)},
    "hangs": {},  # the rest is made for each run, see `hanging` and `filling`
    "late": {},
    "full": {},
}


class Hang:
    """Lets some calls of a store wait: for ever, until the gate opens, or for longer than their deadline."""

    def __init__(self, rng: random.Random, *, late: bool) -> None:
        self.gate = threading.Event()
        self.rng = rng
        self.late = late

    def overrides(self) -> dict[str, Any]:
        def contains(store: DictStore, keys: Sequence[Any]) -> Sequence[bool]:
            self.maybe_wait(0.1)
            return DictStore.contains(store, keys)

        def read(store: DictStore, keys: Sequence[Any], buffers: Sequence[memoryview]) -> Sequence[int | None]:
            if self.maybe_wait(0.3):
                for buffer in buffers:  # into slots that must not be anybody else's by now
                    buffer[:] = bytes([0xEE]) * len(buffer)
            return DictStore.read(store, keys, buffers)

        def write(store: DictStore, keys: Sequence[Any], frames: Sequence[Any]) -> Sequence[bool]:
            self.maybe_wait(0.1)
            return DictStore.write(store, keys, frames)

        return {"contains": contains, "read": read, "write": write}

    def maybe_wait(self, share: float) -> bool:
        if self.rng.random() >= share:
            return False
        return not self.gate.wait(TIMEOUT_S * 2 if self.late else None)


def filling(limit: int) -> dict[str, Any]:
    """A store that has no room for more than `limit` frames."""

    def write(store: DictStore, keys: Sequence[Any], frames: Sequence[Any]) -> Sequence[bool]:
        return [
            len(store.frames) < limit and DictStore.write(store, [k], [f])[0] for k, f in zip(keys, frames, strict=True)
        ]

    return {"write": write}


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
        for pool in llm._core.cache.pools:
            pool.check_integrity()  # free and held pages are the pool


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    family=st.sampled_from(["llama", "gemma3"]),
    seed=st.integers(0, 9),
    order=st.integers(0, 2**16),
    block_size=st.sampled_from([8, 16, 32, 128]),
    chunk=st.integers(3, 120),
    pages=st.integers(0, 44),
    slots=st.integers(3, 80),
    async_load=st.booleans(),
    async_scheduling=st.booleans(),
    num_ranks=st.sampled_from([1, 2]),
    aborts=st.booleans(),
    fault=st.sampled_from(sorted(FAULTS)),
    codec=st.sampled_from(["none", "zstd"]),
    policy=st.sampled_from(["always", "cost"]),
)
def test_any_schedule_gives_the_same_tokens_and_leaves_nothing(
    use_store: Any,
    references: dict[str, Reference],
    models: dict[str, Any],
    family: str,
    seed: int,
    order: int,
    block_size: int,
    chunk: int,
    pages: int,
    slots: int,
    async_load: bool,
    async_scheduling: bool,
    num_ranks: int,
    aborts: bool,
    fault: str,
    codec: str,
    policy: str,
) -> None:
    batch = batch_of(seed)
    expected = [references[family](prompt, TOKENS) for prompt in batch]
    rng = random.Random(order)
    hang = Hang(random.Random(order), late=fault == "late")
    overrides = FAULTS[fault]
    if fault in ("hangs", "late"):
        overrides = hang.overrides()
    elif fault == "full":
        overrides = filling(rng.randrange(12))
    healthy = dict_store()
    bad: type[DictStore] = dict_store(**overrides, frames=healthy.frames)
    before = threads_of_ours()
    page = TOKEN * block_size * (2 if family == "gemma3" else 1)  # twice the layers
    slot = -(-(256 + page // num_ranks) // 4096) * 4096
    longest = max(len(prompt) + TOKENS for prompt in batch)
    for store in (healthy, bad):
        host = f"host://?capacity={slot * slots * num_ranks}&load_policy={policy}"
        url = use_store(store).replace("0.2", str(TIMEOUT_S))
        with LLM(
            models[family],
            [host, f"{url}&codec={codec}"],
            block_size=block_size,
            kv_cache_bytes=page * (-(-longest // block_size) + pages * 8 // block_size),
            max_batch_tokens=chunk,
            max_num_seqs=4,
            num_ranks=num_ranks,
            async_load=async_load,
            async_scheduling=async_scheduling,
        ) as llm:
            for _ in range(2):
                serve(llm, batch, expected, rng, aborts)
                llm.reset_prefix_cache()
            if rng.random() < 0.5:  # else the engine is closed while calls hang
                hang.gate.set()
                wait_until(llm, lambda arena: not arena["quarantined"])
            started = time.monotonic()
            llm.close(drain_s=5)
            assert time.monotonic() - started < 10
            check_pages(llm)
            leader = llm.get_stats()["leader"]
            arena = leader["arena"]
            assert [arena[name] for name in ("claimed", "reserved", "promoting")] == [0] * 3
            assert arena["quarantined"] == 0 or not hang.gate.is_set()
            assert leader["requests"] == 0
            assert leader["off"] == ""
            assert leader["hooks"]["failures"] == {}
            assert all(stats["hooks"]["failures"] == {} for stats in llm.get_stats()["workers"])
    hang.gate.set()
    deadline = time.monotonic() + 10
    while threads_of_ours() - before and time.monotonic() < deadline:
        time.sleep(0.01)  # those whose call hung end with it
    assert threads_of_ours() <= before


def wait_until(llm: LLM, done: Any) -> None:
    deadline = time.monotonic() + 10
    while not done(llm.get_stats()["leader"]["arena"]):
        assert time.monotonic() < deadline, llm.get_stats()
        llm.step()
