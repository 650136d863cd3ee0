"""Asynchronous scheduling: step N+1 is planned and run before the results of step N are taken."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvconnect import LLM, SamplingParams
from kvconnect.leader import OffloadLeader
from kvconnect.leader.request import RequestState
from kvconnect.protocol import Plan, Report, SchedulerOutput
from kvconnect.worker import OffloadWorker
from tests.conftest import FAMILIES, Reference, make_model
from tests.engine.test_connectors import run
from tests.engine.test_generate import check_pages, prompts

PARAMS = SamplingParams(max_tokens=6)
PAGE = 2 * 2 * 2 * 16 * 4 * 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block_size", "max_batch_tokens"), [(16, 2048), (8, 40), (128, 7)])
def test_output_equals_generate(
    references: dict[str, Reference], family: str, block_size: int, max_batch_tokens: int
) -> None:
    batch = prompts(1)
    with LLM(
        make_model(family), block_size=block_size, max_batch_tokens=max_batch_tokens, async_scheduling=True
    ) as llm:
        outputs = llm.generate(batch, PARAMS)
        for prompt, output in zip(batch, outputs, strict=True):
            assert output.token_ids == references[family](prompt, 6)
            assert output.computed_tokens + output.reused_tokens + output.loaded_tokens == len(prompt)
        check_pages(llm)


@pytest.mark.parametrize("async_load", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_engine_loads_what_another_computed(
    tmp_path: Path, references: dict[str, Reference], family: str, async_load: bool
) -> None:
    batch = prompts(5)
    connector = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv"]
    options = {"max_batch_tokens": 40, "async_scheduling": True, "async_load": async_load}
    cold, _ = run(make_model(family), connector, batch, **options)
    warm, stats = run(make_model(family), connector, batch, **options)
    for outputs in (cold, warm):
        assert [output.token_ids for output in outputs] == [references[family](prompt, 6) for prompt in batch]
    found = sum((output.loaded_tokens + output.reused_tokens) // 8 for output in warm)
    assert found >= 0.9 * sum(len(prompt) // 8 for prompt in batch)
    assert stats["workers"][0]["failures"] == {}


def test_stop_tokens_seeds_and_preemption_change_nothing(references: dict[str, Reference]) -> None:
    batch = prompts(31, count=6, longest=90)
    expected = references["llama"](batch[0], 10)
    stopping = SamplingParams(max_tokens=10, stop_token_ids=(expected[4],))
    sampled = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=7)
    results = []
    for options in ({}, {"async_scheduling": True}, {"async_scheduling": True, "kv_cache_bytes": PAGE * 26}):
        with LLM(make_model("llama"), "host://?capacity=1MiB", block_size=8, max_batch_tokens=64, **options) as llm:
            (stopped,) = llm.generate([batch[0]], stopping)
            assert stopped.token_ids == expected[: expected.index(expected[4]) + 1]
            assert stopped.finish_reason == "stop"
            results.append([output.token_ids for output in llm.generate(batch, sampled)])
            assert [output.token_id for output in llm.stream(batch[0], stopping)] == stopped.token_ids
            check_pages(llm)
            preemptions = llm.get_stats()["preemptions"]
    assert preemptions > 0
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("ahead", [False, True])
def test_plan_comes_before_the_reports_of_the_step_before_it(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    order: list[tuple[str, int]] = []
    build, update = OffloadLeader.build_connector_meta, OffloadLeader.update_connector_output

    def build_connector_meta(self: Any, scheduler_output: SchedulerOutput) -> bytes:
        order.append(("plan", scheduler_output.step))
        return build(self, scheduler_output)

    def update_connector_output(self: Any, reports: Sequence[bytes]) -> None:
        order.append(("report", Report.decode(reports[0]).step))
        update(self, reports)

    monkeypatch.setattr(OffloadLeader, "build_connector_meta", build_connector_meta)
    monkeypatch.setattr(OffloadLeader, "update_connector_output", update_connector_output)
    with LLM(make_model("llama"), "host://?capacity=1MiB", async_scheduling=ahead) as llm:
        llm.generate([list(range(20))], SamplingParams(max_tokens=4))
    steps = [("plan", 0)]
    for step in range(3):
        after, report = ("plan", step + 1), ("report", step)
        steps += [after, report] if ahead else [report, after]
    assert order[: len(steps)] == steps


def test_blocks_whose_last_token_was_not_known_are_saved_when_it_is(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference], tmp_path: Path
) -> None:
    """With planning ahead a decoded block is computed before it can be named; the last one after the request ended."""
    plans: list[Plan] = []
    bind = OffloadWorker.bind_connector_meta

    def bind_connector_meta(self: Any, meta: bytes) -> None:
        plans.append(Plan.decode(meta))
        bind(self, meta)

    monkeypatch.setattr(OffloadWorker, "bind_connector_meta", bind_connector_meta)
    prompt = list(range(3))
    connector = ["host://?capacity=1MiB", f"disk://{tmp_path}/kv"]
    tokens = references["llama"](prompt, 14)
    with LLM(make_model("llama"), connector, block_size=8, async_scheduling=True) as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=14))
        assert output.token_ids == tokens
        llm.close()
        check_pages(llm)
        stats = llm.get_stats()
    # 3 + 14 tokens, the last one never computed: two full blocks, both of which end with a token that was decoded
    assert [len(plan.saves) for plan in plans if len(plan.saves)] == [1, 1]
    assert stats["leader"]["committed_blocks"] == stats["leader"]["demoted_blocks"] == 2
    assert stats["lost_saves"] == 0
    named = [plan.saved for plan in plans if plan.saved]
    assert named
    assert len(plans[-1].saved) == 0
    with LLM(make_model("llama"), connector, block_size=8) as llm:
        (again,) = llm.generate([prompt + tokens], SamplingParams(max_tokens=1))
        assert again.loaded_tokens == 16
        assert again.token_ids == references["llama"](prompt + tokens, 1)


@pytest.mark.parametrize("commit_rule", [True, False])
def test_nothing_computed_on_a_load_that_failed_is_ever_matched(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference], commit_rule: bool
) -> None:
    """A block fails its check while the next step is planned already; that step computes and saves on garbage.

    Without the commit rule (simulated: a failed load voids nothing) the same run matches that garbage, so the check
    that finds none with the rule can fail.
    """
    stem = list(range(100, 148))  # six blocks
    prompt = [*stem, *range(200, 240)]  # five more, computed in chunks of two blocks behind those that are loaded
    expected = references["llama"](prompt, 6)
    fails = False
    load = OffloadWorker._load

    def lose_a_block(self: OffloadWorker, loads: Sequence[Any]) -> None:
        nonlocal fails
        if fails and loads:
            fails = False
            self._held.pop(loads[3].slot)
            # the pages hold plausible KV of other tokens, so that nothing but the report tells
            for region in self._layout.groups[0].regions:  # type: ignore[union-attr]
                for move in loads:
                    region.tensor[move.target] = region.tensor[move.target].new_full((), 0.5)
        load(self, loads)

    monkeypatch.setattr(OffloadWorker, "_load", lose_a_block)
    if not commit_rule:
        never = property(lambda self: -1, lambda self, value: None)
        monkeypatch.setattr(RequestState, "void_until", never)
        monkeypatch.setattr("kvconnect.leader.ledger.OpenStep.fail", lambda self, request_id, ordinals: None)
    options: dict[str, Any] = {"block_size": 8, "max_batch_tokens": 16, "async_scheduling": True}
    with LLM(make_model("llama"), "host://?capacity=1MiB", **options) as llm:
        llm.generate([stem], SamplingParams(max_tokens=1))
        llm.reset_prefix_cache()
        fails = True
        (output,) = llm.generate([prompt], PARAMS)
        assert not fails
        assert output.token_ids == expected
        stats = llm.get_stats()
        assert stats["unwritten_kv_seen"] == 0
        assert stats["workers"][0]["load_errors"] == 1
        assert stats["leader"]["voided_blocks"] > 0 or not commit_rule
        for length in itertools.count(2):
            llm.reset_prefix_cache()
            (later,) = llm.generate([prompt[: length * 8 + 1]], PARAMS)
            if later.token_ids != references["llama"](prompt[: length * 8 + 1], 6):
                assert not commit_rule
                return
            if length == 10:
                break
        assert later.loaded_tokens == 80  # what was void was saved again
    assert commit_rule, "garbage was saved and nobody could tell: this test proves nothing"


def test_forward_that_raises_leaves_an_engine_that_works(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference]
) -> None:
    from kvconnect.engine.runner import ModelRunner

    batch = prompts(18)
    original = ModelRunner.forward
    steps = iter([False, True, False])

    def forward(self: Any, batch: Any, sampled: Any) -> torch.Tensor:
        if next(steps, False):
            raise KeyboardInterrupt
        return original(self, batch, sampled)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    options: dict[str, Any] = {"block_size": 8, "max_batch_tokens": 64, "async_scheduling": True}
    with LLM(make_model("llama"), "host://?capacity=64MiB", **options) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(batch, PARAMS)
        outputs = llm.generate(batch, PARAMS)
        assert [output.token_ids for output in outputs] == [references["llama"](prompt, 6) for prompt in batch]
        llm.close()
        check_pages(llm)


def test_step_that_stands_on_a_failed_one_commits_nothing(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference]
) -> None:
    """The first chunk's forward pass raises while the second is planned and runs, without a load in either."""
    from kvconnect.engine.runner import ModelRunner

    prompt = list(range(100, 164))
    original = ModelRunner.forward
    fails = iter([True])

    def forward(self: Any, batch: Any, sampled: Any) -> torch.Tensor:
        if next(fails, False):
            raise RuntimeError("out of memory")
        return original(self, batch, sampled)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    options: dict[str, Any] = {"block_size": 8, "max_batch_tokens": 16, "async_scheduling": True}
    with LLM(make_model("llama"), "host://?capacity=1MiB", **options) as llm:
        request_id = llm.add_request(prompt, PARAMS)
        llm.step()
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.step()
        llm.abort(request_id)
        for length in (17, 33, 49, 64):
            llm.reset_prefix_cache()
            (output,) = llm.generate([prompt[:length]], PARAMS)
            assert output.token_ids == references["llama"](prompt[:length], 6)
        assert llm.get_stats()["unwritten_kv_seen"] == 0


def test_error_of_a_step_that_nobody_waits_for_does_not_stop_the_shutdown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvconnect.engine.runner import ModelRunner

    original = ModelRunner.forward
    fails = False

    def forward(self: Any, batch: Any, sampled: Any) -> torch.Tensor:
        if fails:
            raise RuntimeError("boom")
        return original(self, batch, sampled)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    connector = ["host://?capacity=1MiB", f"disk://{tmp_path}/kv"]
    with LLM(make_model("llama"), connector, block_size=8, async_scheduling=True) as llm:
        llm.generate([list(range(40))], SamplingParams(max_tokens=1))
        llm.add_request(list(range(50, 90)), PARAMS)
        fails = True
        llm.step()
    stats = llm.get_stats()["leader"]
    assert stats["demoted_blocks"] == stats["committed_blocks"] == 5


@pytest.mark.parametrize("hook", ["wait_for_save", "save_kv_layer"])
def test_worker_that_keeps_failing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    fails = False

    if hook == "wait_for_save":

        def wait_for_save(self: Any) -> None:
            if fails:
                raise ValueError("always")

        monkeypatch.setattr(OffloadWorker, hook, wait_for_save)
    else:

        def save_kv_layer(self: Any, layer: int) -> None:
            if fails:
                raise ValueError("always")

        monkeypatch.setattr(OffloadWorker, hook, save_kv_layer)
    with LLM(make_model("llama"), "host://?capacity=1MiB", block_size=8, async_scheduling=True) as llm:
        fails = True
        for round_number in range(4):
            llm.generate([[round_number, *range(6)]], SamplingParams(max_tokens=12))
        leader = llm._leader._hooks["get_stats"].__self__  # type: ignore[union-attr]
        assert len(leader._saves.ended) <= 1
        for _ in range(4):
            llm.step()
        assert not llm._core.has_connector_work
        check_pages(llm)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_a_token_takes_is_measured_with_either_scheduling(
    monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    """Prefill and decode alternate: a step's time must not be taken for that of the step after it."""
    from kvconnect.engine.runner import ModelRunner

    original = ModelRunner.forward

    def forward(self: Any, batch: Any, sampled: Any) -> torch.Tensor:
        time.sleep(0.001 * sum(part.num_tokens for part in batch.parts))
        return original(self, batch, sampled)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    with LLM(make_model("llama"), "host://?capacity=4MiB", block_size=8, async_scheduling=async_scheduling) as llm:
        for number in range(3):
            llm.generate([[(number + 7 * i) % 300 for i in range(200)]], SamplingParams(max_tokens=3))
        leader = llm._leader._hooks["get_stats"].__self__  # type: ignore[union-attr]
        assert leader._cost._steps.seconds(200) == pytest.approx(0.2, rel=0.5)
