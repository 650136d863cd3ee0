"""What is claimed between the offer and the allocation stays, and is let go whatever comes then."""

from __future__ import annotations

import random

import pytest

from kvconnect.testing.harness import BLOCK, KitRequest
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal
from kvconnect.testing.suspending import SuspendEngine, needs_of, with_room
from kvconnect.testing.target import Target

__all__ = ["ClaimTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2
_ROOM = 12
_SHAPES = ["full", "window", "mixed"]


class ClaimTests(Kit):
    """What `claim_match` holds, until when, and for whom."""

    @pytest.mark.parametrize("shape", _SHAPES)
    def test_claim_is_whole_blocks_of_the_offer(self, target: Target, rng: random.Random, shape: str) -> None:
        """`claim_match` answers with the tokens it holds: whole blocks, no more than asked for; with room, all."""
        needs_of(target, "batch_claim", shape)
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(target, shape=shape) as engine:
            engine.save(tokens)
            for count in (_BLOCKS * BLOCK, 3 * BLOCK):
                request, offered = _offered(engine, tokens)
                must_equal("tokens offered", offered, _BLOCKS * BLOCK)
                held = engine.leader.hook("claim_match")(request.view(), count)
                must_equal(f"tokens held of {count}", held, count, "claim what was asked for, and answer in tokens")
                engine.leader.release_match(request.view())
                engine.end(request)

    @pytest.mark.parametrize("num_ranks", [1, 2])
    @pytest.mark.parametrize("shape", _SHAPES)
    def test_claimed_blocks_are_not_evicted(
        self, target: Target, rng: random.Random, shape: str, num_ranks: int
    ) -> None:
        """What is held is loaded, byte for byte, whatever is saved between the claim and the allocation."""
        needs_of(target, "batch_claim", shape, num_ranks)
        tokens = self.tokens(rng, _PROMPT)
        room = with_room(target, _ROOM, shape=shape, num_ranks=num_ranks)
        with SuspendEngine(room, shape=shape, num_ranks=num_ranks) as engine:
            engine.save(tokens)
            request, offered = _offered(engine, tokens)
            held = engine.claim(request, offered)
            engine.press(rng)
            _must_load(engine, request, held)
            engine.end(request)

    @pytest.mark.parametrize("shape", _SHAPES)
    def test_batch_is_claimed_before_it_is_allocated(self, target: Target, rng: random.Random, shape: str) -> None:
        """Several requests are claimed, then allocated one by one: what one saves takes nothing from the next."""
        needs_of(target, "batch_claim", shape)
        prompts = [self.tokens(rng, _PROMPT) for _ in range(2)]
        with SuspendEngine(with_room(target, _ROOM, shape=shape), shape=shape, num_pages=96) as engine:
            for tokens in prompts:
                engine.save(tokens)
            batch = [_offered(engine, [*tokens, *self.tokens(rng, 4 * BLOCK)]) for tokens in prompts]
            claimed = [(request, engine.claim(request, offered)) for request, offered in batch]
            for request, held in claimed:
                _must_load(engine, request, held)
            engine.end(*(request for request, _ in batch))

    @pytest.mark.parametrize(
        "way",
        [
            "released",
            "released twice",
            "claimed twice",
            "finished",
            "reset",
            "taken in part",
            "not taken",
            "offered again",
        ],
    )
    def test_claim_ends_whatever_comes(self, target: Target, rng: random.Random, way: str) -> None:
        """Released, reset, finished or allocated, for all of it or less: then all memory is there for others."""
        needs_of(target, "batch_claim", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(with_room(target, _ROOM)) as engine:
            engine.save(tokens)
            request, offered = _offered(engine, tokens)
            must_equal("tokens held", engine.claim(request, offered), offered)
            match way:
                case "released" | "released twice":
                    engine.leader.release_match(request.view())
                    if way == "released twice":
                        engine.leader.release_match(request.view())
                case "claimed twice":
                    engine.claim(request, offered)
                    engine.leader.release_match(request.view())
                case "finished":
                    engine.finish(request)
                case "reset":
                    engine.reset(request)
                case "taken in part" | "not taken":
                    engine.allocate(request, 2 * BLOCK if way == "taken in part" else 0)
                    engine.go_on(request)
                case "offered again":
                    engine.offer(request)
                    engine.claim(request, BLOCK)
                    engine.allocate(request, BLOCK)
                    engine.go_on(request)
            engine.must_fit(rng, _ROOM)
            if way != "finished":
                engine.end(request)

    def test_release_without_a_claim_does_nothing(self, target: Target, rng: random.Random) -> None:
        """`release_match` of a request that claimed nothing, is unknown, or runs already changes nothing."""
        needs_of(target, "batch_claim", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(target) as engine:
            engine.save(tokens)
            unknown = KitRequest("nobody", tokens, 1, {})
            engine.leader.release_match(unknown.view())
            request = engine.arrive(tokens)
            engine.leader.release_match(request.view())
            offered = engine.offer(request).num_tokens or 0
            engine.allocate(request, engine.claim(request, offered))
            engine.leader.release_match(request.view())  # its load is the next plan's now
            must(
                not any(engine.step().bad_pages or ()), expected="the load to be made all the same", got="a load error"
            )
            engine.check_loaded(request)
            request.loaded = 0
            engine.go_on(request)
            engine.leader.release_match(request.view())
            engine.end(request)

    def test_who_is_offered_nothing_claims_nothing(self, target: Target, rng: random.Random) -> None:
        """A request that may not load, or that nobody knows, holds nothing, whatever the engine asks for."""
        needs_of(target, "batch_claim", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(with_room(target, _ROOM)) as engine:
            engine.save(tokens)
            asking = [engine.arrive(tokens, cache=cache) for cache in ("none", "write")]
            for request in (*asking, KitRequest("nobody", tokens, 1, {})):
                said = request.fields.get("cache", "unknown")
                engine.ask(request)
                must_equal(f"tokens held for a request ({said})", engine.claim(request, _BLOCKS * BLOCK), 0)
            engine.must_fit(rng, _ROOM)
            engine.end(*asking)

    def test_claim_changes_no_other_offer(self, target: Target, rng: random.Random) -> None:
        """Others are offered, and load, what one request holds."""
        needs_of(target, "batch_claim", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(target) as engine:
            engine.save(tokens)
            request, offered = _offered(engine, tokens)
            held = engine.claim(request, offered)
            for _ in range(2):
                must_equal("tokens that another request loads", engine.load(tokens), _BLOCKS * BLOCK)
            other, also = _offered(engine, tokens)
            must_equal("tokens that another request holds too", engine.claim(other, also), also)
            engine.leader.release_match(other.view())
            _must_load(engine, request, held)
            engine.end(request, other)


def _offered(engine: SuspendEngine, tokens: list[int]) -> tuple[KitRequest, int]:
    request = engine.arrive(tokens)
    return request, engine.offer(request).num_tokens or 0


def _must_load(engine: SuspendEngine, request: KitRequest, held: int) -> None:
    must(held > 0, expected="an offer that nothing competes for to be held", got="0 tokens")
    engine.allocate(request, held)
    failed = engine.step().bad_pages
    must(
        failed is not None and not any(failed),
        expected=f"the {held} tokens that were held to be loaded",
        got=f"load errors for pages {failed}",
        hint="claim_match holds blocks so that nothing evicts them",
    )
    engine.check_loaded(request)
    request.loaded = 0
    engine.go_on(request)
