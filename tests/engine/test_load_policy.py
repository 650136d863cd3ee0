"""``load_policy=cost`` leaves in a store what is faster to compute; ``always`` loads it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from kvconnect import LLM, SamplingParams
from kvconnect.engine.runner import ModelRunner
from kvconnect.errors import ConfigError
from tests.conftest import Reference, make_model
from tests.engine.test_connectors import run, use_store
from tests.store.stores import DictStore, dict_store

assert use_store  # a fixture

PARAMS = SamplingParams(max_tokens=2)
PROMPT = [(7 * i) % 300 for i in range(401)]  # fifty blocks of eight tokens
OTHER = [(11 * i) % 300 for i in range(401)]


def slow_reads(self: Any, keys: Any, buffers: Any) -> Any:
    time.sleep(0.02 * len(keys))
    return DictStore.read(self, keys, buffers)


@pytest.mark.parametrize("async_load", [False, True])
@pytest.mark.parametrize(
    ("policy", "throttled", "step_s", "loads"),
    [
        ("cost", True, 0.1, False),  # 50 blocks take 1 s, 401 tokens two steps
        ("always", True, 0.1, True),
        ("cost", False, 0.3, True),
    ],
)
def test_policy_decides_by_measured_rates(
    use_store: Any,
    monkeypatch: pytest.MonkeyPatch,
    references: dict[str, Reference],
    async_load: bool,
    policy: str,
    throttled: bool,
    step_s: float,
    loads: bool,
) -> None:
    healthy = dict_store()
    run(make_model("llama"), use_store(healthy), [PROMPT])
    forward = ModelRunner.forward

    def slowly(self: Any, batch: Any, sampled: Any) -> torch.Tensor:
        time.sleep(step_s)
        return forward(self, batch, sampled)

    monkeypatch.setattr(ModelRunner, "forward", slowly)
    store = dict_store(**({"read": slow_reads} if throttled else {}), frames=dict(healthy.frames))
    connector = [f"host://?capacity=16MiB&load_policy={policy}", use_store(store).replace("0.2", "5")]
    with LLM(make_model("llama"), connector, block_size=8, max_batch_tokens=256, async_load=async_load) as llm:
        llm.generate([OTHER], PARAMS)  # so that it is known what computing takes
        (output,) = llm.generate([PROMPT], PARAMS)
        stats = llm.get_stats()["leader"]
    assert output.token_ids == references["llama"](PROMPT, 2)
    measured = stats["load_cost"]
    assert stats["load_policy"] == policy
    # no less than what was slept; a machine that is busy adds to it
    assert 0.5 * step_s / 256 <= measured["compute_s_per_token"] <= 5 * step_s / 256
    if throttled:
        assert 0.01 <= measured["stores"][0]["read_s_per_block"] <= 0.1
    if loads:
        assert output.loaded_tokens == 400
        assert measured["loads_refused"] == 0
    else:
        assert output.loaded_tokens <= 32 * 8  # what the probe brought
        assert measured["loads_refused"] == 1
    if policy == "cost":
        decision = measured["last_decision"]
        assert decision["loaded"] is loads
        assert (decision["load_s"] <= decision["compute_s"]) is loads


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="load_policy"):
        LLM(make_model("llama"), "host://?load_policy=sometimes")
