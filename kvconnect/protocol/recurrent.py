"""Finds, in a model's configuration, layers that keep a state instead of KV, a token at a time. See ADR 0015."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

__all__ = ["recurrent_layers"]

# Fields that list every layer's kind; a short list is repeated over all layers.
_KIND_FIELDS = ("layer_types", "layers_block_type", "block_types")

# Parts of the names of such kinds. A hybrid layer has attention and a state side by side.
_RECURRENT_KINDS = ("conv", "delta", "hybrid", "linear", "lightning", "mamba", "recurrent", "rwkv", "ssm", "xlstm")

# Fields that only models with a state have, for configurations that do not list their layers.
_STATE_FIELDS = (
    "conv_L_cache",
    "linear_conv_kernel_dim",
    "lru_width",
    "mamba_d_state",
    "n_mamba_heads",
    "number_of_conv_states",
    "short_conv_kernel_size",
    "ssm_cfg",
    "ssm_state_size",
    "state_size",
)

# Beginnings of the model types whose configurations say nothing of it, or which have a state beside listed attention.
_RECURRENT_TYPES = ("falcon_h1", "mamba", "retnet", "rwkv", "xlstm")


def recurrent_layers(config: Mapping[str, object]) -> str:
    """Name the layers whose state of a prefix is not one part a token, ``""`` if there are none.

    Args:
        config: The configuration of the text model, as a mapping.
    """
    kinds = _kinds(config)
    found: dict[str, list[int]] = {}
    for layer, kind in enumerate(kinds):
        if any(part in kind.lower() for part in _RECURRENT_KINDS):
            found.setdefault(kind, []).append(layer)
    if found:
        return "; ".join(f"layers {_ranges(layers)} ({kind})" for kind, layers in found.items())
    model_type = str(config.get("model_type") or "").lower()
    if model_type.startswith(_RECURRENT_TYPES):
        return f"the layers of {model_type!r} models"
    # a list without such a layer is trusted: hybrid families have members with attention alone
    said = [name for name in _STATE_FIELDS if not kinds and config.get(name) not in (None, False, 0)]
    return f"layers with {', '.join(f'{name}={config[name]!r}' for name in said)}" if said else ""


def _kinds(config: Mapping[str, object]) -> list[str]:
    """Return each layer's kind, nothing if they are not listed."""
    for field in _KIND_FIELDS:
        listed = config.get(field)
        if isinstance(listed, Sequence) and not isinstance(listed, str) and listed:
            count = config.get("num_hidden_layers")
            total = max(count, len(listed)) if isinstance(count, int) else len(listed)
            return [str(listed[layer % len(listed)]) for layer in range(total)]
    return []


def _ranges(layers: Sequence[int]) -> str:
    """Write ascending numbers shortly: ``0-2, 4``."""
    breaks = [0, *(at for at, (one, other) in enumerate(pairwise(layers), 1) if other != one + 1), len(layers)]
    runs = [layers[start:end] for start, end in pairwise(breaks)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
