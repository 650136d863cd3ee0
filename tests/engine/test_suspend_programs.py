"""Random programs over tiny tiers: add, suspend, prefetch, resume, abort, resize, forget, reset, in any order.

Every byte that a layer reads is compared (the runner does), every token too; at the end every request is answered and
nothing is held, claimed or left behind. First written by a reviewer to break this, which it did.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from kvconnect_disk.store import DiskStore

from kvconnect.engine.request import EngineRequest
from kvconnect.engine.sequence import Sequence as CacheSequence
from kvconnect.protocol import is_private, split_key
from kvconnect.protocol.keys import BlockKey
from kvconnect.testing.content import prefix_states
from tests.engine.paged import BLOCK, SLOT, PagedEngine, paged_engine
from tests.engine.test_suspend import handle, push_out, started, tokens

ACTS = ["step"] * 17 + ["add"] * 9 + ["suspend"] * 6 + ["resume"] * 7 + ["prefetch"] * 3 + ["abort", "resize"] * 2
ACTS += ["forget", "idle"]
PATIENCE_S = 30.0


class Program:
    def __init__(self, engine: PagedEngine, rng: random.Random, setting: dict[str, Any], *, resets: bool) -> None:
        self.engine = engine
        self.rng = rng
        self.ranks = setting["num_ranks"]
        self.longest = min(setting["num_pages"] * BLOCK - 12, 70)
        self.stems = [[rng.randrange(97) for _ in range(rng.randrange(3, 30))] for _ in range(2)]
        self.requests: list[EngineRequest] = []
        self.aborted: set[EngineRequest] = set()
        self.acts = [*ACTS, "reset"] if resets else ACTS

    @property
    def alive(self) -> list[CacheSequence]:
        handles = [handle(self.engine, request) for request in self.requests if request not in self.aborted]
        return [sequence for sequence in handles if sequence.status != "finished"]

    def act(self) -> None:
        engine, rng, act = self.engine, self.rng, self.rng.choice(self.acts)
        alive = self.alive
        sequence = rng.choice(alive) if alive else None
        suspended = sequence is not None and sequence.status == "suspended"
        if act == "add" and len(alive) < 8:
            prompt = rng.choice([[], *self.stems]) + [rng.randrange(97) for _ in range(rng.randrange(1, 25))]
            prompt, max_tokens = prompt[: self.longest], rng.randrange(1, 9)
            cache = rng.choice(["both"] * 4 + ["read", "write", "none"])
            if len(prompt) + max_tokens <= engine.cache.pools[0].num_usable * BLOCK:  # else `LLM` refuses it
                self.requests.append(engine.add(prompt, max_tokens, cache=cache))
        elif act == "suspend" and sequence is not None and sequence.status in ("running", "waiting"):
            sequence.suspend()
        elif act == "prefetch" and sequence is not None and suspended:
            sequence.prefetch(rng.randrange(1, 2 + len(engine.leader.tier_names)))
        elif act == "resume" and sequence is not None and suspended:
            sequence.resume()
        elif act == "abort" and sequence is not None:
            request = sequence._request
            engine.scheduler.abort(request)
            self.aborted.add(request)
        elif act == "resize" and not engine.scheduler.running and not engine.scheduler.parked:
            level = rng.randrange(2 + len(engine.leader.tier_names))
            unit = SLOT * self.ranks if level else engine.cache.bytes_per_page
            engine.core.resize(level, rng.randrange(1, 64) * unit)
        elif act == "forget":
            for pool in engine.cache.pools:
                pool.forget_names()
        elif act == "reset":
            engine.core._settle_steps()
            for pool in engine.cache.pools:
                pool.forget_names()
            assert engine.leader.reset_cache()
        elif act == "idle":
            engine.core.idle()
        else:
            engine.core.step()
        engine.check()

    def finish(self) -> None:
        """Let everybody end, and the connector too."""
        engine = self.engine
        deadline = time.monotonic() + PATIENCE_S
        while alive := self.alive:
            for sequence in alive:
                if sequence.status == "suspended":
                    sequence.resume()
            engine.core.step()
            engine.check()
            assert time.monotonic() < deadline, [(each.request_id, each.status) for each in alive]
        engine.settle()
        for request in self.requests:
            known = request.tokens.tolist()
            for end in range(request.num_prompt_tokens, len(known)):
                assert known[end] == int(prefix_states(known[:end])[-1]) % 97
            assert request in self.aborted or request.num_generated == request.params.max_tokens


def check_nothing_left(engine: PagedEngine, folder: Path) -> None:
    assert engine.num_held == 0
    arena = engine.arena()
    assert [arena[name] for name in ("claimed", "reserved", "promoting", "quarantined")] == [0] * 4
    leader = engine.offload
    assert not leader._suspended._requests
    assert not leader._suspended._blocks
    assert leader._suspended._holds.num_held == 0
    assert not leader._parked
    assert not leader._requests
    scheduler = engine.scheduler
    assert not scheduler._orphans
    assert not scheduler._saving
    assert not scheduler.suspended
    assert engine.core.num_unwritten == 0
    assert engine.leader.get_stats()["hooks"]["failures"] == {}
    assert all(worker.get_stats()["hooks"]["failures"] == {} for worker in engine.core._workers)
    assert not [name for group in leader._index._groups for name in group if is_private(name)]
    deadline = time.monotonic() + 10
    while litter(folder):
        assert time.monotonic() < deadline, litter(folder)
        time.sleep(0.01)


def litter(folder: Path) -> list[Path]:
    """Private blocks, and holds."""
    blocks = [path for path in (folder / "blocks").rglob("*") if path.is_file()]
    private = [path for path in blocks if is_private(split_key(BlockKey(bytes.fromhex(path.name)))[1])]
    return private + [path for path in (folder / "holds").rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize("seed", range(24))
def test_any_program_answers_everybody_and_leaves_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    setting: dict[str, Any] = {
        "shape": rng.choice(["full", "full", "window", "mixed", "mixed"]),
        "num_pages": rng.randrange(10, 34),
        "max_batch_tokens": rng.choice([5, 11, 24, 64]),
        "max_num_seqs": rng.choice([2, 4, 8]),
        "num_ranks": rng.choice([1, 1, 2]),
        "async_load": rng.random() < 0.5,
        "async_scheduling": rng.random() < 0.5,
        "enable_partial_reuse": rng.random() < 0.8,
    }
    unit = SLOT * setting["num_ranks"]
    connector = [f"host://?capacity={rng.randrange(3, 60) * unit}&reserve={64 * unit}"]
    if rng.random() < 0.7:
        connector.append(f"disk://{tmp_path}/kv?capacity={rng.randrange(4, 120) * unit}")
    with paged_engine(connector, **setting) as engine:
        program = Program(engine, rng, setting, resets=rng.random() < 0.2)
        for _ in range(150):
            program.act()
        program.finish()
        check_nothing_left(engine, tmp_path / "kv")


def test_slot_that_a_store_reads_into_is_nobodys_though_its_request_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A's private blocks are on their way up when A is aborted; B's come up then, into other slots."""
    connector = [f"host://?capacity={16 * SLOT}", f"disk://{tmp_path}/kv?capacity={400 * SLOT}"]
    with paged_engine(connector, num_pages=40) as engine:
        requests = []
        for seed in (1, 3):
            requests.append(started(engine, tokens(seed, 50), cache="none"))
            assert handle(engine, requests[-1]).suspend()
            engine.settle()
        push_out(engine)
        first, second = (handle(engine, request) for request in requests)
        fast = DiskStore.read

        def slow(self: DiskStore, keys: Any, buffers: Any) -> Any:
            time.sleep(0.15)
            return fast(self, keys, buffers)

        monkeypatch.setattr(DiskStore, "read", slow)
        assert first.prefetch(1)
        engine.core.idle()  # the reads are under way
        engine.scheduler.abort(requests[0])
        assert engine.arena()["promoting"] == 13
        assert second.resume()
        engine.run()
        assert requests[1].num_generated == 8
        assert requests[1].run == 2
        check_nothing_left(engine, tmp_path / "kv")


def test_shard_that_is_held_is_let_go_when_another_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = DiskStore.hold
    asked: set[BlockKey] = set()

    def half(self: DiskStore, keys: Any, ttl_s: float) -> Any:
        asked.update(keys)
        return [held and number % 2 == 0 for number, held in enumerate(hold(self, keys, ttl_s))]

    monkeypatch.setattr(DiskStore, "hold", half)
    connector = ["host://?capacity=1MiB", f"disk://{tmp_path}/kv"]
    with paged_engine(connector, num_pages=40, num_ranks=2) as engine:
        sequence = handle(engine, started(engine, tokens(1, 50)))
        assert sequence.suspend()
        engine.settle()
        assert len(asked) == 26
        # those that were said to be held were released; of the others nobody knows
        left = [path for path in litter(tmp_path / "kv") if path.parent.parent.name == "holds"]
        assert len(left) == 13
        assert engine.offload._suspended._holds.num_held == 0
        assert sequence.resume()
        engine.run()


def test_device_does_not_shrink_below_what_a_request_in_the_queue_needs() -> None:
    with paged_engine(num_pages=20) as engine:
        long, short = engine.add(tokens(1, 60)), engine.add(tokens(2, 5))
        page = engine.cache.bytes_per_page
        assert not engine.core.resize(0, 15 * page)
        assert engine.core.resize(0, 16 * page)
        engine.run()
        assert [request.num_generated for request in (long, short)] == [1, 1]
