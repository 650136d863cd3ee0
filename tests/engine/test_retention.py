"""What the device keeps: priorities and their time, what nothing depends on, parts of blocks; and what is not saved."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvconnect import LLM, SamplingParams
from kvconnect.engine.config import KVCacheConfig
from kvconnect.engine.pool import NO_PAGE, CachedBlock, PagePool
from kvconnect.errors import ConfigError
from kvconnect.protocol import BlockHash, Retention, TokenRange
from tests.conftest import FAMILIES, Reference, make_model
from tests.engine.paged import BLOCK, SLOT, paged_engine
from tests.engine.test_generate import check_pages


def block(name: int, parent: int | None = None) -> CachedBlock:
    hashes = [BlockHash(bytes([each]) * 32) for each in (name, 255 if parent is None else parent)]
    return CachedBlock(hashes[0], hashes[1], (name,) * BLOCK)


def cached(pool: PagePool, *blocks: tuple[CachedBlock, int, float | None]) -> list[int]:
    """Fill pages, name them, and let them go in order."""
    pages = [pool.take() for _ in blocks]
    for page, (held, priority, duration_s) in zip(pages, blocks, strict=True):
        pool.name(page, held, priority, duration_s)
    for page in pages:
        pool.release(page)
    return pages


def gone(pool: PagePool, pages: Sequence[int], blocks: Sequence[CachedBlock]) -> list[int]:
    """Take every page; return the positions of the blocks in the order in which they went."""
    order = []
    for _ in pages:
        taken = pool.take()
        order.append(list(pages).index(taken))
        assert pool.find(blocks[order[-1]].block_hash) == NO_PAGE
        pool.check_integrity()
    return order


def test_lowest_priority_goes_first_then_the_least_recently_used() -> None:
    pool = PagePool(4)
    blocks = [block(1), block(2), block(3), block(4)]
    pages = cached(pool, (blocks[0], 35, None), (blocks[1], 80, None), (blocks[2], 10, None), (blocks[3], 35, None))
    assert gone(pool, pages, blocks) == [2, 0, 3, 1]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("ranks", "before", "after"), [([80, 35], 1, 0), ([35, 10], 1, 0)])
def test_priority_counts_for_its_time_and_is_the_default_one_then(ranks: list[int], before: int, after: int) -> None:
    for waited, first in ((4.0, before), (6.0, after)):
        clock = Clock()
        pool = PagePool(2, clock=clock)
        blocks = [block(1), block(2)]
        pages = cached(pool, *((held, rank, 5.0) for held, rank in zip(blocks, ranks, strict=True)))
        clock.now += waited
        assert gone(pool, pages, blocks)[0] == first


def test_block_that_another_continues_goes_after_it_whatever_its_priority() -> None:
    pool = PagePool(3)
    blocks = [block(1), block(2, 1), block(3, 2)]
    pages = cached(pool, (blocks[0], 0, None), (blocks[1], 100, None), (blocks[2], 100, None))
    assert gone(pool, pages, blocks) == [2, 1, 0]
    sliding = PagePool(3, sliding=True)
    pages = cached(sliding, (blocks[0], 0, None), (blocks[1], 100, None), (blocks[2], 100, None))
    assert gone(sliding, pages, blocks) == [0, 1, 2]  # in a window blocks do not depend on those before


@pytest.mark.parametrize(("says", "left"), [(True, 2), (False, 0)])
def test_claim_by_a_request_with_another_priority_changes_it(says: bool, left: int) -> None:
    prompt, other = list(range(12)), list(range(20, 32))
    keep = Retention(ranges=(TokenRange(start=0, end=None, priority=90, duration_s=None),), decode_priority=90)
    with paged_engine(None, num_pages=8, enable_partial_reuse=False) as engine:
        engine.serve(prompt)
        engine.serve(prompt, retention=keep if says else None)  # finds two blocks, and says that they are worth more
        engine.serve(other)
        engine.serve(list(range(40, 60)))  # takes two pages that are free, and three of theirs
        assert engine.cache.match(engine.request([*prompt, 1]).chain.hashes, 3) == left


def test_retention_without_reuse_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(max_tokens=1, retention=Retention(decode_priority=80))
    config = KVCacheConfig(max_tokens=256, enable_block_reuse=False)
    with LLM(None, kv_cache_config=config) as llm, caplog.at_level(logging.WARNING, "kvconnect.engine.llm"):
        for _ in range(2):
            llm.generate([[1, 2, 3]], params)
    assert [record.message for record in caplog.records if "retention" in record.message] == [
        "retention has no effect: enable_block_reuse is off"
    ]


def test_blocks_below_the_minimum_priority_are_not_kept_in_host_memory(references: dict[str, Reference]) -> None:
    prompt = list(range(1, 70))
    low = Retention(ranges=(TokenRange(start=0, end=32, priority=20, duration_s=None),))
    config = KVCacheConfig(max_tokens=512, block_size=8, host_cache_bytes="1MiB", host_min_priority=30)
    for retention, loaded in ((None, 64), (low, 0)):
        with LLM(make_model("llama"), kv_cache_config=config) as llm:
            llm.generate([prompt], SamplingParams(max_tokens=2, retention=retention))
            llm.reset_prefix_cache()
            (output,) = llm.generate([prompt], SamplingParams(max_tokens=6))
            assert output.loaded_tokens == loaded  # without the first blocks the others are of no use
            assert output.token_ids == references["llama"](prompt, 6)
            below = llm.get_stats()["leader"].get("saves_below_priority", 0)
            assert below == (0 if retention is None else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_part_of_a_block_is_copied_and_the_outputs_are_the_same(references: dict[str, Reference], family: str) -> None:
    stem = list(range(1, 60))
    with LLM(make_model(family), block_size=16) as llm:
        llm.generate([[*stem, 7, 7, 7, 7, 7, 7]], SamplingParams(max_tokens=4))
        for prompt, reused in (([*stem, 9, 9], 59), ([*stem[:40], 3, 3], 40), ([250, *stem], 0)):
            (output,) = llm.generate([prompt], SamplingParams(max_tokens=6))
            assert output.reused_tokens == reused
            assert output.blocks.partially_reused == (reused > 0) * len(llm._core.cache.pools)
            assert output.token_ids == references[family](prompt, 6)
        check_pages(llm)
    config = KVCacheConfig(block_size=16, enable_partial_reuse=False)
    with LLM(make_model(family), kv_cache_config=config) as llm:
        llm.generate([[*stem, 7, 7, 7, 7, 7, 7]], SamplingParams(max_tokens=4))
        (output,) = llm.generate([[*stem, 9, 9]], SamplingParams(max_tokens=6))
        assert output.reused_tokens == 48
        assert output.token_ids == references[family]([*stem, 9, 9], 6)


def test_copied_part_is_the_others_bytes_and_nothing_behind_it() -> None:
    with paged_engine(None) as engine:
        engine.serve(list(range(20)))
        request = engine.add([*range(18), 90, 91, 92])
        batch = engine.scheduler.schedule()
        assert request.num_reused == 18
        source = engine.cache.pools[0].find(engine.request(list(range(20))).chain.hashes[4])
        target = request.tables[0][4]
        assert source not in (NO_PAGE, target)
        for layer in engine.cache.layers:
            for pages in (layer.key, layer.value):
                assert torch.equal(pages[source, :2], pages[target, :2])
                assert torch.isnan(pages[target, 2:]).all()
        engine.core._advance(batch)
        engine.run()
        assert engine.num_held == 0


def test_part_of_a_salted_block_is_nobody_elses() -> None:
    with paged_engine(None) as engine:
        engine.serve(list(range(20)), cache_salt="one")
        assert engine.serve(list(range(19)), cache_salt="two").first_counts == (0, 0)
        assert engine.serve(list(range(19))).first_counts == (0, 0)
        assert engine.serve(list(range(19)), cache_salt="one").first_counts == (18, 0)


@given(st.data())
def test_pool_keeps_its_lists_whatever_happens(data: st.DataObject) -> None:
    now = 0.0
    pool = PagePool(8, clock=lambda: now)
    held: list[int] = []
    names = iter(range(10_000))
    for _ in range(data.draw(st.integers(1, 60))):
        now += data.draw(st.sampled_from([0.0, 1.0]))
        act = data.draw(st.sampled_from(["take", "name", "release", "find", "resize", "forget"]))
        if act == "take" and pool.num_available:
            held.append(pool.take())
        elif act == "name" and held:
            number = next(names) % 200
            parent = data.draw(st.none() | st.integers(0, 200))
            priority, duration = data.draw(st.integers(0, 100)), data.draw(st.none() | st.floats(0.5, 3))
            pool.name(data.draw(st.sampled_from(held)), block(number, parent), priority, duration)
        elif act == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif act == "find":
            page = pool.find(block(data.draw(st.integers(0, 199))).block_hash)
            if page != NO_PAGE:
                pool.hold(page)
                held.append(page)
        elif act == "resize":
            count = data.draw(st.integers(0, 9))
            before = pool.num_usable
            resized = pool.resize(count)
            assert resized == (0 < count <= 8 and pool.num_held <= count)
            assert pool.num_usable == (count if resized else before)
        elif act == "forget":
            pool.forget_names()
        pool.check_integrity()
        assert pool.num_held == len(set(held))
        assert pool.num_available == pool.num_usable - pool.num_held


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_tokens": 10}, "max_tokens=10 does not hold one block of 16"),
        ({"host_min_priority": 101}, r"host_min_priority must lie in \[0, 100\]"),
        ({"event_buffer_max_size": -1}, "event_buffer_max_size must be 0 or more"),
        ({"reserve_tokens": -1}, "reserve_tokens must be 0 or more"),
        ({"host_cache_bytes": 1 << 20, "enable_block_reuse": False}, "leaves nothing to do for host_cache_bytes"),
        ({"reserve_host_bytes": 1 << 20}, "reserve_host_bytes needs host_cache_bytes"),
    ],
)
def test_configuration_that_cannot_be_is_refused(fields: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KVCacheConfig(**fields)  # type: ignore[arg-type]


def test_host_memory_is_sized_once() -> None:
    config = KVCacheConfig(max_tokens=256, host_cache_bytes=64 * SLOT)
    with pytest.raises(ConfigError, match="both size host memory"):
        LLM(None, "host://?capacity=1MiB", kv_cache_config=config)


def test_device_and_host_grow_into_what_was_reserved(references: dict[str, Reference]) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(300) for _ in range(100)]
    config = KVCacheConfig(
        max_tokens=128, reserve_tokens=512, block_size=8, host_cache_bytes="64KiB", reserve_host_bytes="1MiB"
    )
    with LLM(make_model("llama"), kv_cache_config=config) as llm:
        with pytest.raises(ConfigError, match="16 pages of 8 tokens"):
            llm.add_request(prompt, SamplingParams(max_tokens=60))
        page = llm._core.cache.bytes_per_page
        assert llm.resize(0, 64 * page)
        assert not llm.resize(0, 65 * page)
        assert llm.resize(1, "1MiB")
        assert not llm.resize(1, "2MiB")
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=60))
        assert output.token_ids == references["llama"](prompt, 60)
        assert llm.get_stats()["pages"] == 64
        llm.reset_prefix_cache()
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=1))
        assert output.loaded_tokens == 96
        assert llm.resize(1, "64KiB")
        assert llm.get_stats()["leader"]["arena"]["slots"] == 8


def test_warming_up_computes_and_leaves_nothing() -> None:
    with LLM(None, "host://?capacity=16MiB") as llm:
        llm.warm_up(100)
        stats = llm.get_stats()
        assert stats["leader"].get("save_blocks", 0) == 0
        assert stats["leader"]["requests"] == 0
        assert llm.generate([[0] * 100], SamplingParams(max_tokens=1))[0].computed_tokens == 100
        llm.warm_up()
        llm.add_request([1, 2, 3])
        with pytest.raises(ConfigError, match="before the first request"):
            llm.warm_up()


def test_whole_block_behind_loaded_ones_is_used_but_for_its_last_token() -> None:
    prompt = list(range(30))
    with paged_engine(num_pages=20) as engine:
        engine.serve(prompt, retention=Retention(decode_priority=0))
        pool = engine.cache.pools[0]
        hashes = engine.request(prompt).chain.hashes
        for number in (0, 1):  # the first two blocks are in host memory only, the others on the device too
            page = pool.find(hashes[number])
            pool.hold(page)
            pool._forget(page, pool._blocks[page])
            pool.release(page)
        for number in range(3, 7):
            page = pool.find(hashes[number])
            pool.hold(page)
            pool._forget(page, pool._blocks[page])
            pool.release(page)
        engine.offload._index.void(engine.offload._index.get(0, hashes[2]))
        request = engine.serve(prompt)  # the runner compares every byte that is read
        assert request.first_counts == (3, 8)
