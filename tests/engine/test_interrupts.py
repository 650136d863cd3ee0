"""An interrupt at any hook of any step: the engine goes on, and what it answers later is right."""

from __future__ import annotations

from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.driver import WorkerDriver, _Driver
from tests.conftest import Reference, make_model
from tests.engine.test_generate import check_pages

PARAMS = SamplingParams(max_tokens=9)
PROMPTS = [list(range(100, 125)), [*range(100, 118), *[7] * 9], [5, 6, 7]]
PAGE = 2 * 2 * 2 * 16 * 4 * 8
HOOKS = [
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_reset",
    "bind_connector_meta",
    "start_load_kv",
    "wait_for_save",
    "get_finished",
    "build_worker_report",
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_interrupt_in_a_hook_costs_no_token(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, Reference], async_scheduling: bool, hook: str, when: str
) -> None:
    expected = [references["llama"](prompt, 9) for prompt in PROMPTS]
    state = {"left": -1}

    def interrupting(original: Any) -> Any:
        def call(self: Any, name: str, *args: Any) -> Any:
            hit = name == hook and state["left"] >= 0
            state["left"] -= hit
            if hit and state["left"] < 0 and when == "before":
                raise KeyboardInterrupt
            result = original(self, name, *args)
            if hit and state["left"] < 0:
                raise KeyboardInterrupt
            return result

        return call

    monkeypatch.setattr(_Driver, "_call", interrupting(_Driver._call))
    monkeypatch.setattr(WorkerDriver, "_step_call", interrupting(WorkerDriver._step_call))
    for number in (0, 4):
        with LLM(
            make_model("llama"),
            "host://?capacity=1MiB",
            block_size=8,
            max_batch_tokens=16,
            kv_cache_bytes=PAGE * 9,  # requests preempt one another
            async_scheduling=async_scheduling,
        ) as llm:
            llm.generate([PROMPTS[0][:17]], SamplingParams(max_tokens=2))
            llm.reset_prefix_cache()
            ids = [llm.add_request(prompt, PARAMS) for prompt in PROMPTS]
            state["left"] = number
            done: dict[str, list[int]] = {}
            for _ in range(300):
                try:
                    for output in llm.step():
                        if output.finished is not None:
                            done[output.request_id] = output.finished.token_ids
                except KeyboardInterrupt:
                    continue
            assert [done[request_id] for request_id in ids] == expected
            state["left"] = -1
            llm.reset_prefix_cache()
            again = llm.generate(PROMPTS, PARAMS)
            assert [output.token_ids for output in again] == expected
            assert llm.get_stats()["unwritten_kv_seen"] == 0
            llm.close()
            check_pages(llm)
