"""Suspend, prefetch and resume: where blocks go, what comes back, and what a failure changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.engine.config import CacheLevel
from kvconnect.engine.request import EngineRequest
from kvconnect.engine.sequence import Sequence as CacheSequence
from kvconnect.errors import ConfigError, UnsupportedError
from kvconnect.protocol import Capabilities
from tests.conftest import FAMILIES, Reference, make_model
from tests.engine.paged import SLOT, PagedEngine, paged_engine
from tests.engine.test_generate import check_pages


def tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(count)]


def handle(engine: PagedEngine, request: EngineRequest) -> CacheSequence:
    return CacheSequence(engine.core, request, ("device", "host", *engine.leader.tier_names))


def started(engine: PagedEngine, prompt: list[int], max_tokens: int = 8, **params: Any) -> EngineRequest:
    """Queue a request and step until it has two tokens."""
    request = engine.add(prompt, max_tokens, **params)
    while request.num_generated < 2:
        engine.step()
    return request


def connectors(tmp_path: Path, *, host_slots: int = 128, disk_blocks: int = 128, reserve: int = 0) -> list[str]:
    """Host memory and a disk, sizes in blocks of the shapes used here."""
    host = f"host://?capacity={host_slots * SLOT}&reserve={max(reserve, host_slots) * SLOT}"
    return [host, f"disk://{tmp_path}/kv?capacity={disk_blocks * SLOT}"]


def push_out(engine: PagedEngine, seed: int = 900) -> None:
    """Let others use the device and host memory until nothing old is left in them."""
    for number in range(12):
        engine.serve(tokens(seed + number, 60))
    engine.settle()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_suspended_conversation_says_what_generate_says(
    tmp_path: Path, references: dict[str, Reference], family: str, disk: bool, async_scheduling: bool
) -> None:
    prompt, other = list(range(1, 100)), list(range(150, 230))
    connector = ["host://?capacity=1MiB", *([f"disk://{tmp_path}/kv"] if disk else [])]
    with LLM(make_model(family), connector, block_size=8, num_ranks=2, async_scheduling=async_scheduling) as llm:
        request_id = llm.add_request(prompt, SamplingParams(max_tokens=30))
        said: dict[str, list[int]] = {request_id: []}

        def step(count: int) -> None:
            for _ in range(count):
                for output in llm.step():
                    said.setdefault(output.request_id, []).append(output.token_id)

        for pause in (1, 7, 3):  # with little or nothing computed, in a block's middle, and once more
            step(pause)
            sequence = llm.sequence(request_id)
            while sequence.status == "loading":
                step(1)
            assert sequence.suspend()
            assert all(pool.num_held == 0 for pool in llm._core.cache.pools)
            llm.reset_prefix_cache()
            other_id = llm.add_request(other, SamplingParams(max_tokens=4))
            while other_id in llm._requests:
                step(1)
            assert said.pop(other_id) == references[family](other, 4)
            if disk and sequence.blocks_by_level()["host"]:
                assert sequence.wait()
                assert llm.resize(CacheLevel.HOST, "16KiB")
                print(pause, sequence.blocks_by_level(), llm._requests[request_id].num_computed)
                assert sequence.blocks_by_level()["disk"] > 0
                assert llm.resize(CacheLevel.HOST, "1MiB")
            assert sequence.resume()
        while request_id in llm._requests:
            step(1)
        assert said[request_id] == references[family](prompt, 30)
        llm.close()
        stats = llm.get_stats()
        check_pages(llm)
    assert stats["leader"]["suspended"] == {}
    assert stats["leader"]["arena"]["claimed"] == stats["leader"]["arena"]["reserved"] == 0
    assert stats["unwritten_kv_seen"] == 0
    if disk:  # nobody else can load what is only a part of a block, and nothing is held any more
        names = [path.name for path in (tmp_path / "kv" / "blocks").rglob("*") if path.is_file()]
        private = (b"kvconnect/priv\0\0").hex()
        assert not [name for name in names if name[64:].startswith(private)]
        assert not [path for path in (tmp_path / "kv" / "holds").rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize("shape", ["full", "window", "mixed"])
@pytest.mark.parametrize("cache", ["both", "read", "none"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_byte_comes_back_whatever_may_be_shared(tmp_path: Path, shape: str, cache: str, num_ranks: int) -> None:
    with paged_engine(connectors(tmp_path), shape=shape, num_pages=40, num_ranks=num_ranks) as engine:
        request = started(engine, tokens(1, 50), cache=cache)
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        places = sequence.blocks_by_level()
        assert places["device"] == places["host"] == 0 < places["disk"]
        assert "lost" not in places
        if cache != "both":  # nothing of it is to be found by others
            assert engine.serve(tokens(1, 50), cache="read").first_counts == (0, 0)
        assert sequence.resume()
        engine.run()  # its next step reads every byte, and the runner compares them
        assert request.num_generated == 8
        assert request.run == 2  # suspended, and finished: it was never reset
        assert engine.arena()["claimed"] == 0


def test_resize_quota(tmp_path: Path) -> None:
    """TensorRT-LLM's `test_resize_quota`, a quarter of a mebibyte being a page: 64 to 32, 128 to 16, 128 to 64."""
    with paged_engine(connectors(tmp_path, disk_blocks=128), num_pages=64, max_batch_tokens=256) as engine:
        requests = [started(engine, tokens(10 + i, 105), 20) for i in range(2)]
        first, second = (handle(engine, request) for request in requests)
        assert first.suspend()
        assert second.suspend()
        engine.settle()
        page = engine.cache.bytes_per_page
        sizes = {CacheLevel.DEVICE: (64 * page, 32 * page), CacheLevel.HOST: (128 * SLOT, 16 * SLOT)}
        sizes[CacheLevel.DISK] = (128 * SLOT, 64 * SLOT)
        for level, (_, small) in sizes.items():
            assert engine.core.resize(level, small)
        assert engine.arena()["slots"] == 16
        for level in (CacheLevel.HOST, CacheLevel.DISK):
            assert not engine.core.resize(level, SLOT // 2)
        assert not engine.core.resize(CacheLevel.DISK, 40 * SLOT)  # more blocks are held there
        assert first.resume()
        engine.settle()
        assert first.status == "running"
        before = engine.num_held, engine.arena(), second.blocks_by_level()
        assert not second.resume()
        assert (engine.num_held, engine.arena(), second.blocks_by_level()) == before
        assert first.suspend()  # through sixteen slots: what is held below needs none
        engine.settle()
        assert "lost" not in first.blocks_by_level()
        for level, (large, _) in sizes.items():
            assert engine.core.resize(level, large)
        before_prefetch = first.blocks_by_level()
        assert before_prefetch["disk"] > 0
        assert first.prefetch(CacheLevel.HOST)
        assert first.wait()
        after = first.blocks_by_level()
        assert after["device"] == before_prefetch["device"]
        assert after["disk"] == 0
        assert after["host"] == before_prefetch["host"] + before_prefetch["disk"]
        engine.check()  # every block that may be evicted is in the order of eviction
        assert engine.arena()["claimed"] == 0
        assert engine.offload._index.num_available == 128
        assert first.resume()
        assert second.resume()
        engine.run()
        assert [request.num_generated for request in requests] == [20, 20]


def test_prefetch_leaves_what_is_above_and_what_others_have_up(tmp_path: Path) -> None:
    with paged_engine(connectors(tmp_path, host_slots=24), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        assert sequence.blocks_by_level() == {"device": 0, "host": 0, "disk": 16}
        other = started(engine, tokens(21, 30))
        other_sequence = handle(engine, other)
        assert other_sequence.suspend()
        engine.settle()
        up = other_sequence.blocks_by_level()
        assert sequence.prefetch(CacheLevel.HOST)
        assert sequence.wait()
        assert sequence.blocks_by_level() == {"device": 0, "host": 16, "disk": 0}
        assert sequence.prefetch(CacheLevel.HOST)  # again: there is nothing to do, and nothing is pushed out for it
        assert sequence.prefetch(CacheLevel.DISK)  # all of it lies above
        assert sequence.wait()
        assert sequence.blocks_by_level() == {"device": 0, "host": 16, "disk": 0}
        assert sum(other_sequence.blocks_by_level().values()) == sum(up.values())
        for each in (sequence, other_sequence):
            assert each.resume()
        engine.run()
        assert request.num_generated == other.num_generated == 8


def test_prefetch_without_room_for_all_of_it_moves_nothing(tmp_path: Path) -> None:
    with paged_engine(connectors(tmp_path, host_slots=24), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        assert engine.core.resize(CacheLevel.HOST, 10 * SLOT)
        before = sequence.blocks_by_level(), engine.arena()
        assert not sequence.prefetch(CacheLevel.HOST)
        assert (sequence.blocks_by_level(), engine.arena()) == before
        engine.check()
        assert sequence.resume()  # in rounds, through ten slots
        engine.run()
        assert request.num_generated == 8


@pytest.mark.parametrize("fails_at", [0, 3])
def test_failure_while_room_is_made_restores_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    with paged_engine(connectors(tmp_path, host_slots=24), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        index = engine.offload._index
        before = sequence.blocks_by_level(), engine.arena()["claimed"], index.num_available
        left, reserve = iter(range(100)), index.reserve

        def failing(*args: Any) -> Any:
            if next(left) == fails_at:
                raise MemoryError("the test's own")
            return reserve(*args)

        monkeypatch.setattr(index, "reserve", failing)
        assert not sequence.prefetch(CacheLevel.HOST)
        monkeypatch.undo()
        engine.check()
        assert (sequence.blocks_by_level(), engine.arena()["claimed"], index.num_available) == before
        assert sequence.prefetch(CacheLevel.HOST)
        assert sequence.wait()
        assert sequence.blocks_by_level()["host"] == 16
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 8


def test_store_that_fails_a_prefetch_costs_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvconnect_disk.store import DiskStore

    with paged_engine(connectors(tmp_path, host_slots=24), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)

        def broken(self: DiskStore, keys: Any, buffers: Any) -> Any:
            raise OSError("the test's own")

        monkeypatch.setattr(DiskStore, "read", broken)
        assert sequence.prefetch(CacheLevel.HOST)
        assert sequence.wait()
        assert sequence.blocks_by_level() == {"device": 0, "host": 0, "disk": 16}
        engine.check()
        monkeypatch.undo()
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 8
        assert request.run == 2  # nothing was computed again


def test_block_that_is_lost_all_the_same_is_computed_again(tmp_path: Path) -> None:
    with paged_engine(connectors(tmp_path, host_slots=24), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        name = request.chain.hashes[9].hex()
        (path,) = [path for path in (tmp_path / "kv" / "blocks").rglob("*") if name in path.name]
        path.write_bytes(path.read_bytes()[:-1])
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 8
        assert engine.core.num_unwritten == 0


def test_migration_is_one_batch_a_level_and_layer_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with paged_engine(connectors(tmp_path), shape="mixed", num_pages=60) as engine:
        request = started(engine, tokens(20, 62), cache="none")
        sequence = handle(engine, request)
        worker: Any = engine.core._workers[0].hook("get_stats")
        worker = worker.__self__
        gathered: list[tuple[int, int]] = []

        def noting(group: int, gather: Any, pages: Any, slots: Any) -> None:
            gathered.append((group, len(pages)))
            gather(pages, slots)

        for group, copier in enumerate(worker._copiers):
            monkeypatch.setattr(copier, "gather", partial(noting, group, copier.gather))
        pages = [sum(page >= 0 for page in table) for table in request.tables]
        assert sequence.suspend()
        assert gathered == [(0, pages[0]), (1, pages[1])]
        push_out(engine)
        promoted: list[tuple[int, list[int]]] = []
        promote = worker._transfers.promote

        def watched(tier: int, frames: Any) -> None:
            promoted.append((tier, [int.from_bytes(frame.key[64:68], "big") for frame in frames]))
            promote(tier, frames)

        monkeypatch.setattr(worker._transfers, "promote", watched)
        assert sequence.prefetch(CacheLevel.HOST)
        assert sequence.wait()
        assert promoted == [(0, [0] * pages[0] + [1] * pages[1])]
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 8


def test_suspend_without_room_changes_nothing() -> None:
    with paged_engine(f"host://?capacity={8 * SLOT}", num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        before = engine.arena(), [list(table) for table in request.tables]
        sequence = handle(engine, request)
        assert not sequence.suspend()
        assert (engine.arena(), [list(table) for table in request.tables]) == before
        assert sequence.status == "running"
        engine.run()
        assert request.num_generated == 8


def test_host_memory_alone_keeps_what_is_suspended_and_drops_the_rest() -> None:
    with paged_engine(f"host://?capacity={20 * SLOT}", num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        assert sequence.blocks_by_level() == {"device": 0, "host": 16}
        assert not engine.core.resize(CacheLevel.HOST, 15 * SLOT)
        assert engine.core.resize(CacheLevel.HOST, 16 * SLOT)
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 8
        assert engine.arena()["claimed"] == 0


def test_resume_uses_what_is_still_on_the_device(tmp_path: Path) -> None:
    with paged_engine(connectors(tmp_path), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        assert sequence.blocks_by_level() == {"device": 15, "host": 1, "disk": 0}
        loaded = engine.core._workers[0].get_stats().get("loaded_blocks", 0)
        assert sequence.resume()
        engine.run()
        assert engine.core._workers[0].get_stats()["loaded_blocks"] == loaded + 1  # the partial one
        assert request.num_generated == 8


def test_shared_prefix_of_two_suspended_requests_outlives_either(tmp_path: Path) -> None:
    stem = tokens(30, 40)
    with paged_engine(connectors(tmp_path, host_slots=24), num_pages=40) as engine:
        requests = [started(engine, stem + tokens(31 + i, 9)) for i in range(2)]
        sequences = [handle(engine, request) for request in requests]
        for sequence in sequences:
            assert sequence.suspend()
        push_out(engine)
        engine.scheduler.abort(requests[0])
        push_out(engine, 950)
        assert "lost" not in sequences[1].blocks_by_level()
        assert sequences[1].resume()
        engine.run()
        assert requests[1].num_generated == 8
        assert requests[1].run == 2


def test_waiting_request_is_suspended_without_a_connector() -> None:
    with paged_engine(None, num_pages=40) as engine:
        request = engine.add(tokens(1, 20))
        sequence = CacheSequence(engine.core, request, ("device",))
        assert sequence.status == "waiting"
        assert sequence.suspend()
        engine.run()
        assert request.num_generated == 0
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 1


@pytest.mark.parametrize("when", ["suspended", "loading"])
def test_abort_lets_everything_go(tmp_path: Path, when: str) -> None:
    with paged_engine(connectors(tmp_path), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        push_out(engine)
        if when == "loading":
            assert sequence.resume()
            assert sequence.status == "loading"
        engine.scheduler.abort(request)
        engine.run()
        engine.settle()
        assert sequence.status == "finished"
        assert engine.num_held == 0
        assert engine.arena()["claimed"] == 0
        assert engine.offload._suspended._holds.num_held == 0
        holds = [path for path in (tmp_path / "kv" / "holds").rglob("*") if path.is_file() and path.name != "lock"]
        assert holds == []


def test_reset_cache_makes_a_suspended_request_compute_again(tmp_path: Path) -> None:
    with paged_engine(connectors(tmp_path), num_pages=40) as engine:
        request = started(engine, tokens(20, 62))
        sequence = handle(engine, request)
        assert sequence.suspend()
        engine.settle()
        assert engine.leader.reset_cache()
        engine.cache.pools[0].forget_names()
        assert sequence.resume()
        engine.run()
        assert request.num_generated == 8
        assert engine.core._workers[0].get_stats().get("loaded_blocks", 0) == 0


def mistakes() -> list[tuple[str, Callable[[Any, Any], Any], type[Exception], str]]:
    return [
        (
            "running",
            lambda llm, seq: seq.prefetch(CacheLevel.HOST),
            ConfigError,
            "is running; only a suspended request",
        ),
        ("running", lambda llm, seq: seq.resume(), ConfigError, "is running; only a suspended request"),
        ("running", lambda llm, seq: llm.resize(CacheLevel.HOST, 1 << 20), ConfigError, "suspend or finish request-0"),
        ("suspended", lambda llm, seq: seq.suspend(), ConfigError, "is suspended; only a running or waiting"),
        ("suspended", lambda llm, seq: seq.prefetch(7), ConfigError, r"no level 7 .* 1 \(host\), 2 \(disk\)"),
        ("suspended", lambda llm, seq: seq.prefetch(-1), ConfigError, "no level -1"),
        ("suspended", lambda llm, seq: seq.prefetch(CacheLevel.DEVICE), ConfigError, "`resume` goes to the device"),
        ("suspended", lambda llm, seq: llm.resize(3, 1 << 20), ConfigError, r"no level 3 .* 0 \(device\)"),
        ("finished", lambda llm, seq: seq.suspend(), ConfigError, "is finished; only"),
        ("finished", lambda llm, seq: seq.prefetch(CacheLevel.HOST), ConfigError, "is finished; only"),
        (
            "finished",
            lambda llm, seq: llm.sequence("request-0"),
            ConfigError,
            "no request 'request-0', or it is finished",
        ),
    ]


def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path) -> None:
    with LLM(None, ["host://?capacity=16MiB", f"disk://{tmp_path}/kv"]) as llm:
        sequence = llm.sequence(llm.add_request([1, 2, 3] * 20, SamplingParams(max_tokens=30)))
        while sequence.status != "running":
            llm.step()
        for status, act, kind, says in mistakes():
            if (status, sequence.status) == ("suspended", "running"):
                assert sequence.suspend()
            if (status, sequence.status) == ("finished", "suspended"):
                assert sequence.resume()
                while llm._requests:
                    llm.step()
            assert sequence.status == status
            with pytest.raises(kind, match=says):
                act(llm, sequence)
    with LLM(None) as llm:
        sequence = llm.sequence(llm.add_request([1, 2, 3], SamplingParams(max_tokens=30)))
        llm.step()
        with pytest.raises(UnsupportedError, match="nowhere to suspend to"):
            sequence.suspend()
    with LLM(None, "host://?capacity=16MiB") as llm:
        assert llm._leader is not None
        llm._leader.capabilities = Capabilities()  # as of a connector that does not declare it
        sequence = llm.sequence(llm.add_request([1, 2, 3], SamplingParams(max_tokens=30)))
        llm.step()
        with pytest.raises(UnsupportedError, match="does not declare 'suspend'"):
            sequence.suspend()
