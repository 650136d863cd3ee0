"""The protocol: every hook, in the order of its life. One declaration serves pluggy and the type checker.

Leader hooks run where the scheduler runs and never touch a tensor; worker hooks run beside the model. Engines call a
driver (`kvconnect.driver`), never a hook. Each docstring ends with who calls, when, whether it may block, and what a
failure means. Exactly one implementation beside wrappers; an implementation has no default values in its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pluggy

from kvconnect.protocol.events import CacheEvent
from kvconnect.protocol.layout import KVCacheLayout
from kvconnect.protocol.types import Finished, Match, RequestView, SchedulerOutput

__all__ = ["LeaderHooks", "RegistrationHooks", "WorkerHooks", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("kvconnect")
hookimpl = pluggy.HookimplMarker("kvconnect")


class RegistrationHooks(Protocol):
    """What a plugin implements to be found."""

    @hookspec
    def kvconnect_register(self, registry: Any) -> None:
        """Tell `registry` what this plugin brings: `add(name, "module:Class", schemes=(...))`, `add_wrapper(...)`.

        Args:
            registry: A `kvconnect.registry.Registrar` bound to this plugin.

        Runs: any process that opens or lists connectors.
        When: at discovery, before anything of ours imports torch; import nothing heavy here.
        May block: no.
        On failure: the plugin is left out, and asking for a name that it might have brought says so.
        """
        ...


class LeaderHooks(Protocol):
    """The scheduler-side half."""

    @hookspec(firstresult=True)
    def set_handshake_metadata(self, per_rank: Sequence[bytes]) -> None:
        """Take what each rank's worker said of its cache.

        Until every rank has spoken and all agree, the leader offers nothing; if they disagree it stays so, and says
        why in `get_stats`.

        Args:
            per_rank: `get_handshake_metadata` of rank 0, 1, ...

        Runs: scheduler process.
        When: once, after `register_kv_caches` on every rank, before the first request.
        May block: yes; start-up.
        On failure: the connector is off.
        """
        ...

    @hookspec(firstresult=True)
    def on_new_request(self, request: RequestView) -> None:
        """Learn of a request; a good moment to start hashing and looking up.

        Runs: scheduler process.
        When: on arrival, once an id.
        May block: no; linear in the prompt.
        On failure: counted; the request runs without the connector.
        """
        ...

    @hookspec(firstresult=True)
    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> Match:
        """Say how many more tokens could be loaded instead of computed.

        Counts from `num_computed_tokens` on: tokens already on the device are not included. May be asked dozens of
        times for one request, with shrinking `num_computed_tokens` and no allocation between. Asking may start a lookup
        or a promotion, but changes no claim, offer or slot.

        Args:
            request: `request.tokens` are all tokens known now.
            num_computed_tokens: Tokens whose KV is on the device; if it is no multiple of the block size, answer 0.

        Returns:
            Whole blocks that continue the computed prefix without a gap and leave at least one token to compute.
            ``Match(0, False)`` for nothing, ``Match(None, False)`` for "ask again next step", never None or
            ``(0, True)``.

        Runs: scheduler process.
        When: before allocation, each time the request might be scheduled.
        May block: no; stay under 100 µs beside the hashing of new tokens.
        On failure: counted and treated as no match.
        """
        ...

    @hookspec(firstresult=True)
    def claim_match(self, request: RequestView, num_tokens: int) -> int:
        """Hold what was offered so that nothing evicts it before `update_state_after_alloc` or `release_match`.

        Of an asynchronous offer, what still lies in a store need not be held: such a load may fail, and is recomputed.

        Args:
            request: The request that was asked about last.
            num_tokens: The offer, or less of it.

        Returns:
            Tokens that are held: `num_tokens` or less, whole blocks.

        Runs: scheduler process.
        When: after the ask, for a whole batch before anything is allocated; capability `batch_claim`.
        May block: no.
        On failure: counted; nothing is held.
        """
        ...

    @hookspec(firstresult=True)
    def release_match(self, request: RequestView) -> None:
        """Let go of what `claim_match` held; absent is fine.

        Runs: scheduler process.
        When: if the claimed request is not allocated after all.
        May block: no.
        On failure: counted.
        """
        ...

    @hookspec(firstresult=True)
    def update_state_after_alloc(
        self, request: RequestView, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        """Learn which pages the request got, and how much of the offer the engine takes.

        Args:
            request: The request that was asked about.
            block_ids: For each layer group, all pages of the request: those found on the device, then those to load
                into, then the rest, as far as the engine has taken it by now: one that waits for a load may take it
                afterwards. -1 = no page; skip it.
            num_external_tokens: Tokens to load, from the computed ones on; 0 loads nothing; may be less than offered.

        Runs: scheduler process.
        When: after allocation, once an allocation; not for a request that goes on in its pages after a reset.
        May block: no.
        On failure: counted; the engine computes these tokens.
        """
        ...

    @hookspec(firstresult=True)
    def cancel_load(self, request: RequestView, start: int, end: int) -> None:
        """Learn that offered tokens ``[start, end)`` (absolute positions, a head or a tail) will not be used.

        Runs: scheduler process.
        When: between the offer and the plan, or best effort while an asynchronous load runs.
        May block: no.
        On failure: counted.
        """
        ...

    @hookspec(firstresult=True)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> bytes:
        """Emit the plan of this step, for every worker.

        Called every step, an empty one too; plans of step N+1 may be built before the reports of step N. A plan is
        applied once.

        Runs: scheduler process.
        When: after scheduling, before the forward pass.
        May block: no.
        On failure: counted; the step runs with an empty plan, and its loads are reported as failed.
        """
        ...

    @hookspec(firstresult=True)
    def update_connector_output(self, reports: Sequence[bytes]) -> None:
        """Take what every rank reported of one step; here saves are committed or voided.

        A load that failed makes garbage of what its request computed on it, and of what any other request computed that
        has the block in its prefix: an engine may share a page before its load has ended.

        Args:
            reports: `build_worker_report` of rank 0, 1, ...; an empty one if that rank's hook failed, and a
                `Report.unbound` if its plan never reached it.

        Runs: scheduler process.
        When: after each step, in the order of the steps; the next one may be planned by then, and have run.
        May block: no.
        On failure: counted; what was not committed stays invisible.
        """
        ...

    @hookspec(firstresult=True)
    def request_finished(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Learn that a request ended.

        Returns:
            True if its pages are still needed: the engine frees them once every rank has reported the id as saved. It
            may free them without that 30 seconds after its next step, so read them in the next plan or never.

        Runs: scheduler process.
        When: once, after its last step.
        May block: no.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def request_reset(self, request: RequestView) -> None:
        """Learn that the request begins again: it lost its pages, or goes on in them from the first block that is bad.

        The next plan that has a part for it names it as new, from wherever it stands; it may be asked about before.

        Runs: scheduler process.
        When: on preemption, and after a load or a step that failed.
        May block: no.
        On failure: counted; the request goes on without the connector.
        """
        ...

    @hookspec(firstresult=True)
    def suspend(self, request: RequestView, block_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
        """Plan to move all pages of the request below the device, the partial one included.

        What is below may move further down, but is never dropped, until the request is resumed, reset or finished.

        Args:
            request: A request that computed its last step, with all its tokens.
            block_ids: Its pages, by group; they stay its own until they are reported.
            num_tokens: Tokens whose KV is in the pages.

        Returns:
            False if there is no room; then nothing has changed. Pages are free when `get_finished` reports the id as
            saved.

        Runs: scheduler process.
        When: between steps, all of them reported; capability `suspend`.
        May block: no.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def prefetch(self, request: RequestView, tier: int) -> bool:
        """Move a suspended request's blocks that lie below `tier` up to it, all of them, from the next step on.

        Args:
            request: A suspended one.
            tier: 0 for host memory, then the stores in the order given.

        Returns:
            False if there is no room, or no such tier that keeps suspended blocks; then nothing has changed.

        Runs: scheduler process.
        When: between steps, only while suspended; capability `suspend`.
        May block: no.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def resume(self, request: RequestView, block_ids: Sequence[Sequence[int]]) -> bool:
        """Plan to load the blocks of a suspended request, like an asynchronous load: `get_finished` names its end.

        A block that is lost all the same is reported as a load error. With nothing to load it is resumed at once.

        Args:
            request: A suspended one, its pages reported as saved.
            block_ids: Its new pages, by group; -1 for a block that needs no load.

        Returns:
            False if it cannot be resumed now; then nothing has changed.

        Runs: scheduler process.
        When: between steps, only while suspended; capability `suspend`.
        May block: no.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def resize_tier(self, tier: int, num_bytes: int) -> bool:
        """Grow or shrink a tier; blocks that do not fit are evicted, those of suspended requests never.

        Args:
            tier: 0 for host memory, then the stores in the order given.
            num_bytes: Its new size, for the whole engine.

        Returns:
            False if what may not be evicted does not fit, or the tier has no other size; then all is as it was.

        Runs: scheduler process.
        When: while no request runs; capability `suspend`.
        May block: yes, up to the store's deadline.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def has_pending_work(self) -> bool:
        """Say whether the engine should keep stepping although it has no tokens to compute.

        Runs: scheduler process.
        When: whenever the engine would go idle.
        May block: no.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def take_events(self) -> Sequence[CacheEvent]:
        """Give out what was stored and removed since the last call, once; nothing unless the engine `takes_events`.

        Runs: scheduler process.
        When: after a step.
        May block: no.
        On failure: counted; the events are lost.
        """
        ...

    @hookspec(firstresult=True)
    def get_stats(self) -> dict[str, Any]:
        """Return counters and gauges by name: numbers that only grow, and a few that say how things stand.

        Runs: scheduler process.
        When: any time.
        May block: no.
        On failure: counted; an empty mapping.
        """
        ...

    @hookspec(firstresult=True)
    def reset_cache(self) -> bool:
        """Make everything saved so far unmatchable for this engine, as after new weights.

        Runs: scheduler process.
        When: between steps.
        May block: no.
        On failure: counted and treated as False.
        """
        ...

    @hookspec(firstresult=True)
    def shutdown(self) -> None:
        """Let go of everything; twice is fine.

        Runs: scheduler process.
        When: last; engines differ in which half they shut down first.
        May block: yes, up to the stores' deadline.
        On failure: counted.
        """
        ...


class WorkerHooks(Protocol):
    """The model-runner-side half, one a rank."""

    @hookspec(firstresult=True)
    def register_kv_caches(self, layout: KVCacheLayout) -> None:
        """Learn where the paged cache lies.

        Args:
            layout: Its tensors stay valid, at the same addresses, until `shutdown`.

        Runs: worker process.
        When: once, at start.
        May block: yes; start-up.
        On failure: the engine does not start: nothing could be loaded or saved.
        """
        ...

    @hookspec(firstresult=True)
    def get_handshake_metadata(self) -> bytes:
        """Say what the leader must know of this rank's cache: block sizes, groups, shard, arena slots.

        Runs: worker process.
        When: once, after `register_kv_caches`.
        May block: no.
        On failure: the connector is off.
        """
        ...

    @hookspec(firstresult=True)
    def handle_preemptions(self, meta: bytes) -> None:
        """Make sure that no transfer still touches pages that this step hands to others.

        Runs: worker process.
        When: each step, before the plan is bound.
        May block: yes, on running copies.
        On failure: counted; the step's loads are reported as failed.
        """
        ...

    @hookspec(firstresult=True)
    def bind_connector_meta(self, meta: bytes) -> None:
        """Take the plan of the coming step.

        Runs: worker process.
        When: each step, after `handle_preemptions`.
        May block: no.
        On failure: counted; the step's loads are reported as failed.
        """
        ...

    @hookspec(firstresult=True)
    def start_load_kv(self) -> None:
        """Start the plan's loads; those that are not asynchronous are complete at `wait_for_layer_load`.

        Runs: worker process.
        When: each step, before the forward pass or after it.
        May block: no longer than the copies of synchronous loads.
        On failure: counted; the step's loads are reported as failed.
        """
        ...

    @hookspec(firstresult=True)
    def wait_for_layer_load(self, layer: int) -> None:
        """Return when `layer`'s part of every synchronous load is in the pages.

        Runs: worker process.
        When: before each layer's attention; does nothing if no load was started.
        May block: yes, on the copies.
        On failure: counted; the step's loads are reported as failed.
        """
        ...

    @hookspec(firstresult=True)
    def save_kv_layer(self, layer: int) -> None:
        """Learn that `layer`'s KV of this step is in the pages.

        Runs: worker process.
        When: after each layer's attention.
        May block: no.
        On failure: counted; nothing of this step is saved.
        """
        ...

    @hookspec(firstresult=True)
    def wait_for_save(self) -> None:
        """Return when the plan's saves have read the pages, or their reads come before any later write to them.

        Runs: worker process.
        When: each step, after the forward pass.
        May block: yes, on the copies.
        On failure: counted; nothing of this step is saved.
        """
        ...

    @hookspec(firstresult=True)
    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        """Say whose asynchronous transfers ended since the last call.

        Args:
            finished_req_ids: Requests that ended since the last call and whose pages wait for their saves.

        Runs: worker process.
        When: each step, after `wait_for_save`.
        May block: no.
        On failure: counted; nothing is reported this step.
        """
        ...

    @hookspec(firstresult=True)
    def get_block_ids_with_load_errors(self) -> list[set[int]]:
        """Return, for each layer group, the pages that this step should have loaded and did not.

        Runs: worker process.
        When: each step, after `wait_for_save`.
        May block: no.
        On failure: all loads of the step count as failed.
        """
        ...

    @hookspec(firstresult=True)
    def build_worker_report(self) -> bytes:
        """Say what became of this step's plan, and what ended since the last report.

        Runs: worker process.
        When: each step, last.
        May block: no.
        On failure: counted; the leader gets an empty report and commits nothing of the step.
        """
        ...

    @hookspec(firstresult=True)
    def get_stats(self) -> dict[str, Any]:
        """Return counters and gauges by name.

        Runs: worker process.
        When: any time.
        May block: no.
        On failure: counted; an empty mapping.
        """
        ...

    @hookspec(firstresult=True)
    def shutdown(self) -> None:
        """Let go of everything, the layout's tensors included; twice is fine.

        Runs: worker process.
        When: last.
        May block: yes, up to the stores' deadline.
        On failure: counted.
        """
        ...
