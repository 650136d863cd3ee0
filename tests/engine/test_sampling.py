"""Sampling, stop conditions, streaming, arrivals and aborts at any step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kvconnect import LLM, SamplingParams
from kvconnect.engine.sampling import choose_token, draw
from kvconnect.errors import ConfigError
from tests.conftest import Reference, make_model
from tests.engine.test_generate import check_pages, prompts

SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=7)


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = torch.tensor([choose_token(logits, 0.5, 1.0, draw(3, position)) for position in range(20_000)])
    found = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(found, torch.softmax(logits / 0.5, 0), atol=0.01)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))

    def chosen(top_p: float) -> set[int]:
        return {choose_token(logits, 1.0, top_p, draw(3, position)) for position in range(500)}

    assert chosen(0.5) == {1}
    assert chosen(0.6) == {1, 3}
    assert chosen(1.0) == {0, 1, 2, 3}


def test_seeded_output_does_not_depend_on_the_batch_or_on_preemption() -> None:
    model = make_model("llama")
    batch = prompts(31, count=6, longest=90)
    page = 2 * 2 * 2 * 16 * 4 * 8
    with LLM(model, block_size=8) as llm:
        alone = [llm.generate([prompt], SAMPLED)[0].token_ids for prompt in batch]
        together = [output.token_ids for output in llm.generate(batch, SAMPLED)]
        other = llm.generate(batch, SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=8))
    with LLM(model, block_size=8, kv_cache_bytes=page * 26, max_batch_tokens=64) as llm:
        squeezed = [output.token_ids for output in llm.generate(batch, SAMPLED)]
    assert alone == together == squeezed
    assert [output.token_ids for output in other] != alone


def test_stop_token_ends_the_output_with_itself(references: dict[str, Reference]) -> None:
    prompt = prompts(32, count=1)[0]
    expected = references["llama"](prompt, 10)
    with LLM(make_model("llama")) as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=10, stop_token_ids=(expected[4],)))
    assert output.token_ids == expected[: expected.index(expected[4]) + 1]
    assert output.finish_reason == "stop"


def test_stop_text_cuts_the_output_before_it() -> None:
    prompt = "a prompt of some words"
    with LLM() as llm:
        (whole,) = llm.generate([prompt], SamplingParams(max_tokens=10))
        assert whole.finish_reason == "length"
        place = next(i for i, char in enumerate(whole.text) if char != "\ufffd" and i > 1)
        (cut,) = llm.generate([prompt], SamplingParams(max_tokens=10, stop=("never there", whole.text[place])))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(whole.text[place])]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_stream_yields_what_generate_returns(references: dict[str, Reference]) -> None:
    prompt = prompts(33, count=1)[0]
    with LLM(make_model("llama")) as llm:
        outputs = list(llm.stream(prompt, SamplingParams(max_tokens=6)))
        assert [output.token_id for output in outputs] == references["llama"](prompt, 6)
        assert [output.finished is not None for output in outputs] == [False] * 5 + [True]
        assert outputs[-1].finished is not None
        assert outputs[-1].finished.token_ids == references["llama"](prompt, 6)
        check_pages(llm)


def test_leaving_a_stream_early_frees_its_pages() -> None:
    with LLM(make_model("llama")) as llm:
        for output in llm.stream(prompts(34, count=1)[0], SamplingParams(max_tokens=50)):
            assert output.finished is None
            break
        check_pages(llm)
        assert not llm._core.scheduler.has_requests


@pytest.mark.parametrize("connector", [None, "host://?capacity=64MiB"])
@pytest.mark.parametrize("seed", range(4))
def test_requests_come_and_go_at_any_step(references: dict[str, Reference], connector: Any, seed: int) -> None:
    rng = random.Random(seed)
    batch = prompts(35 + seed, count=10)
    params = SamplingParams(max_tokens=6)
    waiting = list(range(10))
    running: dict[str, int] = {}
    finished: dict[int, list[int]] = {}
    page = 2 * 2 * 2 * 16 * 4 * 8
    with LLM(
        make_model("llama"), connector, block_size=8, max_batch_tokens=48, max_num_seqs=4, kv_cache_bytes=page * 40
    ) as llm:
        while waiting or running:
            if waiting and rng.random() < 0.3:
                number = waiting.pop()
                running[llm.add_request(batch[number], params)] = number
            if running and rng.random() < 0.1:
                request_id = rng.choice(list(running))
                number = running.pop(request_id)
                aborted = llm.abort(request_id)
                assert aborted is not None
                assert aborted.finish_reason == "aborted"
                assert aborted.token_ids == references["llama"](batch[number], 6)[: len(aborted.token_ids)]
                assert llm.abort(request_id) is None
            for output in llm.step():
                if output.finished is not None:
                    finished[running.pop(output.request_id)] = output.finished.token_ids
        for number, tokens in finished.items():
            assert tokens == references["llama"](batch[number], 6)
        assert len(finished) > 3
        check_pages(llm)


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"stop": ("",)}]
)
def test_parameters_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**fields)
