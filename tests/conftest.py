"""Fixtures: small real models, checkpoint folders, and an oracle for tokens that is not ours (`model.generate`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs on two processes; more threads would only fight

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "kvconnect", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("kvconnect")

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # with the usual 0.02 wrong KV would not change the output
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILIES = ("llama", "qwen3", "mistral", "gemma3")


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Make a tiny model with random weights, the same for the same seed."""
    import transformers as tf

    shape: dict[str, Any] = {**SHAPE, **changes}
    torch.manual_seed(seed)
    model: Any
    if family == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape))
    elif family == "qwen3":
        model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**shape))
    elif family == "mistral":
        model = tf.MistralForCausalLM(tf.MistralConfig(**shape, sliding_window=40))
    else:
        shape["num_hidden_layers"] = 4
        shape |= {"sliding_window": 24, "sliding_window_pattern": 2}
        config = tf.Gemma3TextConfig(**shape)
        model = tf.Gemma3ForCausalLM(config)
    model.eval()
    return model


class Reference:
    """A model run by transformers alone, and what it says prompts should continue with."""

    def __init__(self, family: str) -> None:
        self.model = make_model(family)
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def __call__(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            ids = torch.tensor([list(prompt)])
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
            self._known[key] = output[0, len(prompt) :].tolist()
        return self._known[key]


@pytest.fixture(scope="session")
def references() -> dict[str, Reference]:
    """One reference a family; the models under test are made anew, with the same weights."""
    return {family: Reference(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama() -> Any:
    """A tiny Llama for engines; `references["llama"]` has the same weights."""
    return make_model("llama")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a saved checkpoint folder of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(made[family])
        return made[family]

    return folder
