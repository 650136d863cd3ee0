"""The engine against `model.generate()`: whatever the batch, the chunks, the pages, the same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvconnect import LLM, SamplingParams
from kvconnect.errors import Closed, ConfigError, UnsupportedError
from tests.conftest import FAMILIES, Reference, make_model

PARAMS = SamplingParams(max_tokens=6)


def prompts(seed: int, count: int = 5, longest: int = 150) -> list[list[int]]:
    """Return prompts of which some share a prefix."""
    rng = random.Random(seed)
    common = [rng.randrange(300) for _ in range(70)]
    made = []
    for number in range(count):
        tail = [rng.randrange(300) for _ in range(rng.randrange(1, longest - 70))]
        made.append((common if number % 2 else []) + tail)
    return made


def check_pages(llm: LLM) -> None:
    for pool in llm._core.cache.pools:
        pool.check_integrity()
        assert pool.num_held == 0, "a finished request keeps pages"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block_size", "max_batch_tokens"), [(16, 2048), (8, 40), (32, 7)])
def test_output_equals_generate(
    references: dict[str, Reference], family: str, block_size: int, max_batch_tokens: int
) -> None:
    with LLM(make_model(family), block_size=block_size, max_batch_tokens=max_batch_tokens) as llm:
        batch = prompts(1)
        outputs = llm.generate(batch, PARAMS)
        for prompt, output in zip(batch, outputs, strict=True):
            assert output.token_ids == references[family](prompt, 6)
            assert output.prompt_tokens == len(prompt)
            assert output.computed_tokens + output.reused_tokens + output.loaded_tokens == len(prompt)
            assert output.ttft_s > 0
        check_pages(llm)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_run_reuses_pages_and_says_the_same(references: dict[str, Reference], family: str) -> None:
    with LLM(make_model(family), block_size=8) as llm:
        (prompt,) = prompts(2, count=1)
        prompt = prompt * 3
        first = llm.generate([prompt], PARAMS)[0]
        second = llm.generate([prompt], PARAMS)[0]
        assert first.token_ids == second.token_ids == references[family](prompt, 6)
        assert first.reused_tokens == 0
        assert second.reused_tokens == (len(prompt) - 1) // 8 * 8
        check_pages(llm)


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_requests_say_the_same(references: dict[str, Reference], family: str) -> None:
    model = make_model(family)
    per_page = 2 * model.config.num_hidden_layers * 2 * 16 * 4 * 8
    batch = prompts(3, count=6, longest=90)
    with LLM(model, block_size=8, kv_cache_bytes=per_page * 26, max_batch_tokens=64) as llm:
        outputs = llm.generate(batch, SamplingParams(max_tokens=40))
        assert llm.get_stats()["preemptions"] > 0
        for prompt, output in zip(batch, outputs, strict=True):
            assert output.token_ids == references[family](prompt, 40)
        check_pages(llm)


def test_salts_do_not_share_pages(llama: Any) -> None:
    prompt = list(range(1, 60))
    with LLM(llama) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1, cache_salt="a"))
        (other,) = llm.generate([prompt], SamplingParams(max_tokens=1, cache_salt="b"))
        (same,) = llm.generate([prompt], SamplingParams(max_tokens=1, cache_salt="a"))
    assert (other.reused_tokens, same.reused_tokens) == (0, 48)


def test_bfloat16_runs_and_repeats_itself(llama: Any) -> None:
    prompt = list(range(1, 60))
    with LLM(make_model("llama"), dtype="bfloat16") as llm:
        first = llm.generate([prompt], PARAMS)[0]
        assert llm.generate([prompt], PARAMS)[0].reused_tokens == 58  # three blocks, and a part of the next
    assert len(first.token_ids) == 6


def test_checkpoint_folder_is_loaded(checkpoints: Callable[[str], Path], references: dict[str, Reference]) -> None:
    with LLM(checkpoints("qwen3")) as llm:
        prompt = list(b"a text that the byte tokenizer makes into tokens")
        (output,) = llm.generate(["a text that the byte tokenizer makes into tokens"], PARAMS)
    assert output.token_ids == references["qwen3"](prompt, 6)


def test_end_of_sequence_ends_unless_ignored(references: dict[str, Reference]) -> None:
    prompt = prompts(4, count=1)[0]
    expected = references["llama"](prompt, 12)
    model = make_model("llama")
    model.generation_config.eos_token_id = expected[3]
    end = expected.index(expected[3]) + 1
    with LLM(model) as llm:
        assert llm.generate([prompt], SamplingParams(max_tokens=12))[0].token_ids == expected[:end]
        ignoring = SamplingParams(max_tokens=12, ignore_eos=True)
        assert llm.generate([prompt], ignoring)[0].token_ids == expected


def test_fresh_pages_hold_nan_until_they_are_written(llama: Any) -> None:
    """So that KV that nobody wrote would be seen: it makes every logit NaN, and the engine stops."""
    with LLM(llama, block_size=8) as llm:
        llm.generate([list(range(20))], SamplingParams(max_tokens=1))
        request = llm._new_request(list(range(20)), SamplingParams(max_tokens=1))
        llm._core.scheduler.add(request)
        request.chain.hashes[0] = next(iter(llm._core.cache.pools[0]._page_of))
        for layer in llm._core.cache.layers:
            layer.key.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="nobody wrote"):
            llm.step()


@pytest.mark.parametrize(
    ("prompt", "params", "why"),
    [
        ([], PARAMS, "at least one token"),
        ([300], PARAMS, r"must lie in \[0, 300\)"),
        ([-1], PARAMS, "must lie in"),
        ([1] * 10_000, PARAMS, "more than the"),
        ([1.5], PARAMS, "a text or a list of token ids"),
        (7, PARAMS, "a text or a list of token ids"),
    ],
)
def test_prompt_that_cannot_run_is_refused(llama: Any, prompt: list[int], params: SamplingParams, why: str) -> None:
    with LLM(llama, kv_cache_bytes="1MiB") as llm, pytest.raises(ConfigError, match=why):
        llm.generate([prompt], params)


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ({"block_size": 0}, ConfigError, "at least 1"),
        ({"num_ranks": 3}, ConfigError, "2 KV heads cannot be shared among 3 ranks"),
        ({"num_ranks": 0}, ConfigError, "num_ranks"),
        ({"dtype": "float16"}, ConfigError, "unknown dtype"),
        ({"kv_cache_bytes": 10}, ConfigError, "does not hold one block"),
        ({"kv_cache_bytes": "900TiB"}, ConfigError, "cannot be had"),
        ({"model": "/nowhere"}, ConfigError, "no config.json"),
        ({"connector": "dsik:///x"}, LookupError, "did you mean 'disk'"),
        ({"connector": "disk:///proc/kvconnect"}, ConfigError, "disk store cannot use"),
        ({"connector": "host://?capacity=1KiB"}, ConfigError, "smaller than one block"),
        ({"connector": "host://?capacity=900TiB"}, ConfigError, "memory that are free"),
    ],
)
def test_engine_that_cannot_work_says_why(
    llama: Any, arguments: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        LLM(**{"model": llama, **arguments})


def test_model_that_breaks_the_prefix_law_is_refused_by_name() -> None:
    model = make_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedError, match="dynamic"):
        LLM(model)


def test_closed_engine_says_so(llama: Any) -> None:
    llm = LLM(llama)
    llm.close()
    llm.close()
    with pytest.raises(Closed):
        llm.generate([[1]])


def test_max_tokens_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize("config", ["{}", "{torn", '{"model_type": "llama"}'])
def test_folder_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        LLM(tmp_path)
