"""Whoever listens knows what lies on the device: by events alone, after any gap, and never of salted blocks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.engine import EventFollower, KVCacheConfig
from kvconnect.errors import ConfigError
from kvconnect.protocol import BlockChain, BlocksRemoved, BlocksStored, BlocksUpdated, Retention, TokenRange
from kvconnect.protocol.keys import BlockHash
from tests.conftest import make_model

Found = set[tuple[int, int, BlockHash]]


def small(tokens: int = 160, events: int = 10_000) -> KVCacheConfig:
    return KVCacheConfig(max_tokens=tokens, block_size=8, event_buffer_max_size=events)


def on_device(llm: LLM) -> Found:
    """Walk the pools' pages; of those that can be found, say which."""
    return {
        (-1, group, block.block_hash)
        for group, pool in enumerate(llm._core.cache.pools)
        for block in pool._blocks.values()
    }


def below(followed: EventFollower) -> Found:
    return {block for block in followed.blocks if block[0] >= 0}


def device_part(followed: EventFollower) -> Found:
    return followed.blocks - below(followed)


def retained(priority: int) -> SamplingParams:
    return SamplingParams(max_tokens=2, retention=Retention(ranges=(TokenRange(0, None, priority),)))


def prompt_of(rng: random.Random, common: list[int]) -> list[int]:
    return common[: rng.randrange(60)] + [rng.randrange(300) for _ in range(rng.randrange(1, 50))]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("connector", [None, "host://?capacity=200KiB"])
def test_a_follower_knows_what_the_pools_know(family: str, connector: str | None) -> None:
    rng = random.Random(7)
    common = [rng.randrange(300) for _ in range(60)]
    follower = EventFollower()
    salted: set[BlockHash] = set()
    with LLM(make_model(family), connector, kv_cache_config=small()) as llm:
        resets = 0
        for _ in range(25):
            salt = rng.choice([None, None, "a"])
            retention = rng.choice([None, Retention(ranges=(TokenRange(0, None, rng.randrange(100)),))])
            params = SamplingParams(max_tokens=rng.randrange(1, 12), cache_salt=salt, retention=retention)
            batch = [prompt_of(rng, common) for _ in range(rng.randrange(1, 4))]
            for prompt, output in zip(batch, llm.generate(batch, params), strict=True):
                if salt is not None:
                    chain = BlockChain(8, salt=salt)
                    chain.extend(prompt + output.token_ids)
                    salted.update(chain.hashes)
            if rng.random() < 0.1:
                llm.reset_prefix_cache()
                resets += 1
            if rng.random() < 0.7:
                assert follower.follow(llm.take_events())
                assert device_part(follower) == {block for block in on_device(llm) if block[2] not in salted}
        evicted = llm.get_stats()["blocks"]["dropped"]
        assert evicted > 50, "nothing was evicted: the test is about that"
        assert resets
        assert salted


def test_stored_blocks_of_a_prompt_are_one_event_that_says_what_they_are() -> None:
    prompt = list(range(40))
    with LLM(make_model("gemma3"), kv_cache_config=small()) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))
        events = [numbered.event for numbered in llm.take_events()]
    chain = BlockChain(8)
    chain.extend(prompt)
    stored = [event for event in events if isinstance(event, BlocksStored)]
    assert [event.group for event in stored] == [0, 1]
    for event in stored:
        assert event.block_hashes == tuple(chain.hashes[:5])
        assert list(event.tokens) == prompt
        assert (event.parent_hash, event.block_size, event.tier, event.tier_name) == (None, 8, -1, "device")


def test_what_follows_on_a_known_prefix_names_its_parent() -> None:
    prompt = list(range(40))
    with LLM(make_model("llama"), kv_cache_config=small()) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))
        llm.take_events()
        llm.generate([[*prompt, *range(100, 109)]], SamplingParams(max_tokens=1))
        (event,) = (numbered.event for numbered in llm.take_events())
    chain = BlockChain(8)
    chain.extend(prompt)
    assert isinstance(event, BlocksStored)
    assert event.parent_hash == chain.hashes[-1]
    assert list(event.tokens) == list(range(100, 108))


def test_a_claim_with_another_priority_is_told_once() -> None:
    prompt = list(range(40))
    with LLM(make_model("llama"), kv_cache_config=small()) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=2))
        llm.take_events()
        for priority, expected in ((80, [80]), (80, []), (10, [10])):
            llm.generate([prompt], retained(priority))
            updates = [n.event for n in llm.take_events() if isinstance(n.event, BlocksUpdated)]
            assert sorted({update.priority for update in updates}) == expected
            assert len({h for update in updates for h in update.block_hashes}) == 4 * len(expected)  # one is computed
            assert all(update.tier == -1 for update in updates)
            levels = {block.priority for block in llm.snapshot_events().stored}
            assert priority in levels


def test_host_and_disk_are_told_with_their_tiers(tmp_path: Path) -> None:
    follower = EventFollower()
    prompt = list(range(48))
    chain = BlockChain(8)
    chain.extend(prompt)
    names = {}
    with LLM(make_model("llama"), ["host://?capacity=8MiB", f"disk://{tmp_path}/kv"], kv_cache_config=small()) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))
        while llm._core.has_connector_work:
            llm.step()
        events = llm.take_events()
        assert [numbered.event_id for numbered in events] == list(range(len(events)))
        assert follower.follow(events)
        for numbered in events:
            assert isinstance(numbered.event, BlocksStored)
            names[numbered.event.tier] = numbered.event.tier_name
    assert names == {-1: "device", 0: "host", 1: "disk"}
    assert follower.blocks == {(tier, 0, block_hash) for tier in names for block_hash in chain.hashes}


def test_what_leaves_host_memory_is_told() -> None:
    follower = EventFollower()
    rng = random.Random(3)
    with LLM(make_model("llama"), "host://?capacity=60KiB", kv_cache_config=small(400)) as llm:
        for _ in range(8):
            llm.generate([[rng.randrange(300) for _ in range(50)]], SamplingParams(max_tokens=1))
            while llm._core.has_connector_work:
                llm.step()
        events = llm.take_events()
        arena = llm.get_stats()["leader"]["arena"]
        assert follower.follow(events)
    removed = [n.event for n in events if isinstance(n.event, BlocksRemoved) and n.event.tier == 0]
    assert removed
    assert len(below(follower)) == arena["ready"]


@pytest.mark.parametrize("size", [1, 3])
def test_an_overflow_is_seen_and_a_snapshot_heals_it(size: int) -> None:
    rng = random.Random(5)
    follower = EventFollower()
    gaps = 0
    with LLM(make_model("gemma3"), kv_cache_config=small(events=size)) as llm:
        for _ in range(12):
            for _ in range(rng.randrange(1, 4)):
                llm.generate([prompt_of(rng, list(range(60)))], SamplingParams(max_tokens=rng.randrange(1, 20)))
            restarted = False
            if rng.random() < 0.5:  # the snapshot may come before what it makes known is taken
                follower.restart(llm.snapshot_events())
                restarted = True
            if not follower.follow(llm.take_events()):
                gaps += 1
                assert not restarted, "nothing came behind the snapshot"
                assert follower.lost
                assert not follower.blocks
                follower.restart(llm.snapshot_events())
            assert follower.device_only or not gaps
            assert device_part(follower) == on_device(llm)
            llm.generate([[1]], SamplingParams(max_tokens=1))
            assert follower.follow(llm.take_events()), "a healed follower goes on"
    assert gaps


def test_the_newest_events_are_kept() -> None:
    with LLM(make_model("llama"), kv_cache_config=small(events=3)) as llm:
        for start in range(5):
            llm.generate([list(range(start, start + 20))], SamplingParams(max_tokens=1))  # one event each
        assert [numbered.event_id for numbered in llm.take_events()] == [2, 3, 4]
        assert llm.snapshot_events().next_id == 5


def test_a_block_behind_a_snapshot_is_an_event_of_its_own() -> None:
    prompt = list(range(40))
    with LLM(make_model("llama"), kv_cache_config=small()) as llm:
        llm.generate([prompt[:33]], SamplingParams(max_tokens=1))
        late = EventFollower()
        late.restart(llm.snapshot_events())
        llm.generate([prompt], SamplingParams(max_tokens=1))
        assert late.follow(llm.take_events())
        assert device_part(late) == on_device(llm)
        assert len(late.blocks) == 5


def test_a_lost_follower_believes_nothing_until_it_is_restarted() -> None:
    with LLM(make_model("llama"), kv_cache_config=small()) as llm:
        llm.generate([list(range(20))], SamplingParams(max_tokens=1))
        llm.reset_prefix_cache()
        events = llm.take_events()
        assert len(events) == 2
        follower = EventFollower()
        assert not follower.follow(events[1:])
        assert not follower.follow(events), "what was missed does not come again"
        assert not follower.blocks


def test_without_events_nobody_listens_and_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(make_model("llama"), "host://?capacity=8MiB", block_size=8) as llm:
        assert all(pool.listener is None for pool in llm._core.cache.pools)
        assert llm._leader is not None
        monkeypatch.setattr(llm._leader, "take_events", lambda: pytest.fail("nobody listens"))
        llm.generate([list(range(40))], SamplingParams(max_tokens=4))
        assert llm.take_events() == []
        with pytest.raises(ConfigError, match="event_buffer_max_size"):
            llm.snapshot_events()


@pytest.mark.parametrize("told", [ValueError("no"), [None, 3], None])
def test_a_leader_that_tells_rubbish_costs_no_request_and_no_event(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_events() -> Any:
        if isinstance(told, Exception):
            raise told
        return told

    follower = EventFollower()
    with LLM(make_model("llama"), "host://?capacity=8MiB", kv_cache_config=small()) as llm:
        assert llm._leader is not None
        monkeypatch.setitem(llm._leader._hooks, "take_events", take_events)
        (output,) = llm.generate([list(range(40))], SamplingParams(max_tokens=4))
        assert len(output.token_ids) == 4
        assert follower.follow(llm.take_events())
        assert follower.blocks == on_device(llm)
