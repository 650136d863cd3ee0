"""Whether loading beats computing: what is measured, and what is made of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvconnect.leader.cost import LoadCost, ReadTime
from kvconnect.protocol import ScheduledRequest, SchedulerOutput
from tests.store.stores import dict_store, tier


class Clock:
    """`time.monotonic` by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("kvconnect.leader.cost.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def output(step: int, *counts: int) -> SchedulerOutput:
    parts = tuple(
        ScheduledRequest(
            request_id=str(number),
            num_computed_tokens=0,
            num_scheduled_tokens=count,
            num_tokens=count,
            new_tokens=(),
            block_ids=[[]],
        )
        for number, count in enumerate(counts)
    )
    return SchedulerOutput(step=step, cached_requests=parts)


def cost(tiers: int = 1, **overrides: Any) -> LoadCost:
    return LoadCost([tier(dict_store(**overrides)) for _ in range(tiers)], call_blocks=8)


def blocks(count: int, number: int = 0) -> list[tuple[int, int, int]]:
    return [(number, 0, ordinal) for ordinal in range(count)]


@pytest.mark.parametrize(("latency", "each"), [(0.05, 0.001), (0.0, 0.002), (0.1, 0.0)])
def test_latency_and_rate_are_told_apart_by_reads_of_several_sizes(latency: float, each: float) -> None:
    read, rng = ReadTime(), random.Random(1)
    assert read.fit() == (0.0, 0.0)
    for _ in range(40):
        count = rng.randrange(1, 33)
        read.add(count, latency + count * each)
    assert read.fit() == pytest.approx((latency, each), abs=1e-9)


def test_reads_of_one_size_give_a_rate_alone() -> None:
    read = ReadTime()
    for _ in range(5):
        read.add(4, 0.4)
    assert read.fit() == pytest.approx((0.0, 0.1))


def test_noise_gives_no_negative_estimate() -> None:
    read = ReadTime()
    for count, seconds in ((1, 0.5), (30, 0.1), (2, 0.4), (20, 0.2)):
        read.add(count, seconds)
    latency, each = read.fit()
    assert each == 0.0
    assert latency > 0


def test_estimate_follows_a_store_that_becomes_fast() -> None:
    read = ReadTime()
    for _ in range(50):
        read.add(8, 8.0)
    for _ in range(60):
        read.add(8, 0.008)
    assert read.fit()[1] == pytest.approx(0.001, rel=2)


def test_store_that_was_never_measured_is_probed_with_one_read_and_then_judged(clock: Clock) -> None:
    decides = cost()
    decides.step_planned(output(0, 100))
    clock.now += 0.1  # 1 ms a token
    decides.step_reported(0)
    assert decides.choose(blocks(20), 0, 320) == blocks(8)
    decides.read_ended(0, 8, 0.8)  # 100 ms a block
    assert decides.choose(blocks(12), 0, 192) == ()
    assert decides.choose(blocks(12), 0, 1300) == blocks(12)  # 1.2 s against 1.3 s
    assert decides.choose(blocks(12), 12, 1300) == ()  # others go first
    stats = decides.get_stats()
    assert (stats["probes"], stats["loads_made"], stats["loads_refused"]) == (1, 1, 2)
    assert stats["prefill_s_per_token"] == pytest.approx(0.001)
    assert stats["stores"][0]["read_s_per_block"] == pytest.approx(0.1)
    assert stats["last_decision"]["load_s"] == pytest.approx(2.4)
    assert stats["last_decision"]["compute_s"] == pytest.approx(1.3)
    assert stats["last_decision"]["loaded"] is False


def test_what_one_read_brings_is_loaded_to_find_out(clock: Clock) -> None:
    decides = cost()
    assert decides.choose(blocks(8), 0, 128) == blocks(8)
    decides.read_ended(0, 8, 100.0)
    assert decides.choose(blocks(8), 0, 128) == blocks(8)  # nothing was computed yet: no reason to refuse


def test_store_that_was_refused_is_tried_again_after_a_while(clock: Clock) -> None:
    decides = cost()
    decides.step_planned(output(0, 100))
    clock.now += 0.1
    decides.step_reported(0)
    decides.read_ended(0, 8, 80.0)
    assert decides.choose(blocks(20), 0, 320) == ()
    clock.now += 31
    assert decides.choose(blocks(20), 0, 320) == blocks(8)


def test_only_steps_that_prefill_say_what_a_token_takes(clock: Clock) -> None:
    decides = cost()
    for step, counts in enumerate([(1,) * 16, (2, 1, 1, 1), (), (64, 1)]):
        decides.step_planned(output(step, *counts))
        clock.now += 0.13
        decides.step_reported(step)
    assert decides.get_stats()["prefill_s_per_token"] == pytest.approx(0.002)


def test_step_planned_ahead_begins_when_the_one_before_it_ends(clock: Clock) -> None:
    decides = cost()
    decides.step_planned(output(0, 100))
    for step in range(1, 4):
        decides.step_planned(output(step, 100))
        clock.now += 0.1
        decides.step_reported(step - 1)
    assert decides.get_stats()["prefill_s_per_token"] == pytest.approx(0.001)


def test_reads_that_cannot_be_are_ignored() -> None:
    decides = cost()
    for number, count, seconds in ((-1, 1, 1.0), (1, 1, 1.0), (0, 0, 1.0), (0, -3, 1.0), (0, 1, -1.0)):
        decides.read_ended(number, count, seconds)
    assert decides.get_stats()["stores"][0]["fresh"] is False
    decides.step_reported(7)  # never planned


def test_threads_of_a_store_share_a_long_list() -> None:
    from kvconnect.store import StoreCapabilities

    alone, four = cost(), cost(capabilities=StoreCapabilities(concurrency=4))
    for each in (alone, four):
        each.read_ended(0, 8, 0.8)
    from collections import Counter

    assert alone.load_seconds(Counter({0: 32})) == pytest.approx(3.2)
    assert four.load_seconds(Counter({0: 32})) == pytest.approx(0.8)
    assert four.load_seconds(Counter({0: 8})) == pytest.approx(0.8)
