"""When an output ends, and what its text is. Knows tokens and texts, no steps."""

from __future__ import annotations

from typing import Any

from kvconnect.engine.request import EngineRequest, FinishReason

__all__ = ["StopRule"]


class StopRule:
    """The model's end-of-sequence tokens, and the tokenizer that stop texts need."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a transformers model, whose generation settings name the tokens, and a tokenizer or None."""
        eos = model.generation_config.eos_token_id
        self._eos = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self._tokenizer = tokenizer

    def reason(self, request: EngineRequest) -> FinishReason | None:
        """Say whether the token that was generated last ends the request, and why."""
        params, token = request.params, request.tokens[-1]
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return "stop"
        if params.stop and self._cut(request) is not None:
            return "stop"
        return "length" if request.num_generated >= params.max_tokens else None

    def text(self, request: EngineRequest) -> str:
        """Return what was generated, decoded and cut before a stop text; ``""`` without a tokenizer."""
        cut = self._cut(request) if request.params.stop else None
        return self._decode(request) if cut is None else cut

    def _cut(self, request: EngineRequest) -> str | None:
        text = self._decode(request)
        found = [place for place in map(text.find, request.params.stop) if place >= 0]
        return text[: min(found)] if found else None

    def _decode(self, request: EngineRequest) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(request.generated)
        return text
