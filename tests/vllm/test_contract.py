"""vLLM, through our adapter, keeps the engine's side of the contract: its real scheduler, and a whole real engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvconnect.errors import UnsupportedError
from kvconnect.testing.engine import EngineTests
from kvconnect.testing.engines import EngineSetting, EngineUnderTest
from tests.vllm.engines import BLOCK_SIZE, open_engine
from tests.vllm.models import VOCABULARY
from tests.vllm.stepping import SIZE, SteppedEngine, expected

_numbers = itertools.count()


class SteppedVllm(EngineUnderTest):
    """vLLM's scheduler with the adapter's halves, and no model: what comes out is right if every byte read was."""

    block_size: ClassVar[int] = SIZE
    vocabulary: ClassVar[int] = VOCABULARY - 1
    window: ClassVar[int] = 70
    checkpoint: ClassVar[Path]

    def __init__(self, connector: Any, setting: EngineSetting, folder: Path) -> None:
        self._engine = SteppedEngine(
            self.checkpoint,
            connector,
            shape=setting.shape,
            num_ranks=setting.num_ranks,
            num_blocks=setting.num_blocks * (2 if setting.shape == "mixed" else 1) + 1,  # one is the null block
            max_batch_tokens=setting.batch_blocks * SIZE,
            async_scheduling=setting.async_scheduling,
        )
        self._closed = False

    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        return self._engine.add(prompt, max_tokens)

    def abort(self, name: str) -> None:
        self._engine.abort(name)

    def step(self) -> None:
        self._engine.step()

    def output(self, name: str) -> list[int] | None:
        return self._engine.outputs[name] if name in self._engine.finished else None

    def is_idle(self) -> bool:
        return not self._engine._in_flight and not self._engine.scheduler.has_requests()

    def forget(self) -> None:
        self._engine.scheduler.reset_prefix_cache()

    def expected(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        return expected(prompt, max_tokens)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.close()


class WholeVllm(EngineUnderTest):
    """A real engine over a tiny Llama, with its core in this process; what must come out is what transformers says."""

    block_size: ClassVar[int] = BLOCK_SIZE
    vocabulary: ClassVar[int] = VOCABULARY - 1
    checkpoint: ClassVar[Path]
    _model: ClassVar[Any] = None

    def __init__(self, connector: Any, setting: EngineSetting, folder: Path) -> None:
        if setting.num_ranks > 1 or setting.shape != "full":
            raise UnsupportedError("one rank and full attention are enough for a whole engine")
        self._setting = setting
        self._connector = connector
        self._open()
        self._outputs: dict[str, list[int]] = {}
        self._closed = False

    def _open(self) -> None:
        self._context = open_engine(
            self.checkpoint,
            self._connector,
            num_gpu_blocks_override=self._setting.num_blocks + 1,
            max_model_len=min(1024, self._setting.num_blocks * BLOCK_SIZE),
            max_num_batched_tokens=max(self._setting.batch_blocks * BLOCK_SIZE, 64),
            async_scheduling=self._setting.async_scheduling,
        )
        self._engine: Any = self._context.__enter__()
        self._core = self._engine.llm.llm_engine

    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        name = f"w{next(_numbers)}"
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._core.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        return name

    def abort(self, name: str) -> None:
        self._core.abort_request([name])

    def step(self) -> None:
        for output in self._core.step():
            if output.finished:
                self._outputs[output.request_id] = list(output.outputs[0].token_ids)

    def output(self, name: str) -> list[int] | None:
        return self._outputs.get(name)

    def is_idle(self) -> bool:
        core = self._core.engine_core.engine_core
        return not self._engine.scheduler.has_requests() and not core.batch_queue

    def forget(self) -> None:
        self._engine.scheduler.reset_prefix_cache()

    def expected(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        import torch
        from transformers import AutoModelForCausalLM

        kind = type(self)
        if kind._model is None:
            model: Any = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
            kind._model = model.eval()
        ids = torch.tensor([list(prompt)])
        made = kind._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
        )
        tokens: list[int] = made[0, len(prompt) :].tolist()
        return tokens

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._context.__exit__(None, None, None)


# what it finds out about a model's class, in a process of its own, the first time that a machine sees it
REGISTRY = ("vllm.model_executor.models.registry",)


class TestScheduler(EngineTests):
    may_unpickle = REGISTRY

    @pytest.fixture
    def engine(self, folder: Path) -> type[EngineUnderTest]:
        SteppedVllm.checkpoint = folder
        return SteppedVllm

    @pytest.fixture
    def patience_s(self) -> float:
        return 15.0


class TestEngine(EngineTests):
    """Whatever raises or answers rubbish is tried on the scheduler above; here is the runner, with its layers."""

    may_unpickle = REGISTRY
    test_connector_that_raises_costs_no_answer = None
    test_rubbish_answers_are_no_match = None

    @pytest.fixture
    def engine(self, folder: Path) -> type[EngineUnderTest]:
        WholeVllm.checkpoint = folder
        return WholeVllm

    @pytest.fixture
    def quick(self) -> bool:
        return True
