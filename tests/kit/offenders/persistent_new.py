"""Model of the newest form of TensorRT-LLM's persistent connector example, written from a description of it.

Where the description names no difference to the old form, it is the old form's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from kvconnect.protocol import Capabilities, Connector, RequestView
from tests.kit.offenders.persistent_old import Metadata, PersistentLeader, PersistentOptions

__all__ = ["PersistentNew", "keys"]


class PersistentNew(Connector):
    """One file a block, named by SHA-256 of salt and whole prefix, and put in place whole."""

    Options = PersistentOptions
    capabilities = Capabilities(durable=True, shared=True, needs=("handshake",))  # not for sharded ranks

    def make_leader(self, options: Any, context: Any) -> Any:
        return NewLeader(options.path)

    def make_worker(self, options: Any, context: Any) -> Any:
        from tests.kit.offenders.persistent_workers import NewWorker  # late: a connector's class loads no torch

        return NewWorker()


class NewLeader(PersistentLeader):
    """The old leader with other names for files, and plans that nobody unpickles."""

    def _file_name(self, request: RequestView, tokens: Sequence[int], ordinal: int) -> str:
        """Name a block: the salt and every token up to its end."""
        return f"{_digest(request.cache_salt, tokens[: (ordinal + 1) * self._block_size]).hex()}.pt"

    def _encode(self, plan: Metadata) -> bytes:
        """Write the plan as JSON."""
        return msgspec.json.encode(plan)


def _digest(salt: str | None, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(json.dumps([salt, list(tokens)]).encode()).digest()


def keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Return what names each full block of a prompt, for `KeyPartitionTests.test_keys_are_wide`."""
    return [_digest(None, tokens[:end]) for end in range(block_size, len(tokens) + 1, block_size)]
