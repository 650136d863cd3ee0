"""Mutants that work until something goes wrong around them: damage, failed steps, hanging stores, crashes, restarts."""

from __future__ import annotations

import pickle
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvconnect.errors import FrameCorrupt
from kvconnect.leader import OffloadLeader
from kvconnect.protocol import BlockKey, Match, Report
from kvconnect.store import HEADER_BYTES, open_frame
from kvconnect.testing.faults import FaultTests
from kvconnect.testing.mutants.base import Right, leader, mutant, worker
from kvconnect.testing.mutants.stores import FolderStore, KeepingFolderStore
from kvconnect.testing.restart import RestartTests
from kvconnect.testing.stateful import StatefulTests
from kvconnect.worker import OffloadWorker

__all__: list[str] = []

_WRONG = "wrong positions"

# -- damaged bytes -----------------------------------------------------------------------------------------------------


def _verifies(verify: Callable[[Any, int], None]) -> type[OffloadWorker]:
    """Return a worker that looks at frames which it has read by ``verify(frame, length)``, and no further."""

    def register_kv_caches(self: Any, layout: Any) -> None:
        def look(frame: Any, length: int) -> str:
            verify(frame, length)
            return str(frame.order)

        OffloadWorker.register_kv_caches(self, layout)
        self._transfers._verify = look

    return worker(register_kv_caches=register_kv_caches)


@mutant(FaultTests.test_damaged_medium_is_a_miss, _WRONG, over=[FolderStore], parameters={"damage": "half of it"})
@mutant(FaultTests.test_damaged_medium_is_a_miss, _WRONG, over=[FolderStore], parameters={"damage": "nothing in it"})
class ServesATornFile(Right):
    """Takes what a store has read, however long it is."""

    worker = _verifies(lambda frame, length: None)


def _has_its_length(frame: Any, length: int) -> None:
    if length != HEADER_BYTES + frame.payload_bytes:
        raise FrameCorrupt("torn")


@mutant(FaultTests.test_damaged_medium_is_a_miss, _WRONG, over=[FolderStore], parameters={"damage": "a flipped bit"})
@mutant(FaultTests.test_damaged_medium_is_a_miss, _WRONG, over=[FolderStore], parameters={"damage": "noise"})
class ServesAFlippedBit(Right):
    """Takes what has the right length, and compares no checksum."""

    worker = _verifies(_has_its_length)


def _is_a_frame(frame: Any, length: int) -> None:
    stored = frame.memory[:length]
    named = BlockKey(bytes(stored[32:104]))
    open_frame(stored, key=named, fingerprint=frame.fingerprint, payload_bytes=frame.payload_bytes)


@mutant(
    FaultTests.test_damaged_medium_is_a_miss, _WRONG, over=[FolderStore], parameters={"damage": "another one's bytes"}
)
class ServesAnothersBlock(Right):
    """Takes a frame that is whole, whichever block it names."""

    worker = _verifies(_is_a_frame)


@mutant(
    FaultTests.test_damaged_block_is_stored_again,
    "an instance that came later to be 24; got .*must not keep the block from being stored",
    over=[KeepingFolderStore],
)
class LeavesDamageInPlace(Right):
    """Does not remove what is damaged, and the store keeps what it has."""

    def register_kv_caches(self: Any, layout: Any) -> None:
        OffloadWorker.register_kv_caches(self, layout)
        self._transfers.drop = lambda tier, keys: None

    worker = worker(register_kv_caches=register_kv_caches)


def _report_without(**changes: Any) -> type[OffloadWorker]:
    """Return a worker whose reports have these fields changed."""

    def build_worker_report(self: Any) -> bytes:
        report = Report.decode(OffloadWorker.build_worker_report(self))
        return msgspec.structs.replace(report, **changes).encode()

    return worker(build_worker_report=build_worker_report)


@mutant(
    FaultTests.test_damaged_medium_is_a_miss,
    r"an answer within 1 s; got Match\(None, False\), again and again",
    over=[FolderStore],
    parameters={"damage": "more of it"},
)
class HangsOnADamagedBlock(Right):
    """Tells of blocks that came up, and not of those that were damaged."""

    worker = _report_without(not_promoted=b"")


def _report_or_raise(self: Any) -> bytes:
    report = OffloadWorker.build_worker_report(self)
    if self._transfers.failures:
        raise OSError("the store has failed")
    return report


_RAISED = "worker.build_worker_report .*: OSError: the store has failed"


@mutant(FaultTests.test_medium_that_vanishes_is_survived, _RAISED, over=[FolderStore])
@mutant(FaultTests.test_full_disk_is_survived, "on a full disk to be 0; got 1.*no hook to raise", over=[FolderStore])
@mutant(FaultTests.test_damaged_medium_is_a_miss, _RAISED, over=[FolderStore], parameters={"damage": "noise"})
class RaisesWhenItsStoreFails(Right):
    """Raises into the engine what went wrong in a store."""

    worker = worker(build_worker_report=_report_or_raise)


# -- steps, plans and reports that fail --------------------------------------------------------------------------------


def _believes(repair: Callable[[Any, int, bytes], bytes]) -> type[OffloadLeader]:
    """Return a leader that takes ``repair(self, rank, report)`` for each report."""

    def update_connector_output(self: Any, reports: Sequence[bytes]) -> None:
        repaired = [repair(self, rank, report) for rank, report in enumerate(reports)]
        OffloadLeader.update_connector_output(self, repaired)

    return leader(update_connector_output=update_connector_output)


class Trusting(Right):
    """Right; its worker loads what the plan says without a look at what it has put into its slots."""

    def _load(self: Any, loads: Any) -> None:
        for move in loads:
            self._copiers[move.group].scatter([move.target], [move.slot], [self._orders[move.group]])

    worker = worker(_load=_load)


def _as_if_it_had_run(self: Any, rank: int, data: bytes) -> bytes:
    report = Report.decode(data)
    return data if report.step >= 0 else Report(step=report.unbound_step, rank=rank).encode()


@mutant(FaultTests.test_steps_that_fail_cost_no_byte, _WRONG)
class CommitsALostPlan(Trusting):
    """Commits the saves of a plan that never reached its worker."""

    leader = _believes(_as_if_it_had_run)


def _without_error(self: Any, rank: int, data: bytes) -> bytes:
    if Report.decode(data).error:
        raise RuntimeError(f"rank {rank} has failed")
    return data


@mutant(
    FaultTests.test_steps_that_fail_cost_no_byte, "leader.update_connector_output .*: RuntimeError: rank . has failed"
)
class RaisesOnAFailedStep(Right):
    """Raises into the engine what a worker says of a step that failed."""

    leader = _believes(_without_error)


def _as_if_it_said_nothing(self: Any, rank: int, data: bytes) -> bytes:
    return data or Report(step=self._ledger.last_step, rank=rank).encode()


@mutant(
    FaultTests.test_reports_that_are_lost_commit_nothing,
    "tokens offered of a step whose report was lost to be 0; got 24",
)
class CommitsALostReport(Right):
    """Takes an empty report for one without errors."""

    leader = _believes(_as_if_it_said_nothing)


# -- what is left over -------------------------------------------------------------------------------------------------


def _wait_for_stores(self: Any) -> None:
    while self._traffic.busy:
        time.sleep(0.01)
    OffloadLeader.shutdown(self)


@mutant(
    FaultTests.test_shutdown_comes_to_an_end_with_work_in_flight,
    "leader.shutdown .*an answer within 4 s; got none. a call that never returns",
    over=[FolderStore],
    deadline_s=4.0,
)
class WaitsAtShutdown(Right):
    """Waits in `shutdown` for reports that no step will bring any more."""

    leader = leader(shutdown=_wait_for_stores)


@mutant(FaultTests.test_hundred_requests_leave_nothing, r"has_pending_work\(\) to be False within .*work without end")
class NeverIdle(Right):
    """Has work for as long as it remembers a request, and remembers them all."""

    leader = leader(has_pending_work=lambda self: bool(self._counts["save_blocks"]))


def _keep_pages(self: Any, request: Any, block_ids: Any) -> bool:
    OffloadLeader.request_finished(self, request, block_ids)
    return True


@mutant(FaultTests.test_hundred_requests_leave_nothing, "work without end|every page to be let go", deadline_s=10.0)
class KeepsPages(Right):
    """Keeps the pages of requests that have ended, and never lets them go."""

    leader = leader(request_finished=_keep_pages)


@mutant(
    FaultTests.test_hundred_requests_leave_room_for_one_more,
    "saved after a hundred requests to be 24; got 0.*must be let go",
)
class KeepsClaimsOfTheEnded(Right):
    """Forgets what a request has claimed that ends before its loads are planned."""

    leader = leader(_drop=lambda self, state: self._lookup.forget(state.request_id))


# -- stores that hang --------------------------------------------------------------------------------------------------


def _patient(context: Any) -> Any:
    """Return a context whose stores have an hour for each call."""
    tiers = tuple(
        msgspec.structs.replace(tier, use=msgspec.structs.replace(tier.use, timeout_s=3600.0)) for tier in context.tiers
    )
    return msgspec.structs.replace(context, tiers=tiers)


@mutant(
    FaultTests.test_store_that_never_answers_is_survived,
    r"an answer within 1 s; got Match\(None, False\), again and again.*give up waiting for a store at its deadline",
    over=[FolderStore],
    parameters={"call": "read"},
)
@mutant(
    FaultTests.test_store_that_never_answers_is_survived,
    r"has_pending_work\(\) to be False within 1 s of empty steps",
    over=[FolderStore],
    parameters={"call": "write"},
)
class WaitsWithoutADeadline(Right):
    """Waits for its stores, however long they take."""

    def make_leader(self, options: Any, context: Any) -> Any:
        return super().make_leader(options, _patient(context))

    def make_worker(self, options: Any, context: Any) -> Any:
        return super().make_worker(options, _patient(context))


def _ask_the_store(self: Any, request: Any, num_computed_tokens: int) -> Match:
    if not hasattr(self, "_own"):
        self._own = self._context.tiers[0].open()
    self._own.contains([BlockKey(bytes(72))])
    return OffloadLeader.get_num_new_matched_tokens(self, request, num_computed_tokens)


@mutant(
    FaultTests.test_store_that_never_answers_is_survived,
    "no hook to wait for a store that hangs.*on a thread of its own",
    over=[FolderStore],
    parameters={"call": "contains"},
)
class AsksWhileItSchedules(Right):
    """Calls the store where the engine schedules."""

    leader = leader(get_num_new_matched_tokens=_ask_the_store)


@mutant(FaultTests.test_store_that_never_answers_is_survived, _WRONG, over=[FolderStore], parameters={"call": "read"})
class ReusesTheSlotOfAHungRead(Right):
    """Gives away the memory of a read that it has given up, and that writes to it when it returns."""

    worker = _report_without(quarantined=b"", released=b"")


# -- strangers' bytes, other processes ---------------------------------------------------------------------------------


def _pickle_plan(self: Any, scheduler_output: Any) -> bytes:
    return pickle.dumps(OffloadLeader.build_connector_meta(self, scheduler_output))


def _unpickle_plan(self: Any, meta: bytes) -> None:
    OffloadWorker.bind_connector_meta(self, pickle.loads(meta))  # noqa: S301  # that is its mistake


@mutant(FaultTests.test_nothing_is_unpickled, "no pickle, anywhere; got a call of pickle.loads")
class PicklesItsPlans(Right):
    """Sends plans as pickles."""

    leader = leader(build_connector_meta=_pickle_plan)
    worker = worker(bind_connector_meta=_unpickle_plan)


_SECRET = secrets.token_bytes(16)


@mutant(
    RestartTests.test_another_process_finds_what_this_one_saved,
    "tokens that it loaded to be 120; got 0",
    over=[FolderStore],
)
@mutant(
    RestartTests.test_this_process_finds_what_another_saved,
    "tokens loaded of what it saved to be 120; got 0",
    over=[FolderStore],
)
class DrawsASecretAtStart(Right):
    """Keys its hashes by a secret that each process draws anew."""

    def make_leader(self, options: Any, context: Any) -> Any:
        return self.leader(context, key_secret=_SECRET)


# -- programs ----------------------------------------------------------------------------------------------------------


@mutant(StatefulTests.test_any_program_of_operations_reads_right_bytes, "only what was computed to be offered")
class ResetsNothing(Right):
    """Says that it has reset its cache."""

    leader = leader(reset_cache=lambda self: True)


def _plan_it_all(self: Any, scheduler_output: Any) -> bytes:
    whole = {
        name: tuple(
            msgspec.structs.replace(part, num_scheduled_tokens=part.num_tokens - part.num_computed_tokens)
            for part in getattr(scheduler_output, name)
        )
        for name in ("new_requests", "cached_requests")
    }
    return OffloadLeader.build_connector_meta(self, msgspec.structs.replace(scheduler_output, **whole))


@mutant(StatefulTests.test_any_program_of_operations_reads_right_bytes, f"{_WRONG}.*nobody wrote it|{_WRONG}|NaN")
class SavesThePromptAtOnce(Right):
    """Saves a whole prompt with its first chunk, before the rest of it is computed."""

    leader = leader(build_connector_meta=_plan_it_all)
