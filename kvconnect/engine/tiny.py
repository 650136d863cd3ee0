"""The embedded default model: a tiny Llama with random weights and a byte-level tokenizer. Needs no download.

`initializer_range` is ten times the usual: with the usual one, attention is so flat that wrong KV would not change the
output, and no comparison would mean anything.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["tiny_model", "tiny_tokenizer"]

_SEED = 20261122


def tiny_tokenizer() -> Any:
    """Return a tokenizer whose tokens are UTF-8 bytes."""
    return ByT5Tokenizer(extra_ids=0)


def tiny_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return the model in `dtype`: the same weights in every process with the same torch."""
    config = LlamaConfig(
        vocab_size=259,  # 256 bytes and the tokenizer's three special tokens
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1 << 20,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(_SEED)
    try:
        model: Any = LlamaForCausalLM(config)  # Any: transformers types `to` as taking a model
        return model.to(dtype)
    finally:
        torch.random.set_rng_state(state)
