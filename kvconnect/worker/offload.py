"""The offload connector's worker: one for every store. Moves what the plan says between pages, arena and stores.

A step: `bind_connector_meta` takes the plan, `start_load_kv` fills pages from slots and starts the traffic with the
stores, `wait_for_save` fills slots from pages, `build_worker_report` says what became of it all.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvconnect.log import FailureLog
from kvconnect.protocol import (
    BlockKey,
    Finished,
    Handshake,
    KVCacheLayout,
    LoadError,
    Move,
    Plan,
    Report,
    WorkerContext,
    block_key,
)
from kvconnect.protocol.messages import GroupHandshake, pack_ints, unpack_ints
from kvconnect.store import FrameTagger
from kvconnect.worker.arena import Arena
from kvconnect.worker.base import Worker
from kvconnect.worker.copies import BlockCopier
from kvconnect.worker.reorder import can_reorder
from kvconnect.worker.transfer import Endings, SlotFrame, StoreTransfers

__all__ = ["OffloadWorker"]

logger = logging.getLogger(__name__)

_MAX_INT = 2**31 - 1

_TOTALS = ("loaded_blocks", "loaded_bytes", "saved_blocks", "saved_bytes")  # said also while they are 0


class _Step:
    """What is left to do of a plan, and what went wrong with it. A list is emptied when its work begins."""

    __slots__ = (
        "bad_pages",
        "demotes",
        "drops",
        "ends",
        "failed_saves",
        "fails",
        "load_errors",
        "loads",
        "number",
        "parked",
        "promotes",
        "request_ids",
        "saved",
        "saves",
        "unused",
    )

    def __init__(self, plan: Plan, num_groups: int) -> None:
        """Unpack a plan.

        Raises:
            MetadataError: If its columns do not fit together.
        """
        self.number = plan.step
        self.request_ids = plan.request_ids
        self.loads = plan.loads.unpack()
        self.fails = plan.fails.unpack()
        self.saves = plan.saves.unpack()
        self.promotes = plan.promotes.unpack()
        self.demotes = plan.demotes.unpack()
        self.drops = plan.drops.unpack()
        self.parked = frozenset(plan.parked)
        self.ends = plan.ends
        self.saved = plan.saved
        self.unused = unpack_ints(plan.unused)
        self.load_errors: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.bad_pages: list[set[int]] = [set() for _ in range(num_groups)]
        self.failed_saves: list[int] = []

    def take(self, name: str) -> list[Move]:
        """Return one list of moves and leave an empty one: a plan is applied once."""
        moves: list[Move] = getattr(self, name)
        setattr(self, name, [])
        return moves


class OffloadWorker(Worker):
    """Arena, copies and store traffic of one rank."""

    def __init__(
        self, context: WorkerContext, *, capacity: int, reserve: int = 0, tagger: FrameTagger | None = None
    ) -> None:
        """Remember what to build; the arena is taken when the layout is known.

        Args:
            context: What the engine and the configuration say.
            capacity: Host bytes of the whole engine; this rank takes its share of those on the machine.
            reserve: Bytes that the host tier may be resized to, of the whole engine; 0 for no more than `capacity`.
            tagger: Of the deployment's secret, for keyed frames; None for frames without a tag.
        """
        self._tagger = tagger
        self._context = context
        self._rank = context.rank
        self._capacity = capacity // context.local_ranks
        self._reserve = reserve // context.local_ranks
        self._arena: Arena | None = None
        self._transfers: StoreTransfers | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._toucher: ThreadPoolExecutor | None = None
        self._copiers: list[BlockCopier] = []
        self._orders: list[str] = []
        self._payload_bytes: list[int] = []
        self._fingerprints: list[bytes] = []
        self._shards: list[int] = []
        self._namespace = b""
        self._held: dict[int, tuple[int, bytes, str]] = {}  # slot -> group, hash and order of what lies in it
        self._endings = Endings()
        self._failed_requests: set[str] = set()  # with an asynchronous load of which some block failed
        self._said_saved: set[str] = set()  # ended requests that a plan may name again
        self._promoting: dict[int, tuple[int, bytes]] = {}  # slot -> group and hash of what is on its way up
        self._counts: Counter[str] = Counter(dict.fromkeys(_TOTALS, 0))
        self._log = FailureLog(logger)
        self._now = _Step(Plan(step=-1), 0)
        self._bound_at = 0.0

    # -- start ---------------------------------------------------------------------------------------------------

    def register_kv_caches(self, layout: KVCacheLayout) -> None:
        """Take the arena and open the stores.

        Raises:
            LayoutMismatch: If the tensors are not what the layout says.
            ConfigError: If the arena does not fit, or a store cannot work as configured.
        """
        layout.check()
        self._layout = layout = layout.in_memory_order()
        self._payload_bytes = [group.payload_bytes for group in layout.groups]  # asked for once a frame
        on_gpu = any(region.tensor.device.type == "cuda" for group in layout.groups for region in group.regions)
        self._arena = Arena(self._capacity, max(self._payload_bytes), pinned=on_gpu, reserve=self._reserve)
        numbers = range(len(layout.groups))
        self._orders = [layout.payload_order(group) for group in numbers]
        self._fingerprints = [layout.fingerprint(group) for group in numbers]
        self._shards = [layout.shard(group) for group in numbers]
        self._namespace = self._context.namespace.digest(layout.groups[0].block_size)
        cores = len(os.sched_getaffinity(0))
        if cores > 1 and not on_gpu:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvconnect-copy")
            self._toucher = ThreadPoolExecutor(1, thread_name_prefix="kvconnect-touch")
        self._touch_ahead([])
        self._copiers = [
            BlockCopier(group, self._arena, order, self._pool)
            for group, order in zip(layout.groups, self._orders, strict=True)
        ]
        self._transfers = StoreTransfers(
            self._context.tiers,
            f"worker{self._rank}",
            self._arena.memory,
            lambda order, frame: can_reorder(order, frame.order),
            self._tagger,
        )

    def get_handshake_metadata(self) -> bytes:
        """Say how many slots there are, and what a block of each group is."""
        assert self._layout is not None, "register_kv_caches comes first"
        assert self._arena is not None, "register_kv_caches comes first"
        groups = tuple(
            GroupHandshake(group.block_size, group.window or 0, len(group.layers), group.payload_bytes, shard)
            for group, shard in zip(self._layout.groups, self._shards, strict=True)
        )
        return Handshake(
            rank=self._rank,
            num_slots=self._arena.usable_slots,
            groups=groups,
            reserved_slots=self._arena.num_slots,
            slot_bytes=self._arena.slot_bytes,
            num_sharing=self._context.local_ranks,
        ).encode()

    # -- one step ------------------------------------------------------------------------------------------------

    def bind_connector_meta(self, meta: bytes) -> None:
        """Decode the plan; nothing of it is started yet.

        Raises:
            MetadataError: If it cannot be read; then the plan bound before is gone too.
        """
        self._bound_at = time.perf_counter()
        self._now = _Step(Plan(step=-1), len(self._orders))
        self._now = _Step(Plan.decode(meta), len(self._orders))
        self._said_saved &= set(self._now.saved)

    def start_load_kv(self) -> None:
        """Fill pages from slots, then start the store traffic in the background. Applied once a plan."""
        assert self._transfers is not None, "register_kv_caches comes first"
        if self._now.unused:
            self._give_back()  # before anything of this plan may use one of them
        for move in self._now.take("fails"):
            self._load_failed(move)
        self._load(self._now.take("loads"))
        for tier, moves in _by_target(self._now.take("promotes")).items():
            for move in moves:
                self._empty(move.slot)  # until it is verified, the slot holds nothing
                self._promoting[move.slot] = (move.group, move.block_hash)
            self._transfers.promote(tier, [self._frame(move) for move in moves])
        for tier, moves in _by_target(self._now.take("demotes")).items():
            self._transfers.demote(tier, [self._frame(move) for move in moves])
        for tier, moves in _by_target(self._now.take("drops")).items():
            self._transfers.drop(tier, [self._key(move) for move in moves])

    def wait_for_save(self) -> None:
        """Fill slots from pages; complete on return. Applied once a plan."""
        planned = self._now.take("saves")
        if not planned:
            return
        saves: dict[int, list[Move]] = defaultdict(list)
        for move in planned:
            self._empty(move.slot)
            saves[move.group].append(move)
        started = time.perf_counter()
        for group, moves in saves.items():
            try:
                self._copiers[group].gather([move.target for move in moves], [move.slot for move in moves])
            except Exception as error:
                self._now.failed_saves += [move.slot for move in moves]
                self._log.failed("save", error, len(moves))
                continue
            for move in moves:
                self._held[move.slot] = (group, move.block_hash, self._orders[group])
            self._counts["saved_blocks"] += len(moves)
            self._counts["saved_bytes"] += len(moves) * self._payload_bytes[group]
        self._counts["save_us"] += round((time.perf_counter() - started) * 1e6)
        self._touch_ahead([move.slot for move in planned])

    def get_finished(self, finished_req_ids: frozenset[str]) -> Finished:
        """Name the requests whose last saves or whose asynchronous load ended with this step's plan."""
        self._said_saved -= finished_req_ids  # suspended once more, with no plan between that did not name it
        saved, self._now.saved = frozenset(self._now.saved) - self._said_saved, ()
        self._said_saved |= saved
        loaded, self._now.ends = frozenset(self._now.ends), ()
        failed = loaded & self._failed_requests
        self._failed_requests -= loaded
        return Finished(saved, loaded, failed)

    def get_block_ids_with_load_errors(self) -> list[set[int]]:
        """Return the pages of this step's failed loads, by group."""
        return self._now.bad_pages

    def build_worker_report(self) -> bytes:
        """Say what became of the step, and what ended in the background."""
        assert self._transfers is not None, "register_kv_caches comes first"
        endings = self._endings
        self._transfers.poll(endings)
        for slot, order in endings.promoted:
            if slot in self._promoting:
                group, block_hash = self._promoting.pop(slot)
                self._held[slot] = (group, block_hash, order)
        for slot in endings.not_promoted:
            self._promoting.pop(slot, None)
        # what a hook that raised never came to has failed, and must be said: its slots would stay reserved
        for move in (*self._now.take("loads"), *self._now.take("fails")):
            self._load_failed(move)
        endings.not_promoted += [move.slot for move in self._now.take("promotes")]
        endings.not_demoted += [(move.target, move.slot) for move in self._now.take("demotes")]
        self._now.failed_saves += [move.slot for move in self._now.take("saves")]
        report = Report(
            step=self._now.number,
            rank=self._rank,
            load_errors=tuple(
                LoadError(request_id, group, pack_ints(ordinals))
                for (request_id, group), ordinals in self._now.load_errors.items()
            ),
            failed_saves=pack_ints(self._now.failed_saves),
            promoted=pack_ints(slot for slot, _ in endings.promoted),
            not_promoted=pack_ints(endings.not_promoted),
            demoted=pack_ints(value for pair in endings.demoted for value in pair),
            not_demoted=pack_ints(value for pair in endings.not_demoted for value in pair),
            quarantined=pack_ints(endings.quarantined),
            released=pack_ints(endings.released),
            reads=pack_ints(min(value, _MAX_INT) for read in endings.reads for value in read),
            step_us=round((time.perf_counter() - self._bound_at) * 1e6),
        ).encode()
        self._endings = Endings()  # only now: what could not be said would be waited for
        return report

    # -- whole life ----------------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Return counters, and failures by kind."""
        stats: dict[str, Any] = dict(self._counts)
        failures = Counter(self._log.counts)
        if self._transfers is not None:
            stats.update(self._transfers.counts)
            failures.update(self._transfers.failures)
            stats["breakers"] = self._transfers.breakers
        if self._arena is not None:
            stats["arena_bytes"] = self._arena.usable_slots * self._arena.slot_bytes
        stats["failures"] = dict(failures)
        return stats

    def shutdown(self) -> None:
        """Close the stores after what is queued, and let the tensors go."""
        if self._transfers is not None:
            self._transfers.close()
        for pool in (self._pool, self._toucher):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._copiers = []
        self._layout = None

    # -- parts ---------------------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        assert self._arena is not None, "register_kv_caches comes first"
        unused, self._now.unused = self._now.unused, []
        for slot in unused:
            self._empty(slot)
        self._arena.give_back(unused)

    def _empty(self, slot: int) -> None:
        assert self._transfers is not None, "register_kv_caches comes first"
        self._held.pop(slot, None)
        self._transfers.refill(slot)

    def _load(self, loads: Sequence[Move]) -> None:
        """Scatter every load whose slot holds what the plan says; the rest are errors."""
        started = time.perf_counter()
        by_group: dict[int, list[tuple[Move, str]]] = defaultdict(list)
        for move in loads:
            held = self._held.get(move.slot)
            if held is None or held[:2] != (move.group, move.block_hash):
                self._load_failed(move)
                self._log.failed("load", f"slot {move.slot} does not hold the block that the plan names")
            else:
                by_group[move.group].append((move, held[2]))
        for group, moves in by_group.items():
            try:
                self._copiers[group].scatter(
                    [move.target for move, _ in moves],
                    [move.slot for move, _ in moves],
                    [order for _, order in moves],
                )
            except Exception as error:
                for move, _ in moves:
                    self._load_failed(move)
                self._log.failed("load", error, len(moves))
                continue
            self._counts["loaded_blocks"] += len(moves)
            self._counts["loaded_bytes"] += len(moves) * self._payload_bytes[group]
        if loads:
            self._counts["load_us"] += round((time.perf_counter() - started) * 1e6)

    def _load_failed(self, move: Move) -> None:
        request_id = self._now.request_ids[move.request]
        if request_id in self._now.parked:
            self._failed_requests.add(request_id)
        self._now.load_errors[request_id, move.group].append(move.ordinal)
        self._now.bad_pages[move.group].add(move.target)
        self._counts["load_errors"] += 1

    def _touch_ahead(self, slots: Sequence[int]) -> None:
        if self._arena is not None and self._toucher is not None:
            self._arena.touch_ahead(slots, self._toucher.submit)

    def _frame(self, move: Move) -> SlotFrame:
        assert self._arena is not None, "register_kv_caches comes first"
        held = self._held.get(move.slot)
        return SlotFrame(
            slot=move.slot,
            key=self._key(move),
            memory=self._arena.slot(move.slot),
            payload_bytes=self._payload_bytes[move.group],
            fingerprint=self._fingerprints[move.group],
            order=held[2] if held is not None else self._orders[move.group],
        )

    def _key(self, move: Move) -> BlockKey:
        return block_key(self._namespace, move.block_hash, move.group, self._shards[move.group])


def _by_target(planned: Sequence[Move]) -> dict[int, list[Move]]:
    """Group moves by their tier."""
    tiers: dict[int, list[Move]] = defaultdict(list)
    for move in planned:
        tiers[move.target].append(move)
    return tiers
