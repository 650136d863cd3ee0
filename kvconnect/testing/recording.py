"""A connector that keeps KV in a dictionary, writes down every call, and does what a script says: for `EngineTests`.

It is simple enough to be right by reading: a block is named by all tokens before its end, and moved as it is. Engines
find it by name (``recording://?script=NAME``) when ``KVCONNECT_PLUGINS`` has ``kvconnect.testing.recording``; the
script lies in this process, so engine, leader and workers must, too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvconnect.leader import Leader
from kvconnect.options import Options
from kvconnect.protocol import (
    Capabilities,
    Connector,
    EngineCapabilities,
    Finished,
    KVCacheLayout,
    Match,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
    hookimpl,
)
from kvconnect.worker import Worker

__all__ = ["Call", "Planned", "RecordingConnector", "Script", "kvconnect_register"]

_SCRIPTS: dict[str, Script] = {}
_NUMBERS = itertools.count()

_Place = tuple[int, int, str]  # rank, layer group, block name
_Move = tuple[int, int, str]  # layer group, page, block name


class Call(NamedTuple):
    """One hook call.

    Attributes:
        hook: Its name.
        rank: Of the worker; -1 for the leader.
        step: The last step that the leader had planned, -1 before the first; of a worker, the one that it runs.
        data: What was given and answered, copied.
    """

    hook: str
    rank: int
    step: int
    data: dict[str, Any]


class Planned(NamedTuple):
    """One request's part of a step, copied from its `ScheduledRequest`."""

    request_id: str
    new: bool
    computed: int
    scheduled: int
    num_tokens: int
    new_tokens: tuple[int, ...]
    tables: list[list[int]]

    @classmethod
    def of(cls, part: ScheduledRequest, *, new: bool) -> Planned:
        """Copy what is the engine's own."""
        return cls(
            request_id=part.request_id,
            new=new,
            computed=part.num_computed_tokens,
            scheduled=part.num_scheduled_tokens,
            num_tokens=part.num_tokens,
            new_tokens=tuple(part.new_tokens),
            tables=[list(table) for table in part.block_ids],
        )


class Script:
    """What the connector does, and what it saw. One engine at a time uses it.

    Attributes:
        calls: Every call so far, in order.
        engine: What the engine says it can do; None before it has opened the connector.
        layouts: The registered cache of each rank.
        parks: Offer asynchronous loads where the engine can park.
        offer: Answers ``(request, num_computed_tokens, known)`` instead of ``Match(known, ...)``; `known` tokens could
            be loaded.
        load_steps: Steps that an asynchronous load takes beyond its first; rank r takes r more.
        save_steps: If not 0, blocks are saved only after their request has ended, that many steps later; rank r takes r
            more. The pages must stay until then.
        failing: Says whether a load of ``(request_id, block)`` fails.
        failing_rank: The one rank on which it does; None for all.
        raising: Hooks that raise, by name: on every n-th call.
        answering: Answers of hooks, by name, instead of the right ones.
        busy_steps: Empty steps for which the connector says that it has work.
        blocks: What is committed: bytes by (rank, group, name).
    """

    def __init__(self) -> None:
        """Start with no blocks."""
        self.name = f"script-{next(_NUMBERS)}"
        self.calls: list[Call] = []
        self.engine: EngineCapabilities | None = None
        self.layouts: dict[int, KVCacheLayout] = {}
        self.parks = False
        self.offer: Callable[[RequestView, int, int], Any] | None = None
        self.load_steps = 0
        self.save_steps = 0
        self.failing: Callable[[str, int], bool] = lambda request_id, block: False
        self.failing_rank: int | None = None
        self.raising: dict[str, int] = {}
        self.answering: dict[str, Any] = {}
        self.busy_steps = 0
        self.blocks: dict[_Place, list[Any]] = {}
        self.step = -1
        self._written: dict[int, list[tuple[_Place, list[Any]]]] = {}  # by step, not committed
        self._counts: dict[str, int] = {}
        _SCRIPTS[self.name] = self

    @property
    def url(self) -> str:
        """What ``connector=`` takes."""
        return f"recording://?script={self.name}"

    def of(self, hook: str, rank: int | None = None) -> list[Call]:
        """Return the calls of one hook."""
        return [call for call in self.calls if call.hook == hook and rank in (None, call.rank)]

    def plans(self, request_id: str) -> list[Planned]:
        """Return a request's parts of all steps, in order."""
        parts = (part for call in self.of("build_connector_meta") for part in call.data["parts"])
        return [part for part in parts if part.request_id == request_id]

    def request(self, prompt: Sequence[int]) -> str:
        """Return the id under which a prompt arrived last, whatever the engine's callers name it."""
        arrived: list[str] = [call.data["request"] for call in self.of("on_new_request")]
        return next(name for name in reversed(arrived) if self.prompts[name] == tuple(prompt))

    @property
    def prompts(self) -> dict[str, tuple[int, ...]]:
        """The prompt of each request that arrived."""
        return {call.data["request"]: call.data["tokens"] for call in self.of("on_new_request")}

    def note(self, hook: str, rank: int = -1, at: int | None = None, **data: Any) -> None:
        """Write a call down; raise if the script says so. A worker says of which step it is (`at`)."""
        self.calls.append(Call(hook, rank, self.step if at is None else at, data))
        every = self.raising.get(hook, 0)
        if every:
            self._counts[hook] = self._counts.get(hook, 0) + 1
            if self._counts[hook] % every == 0:
                raise RuntimeError(f"the script lets {hook} raise")

    def wrote(self, step: int, place: _Place, parts: list[Any]) -> None:
        """Take a block's bytes, which count when the step is reported."""
        self._written.setdefault(step, []).append((place, parts))

    def close_step(self, step: int, *, good: bool) -> None:
        """Commit or forget what a step wrote."""
        for place, parts in self._written.pop(step, ()):
            if good:
                self.blocks[place] = parts

    def forget_written(self) -> None:
        """Forget what is not committed."""
        self._written.clear()


class RecordingOptions(Options, frozen=True):
    """Options of ``recording://``."""

    script: str


class RecordingConnector(Connector):
    """Both halves of one script."""

    Options = RecordingOptions
    capabilities = Capabilities(
        async_load=True, several_groups=True, several_ranks=True, needs=("handshake", "reports")
    )

    def make_leader(self, options: RecordingOptions, context: Any) -> Leader:
        """Make the leader."""
        return _Leader(_SCRIPTS[options.script], context.engine, context.num_ranks)

    def make_worker(self, options: RecordingOptions, context: Any) -> Worker:
        """Make one rank's worker."""
        return _Worker(_SCRIPTS[options.script], context.rank)


@hookimpl
def kvconnect_register(registry: Any) -> None:
    """Register ``recording``."""
    registry.add("recording", "kvconnect.testing.recording:RecordingConnector")


class _Request:
    def __init__(self, view: RequestView) -> None:
        self.tokens = list(view.tokens)
        self.root = repr((view.cache_salt, view.adapter, view.media)).encode()
        self.cached = not view.uncacheable
        self.answer: Match | None = None
        self.asked_at = 0
        self.next_save: int | None = None
        self.computed = 0

    def name(self, block: int, size: int) -> str:
        """Name a block by everything before its end: nothing to get wrong, and nothing to be fast."""
        return hashlib.sha256(self.root + array("q", self.tokens[: (block + 1) * size]).tobytes()).hexdigest()


class _Leader(Leader):
    def __init__(self, script: Script, engine: EngineCapabilities, num_ranks: int) -> None:
        self._script = script
        script.engine = engine
        self._num_ranks = num_ranks
        self._size = 0
        self._groups = 0
        self._requests: dict[str, _Request] = {}
        self._loads: dict[str, tuple[bool, list[_Move], list[int]]] = {}  # parked, moves, failing pages
        self._parked: set[str] = set()
        self._late: list[tuple[int, str, list[_Move]]] = []  # step from which on they are due
        self._saving: dict[str, int] = {}  # ended requests whose pages are kept -> ranks that have said so
        self._open: list[int] = []
        self._busy = script.busy_steps

    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        self._script.note("set_handshake_metadata", per_rank=list(per_rank))
        _, self._size, self._groups = json.loads(per_rank[0])

    def on_new_request(self, request: RequestView) -> None:
        self._requests[request.request_id] = _Request(request)
        self._script.note("on_new_request", request=request.request_id, tokens=tuple(request.tokens))

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        known, state = 0, self._living(request, "get_num_new_matched_tokens")
        state.tokens = list(request.tokens)
        if num_computed_tokens % self._size == 0 and state.cached:
            block = num_computed_tokens // self._size
            while (block + 1) * self._size < len(state.tokens) and self._there(state.name(block, self._size)):
                block += 1
            known = max(0, block * self._size - num_computed_tokens)
        script, engine = self._script, self._script.engine
        assert engine is not None
        parks = known > 0 and engine.async_load and (script.parks or not engine.sync_load)
        answer: Any = Match(known, parks)
        if script.offer is not None:
            answer = script.offer(request, num_computed_tokens, known)
        state.answer, state.asked_at = answer, num_computed_tokens
        script.note(
            "get_num_new_matched_tokens",
            request=request.request_id,
            tokens=tuple(request.tokens),
            computed=num_computed_tokens,
            answer=answer,
        )
        return answer  # type: ignore[no-any-return]

    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        name, state = request.request_id, self._living(request, "update_state_after_alloc")
        tables = [list(table) for table in block_ids]
        parks = bool(num_external_tokens and state.answer and state.answer[1])
        self._script.note(
            "update_state_after_alloc", request=name, tables=tables, external=num_external_tokens, parks=parks
        )
        first = state.asked_at // self._size
        blocks = range(first, first + num_external_tokens // self._size)
        moves = [(g, t[b], state.name(b, self._size)) for b in blocks for g, t in enumerate(tables) if t[b] >= 0]
        failing = [b for b in blocks if self._script.failing(name, b)]
        bad = [t[b] for b in failing for t in tables if t[b] >= 0]
        if num_external_tokens:
            self._loads[name] = (parks, moves, bad)
            if parks:
                self._parked.add(name)

    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        self._script.note("cancel_load", request=request.request_id, start=start, end=end)
        name = request.request_id
        if name in self._loads:
            parks, moves, bad = self._loads[name]
            gone = {self._requests[name].name(b, self._size) for b in range(start // self._size, end // self._size)}
            self._loads[name] = (parks, [move for move in moves if move[2] not in gone], bad)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        step = self._script.step = scheduler_output.step
        parts = [Planned.of(part, new=True) for part in scheduler_output.new_requests]
        parts += [Planned.of(part, new=False) for part in scheduler_output.cached_requests]
        saves = [save for part in parts if part.request_id in self._requests for save in self._saves(part)]
        late = [(name, moves) for due, name, moves in self._late if due <= step]
        self._late = [each for each in self._late if each[0] > step]
        plan = {
            "step": step,
            "loads": [(name, parks, moves, bad) for name, (parks, moves, bad) in self._loads.items()],
            "saves": saves + [move for _, moves in late for move in moves],
            "saved": [name for name, _ in late],
        }
        self._loads = {}
        self._open.append(step)
        if not parts:
            self._busy = max(0, self._busy - 1)
        meta = json.dumps(plan).encode()
        self._script.note(
            "build_connector_meta",
            step=step,
            parts=parts,
            preempted=tuple(scheduler_output.preempted),
            meta=meta,
        )
        return meta

    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        said = [json.loads(data) for data in reports if data.startswith(b"{")]
        for each in said:
            self._parked -= set(each["loaded"])
            for name in each["saved"]:
                self._saving[name] = self._saving.get(name, 0) + 1
        self._saving = {name: count for name, count in self._saving.items() if count < self._num_ranks}
        good = len(said) == self._num_ranks and not any(each["failed"] for each in said)
        step = self._open.pop(0) if self._open else -1
        if not good:  # what was planned by now may have computed on it
            self._script.forget_written()
        self._script.close_step(step, good=good)
        self._script.note("update_connector_output", reports=list(reports))

    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        name = request.request_id
        state = self._living(request, "request_finished")
        del self._requests[name]
        self._loads.pop(name, None)
        self._parked.discard(name)
        keeps = False
        if self._script.save_steps and state.computed >= self._size:
            full = min(state.computed, len(state.tokens)) // self._size
            moves = [
                (group, table[block], state.name(block, self._size))
                for group, table in enumerate(block_ids)
                for block in range(min(full, len(table)))
                if table[block] >= 0
            ]
            self._late.append((self._script.step + 1 + self._script.save_steps, name, moves))
            self._saving[name] = 0
            keeps = True
        self._script.note(
            "request_finished",
            request=name,
            tokens=tuple(request.tokens),
            tables=[list(table) for table in block_ids],
            answer=keeps,
        )
        return keeps

    def request_reset(self, request: RequestView) -> None:
        self._script.note("request_reset", request=request.request_id, tokens=tuple(request.tokens))
        state = self._requests[request.request_id]
        state.tokens = list(request.tokens)
        state.next_save, state.answer, state.computed = None, None, 0
        self._loads.pop(request.request_id, None)

    def has_pending_work(self) -> bool:
        return bool(self._busy or self._late or self._saving or self._parked or self._loads or self._open)

    def reset_cache(self) -> bool:
        self._script.note("reset_cache")
        self._script.blocks.clear()
        return True

    def shutdown(self) -> None:
        self._script.note("shutdown")

    def _living(self, request: RequestView, hook: str) -> _Request:
        """Return what is known of a request; a call for another one is written down all the same."""
        if request.request_id not in self._requests:
            self._script.note(hook, request=request.request_id)
        return self._requests[request.request_id]

    def _there(self, name: str) -> bool:
        blocks = self._script.blocks
        return all((rank, group, name) in blocks for rank in range(self._num_ranks) for group in range(self._groups))

    def _saves(self, part: Planned) -> list[_Move]:
        state = self._requests[part.request_id]
        state.tokens = state.tokens[: part.num_tokens - len(part.new_tokens)] + list(part.new_tokens)
        state.computed = part.computed + part.scheduled
        start = part.computed // self._size if state.next_save is None else state.next_save
        end = state.next_save = max(start, min(state.computed, len(state.tokens)) // self._size)
        if self._script.save_steps or not state.cached:
            return []
        return [
            (group, table[block], state.name(block, self._size))
            for group, table in enumerate(part.tables)
            for block in range(start, end)
            if table[block] >= 0
        ]


class _Parked:
    def __init__(self, name: str, moves: list[_Move], bad: set[int], steps: int) -> None:
        self.name = name
        self.moves = moves
        self.bad = bad
        self.steps = steps


class _Worker(Worker):
    def __init__(self, script: Script, rank: int) -> None:
        self._script = script
        self._rank = rank
        self._cache: KVCacheLayout
        self._plan: dict[str, Any] = {"step": -1, "loads": [], "saves": [], "saved": []}
        self._parked: list[_Parked] = []
        self._sync: list[_Move] = []
        self._copied: dict[tuple[int, str], dict[int, Any]] = {}  # (group, name) -> region -> bytes
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._bad: list[set[int]] = []
        self._saved: list[tuple[int, str]] = []
        self._said_saved: list[str] = []
        self._said_loaded: list[str] = []

    def register_kv_caches(self, layout: KVCacheLayout) -> None:
        self._script.note("register_kv_caches", self._rank)
        self._script.layouts[self._rank] = self._cache = layout

    def get_handshake_metadata(self) -> bytes:
        said = json.dumps([self._rank, self._cache.groups[0].block_size, len(self._cache.groups)]).encode()
        self._script.note("get_handshake_metadata", self._rank, answer=said)
        return said

    def handle_preemptions(self, meta: bytes) -> None:
        self._script.note("handle_preemptions", self._rank, json.loads(meta)["step"], meta=meta)

    def bind_connector_meta(self, meta: bytes) -> None:
        plan = json.loads(meta)
        self._script.note("bind_connector_meta", self._rank, plan["step"], meta=meta)
        self._plan = plan
        self._bad = [set() for _ in self._cache.groups]
        self._copied = {}
        self._said_saved, self._said_loaded = [], []
        self._failed = set()
        self._sync = []

    def start_load_kv(self) -> None:
        self._script.note("start_load_kv", self._rank, self._plan["step"])
        for name, parks, moves, bad in self._plan["loads"]:
            if parks:
                self._parked.append(
                    _Parked(name, moves, set(bad if self._fails else ()), self._script.load_steps + self._rank)
                )
                continue
            for group, page, block in moves:
                if page in bad and self._fails:
                    self._fail(name, group, page)
                else:
                    self._sync.append((group, page, block))
        self._plan["loads"] = []
        for parked in list(self._parked):
            parked.steps -= 1
            if parked.steps < 0:
                self._parked.remove(parked)
                self._end(parked)
        if not self._hooked:
            self._load(self._sync, None)

    def wait_for_layer_load(self, layer: int) -> None:
        self._script.note("wait_for_layer_load", self._rank, self._plan["step"], layer=layer)
        self._load(self._sync, layer)

    def save_kv_layer(self, layer: int) -> None:
        self._script.note("save_kv_layer", self._rank, self._plan["step"], layer=layer)
        self._copy(layer)

    def wait_for_save(self) -> None:
        self._script.note("wait_for_save", self._rank, self._plan["step"])
        self._copy(None)
        for (group, block), parts in self._copied.items():
            ordered = [parts[number] for number in sorted(parts)]
            self._script.wrote(self._plan["step"], (self._rank, group, block), ordered)
        self._copied = {}
        self._saved += [(self._plan["step"] + self._rank, name) for name in self._plan["saved"]]
        self._plan["saves"], self._plan["saved"] = [], []

    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        saved = {name for due, name in self._saved if due <= self._plan["step"]}
        self._saved = [each for each in self._saved if each[1] not in saved]
        loaded, self._loaded = frozenset(self._loaded), set()
        failed = loaded & self._failed
        self._said_saved, self._said_loaded = sorted(saved), sorted(loaded)
        answer = Finished(frozenset(saved), loaded, failed)
        self._script.note("get_finished", self._rank, self._plan["step"], given=finished_req_ids, answer=answer)
        return answer

    def get_block_ids_with_load_errors(self) -> list[set[int]]:
        answer = [set(pages) for pages in self._bad]
        self._script.note(
            "get_block_ids_with_load_errors", self._rank, self._plan["step"], answer=answer, failed=sorted(self._failed)
        )
        given: list[set[int]] = self._script.answering.get("get_block_ids_with_load_errors", answer)
        return given

    def build_worker_report(self) -> bytes:
        said = {
            "rank": self._rank,
            "step": self._plan["step"],
            "failed": sorted(self._failed),
            "loaded": self._said_loaded,
            "saved": self._said_saved,
        }
        answer = json.dumps(said).encode()
        self._script.note("build_worker_report", self._rank, self._plan["step"], answer=answer)
        return answer

    def shutdown(self) -> None:
        self._script.note("shutdown", self._rank)

    @property
    def _fails(self) -> bool:
        return self._script.failing_rank in (None, self._rank)

    @property
    def _hooked(self) -> bool:
        return self._script.engine is not None and self._script.engine.layer_hooks

    def _end(self, parked: _Parked) -> None:
        good = [move for move in parked.moves if move[1] not in parked.bad]
        self._load(good, None)
        for group, page, _ in parked.moves:
            if page in parked.bad:
                self._fail(parked.name, group, page)
        self._loaded.add(parked.name)

    def _fail(self, name: str, group: int, page: int) -> None:
        """Leave a page as a load does that failed half-way: what is there is neither the block nor harmless."""
        for region in self._cache.groups[group].regions:
            region.tensor[page].fill_(9 if region.tensor.is_floating_point() else 85)
        self._bad[group].add(page)
        self._failed.add(name)

    def _load(self, moves: Sequence[_Move], layer: int | None) -> None:
        """Write blocks into pages: everything, or what belongs to a layer (a region of several at its first)."""
        for group, page, block in moves:
            parts = self._script.blocks[self._rank, group, block]
            for region, part in zip(self._cache.groups[group].regions, parts, strict=True):
                if layer is None or min(region.layers) == layer:
                    region.tensor[page].copy_(part)

    def _copy(self, layer: int | None) -> None:
        """Read pages that the plan saves: what is left, or a layer's part (of a region of several: at its last)."""
        for group, page, block in self._plan["saves"]:
            parts = self._copied.setdefault((group, block), {})
            for number, region in enumerate(self._cache.groups[group].regions):
                if number not in parts and (layer is None or max(region.layers) == layer):
                    parts[number] = region.tensor[page].clone()
