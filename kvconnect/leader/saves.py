"""Plans saves: each block once, in the first step that finds it full with all its tokens known. Moves nothing.

Engines that plan ahead compute a block before its last token is known. Such a block is saved by a later plan; if the
request has ended by then its pages are kept for one more plan, which names the request in `Plan.saved`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from kvconnect.leader.demotion import Demotions
from kvconnect.leader.draft import PlanDraft
from kvconnect.leader.events import EventLog
from kvconnect.leader.index import BlockIndex, Entry, State
from kvconnect.leader.request import RequestState
from kvconnect.protocol import RequestView, ScheduledRequest

__all__ = ["SavePlanner"]

_PATIENCE_S = 60.0


class _Ended:
    """A request that has ended and whose pages are kept: they are its own in step `step`, then nobody knows."""

    def __init__(self, state: RequestState, tables: list[list[int]], step: int) -> None:
        self.state = state
        self.tables = tables
        self.step = step
        self.give_up_at = time.monotonic() + _PATIENCE_S


class SavePlanner:
    """Reserves slots for blocks that steps fill."""

    def __init__(
        self,
        index: BlockIndex,
        block_size: int,
        counts: Counter[str],
        events: EventLog,
        down: Demotions,
        *,
        min_priority: int = 0,
    ) -> None:
        """Plan into the slots of `index`.

        Args:
            index: Whose slots.
            block_size: Tokens a block.
            counts: Gets ``save_blocks``, ``saves_without_slot`` and ``saves_below_priority``.
            events: Told which tokens a block holds.
            down: Offered blocks that are used again.
            min_priority: Blocks of a lower priority are not saved.
        """
        self._min_priority = min_priority
        self._index = index
        self._events = events
        self._down = down
        self._block_size = block_size
        self._counts = counts
        self._ended: dict[str, _Ended] = {}

    @property
    def ended(self) -> tuple[str, ...]:
        """Requests that have ended and whose pages are kept."""
        return tuple(self._ended)

    def plan(self, draft: PlanDraft, state: RequestState, scheduled: ScheduledRequest) -> None:
        """Save what the step fills, and what it finds full and unsaved."""
        start = draft.opened.computed[state] = scheduled.num_computed_tokens // self._block_size
        if not state.writes or state.chain is None:
            return
        state.planned_tokens = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
        state.last_step = draft.opened.step
        # what lies on the device already was saved by whoever computed it; what a reset took back is computed anew
        if state.next_save is not None:
            start = min(start, state.next_save)
        else:
            self._used(state, start)
        self._save(draft, state, scheduled.block_ids, start)

    def end(
        self, state: RequestState, request: RequestView, block_ids: Sequence[Sequence[int]], last_step: int
    ) -> bool:
        """Say whether a request that has ended still has blocks to save: then its pages must be kept.

        Args:
            state: What is known of it.
            request: With all its tokens.
            block_ids: Its pages; they are sure to be its own in the step that is planned next, and no longer.
            last_step: The step that was planned last.
        """
        if not state.writes or state.chain is None or state.next_save is None:
            return False
        if not state.extend(request.tokens[state.chain.num_tokens :]):
            return False
        full = min(state.planned_tokens, state.chain.num_tokens) // self._block_size
        if state.next_save >= full or not any(page >= 0 for table in block_ids for page in table[state.next_save :]):
            return False
        self._ended[request.request_id] = _Ended(state, [list(table) for table in block_ids], last_step + 1)
        return True

    def plan_ended(self, draft: PlanDraft) -> None:
        """Save the last blocks of requests that have ended, once; name them until the step is reported."""
        now = time.monotonic()
        for request_id, ended in list(self._ended.items()):
            if now > ended.give_up_at:  # no plan reaches the workers; the engine has long taken the pages back
                del self._ended[request_id]
                continue
            state, tables, ended.tables = ended.state, ended.tables, []
            if not tables or draft.opened.step != ended.step or state.chain is None or state.next_save is None:
                continue
            if state.void_until < state.last_step:  # else its last step stands on one that failed: it computed garbage
                self._save(draft, state, tables, state.next_save)
        draft.opened.ended = tuple(self._ended)

    def reported(self, request_ids: Sequence[str]) -> None:
        """Learn that every rank got a plan that names these ended requests, and has said so to the engine."""
        for request_id in request_ids:
            self._ended.pop(request_id, None)

    def drop_ended(self) -> None:
        """Save nothing more of requests that have ended: their hashes belong to an old epoch."""
        for ended in self._ended.values():
            ended.tables = []

    def _save(self, draft: PlanDraft, state: RequestState, tables: Sequence[Sequence[int]], start: int) -> None:
        assert state.chain is not None, "a request that is not cached is not saved"
        hashes = state.chain.hashes
        end = min(state.planned_tokens // self._block_size, len(hashes))
        state.next_save = end
        if start >= end:
            return
        planned = draft.begin_saves(state)
        found: list[tuple[Entry, int]] = []
        parent = hashes[start - 1] if start else None
        for ordinal in range(start, end):
            block_hash = hashes[ordinal]
            priority, duration_s = state.priority_of(ordinal)
            for group, table in enumerate(tables):
                if table[ordinal] < 0:
                    continue
                entry = self._index.get(group, block_hash)
                if entry is not None:
                    state.retain(self._index, entry, ordinal)
                    found.append((entry, ordinal))
                    continue
                if priority < self._min_priority:
                    self._counts["saves_below_priority"] += 1
                    continue
                entry = self._index.reserve(block_hash, group, State.RESERVED, parent, priority, duration_s)
                if entry is None:
                    self._counts["saves_without_slot"] += 1
                    continue
                entry.decoded = self._is_decoded(state, ordinal)
                if self._events.enabled:
                    self._events.remember(entry, state, ordinal)
                planned.append((entry, ordinal))
                draft.save(state, entry, table[ordinal], ordinal)
            parent = block_hash
        self._counts["save_blocks"] += len(planned)
        self._offer_again(state, found)

    def _used(self, state: RequestState, end: int) -> None:
        """Offer the blocks before `end`, which the request found at hand, to stores that do not have them."""
        if not self._down.writable:
            return
        hashes = state.hashes[:end]
        for group in range(self._index.num_groups):
            get = self._index.group(group).get
            entries = ((get(block_hash), ordinal) for ordinal, block_hash in enumerate(hashes))
            self._offer_again(state, [(entry, ordinal) for entry, ordinal in entries if entry is not None])

    def _offer_again(self, state: RequestState, found: Sequence[tuple[Entry, int]]) -> None:
        for entry, ordinal in found:
            entry.decoded = entry.decoded and self._is_decoded(state, ordinal)
        self._down.offer([entry for entry, _ in found if entry.state is State.READY])

    def _is_decoded(self, state: RequestState, ordinal: int) -> bool:
        return (ordinal + 1) * self._block_size > state.num_prompt_tokens
