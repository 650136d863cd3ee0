"""The reference engine: any Hugging Face causal LM over a paged KV cache. Reference, not for serving."""

try:
    import transformers as _transformers  # noqa: F401  # said once, with the way out
except ImportError as error:
    raise ImportError('the reference engine needs transformers: pip install "kvconnect[engine]"') from error

from kvconnect.engine.llm import LLM
from kvconnect.engine.request import RequestOutput, SamplingParams, TokenOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams", "TokenOutput"]
