"""Batches are admitted in two phases: what one request counted on is never evicted for its neighbour (document 004)."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.engine.manager import Admission, Candidate, Estimate, KVCacheManager
from tests.engine.paged import BLOCK, SLOT, PagedEngine, paged_engine


def tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(count)]


class OneByOne(KVCacheManager):
    """A double of what engines did before: estimates first, then each request matched and allocated on its own."""

    def add_sequences(self, batch: Sequence[Candidate]) -> list[Admission]:
        admitted: list[Admission] = []
        for request, _, _ in batch:
            now = self.estimate(request)
            assert now is not None
            rest = len(request.tokens) - now.num_computed(self.cache.block_size)  # the estimate said that it fits
            admitted += super().add_sequences([Candidate(request, now, rest)])
        return admitted


def race(engine: PagedEngine) -> tuple[int, dict[str, int], dict[str, int]]:
    """Let a request load from host memory beside one that counts on pages; return tokens computed, and reuse by name.

    The pool has 20 pages: the second request's prefix in five of them, the least recently used ones, ten that nobody
    needs, five that are free. The first request needs eight.
    """
    far, near = tokens(1, 30), tokens(2, 23)
    engine.serve(far)
    for pool in engine.cache.pools:
        pool.forget_names()  # its blocks are in host memory now, and nowhere else
    engine.serve(near[:21], cache="none")  # on the device, and nowhere else
    engine.serve(tokens(3, 40))
    assert engine.cache.match(engine.request(near).chain.hashes, 5) == 5
    requests = {"far": engine.add(far), "near": engine.add(near)}
    expected = {}
    for name, request in requests.items():
        estimate = engine.manager.estimate(request)
        assert estimate is not None
        expected[name] = estimate.num_computed(BLOCK)
    batch = engine.scheduler.schedule()
    assert [part.request for part in batch.parts] == list(requests.values())
    computed = sum(part.num_tokens for part in batch.parts)
    return computed, expected, {name: request.num_reused + request.num_loaded for name, request in requests.items()}


def test_neighbours_load_evicts_what_was_counted_on_when_requests_are_added_one_by_one() -> None:
    with paged_engine(num_pages=20, max_batch_tokens=6, enable_partial_reuse=False) as engine:
        engine.manager.__class__ = OneByOne
        computed, expected, found = race(engine)
    assert found["near"] < expected["near"]
    assert computed > 6  # more than a step may compute


def test_two_phases_keep_what_was_counted_on() -> None:
    with paged_engine(num_pages=20, max_batch_tokens=6, enable_partial_reuse=False) as engine:
        computed, expected, found = race(engine)
    assert found == expected
    assert found["near"] == 20
    assert computed <= 6


class History:
    """Prompts that an engine has served, and a batch that comes then; the same for the same values."""

    def __init__(self, seed: int, num_served: int, batch: Sequence[tuple[int, int, str]]) -> None:
        self.stems = [tokens(seed + i, 40) for i in range(3)]
        rng = random.Random(seed)
        self.served = [
            self.stems[rng.randrange(3)][: rng.randrange(5, 40)] + tokens(rng.randrange(99), 3)
            for _ in range(num_served)
        ]
        self.forget = rng.random() < 0.5
        self.batch = [(self.stems[stem][:length] + tokens(length, 2), cache) for stem, length, cache in batch]

    def play(self, engine: PagedEngine) -> None:
        for prompt in self.served:
            engine.serve(prompt)
        if self.forget:
            for pool in engine.cache.pools:
                pool.forget_names()


CACHE_USES = st.sampled_from(["both", "both", "read", "write", "none"])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    num_served=st.integers(0, 6),
    batch=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 38), CACHE_USES), min_size=1, max_size=5),
    num_pages=st.integers(12, 40),
    budget=st.integers(1, 60),
    slots=st.integers(1, 24),
    shape=st.sampled_from(["full", "window", "mixed"]),
    partial=st.booleans(),
    disk=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_reuse_is_what_was_estimated_in_any_order(
    seed: int,
    num_served: int,
    batch: list[tuple[int, int, str]],
    num_pages: int,
    budget: int,
    slots: int,
    shape: str,
    partial: bool,
    disk: bool,
    order: Any,
) -> None:
    history = History(seed, num_served, batch)
    orders = [list(range(len(batch))), list(range(len(batch)))]
    order.shuffle(orders[1])
    seen: list[dict[int, tuple[int, int]]] = []
    for each in orders:
        with (
            tempfile.TemporaryDirectory() as folder,
            paged_engine(
                [f"host://?capacity={slots * SLOT}", *([f"disk://{folder}/kv"] if disk else [])],
                shape=shape,
                num_pages=num_pages,
                max_batch_tokens=budget,
                enable_partial_reuse=partial,
            ) as engine,
        ):
            history.play(engine)
            before = [pool.num_held for pool in engine.cache.pools]
            totals = engine.manager.totals.allocated, engine.manager.totals.reused, engine.manager.totals.loaded
            requests = {i: engine.add(history.batch[i][0], cache=history.batch[i][1]) for i in each}
            estimates: dict[int, Estimate | None] = {}
            for _ in range(2000):  # stores are looked up and blocks come up while the engine asks again
                estimates = {i: engine.manager.estimate(request) for i, request in requests.items()}
                if None not in estimates.values():
                    break
                engine.core.idle()
            step = engine.scheduler.schedule()
            assert sum(part.num_tokens for part in step.parts) <= budget
            found: dict[int, tuple[int, int]] = {}
            for i, request in requests.items():
                estimate = estimates[i]
                assert estimate is not None
                if request in engine.scheduler.waiting:
                    assert not any(request.tables)
                    continue
                found[i] = (request.num_reused, request.num_loaded)
                assert sum(found[i]) == estimate.num_computed(BLOCK)
            seen.append(found)
            for pool in engine.cache.pools:
                pool.check_integrity()
            gained = [
                engine.manager.totals.allocated - totals[0],
                engine.manager.totals.reused - totals[1],
                engine.manager.totals.loaded - totals[2],
            ]
            admitted = [request for request in requests.values() if request not in engine.scheduler.waiting]
            assert gained == [
                sum(request.counts.allocated for request in admitted),
                sum(request.counts.reused for request in admitted),
                sum(request.counts.loaded for request in admitted),
            ]
            tables = [page for request in admitted for page in request.tables[0] if page >= 0]
            assert engine.cache.pools[0].num_held == before[0] + len(set(tables)), "a claim was left over"
            engine.core._advance(step)
            engine.run()
            assert engine.num_held == 0
            assert engine.arena()["claimed"] == 0
    if not disk:  # which blocks have come up when is the store's affair
        for i in seen[0].keys() & seen[1].keys():
            assert seen[0][i] == seen[1][i]


def test_requests_share_a_full_block_and_each_copies_the_partial_one() -> None:
    stem = tokens(5, 11)
    with paged_engine(None) as engine:
        engine.serve([*stem, 50])  # three full blocks; the last one is the stem's only in part
        requests = [engine.add([*stem, 60 + i]) for i in range(2)]
        engine.step()
        assert [request.first_counts for request in requests] == [(11, 0), (11, 0)]
        assert all(request.counts.partially_reused == 1 for request in requests)
    assert all(request.generated for request in requests)


def test_chunked_request_that_finds_more_than_was_estimated_becomes_a_last_chunk() -> None:
    prompt = tokens(6, 30)
    with paged_engine(None, max_batch_tokens=8, enable_partial_reuse=False) as engine:
        request = engine.add(prompt)
        estimate = engine.manager.estimate(request)
        assert estimate is not None
        assert estimate.num_computed(BLOCK) == 0  # eight of thirty tokens: the first of four chunks
        engine.scheduler.waiting.clear()
        engine.serve(prompt)  # meanwhile somebody else computes the same
        batch = engine.scheduler.schedule()
        (admission,) = engine.manager.add_sequences([Candidate(request, estimate, 8)])
        engine.scheduler._place(batch, admission)
        (part,) = batch.parts
        assert (part.start, part.num_tokens, part.samples) == (28, 2, True)


def test_request_that_lost_what_was_estimated_computes_no_more_than_it_was_given() -> None:
    prompt = tokens(7, 30)
    with paged_engine(None, max_batch_tokens=8, enable_partial_reuse=False) as engine:
        engine.serve(prompt[:21])
        request = engine.request(prompt)
        estimate = engine.manager.estimate(request)
        assert estimate is not None
        assert estimate.num_computed(BLOCK) == 20
        engine.cache.pools[0].forget_names()
        (admission,) = engine.manager.add_sequences([Candidate(request, estimate, 10)])
        assert (admission.start, admission.num_tokens) == (0, 10)


def test_several_windows_agree_on_the_smallest_reusable_length() -> None:
    prompt = tokens(8, 41)
    with paged_engine(shape="mixed", num_pages=40, enable_partial_reuse=False) as engine:
        engine.serve(prompt)
        full, window = engine.cache.pools
        hashes = engine.request(prompt).chain.hashes
        # the full group has all ten blocks; the window's has those that the last tokens attend to: make it one fewer
        lost = window.find(hashes[9])
        assert lost >= 0
        window.hold(lost)
        window._forget(lost, window._blocks[lost])
        window.release(lost)
        estimate = engine.manager.estimate(engine.add(prompt))
        assert estimate is not None
        by_hand = max(
            n
            for n in range(11)
            if all(full.find(hashes[i]) >= 0 for i in range(n))
            and all(window.find(hashes[i]) >= 0 for i in range(max(0, (n * BLOCK + 1 - 9) // BLOCK), n))
        )
        assert estimate.matched == by_hand < 10
        assert estimate.matched * BLOCK + estimate.loaded == 40  # host memory has what the window's pages lost
        engine.run()


@pytest.mark.parametrize("phase", ["claim_match", "update_state_after_alloc"])
def test_interrupt_in_either_phase_leaves_nothing_held(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    prompts = [tokens(10 + i, 30) for i in range(3)]
    with paged_engine(num_pages=40) as engine:
        for prompt in prompts:
            engine.serve(prompt)
        for pool in engine.cache.pools:
            pool.forget_names()
        engine.serve(prompts[0][:13])  # a part of it is on the device, the rest in host memory
        requests = [engine.add(prompt) for prompt in prompts]
        calls = iter(range(10))
        original = getattr(engine.leader, phase)

        def interrupted(*args: Any) -> Any:
            if next(calls) == 1:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(engine.leader, phase, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.scheduler.schedule()
        assert engine.num_held == 0
        assert engine.arena()["claimed"] == 0
        assert list(engine.scheduler.waiting) == requests
        monkeypatch.undo()
        engine.run()
        assert [len(request.generated) for request in requests] == [1, 1, 1]


def test_leader_that_holds_less_than_it_offered_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens(20, 30)
    with paged_engine(num_pages=40, max_batch_tokens=12) as engine:
        engine.serve(prompt)
        engine.cache.pools[0].forget_names()
        request = engine.add(prompt)
        held = engine.leader.claim_match
        monkeypatch.setattr(engine.leader, "claim_match", lambda view, count: held(view, count - 2 * BLOCK))
        batch = engine.scheduler.schedule()
        assert request.num_loaded == 20
        assert [part.num_tokens for part in batch.parts] == [2]  # the estimate was two, and more it does not get
        engine.core._advance(batch)
        engine.run()


def test_first_in_the_queue_goes_first_though_its_neighbour_counts_on_every_page() -> None:
    near = tokens(30, 33)
    with paged_engine(None, num_pages=10, enable_partial_reuse=False) as engine:
        engine.serve(near)
        first, second = engine.request(tokens(31, 30)), engine.request(near)
        candidates = []
        for request in (first, second):
            estimate = engine.manager.estimate(request)
            assert estimate is not None
            candidates.append(Candidate(request, estimate, 30))
        admitted = engine.manager.add_sequences(candidates)
        assert [admission.request for admission in admitted] == [first]
        assert not any(second.tables)
        assert engine.num_held == 8


def test_requests_without_reuse_and_dummies_take_the_same_way() -> None:
    prompt = tokens(40, 30)
    with paged_engine(num_pages=40, enable_block_reuse=False) as engine:
        for _ in range(2):
            assert engine.serve(prompt).first_counts == (0, 0)
    with paged_engine(num_pages=40) as engine:
        engine.serve(prompt)
        saved = engine.leader.get_stats()["save_blocks"]
        dummy = engine.request(prompt)
        dummy.dummy = True
        engine.scheduler.add(dummy)
        engine.run()
        assert dummy.first_counts == (0, 0)
        assert engine.leader.get_stats()["save_blocks"] == saved
        assert engine.serve(prompt).first_counts[0] >= 28
    assert (dummy.counts.allocated, dummy.counts.new, dummy.counts.missed) == (8, 8, 7)
