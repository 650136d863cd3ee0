"""The embedded default model: a tiny Llama with random weights and a byte-level tokenizer. Needs no download.

`initializer_range` is ten times the usual: with the usual one, attention is so flat that wrong KV would not change the
output, and no comparison would mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["ByteTokenizer", "tiny_model"]

_SEED = 20261122


class ByteTokenizer:
    """Tokens are UTF-8 bytes; called like a transformers tokenizer.

    Not ByT5Tokenizer: that raises on ids above its own vocabulary, and random weights of a larger model give such ids.
    """

    VOCAB_SIZE = 256

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Encode `text`; there are no special tokens to add."""
        return {"input_ids": list(text.encode("utf-8"))}

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode `tokens`; what is no byte, or no UTF-8, becomes the replacement character."""
        return b"".join(bytes([t]) if t < self.VOCAB_SIZE else b"\xff" for t in tokens).decode("utf-8", "replace")


def tiny_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return the model in `dtype`: the same weights in every process with the same torch."""
    config = LlamaConfig(
        vocab_size=ByteTokenizer.VOCAB_SIZE,
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
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(_SEED)
    try:
        model: Any = LlamaForCausalLM(config)  # Any: transformers types `to` as taking a model
        return model.to(dtype)
    finally:
        torch.random.set_rng_state(state)
