"""Mutants that forget what they must keep, or keep what they must forget; and those that fit no engine."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import Finished, Match, Report
from kvconnect.testing.fit import FitTests
from kvconnect.testing.life import LifeTests
from kvconnect.testing.mutants.base import Right, leader, mutant, worker
from kvconnect.testing.mutants.stores import FolderStore
from kvconnect.testing.saves import SaveTests
from kvconnect.testing.schedules import ScheduleTests
from kvconnect.worker import OffloadWorker

__all__: list[str] = []

_ask = OffloadLeader.get_num_new_matched_tokens
_END = LifeTests.test_request_may_end_before_its_plan


def _keep_loads(self: Any, state: Any) -> None:
    self._lookup.forget(state.request_id)
    self._traffic.forget(state)
    self.__dict__.setdefault("_orphans", []).append((state, state.loads))
    state.loads = []


def _plan_orphans(self: Any, draft: Any) -> None:
    for state, loads in self.__dict__.pop("_orphans", ()):
        draft.load(state, loads)
    OffloadLeader._plan_loads(self, draft)


@mutant(_END, "pages written for a request that is gone")
@mutant(_END, "pages written for a request that is gone", parameters={"ending": "reset"})
class LoadsForTheGone(Right):
    """Makes the loads of a request that was aborted before its plan, into pages that are somebody else's by now."""

    leader = leader(_drop=_keep_loads, _plan_loads=_plan_orphans)


@mutant(LifeTests.test_reset_request_runs_again_like_a_new_one, "drop its loads in request_reset")
class IgnoresRequestReset(Right):
    """Goes on with what it knew of the pages that the request has lost."""

    leader = leader(request_reset=lambda self, request: None)


def _take_unbound(self: Any, reports: Sequence[bytes]) -> None:
    taken = []
    for data in reports:
        report = Report.decode(data)
        if report.step < 0:
            report = msgspec.structs.replace(report, step=report.unbound_step, error="")
        taken.append(report.encode())
    OffloadLeader.update_connector_output(self, taken)


@mutant(LifeTests.test_lost_plan_is_survived, "whose plan was lost|load errors|tokens loaded")
class CommitsWithoutAPlan(Right):
    """Takes the report of a worker that never got its plan for one that carried it out."""

    leader = leader(update_connector_output=_take_unbound)


@mutant(LifeTests.test_reset_cache_forgets_everything, "tokens offered from before")
class ForgetsNothing(Right):
    """Says that it has reset the cache, and goes on."""

    leader = leader(reset_cache=lambda self: True)


def _forget_the_arena(self: Any) -> bool:
    self._index.clear()
    return True


@mutant(LifeTests.test_reset_cache_forgets_everything, "tokens offered from before", over=[FolderStore])
class ForgetsTheArenaOnly(Right):
    """Resets what is in memory, and finds the old blocks in its store again."""

    leader = leader(reset_cache=_forget_the_arena)


def _leave_a_thread(self: Any) -> None:
    OffloadWorker.shutdown(self)
    threading.Thread(target=time.sleep, args=(5,), daemon=True, name="forgotten").start()


@mutant(LifeTests.test_nothing_is_left_after_shutdown, "forgotten")
class LeavesAThread(Right):
    """Leaves a thread running after `shutdown`."""

    worker = worker(shutdown=_leave_a_thread)


def _own_epoch(self: Any, per_rank: Any) -> None:
    OffloadLeader.set_handshake_metadata(self, per_rank)
    self._epoch = self._epoch or secrets.token_bytes(16)


@mutant(LifeTests.test_reopened_connector_has_what_it_promises, "loaded by a new instance", over=[FolderStore])
@mutant(LifeTests.test_instances_share_what_they_promise, "loaded by the other instance", over=[FolderStore])
class KeysItsOwnLife(Right):
    """Mixes something of the instance into its keys: declared durable and shared, it is neither."""

    leader = leader(set_handshake_metadata=_own_epoch)


# -- engines that can more or less ---------------------------------------------------------------------------------


class _NamesTwice(OffloadWorker):
    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        finished = super().get_finished(finished_req_ids)
        before: frozenset[str] = self.__dict__.get("_before", frozenset())
        self._before = finished.loaded
        return finished._replace(loaded=finished.loaded | before)


@mutant(FitTests.test_asynchronous_load_is_reported_once, "once a rank; got rank 0 named", over=[FolderStore])
class ReportsAnIdTwice(Right):
    """Names a request as loaded in two steps."""

    worker = _NamesTwice


class _NamesAnybody(OffloadWorker):
    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        finished = super().get_finished(finished_req_ids)
        return finished._replace(saved=finished.saved | {"r0"})


@mutant(FitTests.test_asynchronous_load_is_reported_once, "named r0", over=[FolderStore])
class ReportsAnIdItWasNeverGiven(Right):
    """Names a request as saved that nobody waits for."""

    worker = _NamesAnybody


class _NamesNobody(OffloadWorker):
    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        return super().get_finished(finished_req_ids)._replace(loaded=frozenset(), failed=frozenset())


@mutant(FitTests.test_asynchronous_load_is_reported_once, "get_finished to name", over=[FolderStore])
class NeverReportsAnId(Right):
    """Loads, and never says so."""

    worker = _NamesNobody


class _LoadsAStepLate(OffloadWorker):
    def start_load_kv(self) -> None:
        late, self._late = self.__dict__.get("_late", []), self._now.take("loads")
        super().start_load_kv()
        self._load(late)


@mutant(FitTests.test_asynchronous_load_is_reported_once, "nobody wrote it", over=[FolderStore])
class LetsGoWhileALoadIsInFlight(Right):
    """Names a request as loaded while its pages are still being written."""

    worker = _LoadsAStepLate


class _LetsGoAtOnce(OffloadLeader):
    def request_finished(self, request: Any, block_ids: Any) -> bool:
        if request.request_id not in self._parked:
            return super().request_finished(request, block_ids)
        self._requests.pop(request.request_id)
        self.__dict__.setdefault("_gone", {})[request.request_id] = False
        return False

    def _plan_parked(self, draft: Any) -> list[str]:
        gone: dict[str, bool] = self.__dict__.get("_gone", {})
        ends = [name for name in super()._plan_parked(draft) if not gone.get(name)]
        now = [name for name, named in gone.items() if not named and name not in ends]
        gone.update(dict.fromkeys((*now, *ends), True))
        return ends + now


@mutant(
    FitTests.test_aborted_load_touches_no_page_after_it_is_reported,
    "pages written after the report",
    over=[FolderStore],
)
class LetsGoOfAnAbortedLoadAtOnce(Right):
    """Names an aborted request as loaded at once, while its load goes on."""

    leader = _LetsGoAtOnce


class _Swallows(OffloadWorker):
    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        return super().get_finished(finished_req_ids)._replace(failed=frozenset())

    def get_block_ids_with_load_errors(self) -> list[set[int]]:
        return [set() for _ in super().get_block_ids_with_load_errors()]


@mutant(FitTests.test_load_that_fails_is_said_to_have_failed, "nobody wrote it", over=[FolderStore])
class SwallowsALoadError(Right):
    """Logs that a load failed, and does not tell the engine."""

    worker = _Swallows


def _parks(self: Any, request: Any, num_computed_tokens: int) -> Match:
    count = _ask(self, request, num_computed_tokens).num_tokens
    return Match(count, bool(count))


@mutant(FitTests.test_undeclared_asynchronous_load_is_never_offered, "load_async of the offer")
class ParksUndeclared(Right):
    """Offers asynchronous loads without declaring that it can."""

    capabilities = msgspec.structs.replace(Right.capabilities, async_load=False)
    leader = leader(get_num_new_matched_tokens=_parks)


_LACKS = FitTests.test_engine_that_lacks_something_is_served_or_refused


def _hesitates(self: Any, request: Any, num_computed_tokens: int) -> Match:
    first = request.request_id not in self.__dict__.setdefault("_asked", set())
    self._asked.add(request.request_id)
    return Match(None, False) if first else _ask(self, request, num_computed_tokens)


@mutant(_LACKS, "this engine does not ask again", parameters={"missing": "can_ask_again"})
class AlwaysAsksForTime(Right):
    """Asks an engine for time that asks once."""

    leader = leader(get_num_new_matched_tokens=_hesitates)


@mutant(_LACKS, "cannot park|wrong positions|tokens", parameters={"missing": "can_ask_again"})
class AlwaysParks(Right):
    """Offers an engine asynchronous loads that cannot park a request."""

    leader = leader(get_num_new_matched_tokens=_parks)


def _in_the_step(self: Any, request: Any, num_computed_tokens: int) -> Match:
    return Match(_ask(self, request, num_computed_tokens).num_tokens, False)


@mutant(FitTests.test_engine_without_loads_in_a_step_is_offered_parked_ones_or_refused, "could not take it back")
class LoadsInTheStep(Right):
    """Offers loads within a step to an engine that could not take them back."""

    leader = leader(get_num_new_matched_tokens=_in_the_step)


_EVENTS = FitTests.test_events_tell_once_what_can_be_loaded


def _wrong_tokens(self: Any) -> Any:
    return [
        msgspec.structs.replace(event, tokens=[0] * len(event.tokens)) if hasattr(event, "tokens") else event
        for event in OffloadLeader.take_events(self)
    ]


@mutant(_EVENTS, "prefix told of")
class TellsOfNobodysTokens(Right):
    """Tells of blocks with other tokens than theirs."""

    leader = leader(take_events=_wrong_tokens)


def _tell_again(self: Any) -> Any:
    self._told = [*self.__dict__.get("_told", ()), *OffloadLeader.take_events(self)]
    return list(self._told)


@mutant(_EVENTS, "events told twice")
class TellsTwice(Right):
    """Gives out the same events again."""

    leader = leader(take_events=_tell_again)


def _listening(self: Any, options: Any, context: Any) -> Any:
    engine = msgspec.structs.replace(context.engine, takes_events=True)
    return self.leader(msgspec.structs.replace(context, engine=engine))


@mutant(_EVENTS, "does not listen", parameters={"listens": False})
class TellsWhoDoesNotListen(Right):
    """Collects events for an engine that never takes them."""

    make_leader = _listening


# -- schedules -----------------------------------------------------------------------------------------------------


def _evict_claimed(self: Any, per_rank: Any) -> None:
    OffloadLeader.set_handshake_metadata(self, per_rank)
    index = self._index
    claim = index.claim

    def careless(entry: Any) -> None:
        claim(entry)
        index._evictable.offer(entry.key, entry.priority)

    index.claim = careless


@mutant(
    SaveTests.test_frames_stay_as_they_are_while_they_are_written,
    "given away while|a claimed block was evicted",
    over=[FolderStore],
)
class EvictsAClaimedBlock(Right):
    """Evicts a block that is on its way to a store, and fills its slot with another."""

    leader = leader(set_handshake_metadata=_evict_claimed)


class _FillsTwice(OffloadWorker):
    """Believes that a slot is filled when it was planned before."""

    def wait_for_save(self) -> None:
        known = self.__dict__.setdefault("_filled", set())
        again = [move for move in self._now.saves if move.slot in known]
        known |= {move.slot for move in self._now.saves}
        self._now.saves = [move for move in self._now.saves if move not in again]
        super().wait_for_save()
        for move in again:
            self._held[move.slot] = (move.group, move.block_hash, self._orders[move.group])


@mutant(ScheduleTests.test_arena_smaller_than_a_prompt_is_enough, "to read what was computed", parameters={"seed": 3})
class FillsASlotOnce(Right):
    """Does not fill a slot again that was given to another block."""

    worker = _FillsTwice


class _ReadsOnePageOff(OffloadWorker):
    def wait_for_save(self) -> None:
        saves = self._now.saves
        if len({move.request for move in saves}) > 1:  # only where two requests save in one step
            targets = [move.target for move in saves]
            self._now.saves = [
                move._replace(target=target) for move, target in zip(saves, [*targets[1:], targets[0]], strict=True)
            ]
        super().wait_for_save()


@mutant(ScheduleTests.test_any_schedule_reads_right_bytes, "to read what was computed|hook")
class MixesUpRequestsThatSaveTogether(Right):
    """Mixes up pages when two requests save in one step."""

    worker = _ReadsOnePageOff
