"""Mutants of the shape of leaders and workers: what can be seen of one half alone."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import torch

from kvconnect.errors import MetadataError
from kvconnect.leader import Leader, OffloadLeader
from kvconnect.protocol import Finished, Match
from kvconnect.testing.leader import LeaderTests
from kvconnect.testing.mutants.base import Right, leader, mutant, worker
from kvconnect.testing.worker import WorkerTests
from kvconnect.worker import OffloadWorker

__all__: list[str] = []

# -- leaders: their shape ----------------------------------------------------------------------------------------------


@mutant(LeaderTests.test_leader_implements_the_hooks, "parameters of hooks have no default values: num_computed_tokens")
class HasDefaults(Right):
    """Gives a parameter of a hook a default value."""

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int = 0) -> Match:
        return OffloadLeader.get_num_new_matched_tokens(self, request, num_computed_tokens)

    leader = leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


@mutant(
    LeaderTests.test_leader_implements_the_hooks,
    "get_num_matched_tokens is no hook; the nearest is 'get_num_new_matched",
)
class MisspellsAHook(Right):
    """Has a public method that is no hook."""

    leader = leader(get_num_matched_tokens=lambda self, request: 0)


@mutant(LeaderTests.test_leader_implements_the_hooks, r"(?s)get_num_new_matched_tokens.*Argument\(s\) {'num_computed'}")
class RenamesAnArgument(Right):
    """Calls the argument of a hook something else."""

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed: int) -> Match:
        return OffloadLeader.get_num_new_matched_tokens(self, request, num_computed)

    leader = leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


# -- leaders: before anything is known ---------------------------------------------------------------------------------


def _guess(self: Any, request: Any, num_computed_tokens: int) -> Match:
    if self._off:
        return Match((len(request.tokens) - 1) // 4 * 4, False)
    return OffloadLeader.get_num_new_matched_tokens(self, request, num_computed_tokens)


@mutant(LeaderTests.test_nothing_is_offered_before_the_handshake, r"the answer to be Match\(num_tokens=0")
class OffersBeforeTheHandshake(Right):
    """Offers tokens although no worker has said what its cache is."""

    leader = leader(get_num_new_matched_tokens=_guess)


@mutant(LeaderTests.test_handshake_of_nonsense_leaves_it_off, "the answer after .*rubbish.* to be 0; got 36")
class BelievesAnyHandshake(Right):
    """Counts on a handshake, whatever the ranks said in it."""

    def set_handshake_metadata(self: Any, per_rank: Any) -> None:
        OffloadLeader.set_handshake_metadata(self, per_rank)
        self._spoken = any(b"rubbish" in said for said in per_rank)

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Match:
        ask = _guess if getattr(self, "_spoken", False) else OffloadLeader.get_num_new_matched_tokens
        return ask(self, request, num_computed_tokens)

    leader = leader(
        set_handshake_metadata=set_handshake_metadata, get_num_new_matched_tokens=get_num_new_matched_tokens
    )


@mutant(LeaderTests.test_handshake_of_nonsense_leaves_it_off, "unpickle what ranks said to be .*pickle.loads")
class UnpicklesHandshakes(Right):
    """Unpickles what workers say of themselves."""

    def set_handshake_metadata(self: Any, per_rank: Any) -> None:
        OffloadLeader.set_handshake_metadata(self, [_unpickled(said) for said in per_rank])

    leader = leader(set_handshake_metadata=set_handshake_metadata)


def _unpickled(data: bytes) -> Any:
    return pickle.loads(data) if data[:1] == b"\x80" else data  # noqa: S301  # that is its mistake


@mutant(LeaderTests.test_request_lives_without_a_load, "leader.update_state_after_alloc: ZeroDivisionError")
class DividesByTheBlockSize(Right):
    """Divides by the block size, which nobody has told it yet."""

    def update_state_after_alloc(self: Any, request: Any, block_ids: Any, num_external_tokens: int) -> None:
        assert num_external_tokens // self._block_size >= 0
        OffloadLeader.update_state_after_alloc(self, request, block_ids, num_external_tokens)

    leader = leader(update_state_after_alloc=update_state_after_alloc)


@mutant(LeaderTests.test_empty_step_has_a_plan, "leader.build_connector_meta: IndexError")
class RaisesOnAnEmptyStep(Right):
    """Looks at the first request of a step that has none."""

    def build_connector_meta(self: Any, scheduler_output: Any) -> bytes:
        first = (*scheduler_output.new_requests, *scheduler_output.cached_requests)[0]
        assert first
        return OffloadLeader.build_connector_meta(self, scheduler_output)

    leader = leader(build_connector_meta=build_connector_meta)


@mutant(LeaderTests.test_empty_step_has_a_plan, "build_connector_meta to return bytes; got None")
class PlansNothingForAnEmptyStep(Right):
    """Returns None for a step without requests."""

    def build_connector_meta(self: Any, scheduler_output: Any) -> bytes | None:
        if not scheduler_output.new_requests and not scheduler_output.cached_requests:
            return None
        return OffloadLeader.build_connector_meta(self, scheduler_output)

    leader = leader(build_connector_meta=build_connector_meta)


@mutant(LeaderTests.test_reports_of_nonsense_are_survived, "unpickle reports to be .*pickle.loads")
class UnpicklesReports(Right):
    """Unpickles what workers report."""

    def update_connector_output(self: Any, reports: Any) -> None:
        OffloadLeader.update_connector_output(self, [_unpickled(data) for data in reports])

    leader = leader(update_connector_output=update_connector_output)


@mutant(LeaderTests.test_unknown_request_is_no_error, "KeyError.*never")
class RaisesForAnUnknownRequest(Right):
    """Looks up a request as if it had been told of each."""

    def request_finished(self: Any, request: Any, block_ids: Any) -> bool:
        assert self._requests[request.request_id]
        return OffloadLeader.request_finished(self, request, block_ids)

    leader = leader(request_finished=request_finished)


@mutant(LeaderTests.test_leader_stats_are_a_mapping, "leader.get_stats: .*returned list")
class ListsItsStats(Right):
    """Returns its counters as a list."""

    leader = leader(get_stats=lambda self: list(OffloadLeader.get_stats(self).items()))


@mutant(LeaderTests.test_no_work_is_pending_at_the_start, r"has_pending_work\(\) to be False; got True")
class HasWorkAtTheStart(Right):
    """Counts the handshake that it waits for as work."""

    leader = leader(has_pending_work=lambda self: bool(self._off) or OffloadLeader.has_pending_work(self))


def _plain(**members: Any) -> type[OffloadLeader]:
    """Return the offload leader with the base's claims and suspension, which refuse, or with other methods."""
    names = ("claim_match", "release_match", "suspend", "prefetch", "resume", "resize_tier")
    return leader(**{name: getattr(Leader, name) for name in names} | members)


class Plain(Right):
    """Neither claims nor suspends, and says so."""

    capabilities = msgspec.structs.replace(Right.capabilities, batch_claim=False, suspend=False)
    leader = _plain()


@mutant(LeaderTests.test_undeclared_batch_claim_is_refused, "claim_match to raise UnsupportedError.*got 4.*declare")
class PretendsToClaim(Plain):
    """Says that it holds what it was offered, and holds nothing."""

    leader = _plain(claim_match=lambda self, request, num_tokens: num_tokens)


@mutant(LeaderTests.test_undeclared_suspend_is_refused, "suspend to raise UnsupportedError.*got False")
class PretendsToSuspend(Plain):
    """Answers that there is no room, where it cannot suspend at all."""

    leader = _plain(suspend=lambda self, request, block_ids, num_tokens: False)


@mutant(LeaderTests.test_undeclared_suspend_is_refused, "resize_tier to raise UnsupportedError.*got True")
class PretendsToResize(Plain):
    """Says that it has resized a tier, and has not."""

    leader = _plain(resize_tier=lambda self, tier, num_bytes: True)


@mutant(LeaderTests.test_leader_shuts_down_twice, "AttributeError.*_lookup")
class LeaderShutsDownOnce(Right):
    """Lets go of its stores so that a second shutdown finds none."""

    def shutdown(self: Any) -> None:
        self._lookup.close()
        del self._lookup

    leader = leader(shutdown=shutdown)


# -- workers: their shape ----------------------------------------------------------------------------------------------


@mutant(WorkerTests.test_worker_implements_the_hooks, "parameters of hooks have no default values: finished_req_ids")
class WorkerHasDefaults(Right):
    """Gives a parameter of a worker's hook a default value."""

    def get_finished(self: Any, finished_req_ids: frozenset[str] = frozenset()) -> Finished:
        return OffloadWorker.get_finished(self, finished_req_ids)

    worker = worker(get_finished=get_finished)


@mutant(WorkerTests.test_worker_implements_the_hooks, "wait_for_layer is no hook; the nearest is 'wait_for_layer_load'")
class WorkerHasAPublicMethod(Right):
    """Has a public method that helps its hooks and is none."""

    worker = worker(wait_for_layer=lambda self, layer: None)


# -- workers: caches ---------------------------------------------------------------------------------------------------


def _registers(before: Any) -> type[OffloadWorker]:
    """Return a worker that does something before it takes a cache."""

    def register_kv_caches(self: Any, layout: Any) -> None:
        before(layout)
        OffloadWorker.register_kv_caches(self, layout)

    return worker(register_kv_caches=register_kv_caches)


def _tensors(layout: Any) -> list[torch.Tensor]:
    return [region.tensor for group in layout.groups for region in group.regions]


@mutant(
    WorkerTests.test_cache_of_any_layout_is_taken,
    "the cache to stay as it was in register_kv_caches; got changed pages",
)
class WritesWhenItRegisters(Right):
    """Tries out a copy on the first page when it registers the cache."""

    worker = _registers(lambda layout: [tensor[0].zero_() for tensor in _tensors(layout)])


@mutant(
    WorkerTests.test_cache_of_any_layout_is_taken,
    "worker cannot use the KV cache: ValueError: too many values",
    parameters={"name": "one pool"},
)
class KnowsOneLayout(Right):
    """Takes every cache for one of four dimensions."""

    @staticmethod
    def look(layout: Any) -> None:
        for tensor in _tensors(layout):
            _pages, _tokens, _heads, _dims = tensor.shape

    worker = _registers(look)


@mutant(
    WorkerTests.test_cache_of_any_layout_is_taken,
    "worker cannot use the KV cache: TypeError.*BFloat16",
    parameters={"dtype": torch.bfloat16},
)
class KnowsNumpysTypes(Right):
    """Looks at the cache through numpy, which has no bfloat16."""

    worker = _registers(lambda layout: [tensor.numpy() for tensor in _tensors(layout)])


@mutant(WorkerTests.test_cache_of_any_layout_is_taken, "get_handshake_metadata to return bytes; got {'slots'")
class ShakesHandsWithADict(Right):
    """Returns a mapping as its handshake."""

    worker = worker(get_handshake_metadata=lambda self: {"slots": self._arena.num_slots})


@mutant(WorkerTests.test_cache_of_several_groups_is_taken, "worker cannot use the KV cache: ValueError")
class TakesOneGroup(Right):
    """Declares several groups and takes one."""

    @staticmethod
    def look(layout: Any) -> None:
        (_group,) = layout.groups

    worker = _registers(look)


@mutant(
    WorkerTests.test_layout_that_does_not_fit_its_tensors_is_refused,
    r"expected a KVConnectError.*IndexError.*check\(\)",
)
class BelievesTheLayout(Right):
    """Uses a description that it has not compared with the tensors."""

    worker = _registers(lambda layout: [tensor[:, :, 1].sum() for tensor in _tensors(layout)])


# -- workers: steps ----------------------------------------------------------------------------------------------------


@mutant(WorkerTests.test_steps_without_a_plan_move_nothing, "AttributeError.*_arrived")
class WaitsForALoadThatNeverBegan(Right):
    """Waits for a layer of a load that was not started."""

    def start_load_kv(self: Any) -> None:
        self._arrived = 0
        OffloadWorker.start_load_kv(self)

    def wait_for_layer_load(self: Any, layer: int) -> None:
        assert self._arrived <= layer

    worker = worker(start_load_kv=start_load_kv, wait_for_layer_load=wait_for_layer_load)


@mutant(
    WorkerTests.test_steps_without_a_plan_move_nothing, "stay as it was in a step without a plan; got changed pages"
)
class ClearsAPage(Right):
    """Writes to the null page with each layer, plan or not."""

    def save_kv_layer(self: Any, layer: int) -> None:
        _tensors(self._layout)[0][0].zero_()

    worker = worker(save_kv_layer=save_kv_layer)


@mutant(WorkerTests.test_plan_of_nonsense_is_refused_and_moves_nothing, "unpickle a plan to be .*pickle.loads")
class UnpicklesPlans(Right):
    """Takes pickles for plans too."""

    def bind_connector_meta(self: Any, meta: bytes) -> None:
        OffloadWorker.bind_connector_meta(self, _unpickled(meta))

    worker = worker(bind_connector_meta=bind_connector_meta)


_loads = pickle.loads  # under this name it was imported before anybody watched


@mutant(WorkerTests.test_plan_of_nonsense_is_refused_and_moves_nothing, "never executed; got code in a plan was run")
class UnpicklesUnseen(Right):
    """Unpickles plans by a name of its own."""

    def bind_connector_meta(self: Any, meta: bytes) -> None:
        OffloadWorker.bind_connector_meta(self, _loads(meta) if meta[:1] == b"\x80" else meta)

    worker = worker(bind_connector_meta=bind_connector_meta)


@mutant(
    WorkerTests.test_plan_of_nonsense_is_refused_and_moves_nothing, "stay as it was in a plan of nonsense; got changed"
)
class MovesForNonsense(Right):
    """Fills pages with zeros where it cannot read what to load."""

    def bind_connector_meta(self: Any, meta: bytes) -> None:
        try:
            OffloadWorker.bind_connector_meta(self, meta)
        except MetadataError:
            for tensor in _tensors(self._layout):
                tensor.zero_()

    worker = worker(bind_connector_meta=bind_connector_meta)


# -- workers: the rest -------------------------------------------------------------------------------------------------


@mutant(WorkerTests.test_worker_stats_are_a_mapping, "worker.get_stats: AttributeError.*num_slots")
class CountsBeforeTheCache(Right):
    """Asks an arena that is not there yet how large it is."""

    worker = worker(get_stats=lambda self: {"slots": self._arena.num_slots})


@mutant(WorkerTests.test_worker_stats_are_a_mapping, "worker.get_stats: .*returned str")
class PrintsItsStats(Right):
    """Returns its counters as text."""

    worker = worker(get_stats=lambda self: str(OffloadWorker.get_stats(self)))


@mutant(WorkerTests.test_worker_shuts_down_twice, "AttributeError.*_transfers")
class WorkerShutsDownOnce(Right):
    """Lets go of its transfers so that a second shutdown finds none."""

    def shutdown(self: Any) -> None:
        OffloadWorker.shutdown(self)
        del self._transfers

    worker = worker(shutdown=shutdown)
