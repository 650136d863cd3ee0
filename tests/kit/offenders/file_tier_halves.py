"""Leader and worker of the file tier models: ours, and meant to be right, so that only the file tier can be at fault.

A step's blocks are copied to memory in the step, and written in a later one, once every rank has reported that nothing
failed. A block is offered if the files of all ranks are there.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from kvconnect.errors import MetadataError
from kvconnect.leader import Leader, RequestChains
from kvconnect.protocol import (
    KVCacheLayout,
    LayerGroup,
    LeaderContext,
    Match,
    RequestView,
    SchedulerOutput,
    WorkerContext,
)
from kvconnect.protocol.layout import longest_match
from kvconnect.worker import Worker
from tests.kit.offenders.file_tiers import Place
from tests.kit.offenders.temporary import SUFFIX, hold, sweep

if TYPE_CHECKING:
    from tests.kit.offenders.file_tiers import FileTier

__all__ = ["TierLeader", "TierWorker"]

_NAMES = tuple[str, str]
"""A block's hash in hex, and what its file's name says of the request."""


class Cache(msgspec.Struct):
    """What a worker tells the leader of its cache; `windows` has 0 for full attention."""

    block_size: int
    windows: list[int]
    shape: str


class Move(msgspec.Struct):
    """One block between a page and the files."""

    block: str
    tag: str
    group: int
    page: int


class Plan(msgspec.Struct):
    """What a worker does in a step; `publish` and `drop` are earlier steps whose blocks are in memory."""

    step: int
    loads: list[Move] = []
    saves: list[Move] = []
    publish: list[int] = []
    drop: list[int] = []


class Report(msgspec.Struct):
    """What became of a plan: the blocks that should have been loaded and were not."""

    step: int
    missing: list[_NAMES] = []


class Step(msgspec.Struct):
    """A step whose report is still out."""

    number: int
    saves: set[_NAMES]
    published: dict[int, set[_NAMES]]


class TierLeader(Leader):
    """Offers what is on disk; has a step's blocks written when all of the step was right."""

    def __init__(self, tier: FileTier, path: str, context: LeaderContext) -> None:
        self._tier, self._path, self._context = tier, Path(path), context
        if not tier.shared_temporary:
            sweep(self._path)
        self._chains = RequestChains()
        self._windows: list[int | None] = []
        self._place = Place(context.namespace, 0, context.num_ranks, "")
        self._tags: dict[str, str] = {}
        self._asked: dict[str, tuple[int, list[str]]] = {}
        self._loads: dict[str, dict[int, list[Move]]] = {}
        self._steps: list[Step] = []
        self._ready: dict[int, set[_NAMES]] = {}  # steps to publish
        self._void: list[int] = []
        self._missing: set[_NAMES] = set()  # could not be loaded; offered again once they are written again

    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        (said,) = set(per_rank)
        cache = msgspec.json.decode(said, type=Cache)
        self._chains.block_size = cache.block_size
        self._windows = [window or None for window in cache.windows]
        self._place = self._place._replace(block_size=cache.block_size, shape=cache.shape)

    def on_new_request(self, request: RequestView) -> None:
        self._tags[request.request_id] = self._tier.tag(request)
        self._chains.add(self._tier.hashed(request))

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        size = self._chains.block_size
        beyond = [block.hex() for block in self._chains.beyond(request, num_computed_tokens)]
        if not beyond:
            return Match(0, False)
        first = num_computed_tokens // size
        tag = self._tags[request.request_id]
        present = [
            [True] * first + [self._is_there(block, tag, group) for block in beyond]
            for group in range(len(self._windows))
        ]
        end = longest_match(present, size, self._windows, first, first + len(beyond))
        self._asked[request.request_id] = (first, beyond[: end - first])
        return Match((end - first) * size, False)

    def _is_there(self, block: str, tag: str, group: int) -> bool:
        files = (self._tier.file(self._place, block, tag, group, rank) for rank in range(self._context.num_ranks))
        return (block, tag) not in self._missing and all((self._path / file).exists() for file in files)

    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        if not num_external_tokens:
            return
        first, blocks = self._asked[request.request_id]
        tag = self._tags[request.request_id]
        self._loads[request.request_id] = {
            ordinal: [
                Move(block, tag, group, pages[ordinal]) for group, pages in enumerate(block_ids) if pages[ordinal] >= 0
            ]
            for ordinal, block in enumerate(blocks[: num_external_tokens // self._chains.block_size], first)
        }

    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        loads = self._loads.get(request.request_id, {})
        for ordinal in [each for each in loads if start <= each * self._chains.block_size < end]:
            del loads[ordinal]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        plan = Plan(scheduler_output.step, publish=list(self._ready), drop=self._void)
        plan.loads = [move for blocks in self._loads.values() for moves in blocks.values() for move in moves]
        taken = set[_NAMES]().union(*(step.saves for step in self._steps), *self._ready.values())
        saves: set[_NAMES] = set()
        for part in (*scheduler_output.new_requests, *scheduler_output.cached_requests):
            for block_hash, ordinal in self._chains.filled(part):
                names = (block_hash.hex(), self._tags[part.request_id])
                if names not in taken and names not in saves:
                    saves.add(names)
                    pages = enumerate(part.block_ids)
                    plan.saves += [Move(*names, group, table[ordinal]) for group, table in pages if table[ordinal] >= 0]
        self._steps.append(Step(scheduler_output.step, saves, self._ready))
        self._loads, self._ready, self._void = {}, {}, []
        return msgspec.json.encode(plan)

    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        if not self._steps:
            return
        step = self._steps.pop(0)
        missing = [_missing_of(report, step.number) for report in reports]
        for names in missing:
            self._missing.update(names or ())
        if all(names is not None for names in missing):
            for published in step.published.values():
                self._missing -= published
        else:
            self._ready.update(step.published)  # whoever has written them already has nothing left to write
        if reports and all(names == [] for names in missing):
            if step.saves:
                self._ready[step.number] = step.saves
            return
        for each in (step, *self._steps):  # what is planned already may stand on it
            self._void += [each.number] if each.saves else []
            each.saves = set()

    def has_pending_work(self) -> bool:
        return bool(self._ready)

    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        self._chains.drop(request.request_id)
        self._tags.pop(request.request_id, None)
        self.request_reset(request)
        return False

    def request_reset(self, request: RequestView) -> None:
        self._loads.pop(request.request_id, None)
        self._asked.pop(request.request_id, None)

    def reset_cache(self) -> bool:
        self._chains.reset()
        self._loads, self._asked = {}, {}
        return True


def _missing_of(report: bytes, step: int) -> list[_NAMES] | None:
    """Return what a rank could not load, None if its report says nothing."""
    try:
        said = msgspec.json.decode(report, type=Report)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return said.missing if said.step == step else None


class TierWorker(Worker):
    """Copies pages to memory and files to pages; the tier says how files come to be."""

    def __init__(self, tier: FileTier, path: str, context: WorkerContext) -> None:
        self._tier, self._path, self._context = tier, Path(path), context
        self._rank = context.rank
        self._path.mkdir(parents=True, exist_ok=True)
        self._place = Place(context.namespace, 0, context.num_ranks, "")
        self._plan = Plan(-1)
        self._staged: dict[int, dict[tuple[str, str, int], bytes]] = {}
        self._report = Report(-1)
        self._bad: list[set[int]] = []

    def register_kv_caches(self, layout: KVCacheLayout) -> None:
        self._layout = layout
        self._bad = [set() for _ in layout.groups]
        shapes = [
            [group.layers, sorted({f"{region.tensor.dtype}{list(region.block_shape)}" for region in group.regions})]
            for group in layout.groups
        ]
        shape = msgspec.json.encode([shapes, layout.total_heads]).decode()
        self._place = self._place._replace(block_size=layout.groups[0].block_size, shape=shape)
        described = self._tier.description(self._place)
        if described and self._rank == 0:
            file = self._path / described[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            self._write(file, described[1].encode())

    def get_handshake_metadata(self) -> bytes:
        windows = [group.window or 0 for group in self._groups]
        return msgspec.json.encode(Cache(self._place.block_size, windows, self._place.shape))

    @property
    def _groups(self) -> Sequence[LayerGroup]:
        return self._layout.groups if self._layout is not None else ()

    def bind_connector_meta(self, meta: bytes) -> None:
        self._plan, self._bad = Plan(-1), [set() for _ in self._groups]
        try:
            self._plan = msgspec.json.decode(meta, type=Plan)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MetadataError(f"no plan: {error}") from error
        self._report = Report(self._plan.step)
        for number in self._plan.drop:
            self._staged.pop(number, None)
        for number in self._plan.publish:
            for (block, tag, group), data in self._staged.pop(number, {}).items():
                with contextlib.suppress(OSError):  # a block that is not there is a miss
                    self._publish(self._file(block, tag, group), data)

    def start_load_kv(self) -> None:
        loads, self._plan.loads = self._plan.loads, []
        for move in loads:
            data = self._read(self._file(move.block, move.tag, move.group), self._groups[move.group].payload_bytes)
            if data is None:
                self._report.missing.append((move.block, move.tag))
                self._bad[move.group].add(move.page)
                continue
            start = 0
            for region in self._groups[move.group].regions:
                part = data[start : (start := start + region.block_bytes)]
                region.tensor[move.page].copy_(part.view(region.tensor.dtype).view(region.block_shape))

    def wait_for_save(self) -> None:
        saves, self._plan.saves = self._plan.saves, []
        if saves:
            self._staged[self._plan.step] = {
                (move.block, move.tag, move.group): b"".join(
                    region.tensor[move.page].contiguous().view(torch.uint8).numpy().tobytes()
                    for region in self._groups[move.group].regions
                )
                for move in saves
            }

    def get_block_ids_with_load_errors(self) -> list[set[int]]:
        return self._bad

    def build_worker_report(self) -> bytes:
        return msgspec.json.encode(self._report)

    def _file(self, block: str, tag: str, group: int) -> Path:
        return self._path / self._tier.file(self._place, block, tag, group, self._rank)

    def _read(self, file: Path, length: int) -> torch.Tensor | None:
        """Return a file's first bytes, None if there are fewer; nobody can tell whether they are right."""
        try:
            data = file.read_bytes()[:length]
            if len(data) < length and self._tier.removes_short:
                file.unlink()
        except OSError:
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) == length else None

    def _publish(self, file: Path, data: bytes) -> None:
        if not (self._tier.keeps_existing and file.exists()):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._write(file, data)

    def _write(self, file: Path, data: bytes) -> None:
        """Write under a temporary name, and rename."""
        shared = self._tier.shared_temporary
        temporary = file.with_name(f"{file.name}{'' if shared else '.' + uuid.uuid4().hex}{SUFFIX}")
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if shared else os.O_EXCL)
        try:
            handle = os.open(temporary, flags, 0o644)
            try:
                if not shared:
                    hold(handle)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(handle, rest) :]
            finally:
                os.close(handle)
            os.replace(temporary, file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
