"""Models of the file tiers of vLLM, LMCache and SGLang: names of files, how they are written, and what is looked at.

They are written from descriptions of those file tiers, and of nothing else. Leader and worker above them are ours, one
pair for all three, and right (`file_tier_halves`): what is offered is on every rank's disk and was reported as good; a
load that fails is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

import msgspec

from kvconnect.options import Options
from kvconnect.protocol import BlockChain, Capabilities, Connector, Namespace, RequestView

__all__ = ["FileTier", "FileTierOptions", "LmcacheFs", "Place", "SglangFile", "VllmFs", "keys"]


class FileTierOptions(Options, frozen=True):
    """Options of each."""

    path: str


class Place(NamedTuple):
    """What a file's name may say beside the block: where it was computed."""

    namespace: Namespace
    block_size: int
    num_ranks: int
    shape: str


class FileTier(Connector):
    """Base: raw bytes of a block in a file without a header."""

    Options = FileTierOptions
    capabilities = Capabilities(
        durable=True, shared=True, several_groups=True, several_ranks=True, needs=("handshake", "reports")
    )

    shared_temporary: ClassVar[bool] = False
    """Whether all writers of a block use one temporary name; else each has its own."""

    keeps_existing: ClassVar[bool] = False
    """Whether a block whose file is there is not written again, whatever is in it."""

    removes_short: ClassVar[bool] = False
    """Whether a file that is too short is deleted when it is read."""

    def hashed(self, request: RequestView) -> RequestView:
        """Return the request as the block hash sees it."""
        return request

    def tag(self, request: RequestView) -> str:
        """Return what the file's name says of the request, beside the hash."""
        return ""

    def file(self, place: Place, block: str, tag: str, group: int, rank: int) -> str:
        """Return a block's file, relative to the folder; `block` is the hash in hex."""
        raise NotImplementedError

    def description(self, place: Place) -> tuple[str, str] | None:
        """Return a file that describes the folder, and what is in it."""
        return None

    def make_leader(self, options: Any, context: Any) -> Any:
        from tests.kit.offenders.file_tier_halves import TierLeader

        return TierLeader(self, options.path, context)

    def make_worker(self, options: Any, context: Any) -> Any:
        from tests.kit.offenders.file_tier_halves import TierWorker  # late: a connector's class loads no torch

        return TierWorker(self, options.path, context)


class VllmFs(FileTier):
    """A folder for each set of fields, named by 12 digits of their digest; O_EXCL temporary file and rename."""

    removes_short = True

    def file(self, place: Place, block: str, tag: str, group: int, rank: int) -> str:
        return f"{self._folder(place)}_r{rank}/{block[:3]}/{block[3:5]}_g{group}/{block}.bin"

    def description(self, place: Place) -> tuple[str, str]:
        return f"{self._folder(place)}/config.json", _fields(place)

    def _folder(self, place: Place) -> str:
        return f"{quote(place.namespace.model, safe='')}_{hashlib.sha256(_fields(place).encode()).hexdigest()[:12]}"


class LmcacheFs(FileTier):
    """One flat folder; model, rank, group, hash and salt in the name; one temporary name for all writers."""

    shared_temporary = True
    keeps_existing = True

    def hashed(self, request: RequestView) -> RequestView:
        return msgspec.structs.replace(request, cache_salt=None, adapter=None)

    def tag(self, request: RequestView) -> str:
        return "" if request.cache_salt is None else f"@{quote(request.cache_salt, safe='')}"

    def file(self, place: Place, block: str, tag: str, group: int, rank: int) -> str:
        kv_rank = place.num_ranks << 16 | rank
        return f"{quote(place.namespace.model, safe='')}@{kv_rank:#010x}@{group}@{block}{tag}.data"


class SglangFile(FileTier):
    """One flat folder; hash, model, rank and number of ranks in the name; a temporary name for each writer."""

    capabilities = Capabilities(durable=True, shared=True, several_ranks=True, needs=("handshake", "reports"))

    def hashed(self, request: RequestView) -> RequestView:
        if request.adapter is None:
            return request
        extra = (request.cache_salt or "") + request.adapter.decode("latin-1")  # one string behind the other
        return msgspec.structs.replace(request, cache_salt=extra, adapter=None)

    def file(self, place: Place, block: str, tag: str, group: int, rank: int) -> str:
        return f"{block}_{quote(place.namespace.model, safe='')}_{rank}_{place.num_ranks}.bin"


def _fields(place: Place) -> str:
    fields = {**msgspec.structs.asdict(place.namespace), **place._asdict()}
    del fields["namespace"]
    return json.dumps(fields, sort_keys=True)


def keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Return what names each full block of a prompt, for `KeyPartitionTests.test_keys_are_wide`."""
    chain = BlockChain(block_size)
    chain.extend(tokens)
    return [bytes(block) for block in chain.hashes]
