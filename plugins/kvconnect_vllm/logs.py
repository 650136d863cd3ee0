"""Shows our log lines where vLLM shows its own: otherwise warnings come bare, and the rest not at all."""

from __future__ import annotations

import logging

import vllm.logger

__all__ = ["join_vllm_log"]

_OURS = ("kvconnect", "kvconnect_vllm", "kvconnect_host", "kvconnect_disk")


def join_vllm_log() -> None:
    """Give our loggers vLLM's handlers and level, unless somebody configured them; twice is fine."""
    theirs = logging.getLogger(vllm.logger.__name__.partition(".")[0])
    for name in _OURS:
        ours = logging.getLogger(name)
        if not ours.handlers and ours.level == logging.NOTSET:
            ours.setLevel(theirs.level)
            ours.propagate = ours.propagate and not theirs.handlers
            for handler in theirs.handlers:
                ours.addHandler(handler)
