"""The reference engine as `EngineTests` sees it: a real model, `LLM`, and `generate()` for what must come out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from kvconnect.engine import LLM, SamplingParams
from kvconnect.errors import ConfigError
from kvconnect.testing.engines import EngineSetting, EngineUnderTest

__all__ = ["ReferenceEngine"]

_WINDOW = 10
_SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # with the usual 0.02 wrong KV would not change the output
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_models: dict[str, Any] = {}


class ReferenceEngine(EngineUnderTest):
    """`kvconnect.LLM` over tiny models with random weights: Llama, Mistral (window), Gemma3 (both)."""

    block_size: ClassVar[int] = 4
    window: ClassVar[int] = _WINDOW

    def __init__(self, connector: Any, setting: EngineSetting, folder: Path) -> None:
        """Start it."""
        self._model = model = _model(setting.shape)
        config = model.config.get_text_config()
        bytes_per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
        self.llm = LLM(
            copy.deepcopy(model),  # it gets another attention function, and the oracle must not
            connector,
            block_size=self.block_size,
            kv_cache_bytes=setting.num_blocks * self.block_size * bytes_per_token,
            max_batch_tokens=setting.batch_blocks * self.block_size,
            max_num_seqs=8,
            num_ranks=setting.num_ranks,
            async_load=setting.async_load,
            async_scheduling=setting.async_scheduling,
            model_id="conformance",
        )
        self._outputs: dict[str, list[int]] = {}

    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Queue a prompt."""
        return self.llm.add_request(list(prompt), SamplingParams(max_tokens=max_tokens))

    def abort(self, name: str) -> None:
        """End a request."""
        self.llm.abort(name)

    def step(self) -> None:
        """Run a step."""
        for output in self.llm.step():
            if output.finished is not None:
                self._outputs[output.request_id] = list(output.finished.token_ids)

    def output(self, name: str) -> list[int] | None:
        """Return a finished request's tokens."""
        return self._outputs.get(name)

    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        core = self.llm._core
        return not core.scheduler.has_requests and not core.has_connector_work

    def forget(self) -> None:
        """Forget full pages on the device."""
        self.llm.reset_prefix_cache()

    def expected(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Ask transformers."""
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            made = self._model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        tokens: list[int] = made[0, len(prompt) :].tolist()
        return tokens

    def close(self) -> None:
        """Shut it down."""
        self.llm.close()


def _model(shape: str) -> Any:
    """Return a tiny model, the same one each time."""
    import transformers as tf

    if shape in _models:
        return _models[shape]
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    model: Any
    if shape == "full":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SHAPE))
    elif shape == "window":
        model = tf.MistralForCausalLM(tf.MistralConfig(**_SHAPE, sliding_window=_WINDOW))
    elif shape == "mixed":
        changes = {"num_hidden_layers": 4, "sliding_window": _WINDOW, "sliding_window_pattern": 2}
        model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**(_SHAPE | changes)))
    else:
        raise ConfigError(f"no model of shape {shape!r}")
    torch.random.set_rng_state(state)
    _models[shape] = model.eval()
    return model
