"""What requests are told adds up to what the engine says, and what levels are said to hold lies there."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.engine import RequestOutput
from kvconnect.engine.manager import KVCacheManager
from kvconnect.engine.pool import PagePool
from kvconnect.engine.stats import BlockCounts
from tests.conftest import make_model
from tests.engine.test_connectors import use_store
from tests.engine.test_generate import check_pages
from tests.store.stores import dict_store

assert use_store  # a fixture

SIZE = 8
PAYLOAD = 2 * 2 * 2 * 16 * 4 * SIZE  # bytes of one block of the small Llama, and of each of Gemma3's groups


class Watch:
    """Counts what no counter of the engine's is read for: pages handed out, and runs that began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self.runs: Counter[str] = Counter()
        take, add = PagePool.take, KVCacheManager.add_sequences

        def counted_take(pool: PagePool) -> int:
            self.taken += 1
            return take(pool)

        def counted_add(manager: KVCacheManager, batch: Any) -> Any:
            admitted = add(manager, batch)
            self.runs.update(admission.request.request_id for admission in admitted)
            return admitted

        monkeypatch.setattr(PagePool, "take", counted_take)
        monkeypatch.setattr(KVCacheManager, "add_sequences", counted_add)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def live(llm: LLM, rng: random.Random, *, count: int, aborts: bool, suspends: bool) -> list[RequestOutput]:
    """Let requests come, run, be suspended, resumed and aborted, in any order; return what became of each."""
    common = [rng.randrange(300) for _ in range(60)]
    ended: list[RequestOutput] = []
    living: set[str] = set()
    arrived = 0
    while arrived < count or living:
        if arrived < count and rng.random() < 0.5:
            prompt = common[: rng.randrange(60)] + [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
            living.add(llm.add_request(prompt, SamplingParams(max_tokens=rng.randrange(1, 20))))
            arrived += 1
        for output in llm.step():
            if output.finished is not None:
                living.discard(output.request_id)
                ended.append(output.finished)
        for request_id in sorted(living):
            sequence = llm.sequence(request_id)
            if aborts and rng.random() < 0.03:
                aborted = llm.abort(request_id)
                assert aborted is not None
                ended.append(aborted)
                living.discard(request_id)
            elif sequence.status == "suspended":
                if rng.random() < 0.5:
                    sequence.resume()
            elif suspends and sequence.status in ("running", "waiting") and rng.random() < 0.1:
                sequence.suspend()
                if rng.random() < 0.5:
                    llm.reset_prefix_cache()
    return ended


def summed(outputs: list[RequestOutput]) -> BlockCounts:
    total = BlockCounts()
    for output in outputs:
        total.add(output.blocks)
    return total


def full_blocks(output: RequestOutput) -> int:
    return (output.prompt_tokens - 1) // SIZE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("async_load", "async_scheduling"), [(False, False), (True, False), (False, True)])
def test_requests_add_up_to_the_engine(
    family: str, async_load: bool, async_scheduling: bool, watch: Watch, use_store: Any
) -> None:
    seen: Counter[str] = Counter()
    groups = 2 if family == "gemma3" else 1
    options: dict[str, Any] = {"async_load": async_load, "async_scheduling": async_scheduling, "max_batch_tokens": 50}
    options |= {"block_size": SIZE, "kv_cache_bytes": 15 * PAYLOAD * groups}  # as many pages as the longest needs
    for seed in range(3):
        rng = random.Random(seed)
        connector = [f"host://?capacity={rng.choice([300, 900])}KiB", use_store(dict_store())]
        with LLM(make_model(family), connector, **options) as llm:
            llm.warm_up(20)  # has pages, and no output
            watch.taken = 0
            watch.runs.clear()
            outputs = live(llm, rng, count=25, aborts=True, suspends=True)
            assert len(outputs) == 25
            stats = llm.get_stats()
            llm.close()
            check_pages(llm)
        total = summed(outputs)
        told = {name: count for name, count in stats["blocks"].items() if name != "dropped"}
        assert told == msgspec.structs.asdict(total)
        assert total.allocated == watch.taken
        assert total.allocated_bytes == total.allocated * PAYLOAD
        seen.update({**told, "preemptions": stats["preemptions"]})
        for output in outputs:
            blocks = output.blocks
            found = blocks.reused + blocks.loaded + blocks.missed
            assert found == full_blocks(output) * groups * watch.runs[output.request_id]
            assert min(msgspec.structs.astuple(blocks)) >= 0
            if watch.runs[output.request_id] == 1 and output.finish_reason != "aborted":
                assert blocks.reused == min(full_blocks(output), output.reused_tokens // SIZE) * groups
                assert blocks.loaded == output.loaded_tokens // SIZE * groups
    assert all(seen[what] for what in ("preemptions", "restored", "reused", "loaded", "missed")), seen


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_pages_are_computed_into_loaded_or_restored(family: str, num_ranks: int, use_store: Any) -> None:
    rng = random.Random(4)
    connector = ["host://?capacity=4MiB", use_store(dict_store())]
    groups = 2 if family == "gemma3" else 1
    pages = {"kv_cache_bytes": 30 * PAYLOAD * groups}
    with LLM(make_model(family), connector, block_size=SIZE, num_ranks=num_ranks, **pages) as llm:  # type: ignore[arg-type]
        outputs = live(llm, rng, count=25, aborts=False, suspends=True)
        total, stats = summed(outputs), llm.get_stats()
    by_workers = sum(worker["loaded_bytes"] for worker in stats["workers"])
    assert total.loaded_bytes == by_workers > 0
    assert (total.allocated - total.new) * PAYLOAD == by_workers
    assert stats["levels"]["host"]["loaded_blocks"] * PAYLOAD == by_workers
    assert stats["levels"]["host"]["loaded_bytes"] == by_workers


def test_a_resume_is_no_hit() -> None:
    with LLM(make_model("llama"), "host://?capacity=4MiB", block_size=SIZE) as llm:
        request_id = llm.add_request(list(range(33)), SamplingParams(max_tokens=10))
        for _ in range(4):
            llm.step()
        computed = llm._requests[request_id].num_computed
        assert llm.sequence(request_id).suspend()
        llm.reset_prefix_cache()
        assert llm.sequence(request_id).resume()
        finished = [output.finished for _ in range(40) for output in llm.step() if output.finished]
    (output,) = finished
    assert output is not None
    taken = -(-computed // SIZE)
    assert output.blocks == BlockCounts(
        allocated=6 + taken,  # 43 tokens, of which the last is never computed on
        new=6,
        missed=4,
        restored=taken,
        allocated_bytes=(6 + taken) * PAYLOAD,
        loaded_bytes=taken * PAYLOAD,
    )


def test_requests_that_never_ran_count_nothing() -> None:
    with LLM(make_model("llama"), block_size=SIZE, max_num_seqs=1) as llm:
        ids = [llm.add_request(list(range(20)), SamplingParams(max_tokens=3)) for _ in range(2)]
        llm.step()
        waiting = llm.abort(ids[1])
        running = llm.abort(ids[0])
        assert waiting is not None
        assert running is not None
        assert waiting.blocks == BlockCounts()
        assert running.blocks == BlockCounts(allocated=3, new=3, missed=2, allocated_bytes=3 * PAYLOAD)
        assert llm.get_stats()["blocks"]["allocated"] == 3


@pytest.mark.parametrize("async_load", [False, True])
def test_what_a_store_does_not_bring_is_missed(async_load: bool, use_store: Any) -> None:
    prompt = list(range(41))
    store = dict_store()
    url = use_store(store)
    with LLM(make_model("llama"), ["host://?capacity=4MiB", url], block_size=SIZE) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))
    torn = sorted(store.frames, key=lambda key: key)[2]
    store.frames[torn] = store.frames[torn][:-1] + b"?"
    with LLM(make_model("llama"), ["host://?capacity=4MiB", url], block_size=SIZE, async_load=async_load) as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=1))
        blocks, levels = output.blocks, llm.get_stats()["levels"]
    assert blocks.loaded * SIZE == output.loaded_tokens < 40
    assert (blocks.loaded + blocks.missed, blocks.reused, blocks.allocated) == (5, 0, 6)
    assert blocks.new == 6 - blocks.loaded
    assert blocks.loaded_bytes == blocks.loaded * PAYLOAD
    assert levels["test"]["loaded_blocks"] == 4


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_levels_agree_with_what_lies_there(num_ranks: int, use_store: Any) -> None:
    rng = random.Random(2)
    store = dict_store()
    connector = ["host://?capacity=160KiB", use_store(store)]
    options: dict[str, Any] = {"kv_cache_bytes": 30 * PAYLOAD, "num_ranks": num_ranks}
    with LLM(make_model("llama"), connector, block_size=SIZE, **options) as llm:
        live(llm, rng, count=25, aborts=False, suspends=False)
        while llm._core.has_connector_work:
            llm.step()
        stats = llm.get_stats()
        levels = stats["levels"]
        assert list(levels) == ["device", "host", "test"]
        (pool,) = llm._core.cache.pools
        device, host, below = levels.values()
        assert device["saved_blocks"] - device["dropped_blocks"] == len(pool.blocks)
        assert device["used_blocks"] == len(pool.blocks)  # nothing runs
        assert device["capacity_blocks"] == 30
        assert device["dropped_blocks"] > 0
        assert device["loaded_blocks"] == stats["blocks"]["reused"] > 0
        assert host["saved_blocks"] + below["loaded_blocks"] - host["dropped_blocks"] == host["used_blocks"]
        assert host["used_blocks"] == stats["leader"]["arena"]["ready"]
        assert host["capacity_blocks"] == stats["leader"]["arena"]["slots"]
        assert host["capacity_bytes"] <= 160 << 10
        assert host["dropped_blocks"] > 0
        assert below["saved_blocks"] * num_ranks == len(store.frames)
        assert below["loaded_blocks"] > 0
        for level in levels.values():
            for what in ("loaded", "saved", "dropped", "used"):
                blocks = level[f"{what}_blocks"]
                assert level[f"{what}_bytes"] == (None if blocks is None else blocks * PAYLOAD)
        unknown = {name for name, value in below.items() if value is None}
        assert unknown == {f"{what}_{unit}" for what in ("dropped", "used", "capacity") for unit in ("blocks", "bytes")}


def test_two_stores_of_a_name_are_two_levels(tmp_path: Path) -> None:
    connector = ["host://?capacity=4MiB", f"disk://{tmp_path}/a", f"disk://{tmp_path}/b?mode=r"]
    with LLM(make_model("llama"), connector, block_size=SIZE) as llm:
        llm.generate([list(range(40))], SamplingParams(max_tokens=1))
        while llm._core.has_connector_work:
            llm.step()
        levels = llm.get_stats()["levels"]
    assert list(levels) == ["device", "host", "disk", "disk-3"]
    assert (levels["disk"]["saved_blocks"], levels["disk-3"]["saved_blocks"]) == (5, 0)


def test_without_a_connector_there_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(make_model("llama"), block_size=SIZE) as llm:
        assert list(llm.get_stats()["levels"]) == ["device"]
    with LLM(make_model("llama"), "host://", block_size=SIZE) as llm:
        assert llm._leader is not None
        monkeypatch.setitem(llm._leader._hooks, "get_stats", lambda: {"levels": 3})  # a leader that counts otherwise
        levels = llm.get_stats()["levels"]
        assert set(levels["host"].values()) == {None}
        assert levels["device"]["capacity_blocks"] > 0


def test_an_admission_that_was_interrupted_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(33)), list(range(100, 141))]
    with LLM(make_model("llama"), "host://?capacity=4MiB", block_size=SIZE) as llm:
        assert llm._leader is not None
        told = llm._leader.update_state_after_alloc
        calls: list[object] = []

        def interrupted(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return told(*args)

        monkeypatch.setattr(llm._leader, "update_state_after_alloc", interrupted)
        ids = [llm.add_request(prompt, SamplingParams(max_tokens=1)) for prompt in prompts]
        with pytest.raises(KeyboardInterrupt):
            llm.step()
        assert {llm._requests[request_id].counts.allocated for request_id in ids} == {0}
        finished = {output.request_id: output.finished for _ in range(3) for output in llm.step()}
        first, second = (finished[request_id] for request_id in ids)
        assert first is not None
        assert second is not None
        assert (first.blocks.allocated, first.blocks.missed) == (5, 4)
        assert (second.blocks.allocated, second.blocks.missed) == (6, 5)
        assert llm.get_stats()["blocks"]["allocated"] == 11
