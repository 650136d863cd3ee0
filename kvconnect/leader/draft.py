"""One step's plan while it is being made, together with what the ledger must remember of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvconnect.leader.index import Entry
from kvconnect.leader.ledger import OpenStep
from kvconnect.leader.request import PlannedLoad, PlannedSave, RequestState
from kvconnect.protocol import Move, PackedMoves, Plan
from kvconnect.protocol.messages import pack_ints

__all__ = ["PlanDraft"]


class PlanDraft:
    """Collects moves, numbers the requests that they belong to, and becomes a `Plan`."""

    def __init__(self, opened: OpenStep) -> None:
        """Start an empty plan for a step that the ledger has opened."""
        self.opened = opened
        self.num_loads = 0
        self.num_fails = 0
        self._ids: dict[str, int] = {}
        self._loads: list[Move] = []
        self._fails: list[Move] = []
        self._saves: list[Move] = []

    def load(self, state: RequestState, planned: Sequence[PlannedLoad]) -> None:
        """Add loads; those without an entry are named as failed. Claims on entries end with the step."""
        if not planned:
            return
        request = self._ids.setdefault(state.request_id, len(self._ids))
        for load in planned:
            slot, moves = (-1, self._fails) if load.entry is None else (load.entry.slot, self._loads)
            moves.append(Move(load.block_hash, load.group, slot, load.block_id, request, load.ordinal))
        self.opened.loads.append((state, planned))
        self.num_loads, self.num_fails = len(self._loads), len(self._fails)

    def begin_saves(self, state: RequestState) -> list[PlannedSave]:
        """Return the list of the request's saves in this step; what is in it is committed or voided with the step.

        It is the ledger's before the first slot is taken, so that none is lost if planning raises.
        """
        planned: list[PlannedSave] = []
        self.opened.saves.append((state, planned))
        return planned

    def save(self, state: RequestState, entry: Entry, page: int, ordinal: int) -> None:
        """Add the move of a save: page to slot."""
        request = self._ids.setdefault(state.request_id, len(self._ids))
        self._saves.append(Move(entry.block_hash, entry.group, entry.slot, page, request, ordinal))

    def encode(
        self,
        *,
        parked: Iterable[str],
        ends: Sequence[str],
        saved: Iterable[str],
        drops: Sequence[Move],
        unused: Sequence[int],
    ) -> bytes:
        """Return the plan's bytes; see `Plan` for the arguments."""
        return Plan(
            step=self.opened.step,
            request_ids=tuple(self._ids),
            saves=PackedMoves.pack(self._saves),
            loads=PackedMoves.pack(self._loads),
            promotes=PackedMoves.pack(self.opened.promotes),
            demotes=PackedMoves.pack(self.opened.demotes),
            drops=PackedMoves.pack(drops),
            fails=PackedMoves.pack(self._fails),
            parked=tuple(parked),
            ends=tuple(ends),
            saved=tuple(saved),
            unused=pack_ints(unused),
        ).encode()
