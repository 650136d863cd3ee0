"""A leader, and the engine and the workers played by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import (
    EngineCapabilities,
    Handshake,
    LeaderContext,
    Match,
    Move,
    Namespace,
    Plan,
    Report,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)
from kvconnect.protocol.messages import GroupHandshake, pack_ints
from kvconnect.store import Tier

SIZE = 4
ENGINE = EngineCapabilities(can_ask_again=True, load_errors="block", reports=True, handshake=True)
NONE = Match(0, False)
ASK_AGAIN = Match(None, False)


class Script:
    """A leader, and the engine's part played by hand: pages 0, 1, 2, ... for every request, one group."""

    def __init__(
        self,
        *,
        slots: int = 8,
        ranks: int = 1,
        tiers: Sequence[Tier] = (),
        windows: Sequence[int] = (0,),
        can_ask_again: bool = True,
        sync_load: bool = True,
        events: bool = False,
        **options: Any,
    ) -> None:
        engine = EngineCapabilities(
            can_ask_again=can_ask_again,
            load_errors="block",
            reports=True,
            handshake=True,
            sync_load=sync_load,
            async_load=not sync_load,
            takes_events=events,
        )
        namespace = Namespace(model="id:m", kv_dtype="float32")
        self.ranks = ranks
        self.groups = len(windows)
        self.leader = OffloadLeader(
            LeaderContext(namespace=namespace, engine=engine, num_ranks=ranks, tiers=tuple(tiers)), **options
        )
        self.shake([slots] * ranks, windows)
        self.step = 1
        self.told: dict[str, int] = {}

    def shake(self, slots: Sequence[int], windows: Sequence[int] = (0,)) -> None:
        self.leader.set_handshake_metadata(
            [
                Handshake(
                    rank=rank,
                    num_slots=count,
                    groups=tuple(GroupHandshake(SIZE, window, 2, 1024, rank) for window in windows),
                ).encode()
                for rank, count in enumerate(slots)
            ]
        )

    def view(self, name: str, tokens: Sequence[int], **fields: Any) -> RequestView:
        return RequestView(request_id=name, tokens=list(tokens), num_prompt_tokens=len(tokens), **fields)

    def arrive(self, name: str, tokens: Sequence[int], **fields: Any) -> RequestView:
        view = self.view(name, tokens, **fields)
        self.leader.on_new_request(view)
        self.told[name] = len(tokens)
        return view

    def ask(self, view: RequestView, computed: int = 0) -> Match:
        return self.leader.get_num_new_matched_tokens(view, computed)

    def alloc(self, view: RequestView, external: int) -> None:
        table = list(range(-(-len(view.tokens) // SIZE)))
        self.leader.update_state_after_alloc(view, [table] * self.groups, external)

    def plan(self, *parts: tuple[RequestView, int, int], new_tokens: Sequence[int] = ()) -> Plan:
        """Plan a step that computes ``[start, start + count)`` of each request."""
        scheduled = tuple(
            ScheduledRequest(
                request_id=view.request_id,
                num_computed_tokens=start,
                num_scheduled_tokens=count,
                num_tokens=len(view.tokens),
                new_tokens=new_tokens,
                block_ids=[list(range(-(-len(view.tokens) // SIZE)))] * self.groups,
            )
            for view, start, count in parts
        )
        output = SchedulerOutput(step=self.step, cached_requests=scheduled)
        self.step += 1
        return Plan.decode(self.leader.build_connector_meta(output))

    def report(self, plan: Plan, *, rank: int | None = None, **fields: Any) -> None:
        """Report a step, on one rank or on all."""
        ranks = range(self.ranks) if rank is None else [rank]
        reports = [Report(step=plan.step, rank=each, **fields).encode() for each in ranks]
        if rank is None:
            self.leader.update_connector_output(reports)
        else:
            padding = [Report(step=0, rank=each).encode() for each in range(self.ranks)]  # of no open step
            padding[rank] = reports[0]
            self.leader.update_connector_output(padding)

    def save(self, name: str, tokens: Sequence[int], **fields: Any) -> Plan:
        """Run one whole request; what it computed is committed when this returns."""
        view = self.arrive(name, tokens, **fields)
        plan = self.plan((view, 0, len(tokens)))
        self.report(plan)
        self.leader.request_finished(view, [])
        self.leader._check_integrity()
        return plan

    def counts(self) -> dict[str, int]:
        counted: dict[str, int] = self.leader.get_stats()["arena"]
        return counted


def slots(moves: Sequence[Move]) -> list[int]:
    return [move.slot for move in moves]


TOKENS = list(range(50, 62))  # three blocks


def wait_for(script: Script, view: RequestView) -> Match:
    """Ask again until the leader has an answer, with empty steps between as an engine would make them."""
    deadline = time.monotonic() + 10
    while (match := script.ask(view)) == ASK_AGAIN:
        assert time.monotonic() < deadline
        plan = script.plan()
        script.report(plan, promoted=pack_ints(slots(plan.promotes.unpack())))
        time.sleep(0.001)
    return match


def saved_keys(script: Script, plan: Plan) -> list[Any]:
    from kvconnect.protocol import block_key

    namespace = script.leader._namespace
    return [
        block_key(namespace, move.block_hash, move.group, rank)
        for move in plan.saves.unpack()
        for rank in range(script.ranks)
    ]
