"""Mutants that lose a suspended request's blocks, mix them up, or never let them go."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from kvconnect.leader import OffloadLeader
from kvconnect.leader.index import State
from kvconnect.leader.suspended import Suspensions
from kvconnect.protocol import Finished
from kvconnect.testing.mutants.base import Right, leader, mutant, worker
from kvconnect.testing.mutants.holds import HoldingFolderStore
from kvconnect.testing.suspension import SuspendTests
from kvconnect.worker import OffloadWorker

__all__ = ["SmallHoldingStore"]

_BYTES = SuspendTests.test_resumed_pages_hold_what_was_computed
_MEANS_NOTHING = SuspendTests.test_calls_that_mean_nothing_are_refused
_DROPPED = "tokens that came back to be .* never dropped"
_LEAKS = "tokens that fit into the memory to be .*still held"


def _keeping(**members: Any) -> type[OffloadLeader]:
    """Return a leader that keeps suspended blocks in its own way."""
    kind = type("Suspensions", (Suspensions,), members)

    def use_cache(self: Any, ranks: Any) -> None:
        OffloadLeader._use_cache(self, ranks)
        self._suspended.__class__ = kind

    return leader(_use_cache=use_cache)


def _blocks(kept: Any) -> list[Any]:
    return [block for each in kept._requests.values() for block in each.blocks]


def _resume_less(self: Any, request: Any, block_ids: Sequence[Sequence[int]]) -> bool:
    return OffloadLeader.resume(self, request, [[*table[:-1], -1] for table in block_ids])


@mutant(_BYTES, "loaded pages to hold.*nobody wrote it")
class LoadsOneBlockLess(Right):
    """Leaves out the last block of a resumed request."""

    leader = leader(resume=_resume_less)


def _resume_backwards(self: Any, request: Any, block_ids: Sequence[Sequence[int]]) -> bool:
    return OffloadLeader.resume(self, request, [table[::-1] for table in block_ids])


@mutant(_BYTES, "loaded pages to hold.*it is position")
@mutant(
    SuspendTests.test_any_schedule_with_suspensions_reads_right_bytes,
    "each layer to read.*it is position",
    parameters={"number": 1},
)
class LoadsBackwards(Right):
    """Loads a resumed request's first block into its last page."""

    leader = leader(resume=_resume_backwards)


def _suspend_full(self: Any, request: Any, block_ids: Any, num_tokens: int) -> bool:
    return OffloadLeader.suspend(self, request, block_ids, num_tokens // self._block_size * self._block_size)


def _resume_known(self: Any, request: Any, block_ids: Sequence[Sequence[int]]) -> bool:
    state = self._requests.get(request.request_id)
    known = {} if state is None else state.suspended
    tables = [
        [page if (group, ordinal) in known else -1 for ordinal, page in enumerate(table)]
        for group, table in enumerate(block_ids)
    ]
    return OffloadLeader.resume(self, request, tables)


@mutant(_BYTES, "loaded pages to hold.*nobody wrote it")
class DropsThePartialBlock(Right):
    """Suspends full blocks only."""

    leader = leader(suspend=_suspend_full, resume=_resume_known)


def _suspend_cached(self: Any, request: Any, block_ids: Any, num_tokens: int) -> bool:
    return request.cache != "none" and OffloadLeader.suspend(self, request, block_ids, num_tokens)


@mutant(_BYTES, "room for a suspended request; got False")
class SuspendsOnlyTheCached(Right):
    """Does not suspend a request that must not be cached."""

    leader = leader(suspend=_suspend_cached)


_UNTIL_READ = SuspendTests.test_pages_are_the_requests_until_they_are_read


@mutant(_UNTIL_READ, "to name r0 as saved on every rank.*named by ranks")
class NeverNamesIt(Right):
    """Never says that the pages of a suspended request were read."""

    leader = _keeping(named=property(lambda self: ()))


def _finish_again(self: Any, finished_req_ids: frozenset[str]) -> Finished:
    finished = OffloadWorker.get_finished(self, finished_req_ids)
    self.read = getattr(self, "read", frozenset()) | finished.saved
    return finished._replace(saved=self.read)


@mutant(_UNTIL_READ, "once a rank; got rank 0 named r")
class NamesItForEver(Right):
    """Names a request whose pages were read in every step from then on."""

    worker = worker(get_finished=_finish_again)


@mutant(_UNTIL_READ, "and steps until it does; got named by ranks")
class HasNothingToDo(Right):
    """Lets the engine go idle before the pages of a suspended request were read."""

    leader = leader(has_pending_work=lambda self: False)


def _resume_unread(self: Any, request_id: str) -> bool:
    each = self._requests.get(request_id)
    if each is not None:
        each.named = False
    return Suspensions.resume(self, request_id)


@mutant(_UNTIL_READ, "no resume before that; got True")
class ResumesBeforeItIsRead(Right):
    """Resumes a request whose pages were not read yet."""

    leader = _keeping(resume=_resume_unread)


def _suspend_holes(self: Any, request: Any, block_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
    return OffloadLeader.suspend(self, request, [[max(page, 0) for page in table] for table in block_ids], num_tokens)


@mutant(SuspendTests.test_pages_out_of_the_window_need_nothing, "13 pages where 14 fit.*got False.*is no page")
class SuspendsHoles(Right):
    """Takes room for blocks that have no page."""

    leader = leader(suspend=_suspend_holes)


def _suspend_anyhow(self: Any, request: Any, block_ids: Any, num_tokens: int) -> bool:
    OffloadLeader.suspend(self, request, block_ids, num_tokens)
    return True


@mutant(SuspendTests.test_refused_suspension_changes_nothing, "six blocks do not fit into five; got True")
@mutant(_MEANS_NOTHING, "suspend of an unknown request to be refused; got True")
class SuspendsWithoutRoom(Right):
    """Says that it has taken the pages, with room or without."""

    leader = leader(suspend=_suspend_anyhow)


def _suspend_greedily(self: Any, request: Any, block_ids: Any, num_tokens: int) -> bool:
    suspended = OffloadLeader.suspend(self, request, block_ids, num_tokens)
    if not suspended and self._index.num_available:
        self._index.reserve(secrets.token_bytes(32), 0, State.RESERVED, None)
    return suspended


@mutant(SuspendTests.test_refused_suspension_changes_nothing, _LEAKS)
class KeepsWhatItTook(Right):
    """Takes a slot before it finds that there are too few, and does not give it back."""

    leader = leader(suspend=_suspend_greedily)


@mutant(_MEANS_NOTHING, "prefetch of an unknown request to be refused; got True")
class PrefetchesAnybody(Right):
    """Grants every prefetch."""

    leader = leader(prefetch=lambda self, request, tier: True)


@mutant(_MEANS_NOTHING, "prefetch to tier -1 to be refused; got True")
class KnowsNoTiers(Right):
    """Takes every tier for the nearest that there is."""

    leader = leader(prefetch=lambda self, request, tier: OffloadLeader.prefetch(self, request, 0))


@mutant(_MEANS_NOTHING, "resume of an unknown request to be refused; got True")
class ResumesAnybody(Right):
    """Says that a request is resumed that never was suspended."""

    leader = leader(resume=lambda self, request, block_ids: OffloadLeader.resume(self, request, block_ids) or True)


def _suspend_again(self: Any, request: Any, block_ids: Any, num_tokens: int) -> bool:
    return request.request_id in self._suspended or OffloadLeader.suspend(self, request, block_ids, num_tokens)


@mutant(_MEANS_NOTHING, "suspend of a suspended request to be refused; got True")
class SuspendsTwice(Right):
    """Suspends a request that is suspended already."""

    leader = leader(suspend=_suspend_again)


def _let_go(self: Any, committed: Any, voided: Any) -> None:
    Suspensions.closed(self, committed, voided)
    for block in _blocks(self):
        self._unclaim(block)


@mutant(SuspendTests.test_suspended_blocks_are_never_dropped, _DROPPED)
class HoldsNothingInMemory(Right):
    """Lets suspended blocks be evicted like any other."""

    leader = _keeping(closed=_let_go)


def _believe(self: Any, block: Any, tier: int) -> None:
    block.held_in = tier
    self._unclaim(block)


class SmallHoldingStore(HoldingFolderStore):
    """Has room for about a dozen of the kit's blocks."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.capacity = 12_000


@mutant(SuspendTests.test_suspended_blocks_are_never_dropped, _DROPPED, over=[SmallHoldingStore])
class HoldsNothingInTheStore(Right):
    """Takes what a store has written for what it keeps."""

    leader = _keeping(_ask=_believe)


def _block_of_known(self: Any, state: Any, nonce: bytes, group: int, ordinal: int, page: int, num_tokens: int) -> Any:
    known = max(num_tokens, min(len(state.hashes), ordinal + 1) * self._block_size)
    return Suspensions._block(self, state, nonce, group, ordinal, page, known)


@mutant(SuspendTests.test_partial_block_is_nobody_elses, "at most the 12 tokens of full blocks|nobody wrote it")
class NamesBlocksBeforeTheyAreFull(Right):
    """Gives a block its name as soon as its tokens are known, computed or not."""

    leader = _keeping(_block=_block_of_known)


def _end_all(self: Any, request_id: str) -> None:
    each = self._requests.get(request_id)
    blocks = [] if each is None else each.blocks
    Suspensions.end(self, request_id)
    for block in blocks:
        self._remove(block)


@mutant(SuspendTests.test_others_load_the_full_blocks, "another request loads to be 20; got 0")
class TakesItsBlocksAway(Right):
    """Removes all blocks of a request that is resumed, which others would have loaded."""

    leader = _keeping(end=_end_all)


def _block_of_all(self: Any, state: Any, *args: Any) -> Any:
    writes, state.writes = state.writes, True
    block = Suspensions._block(self, state, *args)
    state.writes = writes
    return block


@mutant(SuspendTests.test_unshared_request_stays_its_own, "offered of it to another request to be 0; got 20")
class SharesWhatIsSuspended(Right):
    """Saves the blocks of a request that may not save where others find them."""

    leader = _keeping(_block=_block_of_all)


@mutant(SuspendTests.test_nothing_of_it_is_left, _LEAKS)
class KeepsTheGone(Right):
    """Keeps the blocks of a suspended request that was aborted."""

    leader = _keeping(forget=lambda self, state: None)


def _end_claimed(self: Any, request_id: str) -> None:
    for block in _blocks(self):
        block.entry = None
    Suspensions.end(self, request_id)


@mutant(SuspendTests.test_nothing_of_it_is_left, _LEAKS, parameters={"way": "resumed"})
class KeepsTheResumed(Right):
    """Keeps the blocks of a request claimed that was resumed long ago."""

    leader = _keeping(loading=lambda self, request_id, loads: None, end=_end_claimed)


def _prefetch_free(self: Any, request_id: str, tier: int) -> bool:
    for block in _blocks(self):
        self._unclaim(block)
    return Suspensions.prefetch(self, request_id, tier)


@mutant(SuspendTests.test_prefetched_blocks_come_back, _DROPPED)
class HoldsNothingThatIsPrefetched(Right):
    """Lets go of a suspended request's blocks when they are wanted further up."""

    leader = _keeping(prefetch=_prefetch_free)


@mutant(SuspendTests.test_prefetch_of_what_is_there_is_granted, "prefetch to host memory to be granted; got False")
class PrefetchesNothing(Right):
    """Refuses every prefetch."""

    leader = leader(prefetch=lambda self, request, tier: False)


class _Deaf:
    def end(self, request_id: str) -> None:
        """Hear nothing."""


def _reset_unheard(self: Any, request: Any) -> None:
    suspended, self._suspended = self._suspended, _Deaf()
    OffloadLeader.request_reset(self, request)
    self._suspended = suspended


@mutant(SuspendTests.test_reset_request_is_suspended_no_longer, "resume of a request that was reset to be refused")
class RemembersTheReset(Right):
    """Keeps a request suspended that begins again."""

    leader = leader(request_reset=_reset_unheard)


@mutant(
    SuspendTests.test_nothing_suspended_outlives_reset_cache,
    "from before reset_cache to be 0; got 22.*weights that are gone",
)
class ResetsNothing(Right):
    """Says that it has reset the cache, and goes on."""

    leader = leader(reset_cache=lambda self: True)


def _suspend_as_before(self: Any, request: Any, block_ids: Any, num_tokens: int) -> bool:
    self.__dict__.setdefault("lengths", {}).setdefault(request.request_id, num_tokens)
    return OffloadLeader.suspend(self, request, block_ids, self.lengths[request.request_id])


@mutant(SuspendTests.test_suspended_again_and_again, "loaded pages to hold.*nobody wrote it")
class RemembersHowLongItWas(Right):
    """Suspends as many tokens as it did the first time."""

    leader = leader(suspend=_suspend_as_before, resume=_resume_known)


def _finish_once(self: Any, finished_req_ids: frozenset[str]) -> Finished:
    finished = OffloadWorker.get_finished(self, finished_req_ids)
    said: frozenset[str] = getattr(self, "said", frozenset())
    self.said = said | finished.saved
    return finished._replace(saved=finished.saved - said)


@mutant(SuspendTests.test_suspended_again_at_once, "to name r0 as saved on every rank.*named by ranks")
class NamesItOnceInItsLife(Right):
    """Says of a request only once that its pages were read, however often it is suspended."""

    worker = worker(get_finished=_finish_once)


@mutant(SuspendTests.test_resize_to_nonsense_is_refused, r"resize_tier\(0, 0\) to be refused; got True")
class ResizesToAnything(Right):
    """Says that a tier has whatever size was asked for."""

    leader = leader(resize_tier=lambda self, tier, num_bytes: OffloadLeader.resize_tier(self, tier, num_bytes) or True)


def _shrink_anyhow(self: Any, tier: int, num_bytes: int) -> bool:
    for block in _blocks(self._suspended):
        self._suspended._unclaim(block)
    return OffloadLeader.resize_tier(self, tier, num_bytes)


@mutant(SuspendTests.test_shrinking_drops_nothing_that_is_suspended, _DROPPED)
class ShrinksAnyhow(Right):
    """Evicts suspended blocks to make a tier smaller."""

    leader = leader(resize_tier=_shrink_anyhow)
