"""Model of the old form of TensorRT-LLM's persistent connector example, written from a description of it.

What it does wrong is meant. What that runtime has no word for (`cancel_load`, `reset_cache`, requests that must not be
cached, pages of -1) it does right, so that what the kit says is about the design and not about the translation.
"""

from __future__ import annotations

import contextlib
import pickle
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvconnect.leader import Leader
from kvconnect.options import Options
from kvconnect.protocol import Capabilities, Connector, Handshake, Match, RequestView, ScheduledRequest, SchedulerOutput
from tests.kit.offenders.temporary import sweep

__all__ = ["Metadata", "PersistentLeader", "PersistentOld", "PersistentOptions", "keys"]


class PersistentOptions(Options, frozen=True):
    """Options of both forms."""

    path: str = "./connector_cache"


class Metadata(NamedTuple):
    """A step's plan: (file, page) of each block to load and to save; the leader names the files."""

    load: list[tuple[str, int]]
    save: list[tuple[str, int]]


class PersistentOld(Connector):
    """One file a block, named by Python's hash of the block's own tokens."""

    Options = PersistentOptions
    capabilities = Capabilities(durable=True, shared=True, several_ranks=True, needs=("handshake",))

    def make_leader(self, options: Any, context: Any) -> Any:
        return PersistentLeader(options.path)

    def make_worker(self, options: Any, context: Any) -> Any:
        from tests.kit.offenders.persistent_workers import OldWorker  # late: a connector's class loads no torch

        return OldWorker()


class PersistentLeader(Leader):
    """Asks the folder about each block when a request is asked about; plans only for requests that are new."""

    def __init__(self, path: str) -> None:
        self._root = self._folder = Path(path)
        self._folder.mkdir(parents=True, exist_ok=True)
        sweep(self._folder)
        self._block_size = 0
        self._requests: dict[str, RequestView] = {}
        self._tokens: dict[str, list[int]] = {}
        self._pending_loads: dict[str, dict[int, str]] = {}  # request -> block of its sequence -> file

    def _file_name(self, request: RequestView, tokens: Sequence[int], ordinal: int) -> str:
        """Name a block: its own tokens and nothing else."""
        block = tokens[ordinal * self._block_size : (ordinal + 1) * self._block_size]
        return f"{abs(hash(tuple(block)))}.pt"

    def _encode(self, plan: Metadata) -> bytes:
        """Write the plan as that runtime does, which broadcasts a pickled object."""
        return pickle.dumps(plan)

    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        (self._block_size,) = {Handshake.decode(said).groups[0].block_size for said in per_rank}

    def on_new_request(self, request: RequestView) -> None:
        self._requests[request.request_id] = request
        self._tokens[request.request_id] = list(request.tokens)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        size = self._block_size
        found: dict[int, str] = {}
        self._pending_loads[request.request_id] = found
        if not size or num_computed_tokens % size or request.uncacheable or request.cache not in ("both", "read"):
            return Match(0, False)
        for ordinal in range(num_computed_tokens // size, len(request.tokens) // size):
            file = self._folder / self._file_name(request, request.tokens, ordinal)
            if not file.exists():
                break
            found[ordinal] = str(file)
        return Match(len(found) * size, False)

    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        pending = self._pending_loads.get(request.request_id, {})
        taken = list(pending.items())[: num_external_tokens // self._block_size] if self._block_size else []
        self._pending_loads[request.request_id] = dict(taken)

    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        pending = self._pending_loads.get(request.request_id, {})
        for ordinal in [each for each in pending if start <= each * self._block_size < end]:
            del pending[ordinal]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        plan = Metadata([], [])
        pending, self._pending_loads = self._pending_loads, {}  # those of requests outside this batch are gone, too
        for part in scheduler_output.new_requests:
            pages = part.block_ids[0]
            for ordinal, file in pending.get(part.request_id, {}).items():
                if pages[ordinal] >= 0:
                    plan.load.append((file, pages[ordinal]))
            self._plan_saves(part, plan)
        return self._encode(plan)

    def _plan_saves(self, part: ScheduledRequest, plan: Metadata) -> None:
        """Plan the full blocks behind the loaded ones.

        The description can also be read as saving blocks that a later chunk computes, before they are computed; this is
        the milder reading, and what its fault 7 says: they are never saved.
        """
        request, size = self._requests.get(part.request_id), self._block_size
        if request is None or not size or request.uncacheable or request.cache not in ("both", "write"):
            return
        tokens = self._tokens[part.request_id]
        tokens += part.new_tokens[max(0, len(part.new_tokens) - (part.num_tokens - len(tokens))) :]
        chunks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        end = part.num_computed_tokens + part.num_scheduled_tokens
        for ordinal in range(part.num_computed_tokens // size, len(part.block_ids[0])):
            page = part.block_ids[0][ordinal]
            full = len(chunks[ordinal]) == size  # there may be more pages than chunks
            if full and (ordinal + 1) * size <= end and page >= 0:
                plan.save.append((str(self._folder / self._file_name(request, tokens, ordinal)), page))

    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        self._requests.pop(request.request_id, None)
        self._tokens.pop(request.request_id, None)
        self._pending_loads.pop(request.request_id, None)
        return False

    def request_reset(self, request: RequestView) -> None:
        self._pending_loads.pop(request.request_id, None)
        if request.request_id in self._requests:
            self._tokens[request.request_id] = list(request.tokens)

    def reset_cache(self) -> bool:
        self._pending_loads = {}
        self._folder = self._root / f"epoch-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True)
        return True


def keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Return what names each full block of a prompt, for `KeyPartitionTests.test_keys_are_wide`."""
    starts = range(0, len(tokens) - block_size + 1, block_size)
    return [abs(hash(tuple(tokens[start : start + block_size]))).to_bytes(8, "big") for start in starts]
