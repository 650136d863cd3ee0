"""vLLM's own scheduler drives our halves: every way a request can go, and nothing is left of any of them."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvconnect_vllm.config
import kvconnect_vllm.scheduler_side
import pytest

from kvconnect.leader import OffloadLeader
from kvconnect.worker import OffloadWorker
from tests.vllm.faulty import Faults
from tests.vllm.models import save_adapter
from tests.vllm.stepping import SIZE, SteppedEngine, expected

HOST = "host://?capacity=1MiB"
BELOW = ["host://?capacity=1MiB", "faulty://?timeout_s=0.3"]

SHAPES = ["full", "mixed"]


@pytest.fixture(autouse=True)
def _faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVCONNECT_PLUGINS", "tests.vllm.faulty")
    Faults.clear()
    yield
    Faults.gate.set()


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(500) for _ in range(length)]


def forget_device(engine: SteppedEngine) -> None:
    engine.settle()
    assert engine.scheduler.reset_prefix_cache()


def stats(engine: SteppedEngine) -> dict[str, Any]:
    found: dict[str, Any] = engine.leader.scheduler_side.leader.get_stats()
    return found


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("connector", [HOST, BELOW], ids=["host", "store"])
def test_second_request_loads_what_the_first_computed(
    folder: Path, connector: Any, shape: str, ranks: int, async_scheduling: bool
) -> None:
    options: dict[str, Any] = {"shape": shape, "num_ranks": ranks, "async_scheduling": async_scheduling}
    with SteppedEngine(folder, connector, **options) as engine:
        engine.generate(prompt(0, 200), prompt(1, 100))
        if connector is BELOW:  # a new engine, that has nothing but the store
            engine.settle()
            engine.close()
            engine = SteppedEngine(folder, connector, **options)
        forget_device(engine)
        branch = [*prompt(0, 96), *prompt(2, 50)]
        first, other = engine.add(prompt(0, 200)), engine.add(branch)
        assert engine.run(first, other) == [expected(prompt(0, 200), 4), expected(branch, 4)]
        assert engine.loaded(first) == 6 * SIZE
        assert engine.garbage_read == 0
        assert stats(engine).get("load_errors", 0) == 0
        engine.settle()
        engine.close()


def test_decoded_blocks_and_pages_of_the_prefix_cache(folder: Path) -> None:
    with SteppedEngine(folder, HOST) as engine:
        (answer,) = engine.generate(prompt(0, 40), count=60)  # its third block is decoded
        conversation = [*prompt(0, 40), *answer, 7]
        on_device = engine.add(conversation)
        engine.run(on_device)
        assert engine.loaded(on_device) == 0  # vLLM had them
        forget_device(engine)
        loaded = engine.add(conversation)
        assert engine.run(loaded) == [expected(conversation, 4)]
        assert engine.loaded(loaded) == 3 * SIZE
        assert engine.garbage_read == 0


def test_part_on_the_device_part_in_the_arena(folder: Path) -> None:
    with SteppedEngine(folder, HOST) as engine:
        engine.generate(prompt(0, 200))
        forget_device(engine)
        engine.generate(prompt(0, 70))  # two blocks come back to the device
        request = engine.add(prompt(0, 200))
        assert engine.run(request) == [expected(prompt(0, 200), 4)]
        assert engine.loaded(request) == 4 * SIZE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_chunked_prefill(folder: Path, shape: str, async_scheduling: bool) -> None:
    with SteppedEngine(folder, HOST, shape=shape, max_batch_tokens=48, async_scheduling=async_scheduling) as engine:
        prompts = [prompt(seed, 150) for seed in range(3)]
        engine.generate(*prompts)
        forget_device(engine)
        engine.generate(*prompts)
        assert stats(engine)["load_blocks"] > 0
        assert engine.garbage_read == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("connector", [HOST, BELOW], ids=["host", "store"])
def test_preemption(folder: Path, connector: Any, shape: str, async_scheduling: bool) -> None:
    options: dict[str, Any] = {"shape": shape, "async_scheduling": async_scheduling}
    with SteppedEngine(folder, connector, num_blocks=14 if shape == "full" else 26, **options) as engine:
        engine.generate(*[prompt(seed, 90) for seed in range(4)], count=100)
        preemptions = engine.num_preemptions
        assert preemptions > 0
        engine.generate(*[prompt(seed, 90) for seed in range(4)], count=100)
        assert engine.garbage_read == 0
        assert stats(engine)["load_blocks"] > 0


def test_reset_of_running_requests(folder: Path) -> None:
    with SteppedEngine(folder, HOST) as engine:
        request = engine.add(prompt(0, 100), 20)
        for _ in range(5):
            engine.step()
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert engine.run(request) == [expected(prompt(0, 100), 20)]
        assert engine.garbage_read == 0


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", [*SHAPES, "window"])
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("lost", [1, 3, 100])
def test_load_that_fails_is_computed(folder: Path, shape: str, ranks: int, async_scheduling: bool, lost: int) -> None:
    with SteppedEngine(folder, "losing://", shape=shape, num_ranks=ranks, async_scheduling=async_scheduling) as engine:
        engine.generate(prompt(0, 200))
        forget_device(engine)
        Faults.lose = lost
        engine.generate(prompt(0, 200), [*prompt(0, 128), *prompt(1, 90)])
        assert stats(engine)["load_errors"] > 0
        Faults.lose = 0
        forget_device(engine)
        engine.generate(prompt(0, 200), [*prompt(0, 128), *prompt(1, 90)])
        assert engine.garbage_read == 0


def test_good_blocks_before_the_first_bad_one_stay(folder: Path) -> None:
    with SteppedEngine(folder, "losing://") as engine:
        engine.generate(prompt(0, 200))
        forget_device(engine)
        Faults.lose = 1  # the last of six
        engine.generate(prompt(0, 200))
        assert engine.num_scheduled_last == 200 - 5 * SIZE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_nobody_stands_on_a_page_whose_load_fails(folder: Path, shape: str, async_scheduling: bool) -> None:
    """VLLM would share a page that is loaded within a step, and rely on its owner to compute it, aborted or not."""
    stem, first, second = prompt(0, 128), prompt(1, 40), prompt(2, 80)
    for steps in range(5):
        with SteppedEngine(folder, "losing://", shape=shape, async_scheduling=async_scheduling) as engine:
            engine.generate([*stem, 1])
            forget_device(engine)
            Faults.lose = 1
            owner, other = engine.add([*stem, *first]), engine.add([*stem, *second])
            for _ in range(steps):
                engine.step()
            engine.abort(owner)
            assert engine.run(other) == [expected([*stem, *second], 4)]
            Faults.lose = 0
            engine.generate([*stem, 1, 2, 3])
            forget_device(engine)
            engine.generate([*stem, *second, 3, 4])
            assert engine.garbage_read == 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fault", ["contains", "read", "write"])
def test_store_that_dies(folder: Path, fault: str, shape: str, ranks: int) -> None:
    with SteppedEngine(folder, BELOW, shape=shape, num_ranks=ranks) as engine:
        if fault == "write":
            Faults.store = {fault}
        engine.generate(prompt(0, 200))
        engine.settle()
    with SteppedEngine(folder, BELOW, shape=shape, num_ranks=ranks) as engine:
        Faults.store = {fault}
        engine.generate(prompt(0, 200), prompt(1, 100))
        Faults.store = {"contains", "read", "write"}
        engine.generate(prompt(2, 200))
        assert engine.garbage_read == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_store_that_hangs(folder: Path, shape: str) -> None:
    with SteppedEngine(folder, BELOW, shape=shape) as engine:
        engine.generate(prompt(0, 200))
        engine.settle()
    with SteppedEngine(folder, BELOW, shape=shape) as engine:
        Faults.gate.clear()
        engine.generate(prompt(0, 200), prompt(1, 100))
        Faults.gate.set()
        engine.generate(prompt(0, 200))
        assert engine.garbage_read == 0


LEADER_HOOKS = [
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_reset",
    "has_pending_work",
    "get_stats",
    "take_events",
]
WORKER_HOOKS = [
    "handle_preemptions",
    "bind_connector_meta",
    "start_load_kv",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "build_worker_report",
    "get_stats",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("half", "hook"),
    [*((OffloadLeader, hook) for hook in LEADER_HOOKS), *((OffloadWorker, hook) for hook in WORKER_HOOKS)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_hook_that_raises(folder: Path, half: type, hook: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third call fails, in the middle of everything; what it fails in is a miss, and nothing more."""
    calls = 0
    real = getattr(half, hook)

    @functools.wraps(real)  # pluggy reads the names of a hook's arguments
    def sometimes(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("not this time")
        return real(self, *arguments)

    monkeypatch.setattr(half, hook, sometimes)
    monkeypatch.setattr(kvconnect_vllm.scheduler_side, "_SAVE_DEADLINE_S", 0.2)
    monkeypatch.setattr(kvconnect_vllm.scheduler_side, "_LOAD_DEADLINE_S", 0.5)
    with SteppedEngine(folder, BELOW, shape=shape) as engine:
        for _ in range(4):
            engine.generate(prompt(0, 200), prompt(1, 100), [*prompt(0, 96), *prompt(2, 50)])
            engine.settle(check=False)
        if calls > 2:
            assert sum(engine.failures().values()) > 0
        calls = -(10**9)
        if hook == "get_finished":  # whose load ended was never said: its pages stay out of use, and nothing else
            engine.check_pages = False


# -- deadlines and aborts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_load_that_nobody_reports_is_given_up(
    folder: Path, shape: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvconnect_vllm.scheduler_side, "_LOAD_DEADLINE_S", 0.3)
    with SteppedEngine(folder, "losing://?parks=true", shape=shape, num_ranks=ranks) as engine:
        engine.generate(prompt(0, 200))
        forget_device(engine)
        Faults.silent = True
        pool = engine.scheduler.kv_cache_manager.block_pool
        engine.generate(prompt(0, 200))
        assert engine.leader.scheduler_side.num_lost_loads == 1
        held = [block for block in pool.blocks if block.ref_cnt and not block.is_null]
        assert held, "pages that a load may still write to are given to others"
        Faults.silent = False
        engine.generate(prompt(1, 40))  # its steps bring the late word


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_abort_while_a_load_is_on_its_way(folder: Path, shape: str, ranks: int) -> None:
    with SteppedEngine(folder, BELOW, shape=shape, num_ranks=ranks) as engine:
        engine.generate(prompt(0, 200))
        engine.settle()
    for steps in range(12):
        with SteppedEngine(folder, BELOW, shape=shape, num_ranks=ranks) as engine:
            doomed, kept = engine.add(prompt(0, 200)), engine.add([*prompt(0, 96), *prompt(3, 40)])
            for _ in range(steps):
                engine.step()
            engine.abort(doomed)
            assert engine.run(kept) == [expected([*prompt(0, 96), *prompt(3, 40)], 4)]
            assert engine.garbage_read == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_pages_of_an_ended_request_wait_for_its_last_block(folder: Path, shape: str) -> None:
    """With asynchronous scheduling a block is computed before its last token is known, here the request's last."""
    with SteppedEngine(folder, HOST, shape=shape, async_scheduling=True) as engine:
        answer = expected(prompt(0, 60), 36)
        request = engine.add(prompt(0, 60), 100, stop=[answer[-1]])
        assert engine.run(request) == [answer]
        forget_device(engine)
        conversation = [*prompt(0, 60), *answer, 9]
        request = engine.add(conversation)
        assert engine.run(request) == [expected(conversation, 4)]
        assert engine.loaded(request) == 3 * SIZE
        assert engine.garbage_read == 0


def test_save_that_nobody_reports_frees_the_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvconnect_vllm.scheduler_side, "_SAVE_DEADLINE_S", 0.2)
    monkeypatch.setattr(OffloadLeader, "request_finished", lambda self, request, block_ids: True)
    with SteppedEngine(folder, HOST) as engine:
        engine.generate(prompt(0, 60), prompt(1, 60))
        engine.settle()
        assert engine.leader.scheduler_side.num_lost_saves == 2


# -- what a request says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saver", "loader", "tokens"),
    [
        ({}, {}, 192),
        ({"cache_salt": "a"}, {"cache_salt": "a"}, 192),
        ({"cache_salt": "a"}, {"cache_salt": "b"}, 0),
        ({}, {"cache_salt": "a"}, 0),
        ({"kv_transfer_params": {"kvconnect": {"cache": "read"}}}, {}, 0),
        ({"kv_transfer_params": {"kvconnect": {"cache": "write"}}}, {}, 192),
        ({"kv_transfer_params": {"kvconnect": {"cache": "none"}}}, {}, 0),
        ({}, {"kv_transfer_params": {"kvconnect": {"cache": "read"}}}, 192),
        ({}, {"kv_transfer_params": {"kvconnect": {"cache": "write"}}}, 0),
        ({}, {"kv_transfer_params": {"kvconnect": {"cache": "none"}}}, 0),
        ({}, {"kv_transfer_params": {"kvconnect": {"cache": "perhaps"}}}, 0),
        ({}, {"kv_transfer_params": {"kvconnect": "read"}}, 0),
        ({}, {"kv_transfer_params": {"another": 1}}, 192),
        ({}, {"resumable": True}, 0),
    ],
)
def test_what_a_request_may_do(folder: Path, saver: dict[str, Any], loader: dict[str, Any], tokens: int) -> None:
    with SteppedEngine(folder, HOST) as engine:
        engine.generate(prompt(0, 200), **saver)
        forget_device(engine)
        request = engine.add(prompt(0, 200), **loader)
        if loader.get("resumable"):  # it would wait for more of its prompt
            while not engine.loads_known(request):
                engine.step()
            assert engine.loaded(request) == tokens
            engine.abort(request)
            return
        assert engine.run(request) == [expected(prompt(0, 200), 4)]
        assert engine.loaded(request) == tokens


def test_adapters_are_told_apart_by_content(folder: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    one, same, other = (save_adapter(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    with SteppedEngine(folder, HOST) as engine:
        engine.generate(prompt(0, 200), lora_request=LoRARequest("one", 1, str(one)))
        loads = {
            "same content": LoRARequest("two", 2, str(same)),
            "other content": LoRARequest("one", 1, str(other)),
            "in place": LoRARequest("one", 1, str(one), load_inplace=True),
            "no folder": LoRARequest("one", 1, "somebody/adapter"),
        }
        found = {}
        for what, adapter in loads.items():
            forget_device(engine)
            request = engine.add(prompt(0, 200), lora_request=adapter)
            engine.run(request)
            found[what] = engine.loaded(request)
        assert found == {"same content": 192, "other content": 0, "in place": 0, "no folder": 0}


def test_prompts_that_are_not_only_tokens_are_not_cached(folder: Path) -> None:
    import torch

    with SteppedEngine(folder, HOST) as engine:
        request = engine.add(prompt(0, 200), prompt_embeds=torch.zeros(200, 8))
        engine.run(request)
        assert "save_blocks" not in stats(engine)
        assert stats(engine)["requests_not_cached"] == 1


# -- whole cache -----------------------------------------------------------------------------------------------------


def test_reset_makes_everything_unmatchable(folder: Path) -> None:
    with SteppedEngine(folder, BELOW) as engine:
        engine.generate(prompt(0, 200))
        engine.settle()
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
        request = engine.add(prompt(0, 200))
        engine.run(request)
        assert engine.loaded(request) == 0
        forget_device(engine)
        again = engine.add(prompt(0, 200))
        engine.run(again)
        assert engine.loaded(again) == 192  # what the new weights computed


@pytest.mark.parametrize("shape", SHAPES)
def test_events_tell_a_router_what_is_where(folder: Path, shape: str) -> None:
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

    with SteppedEngine(folder, BELOW, shape=shape, events=True) as engine:
        engine.generate(prompt(0, 200))
        engine.settle()
        ours = [event for event in engine.events if getattr(event, "ownership", None)]
        stored = [event for event in ours if isinstance(event, BlockStored) and event.group_idx == 0]
        by_tier: dict[str, dict[Any, tuple[Any, list[int]]]] = {"host": {}, "faulty": {}}
        for event in stored:
            parent = event.parent_block_hash
            for index, name in enumerate(event.block_hashes):
                tokens = list(event.token_ids[index * SIZE : (index + 1) * SIZE])
                by_tier[str(event.ownership)][name] = (parent, tokens)
                parent = name
            assert event.block_size == SIZE
        assert by_tier["host"] == by_tier["faulty"]
        tokens, parent = [], None
        while children := [name for name, (above, _) in by_tier["host"].items() if above == parent]:
            (parent,) = children
            tokens += by_tier["host"][parent][1]
        sequence = [*prompt(0, 200), *expected(prompt(0, 200), 4)]
        assert tokens == sequence[: len(sequence) // SIZE * SIZE]
        assert {(event.ownership, event.medium) for event in stored} == {("host", "CPU"), ("faulty", "STORAGE")}
        for seed in range(1, 30):  # more than the arena holds
            engine.generate(prompt(seed, 200), count=1)
        engine.settle()
        removed = [event for event in engine.events if isinstance(event, BlockRemoved) and event.ownership == "host"]
        assert {name for event in removed for name in event.block_hashes} & by_tier["host"].keys()
        engine.scheduler.reset_prefix_cache(reset_connector=True)
        engine.generate(prompt(0, 40))
        assert any(isinstance(event, AllBlocksCleared) for event in engine.events)


# -- everything together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_random_schedules(folder: Path, seed: int) -> None:
    """Arrivals, aborts, preemption, faults and resets at any step, under both schedulings, one rank and two."""
    rng = random.Random(seed)
    shape = rng.choice([*SHAPES, "window"])
    options: dict[str, Any] = {
        "shape": shape,
        "num_ranks": rng.choice([1, 1, 2]),
        "async_scheduling": rng.random() < 0.5,
        "num_blocks": rng.choice([20, 30, 64]) * (2 if shape == "mixed" else 1),
        "max_batch_tokens": rng.choice([48, 96, 512]),
        "prefix_caching": rng.random() < 0.8,
    }
    connector = rng.choice(
        [
            "losing://?capacity=40000",
            "losing://",
            "losing://?parks=true",
            [f"host://?capacity={rng.choice([1, 4]) * 50_000}", BELOW[1]],
            BELOW,
        ]
    )
    stems = [prompt(seed * 10 + i, rng.randrange(40, 160)) for i in range(3)]
    for _ in range(2):
        with SteppedEngine(folder, connector, **options) as engine:
            waiting: dict[str, list[int]] = {}
            deadline = time.monotonic() + 60
            for number in range(14):
                text = [*rng.choice([[], *stems]), *prompt(1000 + seed * 100 + number, rng.randrange(1, 80))]
                waiting[engine.add(text, rng.randrange(1, 40))] = text
                for _ in range(rng.randrange(8)):
                    Faults.lose = rng.choice([0, 0, 0, 0, 1, 4])
                    Faults.store = {rng.choice(["read", "write", "contains"])} if rng.random() < 0.1 else set()
                    engine.step()
                if rng.random() < 0.2:
                    engine.abort(rng.choice(list(waiting)))
                if rng.random() < 0.1:
                    engine.take_all()
                    if not engine.holds_pages:
                        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            Faults.lose, Faults.store = 0, set()
            while engine.scheduler.has_unfinished_requests():
                assert time.monotonic() < deadline, "a request was not answered in time"
                engine.step()
            for request_id, text in waiting.items():
                found = engine.outputs[request_id]
                assert found == expected(text, len(found))
            engine.settle()
