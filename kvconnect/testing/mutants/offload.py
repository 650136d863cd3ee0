"""Connectors that are right but for one mistake: the offload connector with one method changed."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from kvconnect import Connector
from kvconnect.leader import OffloadLeader
from kvconnect.leader.index import State
from kvconnect.leader.ledger import OpenStep
from kvconnect.options import Options
from kvconnect.protocol import BlockChain, Capabilities, Finished, Match, Report
from kvconnect.worker import OffloadWorker
from kvconnect.worker.copies import BlockCopier


class Nothing(Options, frozen=True):
    pass


class Right(Connector):
    """The offload connector itself."""

    Options = Nothing
    capabilities = Capabilities(
        async_load=True, several_groups=True, several_ranks=True, needs=("handshake", "reports")
    )
    leader: type[OffloadLeader] = OffloadLeader
    worker: type[OffloadWorker] = OffloadWorker

    def make_leader(self, options: Any, context: Any) -> Any:
        return self.leader(context)

    def make_worker(self, options: Any, context: Any) -> Any:
        return self.worker(context, capacity=4 << 20)


def leader(**members: Any) -> type[OffloadLeader]:
    return type("Leader", (OffloadLeader,), members)


def worker(**members: Any) -> type[OffloadWorker]:
    return type("Worker", (OffloadWorker,), members)


class ForgetsTheParent(Right):
    def _new_chain(self: Any, request: Any) -> Any:
        class Chain(BlockChain):
            __slots__ = ("seen",)

            def extend(self, tokens: Sequence[int]) -> None:
                self.seen = [*getattr(self, "seen", []), *tokens]
                super().extend(tokens)
                for number in range(len(self.hashes)):
                    alone = BlockChain(self.block_size)
                    alone.extend(self.seen[number * self.block_size : (number + 1) * self.block_size])
                    self.hashes[number] = alone.hashes[0]

        chain = Chain(self._block_size)
        chain.extend(request.tokens)
        return chain

    leader = leader(_new_chain=_new_chain)


class IgnoresTheSalt(Right):
    def _new_chain(self: Any, request: Any) -> Any:
        return OffloadLeader._new_chain(self, msgspec.structs.replace(request, cache_salt=None))

    leader = leader(_new_chain=_new_chain)


class OffersTheWholePrompt(Right):
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Match:
        longer = msgspec.structs.replace(request, tokens=(*request.tokens, 1))
        return OffloadLeader.get_num_new_matched_tokens(self, longer, num_computed_tokens)

    leader = leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


class CountsFromZero(Right):
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Match:
        return OffloadLeader.get_num_new_matched_tokens(self, request, 0)

    leader = leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


class CommitsWhenItPlans(Right):
    def build_connector_meta(self: Any, scheduler_output: Any) -> bytes:
        meta = OffloadLeader.build_connector_meta(self, scheduler_output)
        for entry in list(self._index._by_slot.values()):
            if entry.state is State.RESERVED:
                self._index.commit(entry)
        return meta

    leader = leader(build_connector_meta=build_connector_meta)


class CommitsOnAFailedLoad(Right):
    def update_connector_output(self: Any, reports: Sequence[bytes]) -> None:
        clean = []
        for data in reports:
            report = Report.decode(data) if data else Report(step=-1, rank=0)
            clean.append(msgspec.structs.replace(report, load_errors=(), error="").encode())
        OffloadLeader.update_connector_output(self, clean)

    leader = leader(update_connector_output=update_connector_output)


class NeverAnswers(Right):
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Match:
        return Match(None, False)

    leader = leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


class RaisesOnAnEmptyStep(Right):
    def build_connector_meta(self: Any, scheduler_output: Any) -> bytes:
        first = (*scheduler_output.new_requests, *scheduler_output.cached_requests)[0]
        assert first
        return OffloadLeader.build_connector_meta(self, scheduler_output)

    leader = leader(build_connector_meta=build_connector_meta)


class SwapsKeysAndValues(Right):
    def register_kv_caches(self: Any, layout: Any) -> None:
        OffloadWorker.register_kv_caches(self, layout)
        for copier in self._copiers:
            copier.__class__ = Swapping

    worker = worker(register_kv_caches=register_kv_caches)


class Swapping(BlockCopier):
    def _scatter_words(self, pairs: Any) -> None:
        assert self._words is not None
        for (slots, _), (_, pages) in zip(
            self._words, [self._words[i ^ 1] for i in range(len(self._words))], strict=True
        ):
            for block_id, slot in pairs:
                pages[block_id] = slots[slot]


class SavesAfterTheStep(Right):
    def wait_for_save(self: Any) -> None:
        self._late = self._now.take("saves")

    def build_worker_report(self: Any) -> bytes:
        report = OffloadWorker.build_worker_report(self)
        for move in getattr(self, "_late", []):
            self._held[move.slot] = (move.group, move.block_hash, self._orders[move.group])
        return report

    def bind_connector_meta(self: Any, meta: bytes) -> None:
        for move in getattr(self, "_late", []):
            self._copiers[move.group].gather([move.target], [move.slot])
        self._late = []
        OffloadWorker.bind_connector_meta(self, meta)

    worker = worker(
        wait_for_save=wait_for_save, build_worker_report=build_worker_report, bind_connector_meta=bind_connector_meta
    )


class ReplaysItsPlan(Right):
    def start_load_kv(self: Any) -> None:
        loads = list(self._now.loads)
        OffloadWorker.start_load_kv(self)
        self._now.loads = loads

    def build_worker_report(self: Any) -> bytes:
        kept, self._now.loads = self._now.loads, []
        report = OffloadWorker.build_worker_report(self)
        self._now.loads = kept
        return report

    worker = worker(start_load_kv=start_load_kv, build_worker_report=build_worker_report)


class LoadsLater(Right):
    def start_load_kv(self: Any) -> None:
        loads = self._now.take("loads")
        OffloadWorker.start_load_kv(self)

        def run() -> None:
            time.sleep(0.02)
            self._load(loads)

        threading.Thread(target=run, daemon=True).start()

    worker = worker(start_load_kv=start_load_kv)


class LeavesAThread(Right):
    def shutdown(self: Any) -> None:
        OffloadWorker.shutdown(self)
        threading.Thread(target=time.sleep, args=(5,), daemon=True, name="forgotten").start()

    worker = worker(shutdown=shutdown)


class UnpicklesPlans(Right):
    def bind_connector_meta(self: Any, meta: bytes) -> None:
        if meta[:1] == b"\x80":
            meta = pickle.loads(meta)  # noqa: S301  # that is its mistake
        OffloadWorker.bind_connector_meta(self, meta)

    worker = worker(bind_connector_meta=bind_connector_meta)


class ReportsIdsTwice(Right):
    def get_finished(self: Any, finished_req_ids: frozenset[str]) -> Finished:
        finished = OffloadWorker.get_finished(self, finished_req_ids)
        before: frozenset[str] = getattr(self, "_before", frozenset())
        self._before = finished.loaded
        return finished._replace(loaded=finished.loaded | before, saved=finished.saved | finished_req_ids | {"r0"})

    worker = worker(get_finished=get_finished)


class VoidsOnlyWhoLoaded(Right):
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


class LoadsInTheStep(Right):
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Match:
        count, _ = OffloadLeader.get_num_new_matched_tokens(self, request, num_computed_tokens)
        return Match(count, False)

    leader = leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


class TellsOfNobodysTokens(Right):
    def take_events(self: Any) -> Any:
        return [
            msgspec.structs.replace(event, tokens=[0] * len(event.tokens)) if hasattr(event, "tokens") else event
            for event in OffloadLeader.take_events(self)
        ]

    leader = leader(take_events=take_events)
