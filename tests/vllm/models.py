"""Small random checkpoints that vLLM serves on a CPU; wrong KV changes what they say (`initializer_range=0.2`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "save_adapter", "save_gemma3", "save_gemma3n", "save_llama"]

VOCABULARY = 512

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "bos_token_id": None,
}


def save_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a Llama with full attention."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "num_hidden_layers": 4, **changes})).save_pretrained(folder)
    return _with_tokenizer(folder)


def save_gemma3(folder: Path) -> Path:
    """Save a Gemma3 of five layers with a sliding window of 96 tokens, and one with full attention."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**{**_SHAPE, "num_hidden_layers": 6, "sliding_window": 96, "query_pre_attn_scalar": 64})
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def save_gemma3n(folder: Path) -> Path:
    """Save a Gemma3n whose last two layers use the cache of layers before them."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **{**_SHAPE, "num_hidden_layers": 6, "sliding_window": 96},
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=2,
        layer_types=["full_attention"] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        laurel_rank=16,
        altup_num_inputs=2,
        pad_token_id=0,
    )
    Gemma3nForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def save_adapter(folder: Path, seed: int) -> Path:
    """Save a LoRA adapter for `save_llama`'s query and value projections."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for name, out in (("q_proj", 256), ("v_proj", 128)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 8, generator=generator) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def _with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder
