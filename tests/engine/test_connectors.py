"""The engine with a connector: the same tokens as without, from memory, from disk, and from stores that misbehave."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.errors import KVConnectError
from kvconnect.protocol import BlockKey, split_key
from kvconnect.registry import Registrar, Registry, load_registry
from tests.conftest import FAMILIES, Reference, make_model
from tests.engine.test_generate import check_pages, prompts
from tests.store.stores import DictStore, dict_store

PARAMS = SamplingParams(max_tokens=6)


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes ``test://`` mean a store class."""

    def use(store: type[DictStore]) -> str:
        def load(self: Registry, name: str, original: Any = Registry.load) -> Any:
            return store if name == "test" else original(self, name)

        def discover(environ: Any = None) -> Registry:
            registry = load_registry(environ)
            Registrar(registry, "tests", "").add("test", "tests:Store")
            return registry

        monkeypatch.setattr(Registry, "load", load)
        monkeypatch.setattr("kvconnect.driver.load_registry", discover)
        return "test://?timeout_s=0.2"

    return use


def run(model: Any, connector: Any, batch: Sequence[Sequence[int]], **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Run one engine from start to close; return its outputs and its last counters."""
    with LLM(model, connector, block_size=8, **options) as llm:
        outputs = llm.generate(batch, PARAMS)
        llm.close()
        check_pages(llm)
        stats = llm.get_stats()
    assert stats["leader"]["arena"]["claimed"] == stats["leader"]["arena"]["reserved"] == 0
    assert stats["leader"]["arena"]["promoting"] == stats["leader"]["requests"] == 0
    return outputs, stats


def threads_of_ours() -> set[int | None]:
    """Return the living threads that a connector started; other tests may have left hung ones behind."""
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith("kvconnect")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_batch_tokens", [2048, 40])
@pytest.mark.parametrize(("codec", "async_load"), [("none", False), ("zstd", False), ("none", True)])
def test_fresh_engine_loads_what_another_computed(
    tmp_path: Path, references: dict[str, Reference], family: str, max_batch_tokens: int, codec: str, async_load: bool
) -> None:
    batch = prompts(5)
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv?codec={codec}"]
    expected = [references[family](prompt, 6) for prompt in batch]
    before = threads_of_ours()
    cold, _ = run(make_model(family), connector, batch, max_batch_tokens=max_batch_tokens)
    options = {"max_batch_tokens": max_batch_tokens, "async_load": async_load}
    warm, stats = run(make_model(family), connector, batch, **options)
    assert [output.token_ids for output in cold] == [output.token_ids for output in warm] == expected
    assert all(output.loaded_tokens == 0 for output in cold)
    found = sum((output.loaded_tokens + output.reused_tokens) // 8 for output in warm)
    assert found >= 0.9 * sum(len(prompt) // 8 for prompt in batch)
    assert stats["workers"][0]["failures"] == {}
    assert threads_of_ours() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_load_what_two_ranks_computed(tmp_path: Path, references: dict[str, Reference], family: str) -> None:
    batch = prompts(5)
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    expected = [references[family](prompt, 6) for prompt in batch]
    cold, _ = run(make_model(family), connector, batch, num_ranks=2, max_batch_tokens=40)
    warm, stats = run(make_model(family), connector, batch, num_ranks=2, max_batch_tokens=40)
    assert [output.token_ids for output in cold] == [output.token_ids for output in warm] == expected
    found = sum((output.loaded_tokens + output.reused_tokens) // 8 for output in warm)
    assert found >= 0.9 * sum(len(prompt) // 8 for prompt in batch)
    assert len(stats["workers"]) == 2
    one, _ = run(make_model(family), connector, batch)  # its blocks hold all heads: other keys
    assert [output.token_ids for output in one] == expected
    assert all(output.loaded_tokens == 0 for output in one)


def test_block_that_one_rank_cannot_load_is_loaded_by_none(use_store: Any, references: dict[str, Reference]) -> None:
    batch = prompts(19)
    store = dict_store()
    run(make_model("llama"), use_store(store), batch, num_ranks=2)
    shards = sorted({split_key(key)[3] for key in store.frames})
    assert len(shards) == 2
    for number, key in enumerate(sorted(store.frames)):
        if split_key(key)[3] == shards[0] and number % 3 == 0:
            store.frames[key] = store.frames[key][:-1] + b"?"
    outputs, stats = run(make_model("llama"), use_store(store), batch, num_ranks=2)
    assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
    assert stats["leader"]["promote_failures"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_host_memory_brings_back_what_left_the_device(references: dict[str, Reference], family: str) -> None:
    batch = prompts(6)
    with LLM(make_model(family), "host://?capacity=64MiB", block_size=8) as llm:
        llm.generate(batch, PARAMS)
        llm.reset_prefix_cache()
        for prompt in batch:
            (output,) = llm.generate([prompt], PARAMS)
            assert output.token_ids == references[family](prompt, 6)
            assert output.loaded_tokens + output.reused_tokens == (len(prompt) - 1) // 8 * 8
        check_pages(llm)


def test_arena_smaller_than_a_prompt_loads_what_fits(tmp_path: Path, references: dict[str, Reference]) -> None:
    prompt = prompts(7, count=1, longest=150)[0] * 4
    run(make_model("llama"), f"disk://{tmp_path}/kv", [prompt])
    small = ["host://?capacity=40KiB", f"disk://{tmp_path}/kv"]  # ten slots
    (output,), _ = run(make_model("llama"), small, [prompt])
    assert output.token_ids == references["llama"](prompt, 6)
    assert 0 < output.loaded_tokens <= 80


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_load_larger_than_the_arena_runs_in_rounds(
    tmp_path: Path, references: dict[str, Reference], family: str, num_ranks: int
) -> None:
    batch = [prompt * 3 for prompt in prompts(20, count=4)]
    connector = f"disk://{tmp_path}/kv"
    run(make_model(family), connector, batch, num_ranks=num_ranks)
    small = ["host://?capacity=160KiB", connector]
    outputs, stats = run(make_model(family), small, batch, num_ranks=num_ranks, async_load=True)
    assert [output.token_ids for output in outputs] == [references[family](prompt, 6) for prompt in batch]
    assert stats["leader"]["arena"]["slots"] < max(len(prompt) for prompt in batch) // 8
    found = sum((output.loaded_tokens + output.reused_tokens) // 8 for output in outputs)
    assert found >= 0.9 * sum(len(prompt) // 8 for prompt in batch)


@pytest.mark.parametrize("seed", range(4))
def test_abort_while_loading_frees_pages_when_the_load_has_ended(
    use_store: Any, references: dict[str, Reference], seed: int
) -> None:
    batch = prompts(21)
    store = dict_store()
    run(make_model("llama"), use_store(store), batch)

    def slow(self: Any, keys: Any, buffers: Any) -> Any:
        threading.Event().wait(0.02)
        return DictStore.read(self, keys, buffers)

    rng = random.Random(seed)
    with LLM(
        make_model("llama"), use_store(dict_store(read=slow, frames=store.frames)), block_size=8, async_load=True
    ) as llm:
        ids = [llm.add_request(prompt, PARAMS) for prompt in batch]
        while not llm._core.scheduler.parked:
            llm.step()
        for request_id in rng.sample(ids, 3):
            parked = request_id in llm._core.scheduler.parked
            assert llm.abort(request_id) is not None
            ids.remove(request_id)
            assert not parked or llm._core.cache.pools[0].num_held > 0
        finished = {}
        while llm._core.scheduler.has_requests or llm._core.has_connector_work:
            for output in llm.step():
                finished[output.request_id] = output.finished
        numbers = {request_id: int(request_id.split("-")[1]) for request_id in ids}
        for request_id, number in numbers.items():
            done = finished[request_id]
            assert done is not None
            assert done.token_ids == references["llama"](batch[number], 6)
        check_pages(llm)
        assert llm.get_stats()["leader"]["arena"]["claimed"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_failed_parked_load_goes_on_with_what_arrived(
    use_store: Any, references: dict[str, Reference], family: str
) -> None:
    prompt = prompts(22, count=1)[0] * 10
    store = dict_store()
    run(make_model(family), use_store(store), [prompt])

    def forgetful(self: Any, keys: Any, buffers: Any) -> Any:
        lengths = DictStore.read(self, keys, buffers)
        return [None if key == bad else length for key, length in zip(keys, lengths, strict=True)]

    with LLM(make_model(family), use_store(store), block_size=8) as llm:
        request = llm._new_request(prompt, PARAMS)
        wanted = request.chain.hashes[len(prompt) // 8 - 2]
    bad = next(key for key in store.frames if split_key(key)[1] == wanted)
    broken = dict_store(read=forgetful, frames=dict(store.frames))
    (output,), stats = run(make_model(family), use_store(broken), [prompt], async_load=True)
    assert output.token_ids == references[family](prompt, 6)
    assert stats["workers"][0]["load_errors"] > 0
    if family in ("llama", "qwen3"):
        assert output.loaded_tokens == (len(prompt) // 8 - 2) * 8


def test_preempted_requests_with_a_connector_say_the_same(tmp_path: Path, references: dict[str, Reference]) -> None:
    batch = prompts(8, count=6, longest=90)
    page = 2 * 2 * 2 * 16 * 4 * 8
    params = SamplingParams(max_tokens=40)
    for _ in range(2):
        with LLM(
            make_model("llama"), f"disk://{tmp_path}/kv", block_size=8, kv_cache_bytes=page * 26, max_batch_tokens=64
        ) as llm:
            outputs = llm.generate(batch, params)
            assert llm.get_stats()["preemptions"] > 0
            assert [output.token_ids for output in outputs] == [references["llama"](prompt, 40) for prompt in batch]
            check_pages(llm)
    assert sum(output.loaded_tokens for output in outputs) > 0


def test_decoded_blocks_are_saved_too(tmp_path: Path, references: dict[str, Reference]) -> None:
    prompt = list(range(1, 20))
    answer = references["llama"](prompt, 30)
    with LLM(make_model("llama"), f"disk://{tmp_path}/kv", block_size=8) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=30))
    (output,), _ = run(make_model("llama"), f"disk://{tmp_path}/kv", [[*prompt, *answer]])
    assert output.loaded_tokens == 48


@pytest.mark.parametrize(
    "change",
    ["prefix", "salt", "model", "dtype", "block size", "model id"],
)
def test_nothing_of_another_kind_ever_matches(tmp_path: Path, change: str) -> None:
    """A block after another prefix, or under another salt, model, dtype or block size, is a miss."""
    connector = f"disk://{tmp_path}/kv"
    prompt = list(range(1, 60))
    with LLM(make_model("llama"), connector, block_size=8) as llm:
        llm.generate([prompt], PARAMS)
    arguments: dict[str, Any] = {"block_size": 8}
    params = PARAMS
    model = make_model("llama")
    if change == "prefix":
        prompt = [0, *prompt[1:]]
    elif change == "salt":
        params = SamplingParams(max_tokens=6, cache_salt="other")
    elif change == "model":
        model = make_model("llama", seed=1)
    elif change == "dtype":
        arguments["dtype"] = "bfloat16"
    elif change == "block size":
        arguments["block_size"] = 16
    else:
        arguments["model_id"] = "another"
    with LLM(model, connector, **arguments) as llm:
        (output,) = llm.generate([prompt], params)
        assert llm.get_stats()["leader"]["promoted_blocks"] == 0
    assert output.loaded_tokens == 0
    with LLM(make_model("llama"), connector, block_size=8) as llm:
        assert llm.generate([list(range(1, 60))], PARAMS)[0].loaded_tokens == 56  # the control: it is all there


def test_request_says_whether_it_loads_and_saves(tmp_path: Path) -> None:
    connector, prompt = f"disk://{tmp_path}/kv", list(range(1, 60))

    def loaded(cache: Any, device: bool = False) -> int:
        with LLM(make_model("llama"), connector, block_size=8) as llm:
            (output,) = llm.generate([prompt], SamplingParams(max_tokens=2, cache=cache))
        return int(output.loaded_tokens)

    assert [loaded(cache) for cache in ("none", "read", "both", "write", "none", "read")] == [0, 0, 0, 0, 0, 56]


# -- stores that misbehave ---------------------------------------------------------------------------------------


def raises(self: Any, *args: Any) -> Any:
    raise OSError("no medium")


def hangs(self: Any, *args: Any) -> Any:
    threading.Event().wait(1.0)
    return super(type(self), self).contains(*args)


def half(self: Any, keys: Any, buffers: Any) -> Any:
    lengths = DictStore.read(self, keys, buffers)
    return [None if length is None else length // 2 for length in lengths]


def foreign(self: Any, keys: Any, buffers: Any) -> Any:
    """Answer every key with some other key's frame."""
    everything = sorted(self.frames)
    others = [everything[(everything.index(key) + 1) % len(everything)] for key in keys]
    return DictStore.read(self, others, buffers)


def noise(self: Any, keys: Any, buffers: Any) -> Any:
    lengths = DictStore.read(self, keys, buffers)
    for number, buffer in enumerate(buffers):
        buffer[300 + number] ^= 0x40
    return lengths


MISBEHAVING: dict[str, dict[str, Any]] = {
    "contains raises": {"contains": raises},
    "read raises": {"read": raises},
    "write raises": {"write": raises},
    "everything raises": {"contains": raises, "read": raises, "write": raises, "remove": raises, "close": raises},
    "contains hangs": {"contains": hangs},
    "read returns half": {"read": half},
    "read returns other blocks": {"read": foreign},
    "read flips bits": {"read": noise},
    "read says too much": {"read": lambda self, keys, buffers: [10**9] * len(keys)},
    "read says less than nothing": {"read": lambda self, keys, buffers: [-1] * len(keys)},
    "read answers rubbish": {"read": lambda self, keys, buffers: ["a"] * len(keys)},
    "read answers too few": {"read": lambda self, keys, buffers: []},
    "contains answers too many": {"contains": lambda self, keys: [True] * (len(keys) + 1)},
    "contains believes in everything": {"contains": lambda self, keys: [True] * len(keys)},
    "blocks vanish before the read": {"read": lambda self, keys, buffers: [None] * len(keys)},
    "write declines": {"write": lambda self, keys, frames: [False] * len(keys)},
    "write answers rubbish": {"write": lambda self, keys, frames: None},
}


@pytest.mark.parametrize("async_load", [False, True])
@pytest.mark.parametrize("name", MISBEHAVING)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a close that raises
def test_store_that_misbehaves_costs_speed_and_no_token(
    use_store: Any, references: dict[str, Reference], name: str, async_load: bool
) -> None:
    batch = prompts(9)
    healthy = dict_store()
    run(make_model("llama"), use_store(healthy), batch)
    assert healthy.frames
    bad = dict_store(**MISBEHAVING[name], frames=dict(healthy.frames))
    outputs, stats = run(make_model("llama"), use_store(bad), batch, async_load=async_load)
    assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
    counted = stats["leader"]["lookup_failures"] + stats["leader"]["promote_failures"]
    counted += stats["leader"]["demote_failures"] + sum(stats["workers"][0]["failures"].values())
    if name not in ("write raises", "write declines", "write answers rubbish", "contains believes in everything"):
        assert counted > 0, stats  # those have nothing to write: all blocks are there already


def test_store_that_declines_every_write_is_counted(use_store: Any, references: dict[str, Reference]) -> None:
    batch = prompts(10)
    store = dict_store(write=lambda self, keys, frames: [False] * len(keys))
    outputs, stats = run(make_model("llama"), use_store(store), batch)
    assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
    assert stats["leader"]["demote_failures"] > 0
    assert stats["leader"]["demoted_blocks"] == 0


def test_read_that_hangs_past_its_deadline_is_quarantined_and_its_late_bytes_hurt_nobody(
    use_store: Any, references: dict[str, Reference]
) -> None:
    batch = prompts(11)
    healthy = dict_store()
    run(make_model("llama"), use_store(healthy), batch)
    gate = threading.Event()
    late: list[int] = []

    def read(self: Any, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        gate.wait(30)
        for buffer in buffers:
            buffer[:] = b"\xee" * len(buffer)  # what a late answer would do to a slot in use
        late.append(len(buffers))
        return [None] * len(keys)

    bad = dict_store(read=read, frames=dict(healthy.frames))
    with LLM(make_model("llama"), use_store(bad), block_size=8) as llm:
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
        assert llm.get_stats()["leader"]["arena"]["quarantined"] > 0
        gate.set()
        llm.reset_prefix_cache()
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
        while llm.get_stats()["leader"]["arena"]["quarantined"]:
            llm.step()
        assert late


def test_frames_in_a_store_are_whole_and_named_by_their_keys(use_store: Any) -> None:
    from kvconnect.store import open_frame

    batch = prompts(12)
    store = dict_store()
    run(make_model("mistral"), use_store(store), batch)
    assert store.frames
    for key, frame in store.frames.items():
        size = int.from_bytes(frame[24:32], "little")
        open_frame(memoryview(frame), key=key, fingerprint=frame[104:136], payload_bytes=size)
        assert len(split_key(key)[0]) == 32


# -- failed loads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("times", [1, 2, 100])
def test_load_that_fails_on_the_way_to_the_pages_is_recomputed(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference], family: str, times: int
) -> None:
    """An arena slot that does not hold what the plan names: the worker reports it, the engine computes instead."""
    from kvconnect.worker.offload import OffloadWorker

    batch = prompts(13)
    failing = {"left": times}
    original = OffloadWorker._load

    def load(self: OffloadWorker, loads: Sequence[Any]) -> None:
        for move in loads[len(loads) // 2 :]:
            if failing["left"]:
                self._held.pop(move.slot, None)
        failing["left"] -= bool(loads and failing["left"])
        original(self, loads)

    monkeypatch.setattr(OffloadWorker, "_load", load)
    with LLM(make_model(family), "host://?capacity=64MiB", block_size=8) as llm:
        llm.generate(batch, PARAMS)
        llm.reset_prefix_cache()
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references[family](prompt, 6) for prompt in batch]
        assert llm.get_stats()["workers"][0]["load_errors"] > 0
        check_pages(llm)
        llm.reset_prefix_cache()
        failing["left"] = 0
        again = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in again] == [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    "hook", ["bind_connector_meta", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"]
)
def test_worker_hook_that_raises_now_and_then_costs_no_token(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference], hook: str
) -> None:
    from kvconnect.worker import OffloadWorker

    rng = random.Random(hook)
    original = getattr(OffloadWorker, hook)

    def fragile(self: Any, *args: Any) -> Any:
        if rng.random() < 0.3:
            raise RuntimeError("now and then")
        return original(self, *args)

    import inspect

    names = list(inspect.signature(original).parameters)[1:]
    scope: dict[str, Any] = {"fragile": fragile}
    exec(f"def hook({', '.join(['self', *names])}):\n    return fragile({', '.join(['self', *names])})", scope)
    monkeypatch.setattr(OffloadWorker, hook, scope["hook"])
    batch = prompts(14)
    with LLM(make_model("llama"), "host://?capacity=64MiB", block_size=8, max_batch_tokens=50) as llm:
        for _ in range(3):
            outputs = llm.generate(batch, PARAMS)
            assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
            llm.reset_prefix_cache()
        assert sum(llm.get_stats()["workers"][0]["hooks"]["failures"].values()) > 0
        llm.close()  # what was void is saved again, from pages that are kept for one more step
        check_pages(llm)


def test_leader_whose_plan_fails_costs_no_token(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference]
) -> None:
    from kvconnect.leader import OffloadLeader

    rng = random.Random(5)
    original = OffloadLeader.build_connector_meta

    def build_connector_meta(self: Any, scheduler_output: Any) -> bytes:
        if rng.random() < 0.3:
            raise RuntimeError("now and then")
        return original(self, scheduler_output)

    monkeypatch.setattr(OffloadLeader, "build_connector_meta", build_connector_meta)
    batch = prompts(15)
    with LLM(make_model("llama"), "host://?capacity=64MiB", block_size=8, max_batch_tokens=50) as llm:
        for _ in range(3):
            outputs = llm.generate(batch, PARAMS)
            assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
            llm.reset_prefix_cache()


def test_leader_that_fails_after_its_offer_costs_no_token(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference]
) -> None:
    from kvconnect.leader import OffloadLeader

    fails = False
    original = OffloadLeader.update_state_after_alloc

    def update_state_after_alloc(self: Any, request: Any, block_ids: Any, num_external_tokens: Any) -> None:
        if fails:
            raise RuntimeError("boom")
        original(self, request, block_ids, num_external_tokens)

    monkeypatch.setattr(OffloadLeader, "update_state_after_alloc", update_state_after_alloc)
    batch = prompts(16)
    with LLM(make_model("gemma3"), "host://?capacity=64MiB", block_size=8) as llm:
        llm.generate(batch, PARAMS)
        llm.reset_prefix_cache()
        fails = True
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references["gemma3"](prompt, 6) for prompt in batch]
        assert all(output.loaded_tokens == 0 for output in outputs)
        check_pages(llm)


@pytest.mark.parametrize("max_batch_tokens", [2048, 16])
def test_worker_that_claims_to_have_loaded_is_found_out(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference], max_batch_tokens: int
) -> None:
    """Fresh pages hold NaN, so KV that nobody wrote reaches the logits; the request is computed instead."""
    from kvconnect.worker.copies import BlockCopier

    batch = prompts(17)
    with LLM(make_model("llama"), "host://?capacity=64MiB", block_size=8, max_batch_tokens=max_batch_tokens) as llm:
        llm.generate(batch, PARAMS)
        llm.reset_prefix_cache()
        monkeypatch.setattr(BlockCopier, "scatter", lambda *args: None)
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
        assert llm.get_stats()["unwritten_kv_seen"] > 0
        check_pages(llm)


def test_forward_that_raises_leaves_an_engine_that_works(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference]
) -> None:
    from kvconnect.engine.runner import ModelRunner

    batch = prompts(18)
    original = ModelRunner.forward
    steps = iter([False, True, False])

    def forward(self: Any, batch: Any, sampled: Any) -> Any:
        if next(steps, False):
            raise KeyboardInterrupt
        return original(self, batch, sampled)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    with LLM(make_model("llama"), "host://?capacity=64MiB", block_size=8, max_batch_tokens=64) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(batch, PARAMS)
        check_pages(llm)
        assert not llm._leader.has_pending_work()  # type: ignore[union-attr]
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]


def test_pages_of_a_finished_request_stay_until_its_save_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvconnect.leader import OffloadLeader
    from kvconnect.protocol import Finished
    from kvconnect.worker import OffloadWorker

    asked: list[str] = []

    def request_finished(self: Any, request: Any, block_ids: Any) -> bool:
        return True

    def get_finished(self: Any, finished_req_ids: frozenset[str]) -> Finished:
        ready = frozenset(asked[:1])
        del asked[:1]
        asked.extend(finished_req_ids)
        return Finished(ready, frozenset(), frozenset())

    monkeypatch.setattr(OffloadLeader, "request_finished", request_finished)
    monkeypatch.setattr(OffloadWorker, "get_finished", get_finished)
    with LLM(make_model("llama"), "host://?capacity=64MiB", block_size=8) as llm:
        llm.generate([list(range(40))], PARAMS)
        assert llm._core.cache.pools[0].num_held > 0
        llm.step()
        assert llm._core.cache.pools[0].num_held > 0
        llm.step()
        check_pages(llm)


def test_models_that_differ_only_in_their_configuration_share_nothing(tmp_path: Path) -> None:
    prompt = list(range(1, 60))
    for expected, model in ((0, make_model("llama")), (0, make_model("llama", rms_norm_eps=1e-3))):
        with LLM(model, f"disk://{tmp_path}/kv", block_size=8) as llm:
            assert llm.generate([prompt], PARAMS)[0].loaded_tokens == expected


def test_connector_that_cannot_open_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "other").touch()
    before = threads_of_ours()
    with pytest.raises(KVConnectError, match="folder of its own"):
        LLM(make_model("llama"), ["host://?capacity=1MiB", f"disk://{tmp_path}/ok", f"disk://{tmp_path}/kv"])
    assert threads_of_ours() == before
