"""Mutants that hold too little, too much, too long, or for the wrong request."""

from __future__ import annotations

from typing import Any

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import Match
from kvconnect.testing.claims import ClaimTests
from kvconnect.testing.mutants.base import Right, leader, mutant

__all__: list[str] = []

_ENDS = ClaimTests.test_claim_ends_whatever_comes
_LEAKS = "tokens that fit into the memory to be 48; got .*still held"


def _claimed(self: Any, request: Any) -> list[Any]:
    """Take what a request has claimed away from the leader, which then releases nothing of it."""
    state = self._requests.get(request.request_id)
    if state is None:
        return []
    claimed, state.claimed = state.claimed, []
    return list(claimed)


def _in_blocks(self: Any, request: Any, num_tokens: int) -> int:
    held: int = OffloadLeader.claim_match(self, request, num_tokens) // self._block_size
    return held


@mutant(ClaimTests.test_claim_is_whole_blocks_of_the_offer, "tokens held of 20 to be 20; got 5.*answer in tokens")
class CountsClaimsInBlocks(Right):
    """Answers with the number of blocks that it holds."""

    leader = leader(claim_match=_in_blocks)


@mutant(ClaimTests.test_claimed_blocks_are_not_evicted, "20 tokens that were held to be loaded; got load errors")
class ClaimsNothing(Right):
    """Says that it holds what it was offered, and holds nothing."""

    leader = leader(claim_match=lambda self, request, num_tokens: num_tokens)


def _first_only(self: Any, request: Any, num_tokens: int) -> int:
    if any(state.claimed for state in self._requests.values()):
        return num_tokens
    return OffloadLeader.claim_match(self, request, num_tokens)


@mutant(ClaimTests.test_batch_is_claimed_before_it_is_allocated, "20 tokens that were held to be loaded; got load")
class HoldsOneClaim(Right):
    """Holds the first claim of a batch only."""

    leader = leader(claim_match=_first_only)


@mutant(_ENDS, _LEAKS)
class ForgetsToRelease(Right):
    """Does nothing when a claim is let go."""

    leader = leader(release_match=lambda self, request: None)


def _claim_again(self: Any, request: Any, num_tokens: int) -> int:
    _claimed(self, request)
    return OffloadLeader.claim_match(self, request, num_tokens)


@mutant(_ENDS, _LEAKS, parameters={"way": "claimed twice"})
class AddsUpClaims(Right):
    """Claims what a request has claimed already once more, and releases it once."""

    leader = leader(claim_match=_claim_again)


def _finish(self: Any, request: Any, block_ids: Any) -> bool:
    _claimed(self, request)
    return OffloadLeader.request_finished(self, request, block_ids)


@mutant(_ENDS, _LEAKS, parameters={"way": "finished"})
class HoldsForTheGone(Right):
    """Holds the claim of a request that has ended."""

    leader = leader(request_finished=_finish)


def _reset(self: Any, request: Any) -> None:
    _claimed(self, request)
    OffloadLeader.request_reset(self, request)


@mutant(_ENDS, _LEAKS, parameters={"way": "reset"})
class HoldsForTheReset(Right):
    """Holds the claim of a request that begins again."""

    leader = leader(request_reset=_reset)


def _allocate(self: Any, request: Any, block_ids: Any, num_external_tokens: int) -> None:
    claimed = _claimed(self, request)
    taken = num_external_tokens // self._block_size
    self._index.release_chain(claimed[:taken])
    OffloadLeader.update_state_after_alloc(self, request, block_ids, num_external_tokens)


@mutant(_ENDS, _LEAKS, parameters={"way": "taken in part"})
@mutant(_ENDS, _LEAKS, parameters={"way": "not taken"})
class HoldsWhatWasNotTaken(Right):
    """Lets go of what is allocated, and holds the rest of the claim."""

    leader = leader(update_state_after_alloc=_allocate)


def _release_known(self: Any, request: Any) -> None:
    assert self._requests[request.request_id]
    OffloadLeader.release_match(self, request)


@mutant(ClaimTests.test_release_without_a_claim_does_nothing, "leader.release_match.*KeyError")
class ReleasesOnlyTheKnown(Right):
    """Raises when a request lets go that it has never heard of."""

    leader = leader(release_match=_release_known)


def _release_loads(self: Any, request: Any) -> None:
    OffloadLeader.release_match(self, request)
    state = self._requests.get(request.request_id)
    if state is not None:
        self._index.release_chain(load.entry for load in state.loads)
        state.loads = []


@mutant(ClaimTests.test_release_without_a_claim_does_nothing, "nobody wrote it")
class ReleasesTheLoad(Right):
    """Lets go of the load, too, when a request that is allocated releases its claim."""

    leader = leader(release_match=_release_loads)


def _for_anybody(self: Any, request: Any, num_tokens: int) -> int:
    state = self._requests.get(request.request_id)
    if state is not None:
        state.reads = True
    return OffloadLeader.claim_match(self, request, num_tokens)


@mutant(ClaimTests.test_who_is_offered_nothing_claims_nothing, r"held for a request \(write\) to be 0; got 20")
class ClaimsForWhoMayNotLoad(Right):
    """Claims the blocks of a request that only saves."""

    leader = leader(claim_match=_for_anybody)


def _offer_unclaimed(self: Any, request: Any, num_computed_tokens: int) -> Match:
    others = [state for name, state in self._requests.items() if name != request.request_id]
    if any(state.claimed for state in others):
        return Match(0, False)
    return OffloadLeader.get_num_new_matched_tokens(self, request, num_computed_tokens)


@mutant(ClaimTests.test_claim_changes_no_other_offer, "tokens that another request loads to be 20; got 0")
class LocksWhatIsClaimed(Right):
    """Offers nothing to others while somebody holds a claim."""

    leader = leader(get_num_new_matched_tokens=_offer_unclaimed)
