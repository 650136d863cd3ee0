"""Loads a Hugging Face causal language model and says what its KV cache looks like. Knows no pages."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvconnect.engine.attention import PAGED_ATTENTION
from kvconnect.engine.pages import KVGeometry
from kvconnect.engine.tiny import ByteTokenizer, tiny_model
from kvconnect.errors import ConfigError, UnsupportedError
from kvconnect.protocol import Namespace, check_prefix_law, model_identity, rope_settings
from kvconnect.protocol.identity import VOLATILE_SETTINGS

__all__ = ["LoadedModel", "load_model", "load_tokenizer"]


class LoadedModel(NamedTuple):
    """A model, ready to run through paged attention."""

    model: Any
    tokenizer: Any
    geometry: KVGeometry
    namespace: Namespace


def load_model(
    model: str | os.PathLike[str] | torch.nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    model_id: str | None = None,
) -> LoadedModel:
    """Load a checkpoint folder, take a model that is loaded, or make the embedded default.

    Args:
        model: A folder that ``save_pretrained`` made, a `PreTrainedModel`, or None for the default.
        dtype: To run it in; float32 or bfloat16.
        model_id: An identity that replaces the digest of the weights in block keys.

    Raises:
        ConfigError: If the folder is no checkpoint.
        UnsupportedError: If the model's attention or KV cannot be served, with the reason.
    """
    folder: Path | None = None
    loaded: Any
    if model is None:
        loaded, tokenizer = tiny_model(dtype), ByteTokenizer()
    elif isinstance(model, torch.nn.Module):
        loaded, tokenizer = model.to(dtype), None
    else:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{os.fspath(model)!r} is no checkpoint folder: it has no config.json")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            check_prefix_law(config.get_text_config().to_dict())  # before the weights take memory
            loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
            tokenizer = load_tokenizer(folder, loaded.config)
        except UnsupportedError:
            raise
        except Exception as error:  # transformers raises whatever its readers raise
            first = str(error).strip().split("\n")[0]
            raise ConfigError(f"{os.fspath(model)!r} cannot be loaded: {type(error).__name__}: {first}") from error
    loaded.eval()
    config = loaded.config.get_text_config().to_dict()
    check_prefix_law(config)
    geometry = _geometry(loaded.config.get_text_config(), dtype)
    loaded.set_attn_implementation(PAGED_ATTENTION)
    if loaded.config.get_text_config()._attn_implementation != PAGED_ATTENTION:
        raise UnsupportedError(f"{type(loaded).__name__} does not attend through transformers' attention interface")
    identity = model_identity(folder, model_id=model_id) if folder or model_id else f"state:{_state_digest(loaded)}"
    namespace = Namespace(model=identity, kv_dtype=str(dtype).removeprefix("torch."), rope=rope_settings(config))
    return LoadedModel(loaded, tokenizer, geometry, namespace)


def load_tokenizer(folder: str | os.PathLike[str] | None, config: Any) -> Any:
    """Return the folder's tokenizer; bytes if it has none and the vocabulary is large enough, else None."""
    if folder is not None and any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ByteTokenizer() if config.get_text_config().vocab_size >= ByteTokenizer.VOCAB_SIZE else None


def _geometry(config: Any, dtype: torch.dtype) -> KVGeometry:
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"the reference engine runs float32 and bfloat16, not {dtype}")
    count = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    kinds: Sequence[str] = getattr(config, "layer_types", None) or (
        ["full_attention" if window is None else "sliding_attention"] * count
    )
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedError(f"layers of type {', '.join(sorted(unknown))} are not served by the reference engine")
    groups = [
        (tuple(i for i in range(count) if kinds[i] == kind), None if kind == "full_attention" else window)
        for kind in ("full_attention", "sliding_attention")
        if kind in kinds
    ]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVGeometry(tuple(g for g, _ in groups), tuple(w for _, w in groups), heads, head_dim, dtype)


def _state_digest(model: Any) -> str:
    """Digest a model's weights and configuration in memory, for models without a folder."""
    config: dict[str, Any] = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE_SETTINGS}
    hasher = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()
