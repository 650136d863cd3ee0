"""Decides when a save may be matched: the commit rule. Knows steps, ranks and requests, no tokens.

A save is committed only when every rank has reported its step, and no rank said that the step failed, or named a load
error for the request, in that step or in one before it that was still open when the save was planned: those saves were
computed on garbage. So were those of other requests that have the block: engines share pages before their load ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvconnect.leader.index import Entry
from kvconnect.leader.request import PlannedLoad, PlannedSave, RequestState
from kvconnect.protocol.keys import BlockHash
from kvconnect.protocol.messages import Move, Report, pack_ints, unpack_ints

__all__ = ["OpenStep", "StepLedger", "StepOutcome"]


class OpenStep:
    """A planned step that not every rank has reported.

    Attributes:
        step: Its number.
        saves: What each request saves in it.
        loads: What each request loads in it.
        promotes: Its promotions.
        demotes: Its demotions.
        ended: Requests that have ended and whose last saves it has.
        computed: Requests that it computes for, and the first block of each that it computes.
        unbound: Whether a rank never got its plan.
    """

    __slots__ = (
        "computed",
        "demotes",
        "ended",
        "failed",
        "failed_slots",
        "loads",
        "promotes",
        "saves",
        "step",
        "unbound",
        "void",
        "waiting",
    )

    def __init__(self, step: int, ranks: Iterable[int]) -> None:
        """Open a step that every rank in `ranks` will report."""
        self.step = step
        self.saves: list[tuple[RequestState, list[PlannedSave]]] = []
        self.loads: list[tuple[RequestState, Sequence[PlannedLoad]]] = []
        self.promotes: list[Move] = []
        self.demotes: list[Move] = []
        self.ended: tuple[str, ...] = ()
        self.computed: dict[RequestState, int] = {}
        self.unbound = False
        self.waiting = set(ranks)
        self.failed: dict[str, int] = {}  # requests of which a load failed in this step -> the first block that did
        self.failed_slots: set[int] = set()
        self.void = False

    def fail(self, request_id: str, ordinals: Iterable[int]) -> None:
        """Note a request of which these blocks could not be loaded in this step."""
        first = min(ordinals, default=0)
        self.failed[request_id] = min(first, self.failed.get(request_id, first))

    def bad_blocks(self) -> list[tuple[int, BlockHash]]:
        """Return (ordinal, hash) of blocks that are garbage if the step is what it is, and all that stands on them."""
        bad = [
            (load.ordinal, load.block_hash)
            for request, loads in self.loads
            for load in loads
            if self.void or self.failed.get(request.request_id) == load.ordinal
        ]
        if self.void:
            for request, first in self.computed.items():
                bad += [(first, block_hash) for block_hash in request.hashes[first : first + 1]]
        return bad


class StepOutcome:
    """What a fully reported step turned into.

    Attributes:
        committed: Entries whose bytes are in their slot on every rank.
        voided: Entries to forget.
        loaded: Loads whose claims end.
        lost: Loads of a step that failed as a whole, by request.
        ended: Ended requests whose pages nothing needs any more.
    """

    __slots__ = ("committed", "ended", "loaded", "lost", "voided")

    def __init__(self) -> None:
        """Start empty."""
        self.committed: list[Entry] = []
        self.voided: list[Entry] = []
        self.loaded: list[Entry] = []
        self.lost: list[tuple[RequestState, Sequence[PlannedLoad]]] = []
        self.ended: tuple[str, ...] = ()


class StepLedger:
    """The steps that are planned and not yet fully reported, in order."""

    def __init__(self, num_ranks: int) -> None:
        """Expect reports from ranks ``[0, num_ranks)``."""
        self._ranks = range(num_ranks)
        self._open: OrderedDict[int, OpenStep] = OrderedDict()
        self._last_step = -1

    def __len__(self) -> int:
        """Return how many steps are open."""
        return len(self._open)

    def open(self, step: int) -> OpenStep:
        """Open the step that is being planned."""
        self._last_step = step
        opened = self._open[step] = OpenStep(step, self._ranks)
        return opened

    @property
    def last_step(self) -> int:
        """The step that was opened last, -1 for none."""
        return self._last_step

    def lost_report(self, rank: int, why: str, *, unbound: int | None = None) -> Report | None:
        """Return what to assume when a report of `rank` cannot be read: its step failed in everything.

        Args:
            rank: Whose report it is.
            why: What was wrong with it.
            unbound: The step, if the rank says that it never got its plan; else it is the rank's oldest open step, and
                its store traffic may have begun: its slots stay out of use until the rank names them.

        Returns:
            None if the rank has no such step open.
        """
        steps = self._open.values() if unbound is None else [self._open[unbound]] if unbound in self._open else []
        opened = next((opened for opened in steps if rank in opened.waiting), None)
        if opened is None:
            return None
        opened.unbound = opened.unbound or unbound is not None
        started = unbound is None
        return Report(
            step=opened.step,
            rank=rank,
            not_promoted=pack_ints(move.slot for move in opened.promotes),
            not_demoted=pack_ints(value for move in opened.demotes for value in (move.target, move.slot)),
            quarantined=pack_ints(move.slot for move in (*opened.promotes, *opened.demotes) if started),
            error=why or "no report",
        )

    def skipped(self, rank: int, step: int) -> bool:
        """Say whether `rank` has an open step before `step`: reports come in order, so that one will never come."""
        return any(number < step and rank in opened.waiting for number, opened in self._open.items())

    def loads_open(self, request_id: str) -> bool:
        """Say whether a step is open in which the request loads."""
        return any(request.request_id == request_id for opened in self._open.values() for request, _ in opened.loads)

    def loads_of(self, step: int, request_id: str) -> list[PlannedLoad]:
        """Return what a request loads in a step that is open; nothing for any other step or request."""
        opened = self._open.get(step)
        mine = () if opened is None else opened.loads
        return [load for request, loads in mine if request.request_id == request_id for load in loads]

    def void_open_steps(self) -> None:
        """Commit nothing of the steps that are open now."""
        for opened in self._open.values():
            opened.void = True

    def report(self, rank: int, report: Report) -> StepOutcome | None:
        """Take one rank's report of one step.

        Returns:
            The outcome if this was the last rank, else None; None also for a step that is not open.
        """
        opened = self._open.get(report.step)
        if opened is None or rank not in opened.waiting:
            return None
        opened.waiting.discard(rank)
        if report.error:
            opened.void = True
        else:
            for error in report.load_errors:
                opened.fail(error.request_id, unpack_ints(error.ordinals))
            opened.failed_slots.update(unpack_ints(report.failed_saves))
        if opened.waiting:
            return None
        del self._open[report.step]
        return self._close(opened)

    def _close(self, opened: OpenStep) -> StepOutcome:
        outcome = StepOutcome()
        for request, loads in opened.loads:
            outcome.loaded += [load.entry for load in loads if load.entry is not None]
            if opened.void:
                outcome.lost.append((request, loads))
            if opened.void or request.request_id in opened.failed:
                request.void_until = self._last_step  # later steps that are planned already stand on this one
        if opened.void:
            for request in opened.computed:
                request.void_until = self._last_step
        bad = opened.bad_blocks()
        if bad:  # pages may be shared with requests of this step, and of later ones that are planned already
            for request in {r for each in (opened, *self._open.values()) for r in each.computed}:
                if any(request.hashes[ordinal : ordinal + 1] == [block_hash] for ordinal, block_hash in bad):
                    request.void_until = self._last_step
        for request, saves in opened.saves:
            void = opened.void or opened.step <= request.void_until or request.request_id in opened.failed
            if void and saves:
                request.save_again(min(ordinal for _, ordinal in saves))
            for entry, _ in saves:
                lost = void or entry.slot in opened.failed_slots
                (outcome.voided if lost else outcome.committed).append(entry)
        if not opened.unbound:
            outcome.ended = opened.ended
        return outcome
