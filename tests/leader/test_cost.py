"""Whether loading beats computing: what is measured, and what is made of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from kvconnect.leader.cost import LoadCost, TimeBySize
from kvconnect.protocol import ScheduledRequest, SchedulerOutput
from tests.store.stores import dict_store, tier

NONE: Counter[int] = Counter()


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
    return LoadCost([tier(dict_store(**overrides)) for _ in range(tiers)], call_blocks=[8] * tiers)


def blocks(count: int, number: int = 0) -> list[tuple[int, int, int]]:
    return [(number, 0, ordinal) for ordinal in range(count)]


def measured(*seen: tuple[int, float]) -> TimeBySize:
    times = TimeBySize()
    for size, seconds in seen:
        times.add(size, seconds)
    return times


@pytest.mark.parametrize(
    ("seen", "size", "seconds"),
    [
        ([], 10, 0.0),
        ([(8, 0.8)], 4, 0.4),
        ([(8, 0.8)], 16, 1.6),  # one size alone: in proportion
        ([(1, 0.1), (9, 0.1)], 300, 0.1),  # a fixed cost
        ([(2, 0.5), (10, 0.9)], 6, 0.7),
        ([(2, 0.5), (10, 0.9)], 20, 1.4),  # a fixed cost and a rate
        ([(2, 0.5), (10, 0.3)], 20, 0.3),  # noise: more is not faster
        ([(8, 9.0)] + [(8, 0.0)] * 4, 8, 1.8),  # the first of five counts a fifth
    ],
)
def test_time_is_estimated_from_the_sizes_that_were_seen(
    seen: list[tuple[int, float]], size: float, seconds: float
) -> None:
    assert measured(*seen).seconds(size) == pytest.approx(seconds)


def test_estimate_follows_a_store_that_becomes_fast() -> None:
    assert measured(*[(8, 8.0)] * 50, *[(8, 0.008)] * 40).seconds(8) < 0.01


def test_store_that_was_never_measured_is_probed_with_one_read_and_then_judged(clock: Clock) -> None:
    decides = cost()
    decides.step_planned(output(0, 100))
    decides.step_reported(0, 0.1)  # 1 ms a token
    assert decides.choose(blocks(20), NONE, 320) == blocks(8)
    decides.read_ended(0, 8, 0.8)  # 100 ms a block
    assert decides.choose(blocks(12), NONE, 192) == ()
    assert decides.choose(blocks(12), NONE, 1300) == blocks(12)  # 1.2 s against 1.3 s
    assert decides.choose(blocks(12), Counter({0: 12}), 1300) == ()  # others go first
    stats = decides.get_stats()
    assert (stats["probes"], stats["loads_made"], stats["loads_refused"]) == (1, 1, 2)
    assert stats["compute_s_per_token"] == pytest.approx(0.001)
    assert stats["stores"][0]["read_s_per_block"] == pytest.approx(0.1)
    assert stats["last_decision"]["load_s"] == pytest.approx(2.4)
    assert stats["last_decision"]["compute_s"] == pytest.approx(1.3)
    assert stats["last_decision"]["loaded"] is False


def test_what_one_read_brings_is_loaded_to_find_out() -> None:
    decides = cost()
    assert decides.choose(blocks(8), NONE, 128) == blocks(8)
    decides.read_ended(0, 8, 100.0)
    assert decides.choose(blocks(8), NONE, 128) == blocks(8)  # nothing was computed yet: no reason to refuse


def test_store_that_was_refused_is_tried_again_after_a_while(clock: Clock) -> None:
    decides = cost()
    decides.step_planned(output(0, 100))
    decides.step_reported(0, 0.1)
    decides.read_ended(0, 8, 80.0)
    assert decides.choose(blocks(20), NONE, 320) == ()
    clock.now += 31
    assert decides.choose(blocks(20), NONE, 320) == blocks(8)


def test_computing_is_counted_in_steps_as_the_engine_makes_them() -> None:
    """Short tails and decoding after loads take a whole step each; that must not make computing look slow."""
    told = LoadCost([tier(dict_store())], call_blocks=[8], max_batch_tokens=256)
    for step, count in enumerate([1, 17, 1, 9, 1]):
        told.step_planned(output(step, count))
        told.step_reported(step, 0.1)  # weights are read, whatever the number of tokens
    assert told.compute_seconds(256) == pytest.approx(0.1)
    assert told.compute_seconds(400) == pytest.approx(0.2)
    told.step_planned(output(9))
    told.step_reported(9, 77)  # an empty step says nothing
    assert told.compute_seconds(256) == pytest.approx(0.1)


def test_steps_whose_reports_are_lost_are_forgotten() -> None:
    decides = cost()
    for step in range(1000):
        decides.step_planned(output(step, 10))
    assert len(decides._planned) <= 64
    decides.step_reported(999, 0.01)
    assert decides.get_stats()["compute_s_per_token"] == pytest.approx(0.001)


def test_reads_that_cannot_be_are_ignored() -> None:
    decides = cost()
    for number, count, seconds in ((-1, 1, 1.0), (1, 1, 1.0), (0, 0, 1.0), (0, -3, 1.0), (0, 1, -1.0)):
        decides.read_ended(number, count, seconds)
    assert decides.get_stats()["stores"][0]["fresh"] is False
    decides.step_reported(7, 1.0)  # never planned
    assert decides.get_stats()["compute_s_per_token"] == 0


def test_threads_of_a_store_share_a_long_list() -> None:
    from kvconnect.store import StoreCapabilities

    alone, four = cost(), cost(capabilities=StoreCapabilities(concurrency=4))
    for each in (alone, four):
        each.read_ended(0, 8, 0.8)
    assert alone.load_seconds(Counter({0: 32}), NONE) == pytest.approx(3.2)
    assert four.load_seconds(Counter({0: 32}), NONE) == pytest.approx(0.8)
    assert four.load_seconds(Counter({0: 8}), NONE) == pytest.approx(0.8)
