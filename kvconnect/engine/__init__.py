"""The reference engine: any Hugging Face causal LM over a paged KV cache. Reference, not for serving.

`LLM` needs transformers and is loaded when it is first asked for; scheduler, pages and core do without.
"""

from typing import TYPE_CHECKING, Any

from kvconnect.engine.config import CacheLevel, KVCacheConfig
from kvconnect.engine.events import EventFollower, EventSnapshot, NumberedEvent
from kvconnect.engine.request import RequestOutput, SamplingParams, TokenOutput

if TYPE_CHECKING:
    from kvconnect.engine.llm import LLM

__all__ = [
    "LLM",
    "CacheLevel",
    "EventFollower",
    "EventSnapshot",
    "KVCacheConfig",
    "NumberedEvent",
    "RequestOutput",
    "SamplingParams",
    "TokenOutput",
]


def __getattr__(name: str) -> Any:
    """Import `LLM`, or say what it needs."""
    if name != "LLM":
        raise AttributeError(f"module 'kvconnect.engine' has no attribute {name!r}")
    try:
        import transformers as _transformers  # noqa: F401  # said once, with the way out
    except ImportError as error:
        raise ImportError('the reference engine needs transformers: pip install "kvconnect[engine]"') from error
    from kvconnect.engine.llm import LLM

    return LLM
