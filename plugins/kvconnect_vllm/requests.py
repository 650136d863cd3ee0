"""A vLLM request as a connector sees it: what its KV depends on, and whether it may be cached at all."""

from __future__ import annotations

from typing import Any, get_args

from kvconnect.errors import ConfigError
from kvconnect.protocol import CacheUse, RequestView, adapter_digest

__all__ = ["request_view"]


def request_view(request: Any) -> RequestView:
    """Describe a request; its tokens are vLLM's own growing list.

    Args:
        request: A ``vllm.v1.request.Request``.
    """
    cache: CacheUse = "both"
    adapter: bytes | None = None
    reason = _uncacheable(request)
    if not reason:
        try:
            cache = _cache_use(request)
            adapter = _adapter(request)
        except ConfigError as error:
            reason = str(error)
        except Exception as error:  # whatever a caller's parameters or an adapter's files make of themselves
            reason = f"{type(error).__name__}: {error}"
    return RequestView(
        request_id=request.request_id,
        tokens=request.all_token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        cache_salt=request.cache_salt,
        adapter=adapter,
        cache=cache,
        uncacheable=reason,
    )


def _uncacheable(request: Any) -> str:
    """Say what of the request no key covers, ``""`` for nothing."""
    if request.prompt_embeds is not None:
        return "its prompt has embeddings"
    if request.mm_features:  # vLLM's identifiers may be the caller's own words, and say not whose they are
        return "its prompt has media"
    if request.pooling_params is not None:
        return "it is pooled, not generated"
    if request.resumable:
        return "its prompt is still being streamed, and vLLM takes tokens back between chunks"
    return ""


def _cache_use(request: Any) -> CacheUse:
    """Return what ``kv_transfer_params={"kvconnect": {"cache": ...}}`` allows.

    Raises:
        ConfigError: If it is not understood: then nothing is cached, for a caller who wrote it meant something.
    """
    asked = (request.kv_transfer_params or {}).get("kvconnect", {})
    known = get_args(CacheUse)
    if not isinstance(asked, dict) or asked.keys() - {"cache"} or asked.get("cache", "both") not in known:
        raise ConfigError(
            f"kv_transfer_params['kvconnect'] is {asked!r}; it takes {{'cache': one of {', '.join(known)}}}"
        )
    cache: CacheUse = asked.get("cache", "both")
    if request.skip_reading_prefix_cache:  # vLLM needs every token computed, for prompt log-probabilities for example
        return "write" if cache in ("both", "write") else "none"
    return cache


def _adapter(request: Any) -> bytes | None:
    """Return the content digest of the request's LoRA adapter, None if it has none.

    Raises:
        ConfigError: If there is no folder to digest, or its content may have changed under the same path.
    """
    lora = request.lora_request
    if lora is None:
        return None
    if lora.load_inplace:
        raise ConfigError(f"adapter {lora.lora_name!r} is replaced in place; what it was when it was loaded is unknown")
    return adapter_digest(lora.lora_path)
