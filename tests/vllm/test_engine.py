"""Real vLLM engines, in this process: greedy outputs equal those of the same engine without a connector."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvconnect
from tests.vllm.engines import BLOCK_SIZE, Engine, open_engine, prompts_of, transfer_config
from tests.vllm.faulty import Faults
from tests.vllm.models import save_adapter, save_gemma3, save_gemma3n

ROOT = Path(__file__).parents[2]
PROMPTS = prompts_of(100, 205, 310)
LOADED = [96, 192, 288]


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("KVCONNECT_PLUGINS", "tests.vllm.faulty,kvconnect_sqlite,kvconnect_memo")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "custom_connector"))
    page = (ROOT / "docs" / "writing-a-connector.md").read_text()
    for name, text in re.findall(r"```python\n# (kvconnect_memo\w*\.py)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    Faults.clear()
    yield
    Faults.clear()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """What the Llama says, without a connector."""
    with open_engine(folder) as engine:
        return engine.generate(PROMPTS, 40)


def twice(engine: Engine, expected: list[list[int]], count: int = 40) -> None:
    """Compute and save, forget the device, load."""
    assert engine.generate(PROMPTS, count) == expected
    engine.forget_device()
    assert engine.generate(PROMPTS, count) == expected
    assert engine.cached == LOADED
    assert engine.failures() == {}


def test_host_and_pages_of_vllms_own_prefix_cache(folder: Path, expected: list[list[int]]) -> None:
    with open_engine(folder, "host://?capacity=64MiB") as engine:
        twice(engine, expected)
        assert engine.stats["load_blocks"] == sum(LOADED) // BLOCK_SIZE
        longer = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected, strict=True)]
        engine.generate(longer)  # on the device, the decoded blocks too
        assert engine.stats["load_blocks"] == sum(LOADED) // BLOCK_SIZE
        engine.forget_device()
        engine.generate(longer)
        assert engine.cached == [(len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE for tokens in longer]


@pytest.mark.parametrize("url", ["disk://{}/kv", "sqlite://{}/kv.sqlite"], ids=["disk", "sqlite"])
def test_stores_serve_a_second_engine(folder: Path, expected: list[list[int]], tmp_path: Path, url: str) -> None:
    connector = ["host://?capacity=64MiB", url.format(tmp_path)]
    with open_engine(folder, connector) as engine:
        assert engine.generate(PROMPTS, 40) == expected
    with open_engine(folder, connector) as engine:
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.cached == LOADED
        assert engine.failures() == {}


def test_leader_and_worker_of_an_author(folder: Path, expected: list[list[int]]) -> None:
    with open_engine(folder, "memo://") as engine:
        twice(engine, expected)


def test_the_last_step_of_a_script_reaches_the_store(folder: Path, tmp_path: Path) -> None:
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    with open_engine(folder, connector) as engine:
        first = engine.generate(PROMPTS, 1)  # one step, and then vLLM steps no more
    with open_engine(folder, connector) as engine:
        assert engine.generate(PROMPTS, 1) == first
        assert engine.cached == LOADED


@pytest.mark.parametrize("kind", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}], ids=["bf16", "fp8"])
def test_other_types(folder: Path, tmp_path: Path, kind: dict[str, str]) -> None:
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    try:
        with open_engine(folder, **kind) as engine:
            expected = engine.generate(PROMPTS, 40)
    except NotImplementedError as error:
        pytest.skip(f"env: {error}")
    with open_engine(folder, connector, **kind) as engine:
        twice(engine, expected)
    with open_engine(folder, connector, **kind) as engine:
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.cached == LOADED
    with open_engine(folder, connector) as engine:  # the same folder and store, another type: nothing of it fits
        engine.generate(PROMPTS, 1)
        assert engine.cached == [0, 0, 0]


def test_hybrid_windows(tmp_path: Path) -> None:
    gemma = save_gemma3(tmp_path / "gemma3")
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    with open_engine(gemma) as engine:
        expected = engine.generate(PROMPTS, 40)
    with open_engine(gemma, connector) as engine:
        assert len(engine.scheduler.kv_cache_config.kv_cache_groups) > 1
        twice(engine, expected)
    with open_engine(gemma, connector, max_num_batched_tokens=64) as engine:
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.cached == LOADED


def test_layers_that_use_the_cache_of_others(tmp_path: Path) -> None:
    gemma = save_gemma3n(tmp_path / "gemma3n")
    with open_engine(gemma) as engine:
        expected = engine.generate(PROMPTS, 20)
    with open_engine(gemma, "host://?capacity=64MiB") as engine:
        twice(engine, expected, 20)


def test_chunked_prefill_and_preemption(folder: Path, expected: list[list[int]]) -> None:
    with open_engine(
        folder, "host://?capacity=64MiB", max_num_batched_tokens=64, num_gpu_blocks_override=14, max_model_len=352
    ) as engine:
        twice(engine, expected)
        assert engine.scheduler.requests == {}


def test_prefix_caching_off(folder: Path, expected: list[list[int]]) -> None:
    with open_engine(folder, "host://?capacity=64MiB", enable_prefix_caching=False) as engine:
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.stats["load_blocks"] == sum(LOADED) // BLOCK_SIZE


def test_corrupted_kv_changes_what_is_said(folder: Path, expected: list[list[int]]) -> None:
    """The negative control of every comparison here."""
    with open_engine(folder, "losing://?capacity=67108864") as engine:
        engine.generate(PROMPTS, 40)
        engine.forget_device()
        Faults.corrupt = True
        found = engine.generate(PROMPTS, 40)
        assert all(a != b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lost", [1, 3, 1000])
def test_loads_that_fail(folder: Path, expected: list[list[int]], lost: int) -> None:
    with open_engine(folder, "losing://?capacity=67108864") as engine:
        engine.generate(PROMPTS, 40)
        engine.forget_device()
        Faults.lose = lost
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.stats["load_errors"] > 0
        Faults.lose = 0
        engine.forget_device()
        assert engine.generate(PROMPTS, 40) == expected


def test_hybrid_loads_that_fail(tmp_path: Path) -> None:
    gemma = save_gemma3(tmp_path / "gemma3")
    with open_engine(gemma) as engine:
        expected = engine.generate(PROMPTS, 40)
    with open_engine(gemma, "losing://?capacity=67108864") as engine:
        engine.generate(PROMPTS, 40)
        for lost in (1, 1000, 0):
            engine.forget_device()
            Faults.lose = lost
            assert engine.generate(PROMPTS, 40) == expected
        assert engine.stats["load_errors"] > 0


def test_store_that_dies(folder: Path, expected: list[list[int]]) -> None:
    connector = ["host://?capacity=64MiB", "faulty://?timeout_s=0.5"]
    with open_engine(folder, connector) as engine:
        engine.generate(PROMPTS, 40)
    for fault in ({"read"}, {"contains", "read", "write"}):
        with open_engine(folder, connector) as engine:
            Faults.store = fault
            assert engine.generate(PROMPTS, 40) == expected
            Faults.store = set()


def test_store_that_hangs(folder: Path, expected: list[list[int]]) -> None:
    connector = ["host://?capacity=64MiB", "faulty://?timeout_s=0.5"]
    with open_engine(folder, connector) as engine:
        engine.generate(PROMPTS, 40)
    with open_engine(folder, connector) as engine:
        Faults.gate.clear()
        assert engine.generate(PROMPTS, 40) == expected
        Faults.gate.set()


def test_prompt_logprobs_are_computed(folder: Path, expected: list[list[int]]) -> None:
    with open_engine(folder, "host://?capacity=64MiB") as engine:
        engine.generate(PROMPTS, 8)
        engine.forget_device()
        assert engine.generate(PROMPTS, 8, prompt_logprobs=1) == [tokens[:8] for tokens in expected]
        assert engine.cached == [0, 0, 0]


def test_adapters(folder: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    one, other = (save_adapter(tmp_path / name, seed) for name, seed in (("one", 1), ("other", 2)))
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    adapters = [None, LoRARequest("one", 1, str(one)), LoRARequest("other", 2, str(other))]
    with open_engine(folder, **options) as engine:
        expected = [engine.generate(PROMPTS, 12, lora_request=adapter) for adapter in adapters]
    assert len({str(tokens) for tokens in expected}) == 3
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    for loaded in ([0, 0, 0], LOADED):
        with open_engine(folder, connector, **options) as engine:
            for adapter, tokens in zip(adapters, expected, strict=True):
                assert engine.generate(PROMPTS, 12, lora_request=adapter) == tokens
                assert engine.cached == loaded


def test_a_cache_written_by_the_reference_engine(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    """Keys are ours and the axes are known: what transformers computed, vLLM loads."""
    store = f"disk://{tmp_path}/kv"
    with kvconnect.LLM(str(folder), store, block_size=BLOCK_SIZE) as llm:
        found = llm.generate(PROMPTS, kvconnect.SamplingParams(max_tokens=40, ignore_eos=True))
    assert [output.token_ids for output in found] == expected
    with open_engine(folder, store) as engine:
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.cached == LOADED


def test_a_cache_written_by_vllm(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    store = f"disk://{tmp_path}/kv"
    with open_engine(folder, store, block_size=64) as engine:  # the packing of a larger block is the same
        assert engine.generate(PROMPTS, 40) == expected
    with kvconnect.LLM(str(folder), store, block_size=64) as llm:
        found = llm.generate(PROMPTS, kvconnect.SamplingParams(max_tokens=40, ignore_eos=True))
    assert [output.token_ids for output in found] == expected
    assert [output.loaded_tokens for output in found] == [64, 192, 256]


def test_beside_another_connector(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    children = [
        {
            "kv_connector": "KVConnect",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connector": "host://?capacity=64MiB"},
        },
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    ]
    config = transfer_config(None)
    config.kv_connector = "MultiConnector"
    config.kv_connector_extra_config = {"connectors": children}
    with open_engine(folder, kv_transfer_config=config, disable_hybrid_kv_cache_manager=True) as engine:
        assert engine.generate(PROMPTS, 40) == expected
        engine.forget_device()
        assert engine.generate(PROMPTS, 40) == expected
        assert engine.cached == LOADED
