"""What a connector writes into pages: the right bytes, in time, and nowhere else."""

from __future__ import annotations

import random

import pytest

from kvconnect.testing.harness import BLOCK, SHAPES, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs
from kvconnect.testing.target import Target

__all__ = ["LoadTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2


class LoadTests(Kit):
    """Every byte of a load, and not a byte beside it."""

    @pytest.mark.parametrize("num_ranks", [1, 2])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_loaded_blocks_hold_what_was_computed(
        self, target: Target, rng: random.Random, shape: str, num_ranks: int
    ) -> None:
        """Every byte of a loaded block is what was computed for those tokens: each layer, K and V, each rank."""
        needs(shape != "mixed" or target.capabilities.several_groups, "several_groups")
        needs(num_ranks == 1 or target.capabilities.several_ranks, "several_ranks")
        prompts = [self.tokens(rng, length) for length in (_PROMPT, 2 * BLOCK + 1, 8 * BLOCK)]
        with StepEngine(target, shape=shape, num_ranks=num_ranks) as engine:
            for tokens in prompts:
                engine.save(tokens)
            for tokens in reversed(prompts):
                loaded = engine.load([*tokens, 3])
                must(loaded > 0, expected="a saved prompt to be loaded", got="nothing offered")

    def test_load_touches_its_pages_and_no_other(self, target: Target, rng: random.Random) -> None:
        """A load writes the pages that it was given, and not a byte beside them."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            neighbour = engine.arrive(self.tokens(rng, _PROMPT))
            engine.allocate(neighbour, 0)
            request = engine.arrive(tokens)
            external = engine.offer(request).num_tokens or 0
            engine.allocate(request, external)
            mine = {page for table in request.tables for page in table[: external // BLOCK]}
            before = engine.pages.snapshot()
            engine.step()  # nothing is computed: what changes was loaded
            touched = {page for _, _, page in engine.pages.changed_pages(before)}
            must(
                touched == mine,
                expected=f"the {len(mine)} pages of the load to be written",
                got=f"missing: {sorted(mine - touched)}, foreign: {sorted(touched - mine)}",
                hint="an index that is off by one, or a block id of -1 used as an index",
            )
            engine.check_loaded(request)

    def test_block_without_a_page_is_skipped(self, target: Target, rng: random.Random) -> None:
        """A block id of -1 stays in its place and is never used as an index: the last page is somebody else's."""
        tokens = self.tokens(rng, 8 * BLOCK + 1)
        with StepEngine(target, shape="window") as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            external = engine.offer(request).num_tokens or 0
            must(external > 0, expected="a saved prompt to be offered", got="nothing")
            engine.allocate(request, external)
            assert request.tables[0][0] == -1, "the kit means to have a hole here"
            mine = {page for page in request.tables[0] if page >= 0}
            before = engine.pages.snapshot()
            engine.step()
            foreign = {page for _, _, page in engine.pages.changed_pages(before)} - mine
            must_equal("pages written that are not the request's", sorted(foreign), [])
            engine.check_loaded(request)
            engine.reset(request)
            engine.finish(request)
            engine.settle()

    def test_plan_is_applied_once(self, target: Target, rng: random.Random) -> None:
        """`start_load_kv` and `wait_for_save` without a new plan do nothing: an old one is never replayed."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            engine.admit(request)
            engine.step((request, _PROMPT - request.computed))
            engine.finish(request)
            before = engine.pages.snapshot()
            for worker in engine.workers:
                worker.start_load_kv()
                worker.wait_for_save()
            touched = engine.pages.changed_pages(before)
            must_equal("pages written by a plan that was applied before", len(touched), 0)
            engine.settle()
            must_equal("tokens loaded afterwards, all right", engine.load(tokens), _BLOCKS * BLOCK)

    def test_loads_may_start_after_the_forward_pass(self, target: Target, rng: random.Random) -> None:
        """Empty steps may call `start_load_kv` after the forward pass; layer hooks before it do nothing."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            engine.allocate(request, engine.offer(request).num_tokens or 0)
            engine.step(load_after=True)
            engine.check_loaded(request)
            request.loaded = 0
            engine.step((request, _PROMPT - request.computed))
            engine.finish(request)
            engine.settle()

    def test_load_waits_for_its_request(self, target: Target, rng: random.Random) -> None:
        """A load that was allocated is made although the next steps compute for others: it is not forgotten."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            request, other = engine.arrive(tokens), engine.arrive(self.tokens(rng, _PROMPT))
            engine.allocate(other, 0)
            engine.admit(request)
            engine.step((other, BLOCK))
            engine.step((other, BLOCK))
            engine.check_loaded(request)
            engine.step((request, _PROMPT - request.computed), (other, BLOCK))
            for each in (request, other):
                engine.finish(each)
            engine.settle()

    def test_more_pages_than_tokens_are_fine(self, target: Target, rng: random.Random) -> None:
        """An engine may give a request more pages than its tokens fill; they are neither loaded nor saved."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            for expected in (0, _BLOCKS * BLOCK):
                request = engine.arrive(tokens)
                external = engine.offer(request).num_tokens or 0
                must_equal("tokens offered", external, expected)
                engine.allocate(request, external, room=3 * BLOCK)
                engine.step((request, _PROMPT - external))
                engine.finish(request)
                engine.settle()
            engine.check_hooks()
