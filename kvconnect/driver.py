"""What an engine calls. A connector's hooks, each guarded: whatever one raises or returns, the engine goes on.

A failed hook costs speed: it is counted, logged once a minute, and answered with "nothing matched", "nothing saved" or
"these loads failed". Rubbish answers are treated like exceptions. Opening a connector is the exception to the rule:
what is configured wrongly is raised at start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kvconnect.errors import KVConnectError, MetadataError, PluginError
from kvconnect.hooks import bind_hooks
from kvconnect.log import FailureLog
from kvconnect.protocol import (
    CacheEvent,
    Capabilities,
    EngineCapabilities,
    Finished,
    KVCacheLayout,
    LeaderContext,
    LeaderHooks,
    Match,
    Namespace,
    Report,
    RequestView,
    SchedulerOutput,
    WorkerContext,
    WorkerHooks,
    check_fit,
)
from kvconnect.registry import Registry, ResolvedConnector, load_registry

__all__ = ["LeaderDriver", "WorkerDriver", "open_connector", "open_leader", "open_worker", "resolve_connector"]

logger = logging.getLogger(__name__)

_NOTHING: frozenset[str] = frozenset()
_NO_MATCH = Match(0, False)


class _Driver:
    """Guards one half's hooks; counts failures and the time spent inside."""

    def __init__(self, half: str, hooks: Mapping[str, Callable[..., Any]]) -> None:
        self._hooks = hooks
        self._half = half
        self._log = FailureLog(logger)
        self._closed = False
        self.seconds_in_hooks = 0.0
        self.on_failure: Callable[[str, object], None] | None = None  # told of each, beside the log

    def _call(self, name: str, default: Any, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._hooks[name](*args)
        except Exception as error:  # promise 2: nothing a connector raises reaches a request
            self._failed(name, error)
            return default
        finally:
            self.seconds_in_hooks += time.perf_counter() - started

    def _failed(self, name: str, error: BaseException | str) -> None:
        self._log.failed(f"{self._half}.{name}", error)
        if self.on_failure is not None:
            self.on_failure(f"{self._half}.{name}", error)

    def hook(self, name: str) -> Callable[..., Any]:
        """Return a hook as it is bound, without the guard: for conformance tests, not for engines."""
        return self._hooks[name]

    def get_stats(self) -> dict[str, Any]:
        """Return the half's own counters, and under ``hooks`` the driver's: failures by hook, seconds inside."""
        stats = self._call("get_stats", {})
        if not isinstance(stats, dict):
            self._failed("get_stats", f"returned {type(stats).__name__}")
            stats = {}
        return {**stats, "hooks": {"failures": dict(self._log.counts), "seconds": self.seconds_in_hooks}}

    def shutdown(self) -> None:
        """Shut the half down; twice is fine."""
        if not self._closed:
            self._closed = True
            self._call("shutdown", None)


class LeaderDriver(_Driver):
    """The scheduler's side. One thread calls it."""

    def __init__(
        self,
        leader: LeaderHooks,
        *,
        block_size: int,
        sync_load: bool = True,
        async_load: bool = False,
        capabilities: Capabilities | None = None,
        tier_names: Sequence[str] = (),
        wrappers: Sequence[object] = (),
    ) -> None:
        """Bind the leader's hooks.

        Args:
            leader: The implementation.
            block_size: Tokens a block, against which answers are checked.
            sync_load: Whether the engine can take back a load that failed within a step; if not, such an offer breaks
                the rules.
            async_load: Whether the engine can park a request; if not, an offer of that kind breaks the rules.
            capabilities: What the connector declares; hooks that belong to one that it does not are not called.
            tier_names: Its stores, in the order of their tiers.
            wrappers: Observers.

        Raises:
            PluginError: If the leader does not follow the protocol.
        """
        super().__init__("leader", bind_hooks(LeaderHooks, leader, wrappers))
        self._block_size = block_size
        self._sync_load = sync_load
        self._async_load = async_load
        self.capabilities = capabilities or Capabilities()
        self.tier_names = tuple(tier_names)

    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        """Hand over what each rank said."""
        self._call("set_handshake_metadata", None, per_rank)

    def on_new_request(self, request: RequestView) -> None:
        """Tell of a new request."""
        self._call("on_new_request", None, request)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        """Ask what could be loaded; an answer that breaks the rules counts as no match."""
        match = self._call("get_num_new_matched_tokens", _NO_MATCH, request, num_computed_tokens)
        wrong = self._wrong_match(match, request, num_computed_tokens)
        if wrong:
            self._failed("get_num_new_matched_tokens", wrong)
            return _NO_MATCH
        return Match(*match)

    def _wrong_match(self, match: Any, request: RequestView, num_computed_tokens: int) -> str:
        if not isinstance(match, tuple) or len(match) != 2:
            return f"returned {match!r}, not a Match"
        count, load_async = match
        if count is None or count == 0:
            return f"Match({count}, True): nothing cannot be loaded asynchronously" if load_async else ""
        if not isinstance(count, int) or count < 0 or count % self._block_size:
            return f"offered {count!r} tokens, not whole blocks of {self._block_size}"
        if load_async and not self._async_load:
            return "offered an asynchronous load to an engine that cannot park requests"
        if not load_async and not self._sync_load:
            return "offered a load within the step to an engine that could not take it back"
        if num_computed_tokens + count >= len(request.tokens):
            return f"offered {count} tokens on top of {num_computed_tokens}, of {len(request.tokens)}: none is left"
        return ""

    def claim_match(self, request: RequestView, num_tokens: int) -> int:
        """Hold an offer; return how much of it is held, all of it if the connector holds nothing for anybody."""
        if not self.capabilities.batch_claim or not num_tokens:
            return num_tokens
        held = self._call("claim_match", 0, request, num_tokens)
        if not isinstance(held, int) or not 0 <= held <= num_tokens or held % self._block_size:
            self._failed("claim_match", f"returned {held!r}, not whole blocks of at most {num_tokens} tokens")
            self.release_match(request)
            return 0
        return held

    def release_match(self, request: RequestView) -> None:
        """Let go of a held offer."""
        if self.capabilities.batch_claim:
            self._call("release_match", None, request)

    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> bool:
        """Tell of an allocation.

        Returns:
            False if the leader failed: then nothing will be loaded, and the engine computes these tokens.
        """
        failed = object()
        return self._call("update_state_after_alloc", failed, request, block_ids, num_external_tokens) is not failed

    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        """Tell that offered tokens will not be used."""
        self._call("cancel_load", None, request, start, end)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes | None:
        """Return the step's plan, None if the leader failed: then no worker is bound, and the step's loads failed."""
        meta = self._call("build_connector_meta", None, scheduler_output)
        if meta is not None and not isinstance(meta, bytes):
            self._failed("build_connector_meta", f"returned {type(meta).__name__}, not bytes")
            return None
        return meta

    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        """Hand over one step's reports, one a rank."""
        self._call("update_connector_output", None, reports)

    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Tell that a request ended; True keeps its pages until it is reported as saved."""
        return self._call("request_finished", False, request, block_ids) is True

    def request_reset(self, request: RequestView) -> None:
        """Tell that a request lost its pages and will run again."""
        self._call("request_reset", None, request)

    def suspend(self, request: RequestView, block_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
        """Ask to move a request's pages below the device; True frees them once they are reported as saved."""
        return self.capabilities.suspend and self._call("suspend", False, request, block_ids, num_tokens) is True

    def prefetch(self, request: RequestView, tier: int) -> bool:
        """Ask to move a suspended request's blocks up to a tier."""
        return self.capabilities.suspend and self._call("prefetch", False, request, tier) is True

    def resume(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Ask to load a suspended request's blocks into pages; True ends like an asynchronous load."""
        return self.capabilities.suspend and self._call("resume", False, request, block_ids) is True

    def resize_tier(self, tier: int, num_bytes: int) -> bool:
        """Ask to grow or shrink a tier."""
        return self.capabilities.suspend and self._call("resize_tier", False, tier, num_bytes) is True

    def has_pending_work(self) -> bool:
        """Ask whether to keep stepping without tokens."""
        return self._call("has_pending_work", False) is True

    def take_events(self) -> Sequence[CacheEvent]:
        """Take what was stored and removed."""
        events = self._call("take_events", ())
        return events if isinstance(events, Sequence) else ()

    def reset_cache(self) -> bool:
        """Make what was saved so far unmatchable."""
        return self._call("reset_cache", False) is True


class WorkerDriver(_Driver):
    """The model runner's side, one a rank. One thread calls it."""

    def __init__(self, worker: WorkerHooks, *, rank: int = 0, wrappers: Sequence[object] = ()) -> None:
        """Bind the worker's hooks.

        Raises:
            PluginError: If the worker does not follow the protocol.
        """
        super().__init__("worker", bind_hooks(WorkerHooks, worker, wrappers))
        self._num_groups = 0
        self._number = -1
        self._rank = rank
        self._bound = False
        self._broken = ""
        self._wait_layer = self._hooks["wait_for_layer_load"]
        self._save_layer = self._hooks["save_kv_layer"]

    def register_kv_caches(self, layout: KVCacheLayout) -> None:
        """Hand over the cache.

        Raises:
            KVConnectError: Whatever the worker raised; the engine does not start.
        """
        self._num_groups = len(layout.groups)
        try:
            self._hooks["register_kv_caches"](layout)
        except KVConnectError:
            raise
        except Exception as error:
            raise PluginError(f"worker cannot use the KV cache: {type(error).__name__}: {error}") from error

    def get_handshake_metadata(self) -> bytes:
        """Return what the leader must know; empty, which turns the connector off, if the worker failed."""
        meta = self._call("get_handshake_metadata", b"")
        return meta if isinstance(meta, bytes) else b""

    def bind(self, meta: bytes | None, step: int) -> None:
        """Begin a step: `handle_preemptions`, then `bind_connector_meta`.

        Args:
            meta: The step's plan; None if there is none, then the step's other hooks are not called.
            step: Its number, as in `SchedulerOutput`.
        """
        self._number = step
        self._broken = ""
        self._bound = False
        if meta is None:
            self._broken = "no plan"
            return
        self._step_call("handle_preemptions", meta)
        if not self._broken:
            self._step_call("bind_connector_meta", meta)
        self._bound = not self._broken

    def start_load_kv(self) -> None:
        """Start the plan's loads."""
        if self._bound:
            self._step_call("start_load_kv")

    def wait_for_layer_load(self, layer: int) -> None:
        """Wait until `layer` may be attended to."""
        if self._bound:
            started = time.perf_counter()
            try:
                self._wait_layer(layer)
            except Exception as error:
                self._step_failed("wait_for_layer_load", error)
            self.seconds_in_hooks += time.perf_counter() - started

    def save_kv_layer(self, layer: int) -> None:
        """Tell that `layer`'s KV is in the pages."""
        if self._bound:
            started = time.perf_counter()
            try:
                self._save_layer(layer)
            except Exception as error:
                self._step_failed("save_kv_layer", error)
            self.seconds_in_hooks += time.perf_counter() - started

    def wait_for_save(self) -> None:
        """Wait until the pages may be written again."""
        if self._bound:
            self._step_call("wait_for_save")

    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        """Return whose asynchronous transfers ended."""
        nothing = Finished(_NOTHING, _NOTHING, _NOTHING)
        finished = self._call("get_finished", nothing, finished_req_ids)
        shaped = isinstance(finished, tuple) and len(finished) == 3
        if not shaped or not all(isinstance(ids, (set, frozenset)) for ids in finished):
            self._failed("get_finished", f"returned {finished!r}, not three sets of request ids")
            return nothing
        return Finished(*map(frozenset, finished))

    def get_block_ids_with_load_errors(self) -> list[set[int]] | None:
        """Return the pages that were not loaded, by group; None if no load of this step can be trusted."""
        if self._broken:
            return None
        pages: list[set[int]] | None = self._call("get_block_ids_with_load_errors", None)
        if pages == [] and self._num_groups:  # a worker that keeps no layout of its own
            return [set() for _ in range(self._num_groups)]
        shaped = isinstance(pages, list) and len(pages) == self._num_groups and all(isinstance(g, set) for g in pages)
        if not shaped or not all(isinstance(page, int) for group in pages or () for page in group):
            self._step_failed("get_block_ids_with_load_errors", f"returned {pages!r}, not {self._num_groups} sets")
            return None
        return pages

    def build_worker_report(self) -> bytes:
        """Return the step's report, marked if one of its hooks failed; empty if there is none that can be read.

        If the plan never reached the worker it is a `Report.unbound`, whatever the connector's own format.
        """
        if not self._bound:  # nothing of the plan was started
            return Report.unbound(self._number, self._rank, self._broken).encode()
        report = self._call("build_worker_report", b"")
        if not isinstance(report, bytes):
            self._failed("build_worker_report", f"returned {type(report).__name__}, not bytes")
            return b""
        if not self._broken:
            return report
        try:
            return msgspec.structs.replace(Report.decode(report), error=self._broken).encode()
        except MetadataError:  # a format of its own: the leader is told nothing rather than half
            return b""

    def fail_step(self, why: str) -> None:
        """Say that nothing of this step can be trusted: its loads count as failed, and nothing of it is committed."""
        self._step_failed("step", why)

    def _step_call(self, name: str, *args: Any) -> None:
        started = time.perf_counter()
        try:
            self._hooks[name](*args)
        except Exception as error:
            self._step_failed(name, error)
        finally:
            self.seconds_in_hooks += time.perf_counter() - started

    def _step_failed(self, name: str, error: BaseException | str) -> None:
        self._failed(name, error)
        self._broken = f"{name}: {error}" if isinstance(error, str) else f"{name}: {type(error).__name__}: {error}"


def resolve_connector(connector: Any, registry: Registry | None = None) -> ResolvedConnector:
    """Turn what ``connector=`` takes into one connector, discovering plugins if there is no `registry` yet."""
    return (registry or load_registry()).resolve(connector)


def open_leader(
    resolved: ResolvedConnector,
    *,
    namespace: Namespace,
    engine: EngineCapabilities,
    block_size: int,
    num_ranks: int = 1,
    num_groups: int = 1,
    registry: Registry | None = None,
) -> LeaderDriver:
    """Make and bind the leader.

    Raises:
        UnsupportedError: If connector and engine do not fit; the message says why.
        KVConnectError: If the connector cannot work as configured.
    """
    capabilities = resolved.connector.capabilities
    check_fit(resolved.name, capabilities, engine, num_ranks=num_ranks, num_groups=num_groups)
    namespace.digest(block_size)  # a model without identity is refused here, not at the first block
    context = LeaderContext(namespace=namespace, engine=engine, num_ranks=num_ranks, tiers=resolved.tiers)
    wrappers = (registry or load_registry()).load_wrappers("leader")
    leader = _make("leader", resolved, context)
    return LeaderDriver(
        leader,
        block_size=block_size,
        sync_load=engine.sync_load,
        async_load=engine.async_load,
        capabilities=capabilities,
        tier_names=[tier.name for tier in resolved.tiers],
        wrappers=wrappers,
    )


def open_worker(
    resolved: ResolvedConnector,
    *,
    namespace: Namespace,
    engine: EngineCapabilities,
    rank: int = 0,
    num_ranks: int = 1,
    local_ranks: int = 1,
    registry: Registry | None = None,
) -> WorkerDriver:
    """Make and bind one rank's worker.

    Raises:
        KVConnectError: If the connector cannot work as configured.
    """
    context = WorkerContext(
        namespace=namespace,
        engine=engine,
        rank=rank,
        num_ranks=num_ranks,
        local_ranks=local_ranks,
        tiers=resolved.tiers,
    )
    wrappers = (registry or load_registry()).load_wrappers("worker")
    worker = _make("worker", resolved, context)
    return WorkerDriver(worker, rank=rank, wrappers=wrappers)


def _make(half: str, resolved: ResolvedConnector, context: Any) -> Any:
    try:
        return getattr(resolved.connector, f"make_{half}")(resolved.options, context)
    except KVConnectError:
        raise
    except Exception as error:
        raise PluginError(f"{half} of {resolved.name!r} cannot be made: {type(error).__name__}: {error}") from error


def open_connector(
    connector: Any,
    layouts: Sequence[KVCacheLayout],
    *,
    namespace: Namespace,
    engine: EngineCapabilities,
    registry: Registry | None = None,
) -> tuple[LeaderDriver, list[WorkerDriver]]:
    """Open both halves in one process, register every rank's cache, and shake hands.

    Args:
        connector: What ``connector=`` takes, or what it was resolved to.
        layouts: One per rank.
        namespace: What the keys start with.
        engine: What the engine can do.
        registry: Known plugins; discovered if None.

    Raises:
        KVConnectError: If anything does not fit; what was opened is closed again.
    """
    registry = registry or load_registry()
    resolved = connector if isinstance(connector, ResolvedConnector) else registry.resolve(connector)
    count = len(layouts)
    leader = open_leader(
        resolved,
        namespace=namespace,
        engine=engine,
        block_size=layouts[0].groups[0].block_size,
        num_ranks=count,
        num_groups=len(layouts[0].groups),
        registry=registry,
    )
    workers: list[WorkerDriver] = []
    try:
        for rank, layout in enumerate(layouts):
            worker = open_worker(
                resolved,
                namespace=namespace,
                engine=engine,
                rank=rank,
                num_ranks=count,
                local_ranks=count,
                registry=registry,
            )
            workers.append(worker)
            worker.register_kv_caches(layout)
    except BaseException:
        leader.shutdown()
        for worker in workers:
            worker.shutdown()
        raise
    leader.set_handshake_metadata([worker.get_handshake_metadata() for worker in workers])
    return leader, workers
