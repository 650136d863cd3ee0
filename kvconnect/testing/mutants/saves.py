"""Mutants that save too early, too late, too little, or what never was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from kvconnect.leader import OffloadLeader
from kvconnect.leader.index import State
from kvconnect.leader.ledger import OpenStep
from kvconnect.protocol import Report
from kvconnect.testing.mutants.base import Right, leader, mutant
from kvconnect.testing.saves import SaveTests
from kvconnect.worker import OffloadWorker

__all__: list[str] = []

_build = OffloadLeader.build_connector_meta
_update = OffloadLeader.update_connector_output


def _commit_all(self: Any, scheduler_output: Any) -> bytes:
    meta = _build(self, scheduler_output)
    for entry in list(self._index._by_slot.values()):
        if entry.state is State.RESERVED:
            self._index.commit(entry)
    return meta


@mutant(SaveTests.test_block_is_visible_only_when_its_step_is_reported, "commit when the report")
class CommitsWhenItPlans(Right):
    """Offers a block before its bytes are written."""

    leader = leader(build_connector_meta=_commit_all)


def _without_errors(reports: Sequence[bytes], ranks: range) -> list[bytes]:
    clean = []
    for rank, data in enumerate(reports):
        report = Report.decode(data) if data else Report(step=-1, rank=rank)
        clean.append(msgspec.structs.replace(report, load_errors=(), error="").encode() if rank in ranks else data)
    return clean


@mutant(SaveTests.test_nothing_computed_on_a_failed_load_is_committed, "the commit rule")
@mutant(SaveTests.test_save_that_failed_on_a_rank_is_never_offered, "failed on rank 0")
class CommitsOnAFailedLoad(Right):
    """Commits what was computed in a step whose load failed."""

    leader = leader(update_connector_output=lambda self, reports: _update(self, _without_errors(reports, range(9))))


@mutant(SaveTests.test_nothing_computed_on_a_failed_load_is_committed, "the commit rule", parameters={"rank": 1})
@mutant(SaveTests.test_save_that_failed_on_a_rank_is_never_offered, "failed on rank 1", parameters={"rank": 1})
class ListensToRankZero(Right):
    """Commits what was computed in a step whose load failed on another rank."""

    leader = leader(update_connector_output=lambda self, reports: _update(self, _without_errors(reports, range(1, 9))))


def _void_one_step(self: Any, reports: Sequence[bytes]) -> None:
    _update(self, reports)
    for state in self._requests.values():
        state.void_until = -1  # the steps that were planned by then count again


@mutant(SaveTests.test_nothing_computed_on_a_failed_load_is_committed, "the commit rule")
class VoidsOneStep(Right):
    """Voids the step whose load failed, and commits those that were planned on it."""

    leader = leader(update_connector_output=_void_one_step)


@mutant(SaveTests.test_nothing_computed_on_a_shared_page_of_a_failed_load_is_committed, "not only the one that loaded")
class VoidsOnlyWhoLoaded(Right):
    """Commits what others computed on a page whose load failed."""

    def make_leader(self, options: Any, context: Any) -> Any:
        made = super().make_leader(options, context)
        opens = made._ledger.open

        def open_step(step: int) -> Any:
            opened = opens(step)
            made._ledger._open[step] = forgetful = Forgetful(step, opened.waiting)
            return forgetful

        class Forgetful(OpenStep):
            def bad_blocks(self) -> list[Any]:
                return []

        made._ledger.open = open_step
        return made


def _planning(change: Any) -> type[OffloadLeader]:
    """Return a leader that plans saves of ``change(state, scheduled)``; None plans none."""

    def set_handshake_metadata(self: Any, per_rank: Any) -> None:
        OffloadLeader.set_handshake_metadata(self, per_rank)
        plan = self._saves.plan

        def changed(draft: Any, state: Any, scheduled: Any) -> None:
            part = change(state, scheduled)
            if part is not None:
                plan(draft, state, part)

        self._saves.plan = changed

    return leader(set_handshake_metadata=set_handshake_metadata)


def _only_new(state: Any, scheduled: Any) -> Any:
    seen, state.loads_below = state.loads_below, True
    return None if seen else scheduled


@mutant(SaveTests.test_chunks_and_decoded_blocks_are_saved, "tokens loaded of prompt and answer")
class ForgetsLaterChunks(Right):
    """Saves what the first step of a request computes, as if there were no chunks."""

    leader = _planning(_only_new)


def _prompt_only(state: Any, scheduled: Any) -> Any:
    state.first = state.first or scheduled.num_tokens
    return scheduled if scheduled.num_computed_tokens < 19 else None  # the prompt of the kit's test


@mutant(SaveTests.test_chunks_and_decoded_blocks_are_saved, "tokens loaded of prompt and answer")
class ForgetsDecodedBlocks(Right):
    """Saves the prompt's blocks, and none of the answer's."""

    leader = _planning(_prompt_only)


def _whole_blocks(state: Any, scheduled: Any) -> Any:
    begun = -scheduled.num_computed_tokens % 4
    state.next_save = None
    return msgspec.structs.replace(
        scheduled,
        num_computed_tokens=scheduled.num_computed_tokens + begun,
        num_scheduled_tokens=scheduled.num_scheduled_tokens - begun,
    )


@mutant(SaveTests.test_chunks_and_decoded_blocks_are_saved, "tokens loaded of prompt and answer")
class DropsPartsOfBlocks(Right):
    """Saves whole blocks of each chunk, and drops a block that two chunks fill together."""

    leader = _planning(_whole_blocks)


class _CopiesWhenFull(OffloadWorker):
    """Keeps a copy of every page that is full at the end of a step, for the plan that will name it."""

    def wait_for_save(self) -> None:
        before: dict[int, Any] = self.__dict__.get("_full", {})
        planned = {move.slot: move.target for move in self._now.saves}
        super().wait_for_save()
        for slot, page in planned.items():
            for (slots, _), words in zip(self._copiers[0]._words or (), before.get(page, ()), strict=False):
                slots[slot] = words
        self._full = {}
        regions = self._layout.groups[0].regions  # type: ignore[union-attr]
        for page in range(regions[0].tensor.shape[0]):
            if not any(math.isnan(float(region.tensor[page].sum())) for region in regions):
                self._full[page] = [pages[page].copy() for _, pages in self._copiers[0]._words or ()]


@mutant(SaveTests.test_tokens_that_were_not_accepted_are_not_saved, "it is position 7|bytes of nothing known")
class SavesBeforeTokensAreAccepted(Right):
    """Copies a block when its positions are filled, and names it by the tokens that are accepted in the end."""

    worker = _CopiesWhenFull


class _SavesLate(OffloadWorker):
    def wait_for_save(self) -> None:
        self._late = self._now.take("saves")

    def build_worker_report(self) -> bytes:
        report = super().build_worker_report()
        for move in self.__dict__.get("_late", ()):
            self._held[move.slot] = (move.group, move.block_hash, self._orders[move.group])
        return report

    def bind_connector_meta(self, meta: bytes) -> None:
        for move in self.__dict__.get("_late", ()):
            self._copiers[move.group].gather([move.target], [move.slot])
        self._late = []
        super().bind_connector_meta(meta)


@mutant(SaveTests.test_pages_are_the_engines_again_after_wait_for_save, "nobody wrote it|it is position")
class SavesAfterTheStep(Right):
    """Reads the pages after `wait_for_save` has returned."""

    worker = _SavesLate


def _keep_claims(self: Any, state: Any) -> None:
    self._lookup.forget(state.request_id)
    self._traffic.forget(state)
    state.loads = []


@mutant(SaveTests.test_full_cache_takes_new_blocks, "still holds its blocks")
class LeaksAClaim(Right):
    """Forgets to release what an aborted request had claimed."""

    leader = leader(_drop=_keep_claims)


def _never_evict(self: Any, per_rank: Any) -> None:
    OffloadLeader.set_handshake_metadata(self, per_rank)
    self._index._evict = lambda: False


@mutant(SaveTests.test_full_cache_takes_new_blocks, "tokens loaded of prompt")
class NeverEvicts(Right):
    """Keeps what came first, for ever."""

    leader = leader(set_handshake_metadata=_never_evict)
