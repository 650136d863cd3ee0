"""Mutants that offer too much, too little, or against the contract."""

from __future__ import annotations

from typing import Any

import msgspec

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import Handshake, Match
from kvconnect.testing.mutants.base import Right, leader, mutant
from kvconnect.testing.mutants.stores import FolderStore
from kvconnect.testing.offers import OfferTests

__all__: list[str] = []

_ask = OffloadLeader.get_num_new_matched_tokens


def _answers(answer: Any) -> type[OffloadLeader]:
    """Return a leader that answers ``answer(self, request, num_computed_tokens)``."""

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Any:
        return answer(self, request, num_computed_tokens)

    return leader(get_num_new_matched_tokens=get_num_new_matched_tokens)


@mutant(OfferTests.test_saved_prefix_is_offered, "again and again")
class NeverAnswers(Right):
    """Asks for more time, for ever."""

    leader = _answers(lambda self, request, computed: Match(None, False))


@mutant(OfferTests.test_saved_prefix_is_offered, "returned None, not a Match")
class AnswersNone(Right):
    """Returns None where there is nothing."""

    leader = _answers(
        lambda self, request, computed: _ask(self, request, computed) if self._index.counts()["ready"] else None
    )


@mutant(OfferTests.test_saved_prefix_is_offered, "nothing cannot be loaded asynchronously")
class OffersNothingLater(Right):
    """Answers (0, True): nothing, asynchronously."""

    leader = _answers(lambda self, request, computed: Match(_ask(self, request, computed)[0], True))


@mutant(OfferTests.test_offer_leaves_a_token_to_compute, "none is left|tokens offered")
class OffersTheWholePrompt(Right):
    """Leaves the engine no token to compute."""

    leader = _answers(
        lambda self, request, computed: _ask(
            self, msgspec.structs.replace(request, tokens=(*request.tokens, 1)), computed
        )
    )


def _one_more(self: Any, request: Any, computed: int) -> Match:
    count, parks = _ask(self, request, computed)
    return Match(count + self._block_size, parks) if count else Match(count, parks)


@mutant(OfferTests.test_offer_is_the_common_prefix_and_no_more, "tokens offered with")
class OffersOneBlockMore(Right):
    """Counts the block that missed."""

    leader = _answers(_one_more)


def _count_all(self: Any, request: Any, computed: int) -> Match:
    state, size = self._requests[request.request_id], self._block_size
    first = state.first = computed // size
    hashes = state.chain.hashes[first : (len(request.tokens) - 1) // size]
    there = [number for number, each in enumerate(hashes, 1) if each in self._index.ready(0)]
    return Match(max(there, default=0) * size, False)


@mutant(OfferTests.test_offer_ends_where_the_first_block_is_missing, "ends at the first block that is missing")
class OffersBehindAGap(Right):
    """Offers up to the last block that is there, whatever is missing before it."""

    leader = _answers(_count_all)


@mutant(OfferTests.test_offer_counts_from_what_is_computed, "count from num_computed_tokens")
class CountsFromZero(Right):
    """Forgets what is computed already."""

    leader = _answers(lambda self, request, computed: _ask(self, request, 0))


@mutant(OfferTests.test_offer_counts_from_what_is_computed, "tokens offered on top of 1 ")
class RoundsDown(Right):
    """Offers on top of a part of a block."""

    leader = _answers(lambda self, request, computed: _ask(self, request, computed - computed % self._block_size))


def _first_answer(self: Any, request: Any, computed: int) -> Match:
    known = self.__dict__.setdefault("_first_answers", {})
    if request.request_id not in known:
        known[request.request_id] = _ask(self, request, computed)
    answer: Match = known[request.request_id]
    return answer


@mutant(OfferTests.test_asking_again_and_again_changes_nothing, "answer 8, on top of 16")
class RemembersItsFirstAnswer(Right):
    """Gives the first answer again while computed tokens shrink."""

    leader = _answers(_first_answer)


def _counts_down(self: Any, request: Any, computed: int) -> Match:
    state = self._requests.get(request.request_id)
    if state is not None and state.give_up_at < -30:
        return Match(0, False)
    if state is not None:
        state.give_up_at -= 1
    return _ask(self, request, computed)


@mutant(OfferTests.test_asking_again_and_again_changes_nothing, "answer 32")
class LosesPatienceWhenAskedAgain(Right):
    """Takes each ask for an allocation, and gives up after thirty."""

    leader = _answers(_counts_down)


def _takes_it_all(self: Any, request: Any, block_ids: Any, num_external_tokens: int) -> None:
    state = self._requests.get(request.request_id)
    if state is not None and state.chain is not None:
        limit = (len(request.tokens) - 1) // self._block_size
        num_external_tokens = (
            self._matcher.num_ready(state.chain, state.first, limit) - state.first
        ) * self._block_size
    OffloadLeader.update_state_after_alloc(self, request, block_ids, num_external_tokens)


@mutant(OfferTests.test_engine_may_take_less, "pages written beyond the 0 tokens")
class LoadsWhatItOffered(Right):
    """Loads its whole offer, however much of it the engine took."""

    leader = leader(update_state_after_alloc=_takes_it_all)


@mutant(OfferTests.test_cancelled_part_of_a_load_is_not_made, "written although their load was cancelled")
@mutant(
    OfferTests.test_cancelled_part_of_a_load_is_not_made,
    "written although their load was cancelled",
    parameters={"part": "tail"},
)
class IgnoresCancelLoad(Right):
    """Loads what was cancelled."""

    leader = leader(cancel_load=lambda self, request, start, end: None)


def _any_use(self: Any, request: Any) -> None:
    OffloadLeader.on_new_request(self, msgspec.structs.replace(request, cache="both"))


@mutant(OfferTests.test_request_says_what_it_may_do, "tokens saved", parameters={"cache": "read"})
@mutant(OfferTests.test_request_says_what_it_may_do, "tokens loaded", parameters={"cache": "write"})
@mutant(OfferTests.test_request_says_what_it_may_do, "tokens loaded", parameters={"cache": "none"})
class IgnoresWhatARequestMayDo(Right):
    """Loads and saves for every request."""

    leader = leader(on_new_request=_any_use)


class _KnowsOneRank(OffloadLeader):
    def set_handshake_metadata(self, per_rank: Any) -> None:
        super().set_handshake_metadata(per_rank)
        self._shards = [[group.shard] for group in Handshake.decode(per_rank[0]).groups]
        self._traffic._num_ranks = 1


@mutant(OfferTests.test_offer_needs_every_shard, "a shard is missing", over=[FolderStore])
class TakesOneShardForAll(Right):
    """Takes a block for a hit when one rank's part is there."""

    leader = _KnowsOneRank
