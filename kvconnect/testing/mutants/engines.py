"""Engines that are right but for one small mistake: the reference engine with one call changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvconnect.driver import LeaderDriver
from kvconnect.protocol import Match
from kvconnect.testing.engine import EngineTests
from kvconnect.testing.engines import EngineSetting
from kvconnect.testing.mutants.base import mutant
from kvconnect.testing.reference import ReferenceEngine

__all__: list[str] = []


class _Changed(ReferenceEngine):
    """Finds the parts of the engine, and lets a mutant change them."""

    def __init__(self, connector: Any, setting: EngineSetting, folder: Path) -> None:
        super().__init__(connector, setting, folder)
        self.core: Any = self.llm._core
        self.scheduler: Any = self.core.scheduler
        self.cache: Any = self.core.cache
        self.leader: Any = self.llm._leader
        self.workers: list[Any] = self.llm._workers
        self.change()

    def change(self) -> None:
        """Make the mistake."""

    def close(self) -> None:
        self.llm.close(drain_s=1.0)


@mutant(EngineTests.test_one_request_makes_the_calls_of_its_steps, "wait_for_save calls, one a plan")
class WaitsForSavesTwice(_Changed):
    """Calls `wait_for_save` in the forward pass, and again after it."""

    def change(self) -> None:
        for worker in self.workers:
            once = worker.wait_for_save
            worker.wait_for_save = lambda once=once: (once(), once())


def _described(engine: _Changed, change: Any) -> None:
    """Let every part of a step be told as ``change(part)``."""
    output = engine.scheduler.output

    def changed(batch: Any) -> Any:
        right = output(batch)
        return msgspec.structs.replace(
            right,
            new_requests=tuple(map(change, right.new_requests)),
            cached_requests=tuple(map(change, right.cached_requests)),
        )

    engine.scheduler.output = changed


@mutant(EngineTests.test_every_token_and_block_is_told_once, "what the leader was not told yet")
class TellsNoDecodedTokens(_Changed):
    """Tells the leader of the prompt's tokens, and never of those that were decoded."""

    def change(self) -> None:
        _described(self, lambda part: msgspec.structs.replace(part, new_tokens=()))


@mutant(EngineTests.test_prompt_in_chunks_goes_on_where_it_was, "position and tokens of the first chunk")
class TellsOfTheWholePrompt(_Changed):
    """Says that a step computes the whole prompt when it computes a chunk."""

    def change(self) -> None:
        _described(
            self,
            lambda part: msgspec.structs.replace(
                part, num_scheduled_tokens=max(part.num_scheduled_tokens, part.num_tokens - part.num_computed_tokens)
            ),
        )


@mutant(EngineTests.test_loaded_prefix_shrinks_the_forward_pass, "position of the first step")
class ComputesWhatIsLoaded(_Changed):
    """Has a prefix loaded, and computes it all the same."""

    def change(self) -> None:
        add = self.core.manager.add_sequences

        def added(batch: Any) -> Any:
            return [
                each._replace(
                    start=each.start - each.request.num_loaded,
                    num_tokens=min(each.num_tokens + each.request.num_loaded, self.scheduler.max_batch_tokens),
                )
                for each in add(batch)
            ]

        self.core.manager.add_sequences = added


@mutant(EngineTests.test_offer_becomes_the_allocation, "num_external_tokens to be 4", parameters={"offered": 1})
class SaysThatNothingIsTaken(_Changed):
    """Takes an offer, and tells the leader that it took nothing."""

    def change(self) -> None:
        tell = self.leader.update_state_after_alloc
        self.leader.update_state_after_alloc = lambda request, block_ids, external: tell(request, block_ids, 0)


@mutant(EngineTests.test_request_that_waits_is_asked_about_again, "a question a step until there is an answer")
class TakesLaterForNever(_Changed):
    """Takes "ask again next step" for "nothing"."""

    def change(self) -> None:
        ask = self.leader.get_num_new_matched_tokens

        def asked(request: Any, computed: int) -> Match:
            answer: Match = ask(request, computed)
            return Match(0, False) if answer.num_tokens is None else answer

        self.leader.get_num_new_matched_tokens = asked


@mutant(EngineTests.test_parked_request_waits_for_every_rank, "until every rank has named", parameters={"num_ranks": 2})
class GoesOnWithTheFirstRank(_Changed):
    """Lets a parked request go on when one rank has loaded."""

    def change(self) -> None:
        ended = self.scheduler.loads_ended
        self.scheduler.loads_ended = lambda rank, ids, num_ranks: ended(rank, ids, num_ranks=1)


@mutant(EngineTests.test_aborted_load_keeps_its_pages_until_it_is_named, "until it is let go")
class FreesAnAbortedLoad(_Changed):
    """Frees the pages of an aborted request at once, while a load still writes to them."""

    def change(self) -> None:
        abort = self.scheduler.abort

        def aborted(request: Any) -> None:
            parked = request.request_id in self.scheduler.parked
            abort(request)
            if parked:
                del self.scheduler.parked[request.request_id]
                self.cache.release_all(request.tables)

        self.scheduler.abort = aborted


class _WithoutGuards(_Changed):
    """Fresh pages hold what was there, so that nothing but the connector's word says what is wrong."""

    def change(self) -> None:
        self.cache.fill_fresh = lambda fresh: None
        for layer in self.cache.layers:
            layer.key.zero_()
            layer.value.zero_()


@mutant(EngineTests.test_failed_load_is_computed, "tokens that come out without|computed from")
class IgnoresLoadErrors(_WithoutGuards):
    """Computes on pages that the workers say were not loaded."""

    def change(self) -> None:
        super().change()
        for worker in self.workers:
            said = worker.get_block_ids_with_load_errors
            worker.get_block_ids_with_load_errors = lambda said=said: [set() for _ in said() or self.cache.pools]


@mutant(EngineTests.test_failed_load_is_computed, "computed from|come out without", parameters={"rank": 0})
class HearsTheLastRankOnly(_WithoutGuards):
    """Keeps the load errors of the rank that spoke last."""

    def change(self) -> None:
        super().change()
        for worker in self.workers[:-1]:
            worker.get_block_ids_with_load_errors = lambda: [set() for _ in self.cache.pools]


@mutant(EngineTests.test_load_goes_on_where_the_device_ends, "num_computed_tokens of the question")
class AsksFromZero(_Changed):
    """Asks about a prompt from its beginning, whatever of it is on the device."""

    def change(self) -> None:
        ask = self.leader.get_num_new_matched_tokens

        def asked(request: Any, computed: int) -> Match:
            count, parks = ask(request, 0)
            return Match(max(0, count - computed), parks and count > computed)

        self.leader.get_num_new_matched_tokens = asked


@mutant(EngineTests.test_one_request_makes_the_calls_of_its_steps, "was told of")
class TellsOtherTokens(_Changed):
    """Tells as many new tokens as there are, and others."""

    def change(self) -> None:
        _described(self, lambda part: msgspec.structs.replace(part, new_tokens=[1] * len(part.new_tokens)))


@mutant(
    EngineTests.test_parked_request_waits_for_every_rank,
    "handshakes that the leader was given",
    parameters={"num_ranks": 2},
)
class MixesUpHandshakes(_Changed):
    """Hands the ranks' handshakes over in another order."""

    def __init__(self, connector: Any, setting: EngineSetting, folder: Path) -> None:
        shake = LeaderDriver.set_handshake_metadata
        try:
            LeaderDriver.set_handshake_metadata = lambda self, per_rank: shake(self, per_rank[::-1])  # type: ignore[method-assign]
            super().__init__(connector, setting, folder)
        finally:
            LeaderDriver.set_handshake_metadata = shake  # type: ignore[method-assign]


@mutant(EngineTests.test_one_request_makes_the_calls_of_its_steps, "has ended|calls of request_finished")
class EndsTwice(_Changed):
    """Tells of a request's end twice."""

    def change(self) -> None:
        end = self.leader.request_finished
        self.leader.request_finished = lambda request, block_ids: (end(request, block_ids), end(request, block_ids))[0]


@mutant(EngineTests.test_load_errors_of_nonsense_trust_nothing, "tokens that come out without")
class TakesNonsenseForNoErrors(_WithoutGuards):
    """Takes an answer that cannot be read for "nothing failed"."""

    def change(self) -> None:
        super().change()
        for worker in self.workers:
            said = worker.get_block_ids_with_load_errors
            worker.get_block_ids_with_load_errors = lambda said=said: said() or [set() for _ in self.cache.pools]


@mutant(
    EngineTests.test_ended_request_keeps_its_pages_until_they_are_saved,
    "until it is let go|come out without a connector",
)
class FreesEndedRequests(_Changed):
    """Frees the pages of a request that has ended although its saves are still to come."""

    def change(self) -> None:
        finish = self.scheduler.finish

        def finished(request: Any) -> None:
            finish(request)
            saving = self.scheduler._saving.get(request.request_id)
            if saving is not None:
                self.cache.release_all(saving.tables)
                saving.tables = [[] for _ in saving.tables]

        self.scheduler.finish = finished


@mutant(EngineTests.test_saved_pages_come_back_for_others, "once the others' pages are free")
class NeverFreesSavedPages(_Changed):
    """Waits for saves, and never frees their pages."""

    def change(self) -> None:
        self.scheduler.saves_ended = lambda rank, ids, num_ranks: None


@mutant(EngineTests.test_layer_hooks_surround_their_layer, "save_kv_layer|layer hooks|layer 1")
class ForgetsTheLastLayersHook(_Changed):
    """Calls the layer hooks of every layer but the last."""

    def change(self) -> None:
        last = len(self.cache.layers) - 1
        for worker in self.workers:
            save = worker.save_kv_layer
            worker.save_kv_layer = lambda layer, save=save: None if layer == last else save(layer)


@mutant(EngineTests.test_window_leaves_holes_in_place, "nobody reads them")
class FillsHolesWithPageZero(_Changed):
    """Tells of page 0 where a block has none."""

    def change(self) -> None:
        tell = self.leader.update_state_after_alloc

        def told(request: Any, block_ids: Sequence[Sequence[int]], external: int) -> Any:
            return tell(request, [[max(page, 0) for page in table] for table in block_ids], external)

        self.leader.update_state_after_alloc = told


@mutant(EngineTests.test_preempted_request_begins_again, "among new_requests")
class GoesOnAfterPreemption(_Changed):
    """Names a preempted request among those that an earlier step named, as if it still had its pages."""

    def change(self) -> None:
        reset = self.scheduler.reset_request

        def was_reset(request: Any) -> None:
            reset(request)
            request.scheduled_before = True

        self.scheduler.reset_request = was_reset


@mutant(
    EngineTests.test_connector_that_raises_costs_no_answer,
    "the script lets request_finished raise",
    parameters={"hook": "request_finished"},
)
class CallsAHookUnguarded(_Changed):
    """Lets what a hook raises through to its requests."""

    def change(self) -> None:
        self.leader.request_finished = lambda request, block_ids: self.leader.hook("request_finished")(
            request, block_ids
        )


@mutant(
    EngineTests.test_rubbish_answers_are_no_match,
    "an answer that is|IndexError|AssertionError",
    parameters={"answer": "a part of a block"},
)
class TrustsAnyAnswer(_Changed):
    """Takes an answer as it comes."""

    def change(self) -> None:
        self.leader._wrong_match = lambda match, request, computed: ""


@mutant(EngineTests.test_engine_steps_while_the_connector_has_work, "six empty steps")
class RestsWhenRequestsEnd(_Changed):
    """Stops stepping with the last request, whatever the connector still has to do."""

    def change(self) -> None:
        self.leader.has_pending_work = lambda: False


@mutant(EngineTests.test_shutdown_ends_both_halves, "shutdown of rank 0")
class ForgetsToShutWorkersDown(_Changed):
    """Shuts the leader down, and leaves the workers."""

    def change(self) -> None:
        for worker in self.workers:
            worker.shutdown = lambda: None


@mutant(EngineTests.test_any_schedule_keeps_the_contract, "once and in the order of the steps")
class ReportsEveryStepTwice(_Changed):
    """Hands the reports of a step to the leader twice."""

    def change(self) -> None:
        give = self.leader.update_connector_output
        self.leader.update_connector_output = lambda reports: (give(reports), give(reports))


@mutant(EngineTests.test_preempted_request_begins_again, "and request_reset tells of it")
class ForgetsToTellOfResets(_Changed):
    """Takes a request's pages back without a word."""

    def change(self) -> None:
        self.leader.request_reset = lambda request: None
