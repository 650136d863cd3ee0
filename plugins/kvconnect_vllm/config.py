"""Reads what vLLM was started with: connector, model, what the engine can do. Refuses what cannot be served."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvconnect.driver import resolve_connector
from kvconnect.errors import ConfigError, UnsupportedError
from kvconnect.options import Options, convert_options
from kvconnect.protocol import (
    EngineCapabilities,
    Namespace,
    check_prefix_law,
    model_identity,
    rope_settings,
)
from kvconnect.registry import ResolvedConnector

__all__ = ["EngineSetup", "read_setup", "uses_layer_hooks"]


class _ExtraConfig(Options, frozen=True):
    """What ``kv_connector_extra_config`` takes.

    Attributes:
        connector: One URL or mapping, or a list of them; without it ``KVCONNECT_CONNECTOR`` is read.
        model_id: An identity that replaces the digest of the weights in block keys.
    """

    connector: Any = None
    model_id: str | None = None


_SERVED_SPECS = (FullAttentionSpec, SlidingWindowSpec)

# Methods whose drafts come from no other model: the cache holds the target model's KV and nothing else.
_DRAFTS_WITHOUT_MODEL = ("ngram", "suffix")

_KV_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


class EngineSetup(NamedTuple):
    """What both halves start from.

    Attributes:
        resolved: The connector as configured.
        configuration: The same as text, to tell two of them apart.
        namespace: What its keys begin with.
        capabilities: What this vLLM can do for it.
        block_size: Tokens a block, the same in every layer group.
        num_groups: Layer groups.
        page_errors: Whether vLLM can go on from the first page that was not loaded. Not with several groups, for it is
            told pages without their group; nor with a window, for what a shorter prefix needs was never loaded.
        num_ranks: Tensor-parallel workers.
        local_ranks: Those of them on one machine.
    """

    resolved: ResolvedConnector
    configuration: str
    namespace: Namespace
    capabilities: EngineCapabilities
    block_size: int
    num_groups: int
    page_errors: bool
    num_ranks: int
    local_ranks: int


def read_setup(vllm_config: Any, kv_cache_config: Any) -> EngineSetup:
    """Read the configuration.

    Args:
        vllm_config: The engine's ``VllmConfig``.
        kv_cache_config: The cache that was planned for it.

    Raises:
        UnsupportedError: If vLLM is set up in a way that could give wrong tokens or lose requests, with the reason.
        ConfigError: If the connector or the model's identity is configured wrongly.
    """
    _check_engine(vllm_config)
    block_size = _check_groups(kv_cache_config)
    extra = _extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
    resolved = resolve_connector(extra.connector)
    num_groups = len(kv_cache_config.kv_cache_groups)
    windows = [getattr(group.kv_cache_spec, "sliding_window", None) for group in kv_cache_config.kv_cache_groups]
    page_errors = windows == [None]
    parallel = vllm_config.parallel_config
    capabilities = EngineCapabilities(
        can_ask_again=True,
        load_errors="block" if page_errors else "request",
        async_load=True,
        reports=True,
        handshake=True,
        steps_when_idle=True,
        layer_hooks=True,
        takes_events=_takes_events(vllm_config),
        max_batch_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
    )
    return EngineSetup(
        resolved=resolved,
        configuration=json.dumps(msgspec.to_builtins(extra), sort_keys=True, default=str),
        namespace=_namespace(vllm_config, extra.model_id),
        capabilities=capabilities,
        block_size=block_size,
        num_groups=num_groups,
        page_errors=page_errors,
        num_ranks=parallel.tensor_parallel_size,
        local_ranks=min(parallel.tensor_parallel_size, parallel.local_world_size),
    )


def uses_layer_hooks(extra: dict[str, Any]) -> bool:
    """Say whether the configured connector cannot do without a call for every layer, as full CUDA graphs make none."""
    return "layer_hooks" in resolve_connector(_extra_config(extra).connector).connector.capabilities.needs


def _extra_config(extra: dict[str, Any]) -> _ExtraConfig:
    return convert_options("kv_connector_extra_config", extra, _ExtraConfig)


def _check_engine(vllm_config: Any) -> None:
    transfer, parallel, model = vllm_config.kv_transfer_config, vllm_config.parallel_config, vllm_config.model_config
    if transfer.kv_load_failure_policy != "recompute":
        raise UnsupportedError(
            f"kv_load_failure_policy={transfer.kv_load_failure_policy!r} ends a request whose load failed; "
            'set kv_load_failure_policy="recompute": with it a failed load costs time and no request'
        )
    if transfer.kv_role != "kv_both":
        raise UnsupportedError(
            f"kv_role={transfer.kv_role!r}: KVConnect is a cache that every instance reads and writes, set "
            'kv_role="kv_both"; a store takes mode=r or mode=w'
        )
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            raise UnsupportedError(f"{name}={size} is not served by KVConnect; it was tested with tensor parallelism")
    if model.runner_type != "generate" or model.is_encoder_decoder:
        raise UnsupportedError("KVConnect serves decoder models that generate, not pooling or encoder-decoder models")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in _KV_DTYPES:
        raise UnsupportedError(f"kv_cache_dtype={cache_dtype!r} is not served; served: {', '.join(_KV_DTYPES)}")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedError("calculate_kv_scales: scales computed at run time differ from process to process")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS_WITHOUT_MODEL:
        raise UnsupportedError(
            f"speculative method {speculative.method!r}: the cache then holds a draft model's KV too, which no key "
            f"covers; served: {', '.join(_DRAFTS_WITHOUT_MODEL)}"
        )
    check_prefix_law(model.hf_text_config.to_dict())


def _check_groups(kv_cache_config: Any) -> int:
    """Return the one block size of all layer groups.

    Raises:
        UnsupportedError: If there is another kind of layer, or sizes differ.
    """
    sizes = set()
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if type(spec) not in _SERVED_SPECS or getattr(spec, "attention_chunk_size", None) is not None:
            raise UnsupportedError(
                f"layer group {number} ({group.layer_names[0]}, ...) is a {type(spec).__name__}; KVConnect serves full "
                "and sliding-window attention"
            )
        if not group.enable_kv_transfer or group.host_resident or group.is_eagle_group:
            raise UnsupportedError(f"layer group {number} is no part of the model's own cache on the device")
        sizes.add(spec.block_size)
    if len(sizes) != 1:
        raise UnsupportedError(
            f"layer groups with block sizes {sorted(sizes)}: KVConnect serves one block size; start vLLM with "
            "disable_hybrid_kv_cache_manager=True"
        )
    return int(sizes.pop())


def _takes_events(vllm_config: Any) -> bool:
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def _namespace(vllm_config: Any, model_id: str | None) -> Namespace:
    model, cache_dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    compute_dtype = str(model.dtype).removeprefix("torch.")
    # what the checkpoint says of its own quantisation is part of its digest
    in_checkpoint = getattr(model.hf_config, "quantization_config", None) is not None
    load_time = "" if in_checkpoint else str(model.quantization or "")
    if cache_dtype in ("auto", compute_dtype):
        kv_dtype = compute_dtype
    else:
        kv_dtype = "fp8_e4m3" if cache_dtype == "fp8" else cache_dtype
        load_time += f"computed={compute_dtype}"  # what is rounded to the cache's type was computed in another
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    if skipped:
        kv_dtype += f"-except-{','.join(map(str, skipped))}"
    return Namespace(
        model=_identity(vllm_config, model_id),
        kv_dtype=kv_dtype,
        rope=rope_settings(model.hf_text_config.to_dict()),
        quantization=load_time,
    )


def _identity(vllm_config: Any, model_id: str | None) -> str:
    """Return the model's identity: its folder's content, its commit on the hub, or what the user says.

    Raises:
        ConfigError: If none of these can be had.
    """
    model = vllm_config.model_config
    overrides = model.hf_overrides
    if model_id is None and (callable(overrides) or vllm_config.load_config.load_format == "dummy"):
        what = "hf_overrides is a function" if callable(overrides) else "load_format='dummy' makes random weights"
        raise ConfigError(f"{what}, so that nothing says which model this is; give model_id in the extra configuration")
    folder: Path | None = Path(model.model)
    if model_id is None and not Path(model.model).is_dir():
        folder = None
        model_id = _hub_commit(model.model, model.revision)
    identity = model_identity(folder, model_id=model_id)
    if overrides and not callable(overrides):
        said = json.dumps(overrides, sort_keys=True, default=str).encode()
        identity += f"+overrides:{hashlib.blake2b(said, digest_size=16).hexdigest()}"
    return identity


def _hub_commit(name: str, revision: str | None) -> str:
    """Return ``name@commit`` of a model that was loaded from the Hugging Face hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, (str, os.PathLike)):
        raise ConfigError(
            f"{name!r} is no checkpoint folder, nor in the Hugging Face cache; give model_id in the extra configuration"
        )
    return f"{name}@{Path(found).parent.name}"
