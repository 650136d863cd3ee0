"""Describes vLLM's paged cache: axes where the backend's packing is known, opaque blocks where it is not."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import vllm
from vllm.model_executor.models.utils import extract_layer_index

from kvconnect.errors import UnsupportedError
from kvconnect.protocol import KVCacheLayout, LayerGroup, Region

__all__ = ["describe_caches", "layer_indices"]


def describe_caches(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, vllm_config: Any, rank: int
) -> KVCacheLayout:
    """Describe the tensors that one worker registered.

    Args:
        kv_caches: By layer name, ``(num_blocks, heads, tokens, 2 * head_dim)`` or what the backend packs into it.
            Layers of different groups may lie in the same memory: a page belongs to one group at a time.
        kv_cache_config: The cache as planned.
        vllm_config: The engine's configuration.
        rank: The worker's tensor-parallel rank.

    Raises:
        UnsupportedError: If a tensor does not have the blocks that were planned.
    """
    heads, total_heads = _heads(vllm_config, rank)
    layers = vllm_config.compilation_config.static_forward_context
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if spec.num_kv_heads != heads[1] - heads[0]:
            raise UnsupportedError(
                f"layers with {spec.num_kv_heads} KV heads of the model's {total_heads} on rank {rank}: KVConnect "
                "serves models with the same number in every layer"
            )
        names = sorted(group.layer_names, key=extract_layer_index)
        regions: list[Region] = []
        for name in names:
            blocks = _blocks(name, kv_caches[name], kv_cache_config.num_blocks)
            regions += _regions(extract_layer_index(name), blocks, spec, layers[name])
        groups.append(
            LayerGroup(
                block_size=spec.block_size,
                layers=tuple(extract_layer_index(name) for name in names),
                regions=tuple(regions),
                window=getattr(spec, "sliding_window", None),
            )
        )
    return KVCacheLayout(groups=tuple(groups), heads=heads, total_heads=total_heads)


def layer_indices(kv_cache_config: Any) -> dict[str, int]:
    """Return the index of every layer that has a cache, by vLLM's name for it."""
    return {name: extract_layer_index(name) for group in kv_cache_config.kv_cache_groups for name in group.layer_names}


def _heads(vllm_config: Any, rank: int) -> tuple[tuple[int, int], int]:
    """Return the KV heads ``[start, end)`` that lie on `rank`, and the model's number; ranks beyond it hold copies."""
    total = vllm_config.model_config.get_total_num_kv_heads()
    size = vllm_config.parallel_config.tensor_parallel_size
    if size <= total:
        share = total // size
        return (rank * share, (rank + 1) * share), total
    first = rank // (size // total)
    return (first, first + 1), total


def _blocks(name: str, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return the layer's tensor with one index a block; a backend may have split each into several of its own.

    Raises:
        UnsupportedError: If the first dimension is no multiple of the planned blocks.
    """
    parts, rest = divmod(tensor.shape[0], num_blocks)
    if rest or not parts:
        raise UnsupportedError(f"{name} has {tensor.shape[0]} blocks, and {num_blocks} were planned")
    return tensor if parts == 1 else tensor.view(num_blocks, parts, *tensor.shape[1:])


def _regions(layer: int, blocks: torch.Tensor, spec: Any, module: Any) -> list[Region]:
    """Return what holds one layer: keys and values by axes if the packing is known, else one opaque region."""
    backend = module.get_attn_backend().get_name()
    isa = _cpu_isa(module, spec) if backend == "CPU_ATTN" else ""
    heads, tokens, dim = spec.num_kv_heads, spec.block_size, spec.head_size
    known = isa == "vec" and spec.dtype == torch.float32 and tuple(blocks.shape[1:]) == (heads, tokens, 2 * dim)
    if not known or not blocks[0].is_contiguous():
        packing = f"vllm-{vllm.__version__}/{backend}/{isa or 'as-registered'}/{platform.machine()}"
        return [Region(tensor=blocks, axes=(), layers=(layer,), roles=("kv",), opaque=packing)]
    # a head's part of a block is its keys as (dim, token), then its values as (token, dim)
    start, stride = blocks.storage_offset(), blocks.stride(0)
    keys = blocks.as_strided((len(blocks), heads, dim, tokens), (stride, 2 * dim * tokens, tokens, 1), start)
    values = blocks.as_strided(
        (len(blocks), heads, tokens, dim), (stride, 2 * dim * tokens, dim, 1), start + dim * tokens
    )
    return [
        Region(tensor=keys, axes=("head", "dim", "token"), layers=(layer,), roles=("key",)),
        Region(tensor=values, axes=("head", "token", "dim"), layers=(layer,), roles=("value",)),
    ]


def _cpu_isa(module: Any, spec: Any) -> str:
    """Return which of its packings the CPU backend chose for a layer, ``""`` if it cannot be told."""
    isa = getattr(module, "isa", None)
    if isa is None:  # not yet: the backend chooses when it builds its metadata for the first time
        try:
            from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

            isa = _get_attn_isa(module.dtype, spec.block_size, spec.head_size, module.kv_cache_dtype)
        except (ImportError, AttributeError, TypeError, NotImplementedError):
            return ""
    return str(isa)
