"""What a connector offers: how much, from where on, to whom."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from kvconnect.protocol.keys import BlockKey
from kvconnect.store import BlockStore
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must_equal, needs, not_shown
from kvconnect.testing.target import Target

__all__ = ["OfferTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2


class OfferTests(Kit):
    """What `get_num_new_matched_tokens` may answer."""

    def test_saved_prefix_is_offered(self, target: Target, rng: random.Random) -> None:
        """What was computed, saved and committed is offered to the next request that begins with it."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            must_equal("tokens offered of what nobody computed", engine.offer(engine.arrive(tokens)).num_tokens, 0)
            engine.save(tokens)
            must_equal("tokens loaded of a prompt that was saved", engine.load(tokens), _BLOCKS * BLOCK)

    def test_offer_leaves_a_token_to_compute(self, target: Target, rng: random.Random) -> None:
        """A prompt of whole blocks is offered one block less: the engine needs a token to compute."""
        tokens = self.tokens(rng, _BLOCKS * BLOCK)
        with StepEngine(target) as engine:
            engine.save(tokens)
            must_equal("tokens offered", engine.offer(engine.arrive(tokens)).num_tokens, (_BLOCKS - 1) * BLOCK)
            longer = [*tokens, 1]
            must_equal("tokens offered, one token longer", engine.offer(engine.arrive(longer)).num_tokens, len(tokens))

    def test_offer_is_the_common_prefix_and_no_more(self, target: Target, rng: random.Random) -> None:
        """Whole blocks, without a gap, up to the first that differs."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            for common in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 2):
                other = [*tokens[:common], tokens[common] + 1, *tokens[common + 1 :]]
                offered = engine.offer(engine.arrive(other)).num_tokens
                must_equal(f"tokens offered with {common} in common", offered, common // BLOCK * BLOCK)

    def test_offer_ends_where_the_first_block_is_missing(self, target: Target, rng: random.Random) -> None:
        """Blocks behind one that is not there are not offered: a match is a prefix without a gap."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            silent = engine.arrive(tokens, cache="none")
            engine.allocate(silent, 0)
            engine.step((silent, _PROMPT))
            request = engine.arrive(tokens)
            engine.share(request, silent, 2 * BLOCK)  # its first blocks are on the device, so it saves those behind
            engine.step((request, _PROMPT - 2 * BLOCK))
            engine.finish(silent)
            engine.finish(request)
            engine.settle()
            missing = "a prefix ends at the first block that is missing"
            must_equal("tokens offered behind a gap", engine.offer(engine.arrive(tokens)).num_tokens, 0, missing)
            behind = engine.offer(engine.arrive(tokens), 2 * BLOCK).num_tokens
            must_equal("tokens offered on top of the two that are missing", behind, (_BLOCKS - 2) * BLOCK)

    def test_offer_needs_every_shard(self, target: Target, rng: random.Random) -> None:
        """A block of which one rank's part is not in the store is no hit."""
        needs(target.capabilities.several_ranks, "several_ranks")
        needs(target.capabilities.durable, "durable")
        if not target.resolved.tiers:
            not_shown("what its medium holds of each rank cannot be arranged from outside")
        seen: set[bytes] = set()

        def keep(kept: bytes | None) -> Callable[[type[BlockStore]], type[BlockStore]]:
            def lose(kind: type[BlockStore]) -> type[BlockStore]:
                def write(self: BlockStore, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
                    seen.update(bytes(key[-4:]) for key in keys)
                    mine = [i for i, key in enumerate(keys) if kept in (None, bytes(key[-4:]))]
                    kind.write(self, [keys[i] for i in mine], [frames[i] for i in mine])
                    return [True] * len(keys)

                return type(kind.__name__, (kind,), {"write": write})

            return lose

        with StepEngine(target.with_store(keep(None)), num_ranks=2) as engine:
            engine.save(self.tokens(rng, _PROMPT))
        for shard in sorted(seen):
            tokens = self.tokens(rng, _PROMPT)
            with StepEngine(target.with_store(keep(shard)), num_ranks=2) as engine:
                engine.save(tokens)
            with StepEngine(target, num_ranks=2) as engine:
                must_equal("tokens offered of blocks of which a shard is missing", engine.offered(tokens), 0)
                engine.load(tokens)  # computes and saves it
                must_equal("tokens loaded after they were computed", engine.load(tokens), _BLOCKS * BLOCK)

    def test_offer_counts_from_what_is_computed(self, target: Target, rng: random.Random) -> None:
        """The answer is what comes on top of `num_computed_tokens`; for an unaligned number it is 0."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            engine.offer(request)
            for computed in range(0, _PROMPT + BLOCK, 1):
                expected = max(0, _BLOCKS * BLOCK - computed) if computed % BLOCK == 0 else 0
                offered = engine.offer(request, computed).num_tokens
                must_equal(f"tokens offered on top of {computed}", offered, expected, "count from num_computed_tokens")

    def test_asking_again_and_again_changes_nothing(self, target: Target, rng: random.Random) -> None:
        """35 asks with shrinking `num_computed_tokens`, and no allocation between, are answered alike."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            for number in range(35):
                computed = (_BLOCKS - number * _BLOCKS // 34) * BLOCK
                offered = engine.offer(request, computed).num_tokens
                must_equal(f"answer {number + 1}, on top of {computed}", offered, _BLOCKS * BLOCK - computed)
            must_equal("tokens taken at last", engine.admit(request), _BLOCKS * BLOCK)
            engine.step((request, _PROMPT - request.computed))
            engine.finish(request)
            engine.settle()

    def test_engine_may_take_less(self, target: Target, rng: random.Random) -> None:
        """The engine may honour a part of the offer, or nothing."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            for taken in (0, BLOCK, 3 * BLOCK):
                request = engine.arrive(tokens)
                engine.offer(request)
                engine.allocate(request, taken)
                before = engine.pages.snapshot()
                engine.step()
                written = {page for _, _, page in engine.pages.changed_pages(before)}
                foreign = written - {page for table in request.tables for page in table[: taken // BLOCK]}
                must_equal(f"pages written beyond the {taken} tokens that were taken", len(foreign), 0)
                engine.step((request, _PROMPT - taken))
                engine.finish(request)
                engine.settle()
            must_equal("tokens loaded afterwards", engine.load(tokens), _BLOCKS * BLOCK)

    @pytest.mark.parametrize("part", ["head", "tail", "all"])
    def test_cancelled_part_of_a_load_is_not_made(self, target: Target, rng: random.Random, part: str) -> None:
        """After `cancel_load` those pages are the engine's to compute: nothing is written to them."""
        tokens = self.tokens(rng, _PROMPT)
        start, end = {"head": (0, 2), "tail": (3, _BLOCKS), "all": (0, _BLOCKS)}[part]
        with StepEngine(target) as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            engine.offer(request)
            engine.allocate(request, _BLOCKS * BLOCK)
            engine.leader.cancel_load(request.view(), start * BLOCK, end * BLOCK)
            cancelled = {page for table in request.tables for page in table[start:end]}
            before = engine.pages.snapshot()
            request.computed = 0
            engine.step()
            touched = {page for _, _, page in engine.pages.changed_pages(before)} & cancelled
            must_equal("pages written although their load was cancelled", len(touched), 0)
            engine.reset(request)
            engine.allocate(request, 0)
            engine.step((request, _PROMPT))
            engine.finish(request)
            engine.settle()

    @pytest.mark.parametrize("cache", ["both", "read", "write", "none"])
    def test_request_says_what_it_may_do(self, target: Target, rng: random.Random, cache: str) -> None:
        """`cache="read"` saves nothing, `"write"` loads nothing, `"none"` neither."""
        tokens, known = self.tokens(rng, _PROMPT), self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(known)
            loaded = engine.load(known, cache=cache)
            must_equal("tokens loaded", loaded, _BLOCKS * BLOCK if cache in ("both", "read") else 0)
            engine.save(tokens, cache=cache)
            must_equal(
                "tokens saved, as the next request sees them",
                engine.load(tokens),
                _BLOCKS * BLOCK if cache in ("both", "write") else 0,
            )
