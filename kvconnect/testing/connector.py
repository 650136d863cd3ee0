"""Both halves under an engine: what is offered, loaded and saved, and that nothing is left over."""

from __future__ import annotations

import random
import threading
from typing import Any

import msgspec
import pytest

from kvconnect.errors import UnsupportedError
from kvconnect.protocol import BlocksStored, CacheEvent
from kvconnect.testing.harness import BLOCK, SHAPES, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.simulation import Setting, make_prompts, simulate
from kvconnect.testing.target import ENGINE, Target

__all__ = ["ConnectorTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2
_PARKING = msgspec.structs.replace(ENGINE, async_load=True)


class ConnectorTests(Kit):
    """The promises that need a leader, workers and steps."""

    # -- offers --------------------------------------------------------------------------------------------------

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

    # -- loads ---------------------------------------------------------------------------------------------------

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

    # -- saves ---------------------------------------------------------------------------------------------------

    def test_block_is_visible_only_when_its_step_is_reported(self, target: Target, rng: random.Random) -> None:
        """A save is offered only after every rank has reported its step."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            request = engine.arrive(tokens)
            engine.allocate(request, 0)
            held = engine.step((request, _PROMPT), hand_over=False)
            early = engine.ask(engine.arrive(tokens)).num_tokens or 0
            must_equal("tokens offered before the report of their step", early, 0, "commit when the report is there")
            engine.leader.update_connector_output(held.reports)
            engine.finish(request)
            engine.settle()
            must_equal("tokens loaded after it", engine.load(tokens), _BLOCKS * BLOCK)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_save_that_failed_on_a_rank_is_never_offered(self, target: Target, rng: random.Random, rank: int) -> None:
        """A step that failed on one rank commits nothing on any."""
        needs(rank == 0 or target.capabilities.several_ranks, "several_ranks")
        num_ranks = 2 if target.capabilities.several_ranks else 1
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, num_ranks=num_ranks) as engine:
            request = engine.arrive(tokens)
            engine.allocate(request, 0)
            engine.step((request, _PROMPT), failing_rank=rank)
            engine.reset(request)
            engine.finish(request)
            engine.settle()
            must_equal(f"tokens offered of a step that failed on rank {rank}", engine.load(tokens), 0)
            must_equal("tokens loaded after it was computed again", engine.load(tokens), _BLOCKS * BLOCK)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_nothing_computed_on_a_failed_load_is_committed(
        self, target: Target, rng: random.Random, rank: int
    ) -> None:
        """A load error voids the request's saves of that step, and of steps that were planned by then."""
        needs(rank == 0 or target.capabilities.several_ranks, "several_ranks")
        num_ranks = 2 if target.capabilities.several_ranks else 1
        tokens = self.tokens(rng, 8 * BLOCK + 1)
        with StepEngine(target, num_ranks=num_ranks) as engine:
            engine.save(tokens[: 4 * BLOCK + 1])
            request = engine.arrive(tokens)
            external = engine.offer(request).num_tokens or 0
            engine.allocate(request, external)
            first = engine.step((request, 2 * BLOCK), hand_over=False, failing_rank=rank)
            second = engine.step((request, len(tokens) - request.computed), hand_over=False)
            engine.leader.update_connector_output(first.reports)
            engine.leader.update_connector_output(second.reports)
            engine.reset(request)
            engine.finish(request)
            engine.settle()
            offered = engine.offer(engine.arrive(tokens)).num_tokens or 0
            must(
                offered <= external,
                expected=f"at most the {external} tokens that were there before",
                got=f"{offered} tokens offered, computed on a load that had failed",
                hint="the commit rule: void the request's saves until the last step that was planned",
            )

    def test_nothing_computed_on_a_shared_page_of_a_failed_load_is_committed(
        self, target: Target, rng: random.Random
    ) -> None:
        """Engines share a page before its load has ended: what others compute on it is void too."""
        stem = self.tokens(rng, 4 * BLOCK)
        one, other = ([*stem, *self.tokens(rng, 3 * BLOCK)] for _ in range(2))
        with StepEngine(target) as engine:
            engine.save([*stem, 1])
            loading, sharing = engine.arrive(one), engine.arrive(other)
            engine.offer(sharing, 4 * BLOCK)  # asks stores, which may take steps
            external = engine.offer(loading).num_tokens or 0
            engine.allocate(loading, external)
            first = engine.step((loading, 2 * BLOCK), hand_over=False, failing_rank=0)
            engine.share(sharing, loading, 4 * BLOCK)
            second = engine.step((sharing, 3 * BLOCK), hand_over=False)
            engine.leader.update_connector_output(first.reports)
            engine.leader.update_connector_output(second.reports)
            for request in (loading, sharing):
                engine.reset(request)
                engine.finish(request)
            engine.settle()
            offered = engine.offer(engine.arrive([*other, 1])).num_tokens or 0
            must(
                offered <= external,
                expected=f"at most the {external} tokens that were there before",
                got=f"{offered} tokens offered, computed on another request's load that had failed",
                hint="void the saves of all requests with a failed block in their prefix, not only the one that loaded",
            )

    def test_chunks_and_decoded_blocks_are_saved(self, target: Target, rng: random.Random) -> None:
        """Blocks that fill in a later chunk of the prompt, or while decoding, are saved like the first."""
        tokens = self.tokens(rng, 4 * BLOCK + 3)
        with StepEngine(target) as engine:
            request = engine.arrive(tokens)
            engine.allocate(request, 0)
            for count in (3, 2, BLOCK, 7, 3):
                engine.step((request, count))
            decoded = self.tokens(rng, 2 * BLOCK)
            for token in decoded:
                engine.append(request, token)
                engine.step((request, 1))
            everything = list(request.tokens)
            engine.finish(request)
            engine.settle()
            full = len(everything) // BLOCK * BLOCK
            must_equal("tokens loaded of prompt and answer", engine.load([*everything, 5]), full)

    def test_tokens_that_were_not_accepted_are_not_saved(self, target: Target, rng: random.Random) -> None:
        """KV of a guessed token is never offered as that of the token that was accepted in its place."""
        tokens = self.tokens(rng, 2 * BLOCK - 1)
        with StepEngine(target) as engine:
            request = engine.arrive(tokens)
            engine.allocate(request, 0, room=1)
            engine.step((request, 2 * BLOCK), guess=7)  # fills the block with a token that is then rejected
            engine.append(request, 8)
            engine.step((request, 1))
            engine.finish(request)
            engine.settle()
            guessed = engine.offer(engine.arrive([*tokens, 7, 1])).num_tokens
            must_equal("tokens offered for the guess", guessed, BLOCK, "save a block when its tokens are accepted")
            must_equal("tokens loaded, all right", engine.load([*tokens, 8, 1]), 2 * BLOCK)

    def test_pages_are_the_engines_again_after_wait_for_save(self, target: Target, rng: random.Random) -> None:
        """When `wait_for_save` returns, saves have read the pages: what is written there later is not saved."""
        prompts = [self.tokens(rng, _PROMPT) for _ in range(4)]
        with StepEngine(target, num_pages=8) as engine:  # every request gets the pages of the one before it
            for tokens in prompts:
                request = engine.arrive(tokens)
                engine.allocate(request, 0)
                engine.step((request, _PROMPT))
                engine.finish(request)  # its pages are NaN now, or once the connector lets them go
                while engine.cache.pools[0].num_held:
                    engine.step()
            engine.settle()
            for tokens in prompts:
                must_equal("tokens loaded, all right", engine.load(tokens), _BLOCKS * BLOCK)

    # -- life cycle ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ending", ["finish", "reset"])
    def test_request_may_end_before_its_plan(self, target: Target, rng: random.Random, ending: str) -> None:
        """A request that is allocated and then aborted or preempted loads nothing and leaves nothing."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            request = engine.arrive(tokens)
            engine.allocate(request, engine.offer(request).num_tokens or 0)
            if ending == "reset":
                engine.reset(request)
            engine.finish(request)
            before = engine.pages.snapshot()
            engine.settle()
            engine.step()
            must_equal("pages written for a request that is gone", len(engine.pages.changed_pages(before)), 0)
            must_equal("tokens loaded by the next one", engine.load(tokens), _BLOCKS * BLOCK)

    def test_reset_request_runs_again_like_a_new_one(self, target: Target, rng: random.Random) -> None:
        """After `request_reset` the request is asked about, allocated and loaded anew, in other pages."""
        tokens = self.tokens(rng, 8 * BLOCK + 1)
        with StepEngine(target) as engine:
            engine.save(tokens[: 4 * BLOCK + 1])
            request = engine.arrive(tokens)
            engine.admit(request)
            engine.step((request, BLOCK))
            engine.reset(request)
            other = engine.arrive(self.tokens(rng, 2 * BLOCK))
            engine.allocate(other, 0)  # takes pages that the request had
            taken = engine.admit(request)
            must(taken >= 4 * BLOCK, expected="at least what was offered before", got=f"{taken} tokens")
            engine.step((request, len(tokens) - request.computed), (other, 2 * BLOCK))
            engine.finish(request)
            engine.finish(other)
            engine.settle()
            must_equal("tokens loaded afterwards", engine.load(tokens), 8 * BLOCK)

    def test_lost_plan_is_survived(self, target: Target, rng: random.Random) -> None:
        """A step whose plan never reached the workers commits nothing, and the next steps work."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            request = engine.arrive(tokens)
            engine.allocate(request, 0)
            engine.step((request, _PROMPT), lose_plan=True)
            engine.reset(request)
            engine.finish(request)
            engine.settle()
            must_equal("tokens offered of a step whose plan was lost", engine.load(tokens), 0)
            must_equal("tokens loaded after it was computed again", engine.load(tokens), _BLOCKS * BLOCK)

    def test_reset_cache_forgets_everything(self, target: Target, rng: random.Random) -> None:
        """After `reset_cache`, as after new weights, nothing from before is offered; what comes after is."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            must_equal("reset_cache()", engine.leader.reset_cache(), True)
            must_equal("tokens offered from before", engine.load(tokens), 0)
            must_equal("tokens loaded from after", engine.load(tokens), _BLOCKS * BLOCK)

    def test_nothing_is_left_after_shutdown(self, target: Target, rng: random.Random) -> None:
        """`shutdown` ends every thread, twice is fine, and a new instance works."""
        tokens = self.tokens(rng, _PROMPT)
        before = {thread.ident for thread in threading.enumerate()}
        for _ in range(2):
            with StepEngine(target) as engine:
                engine.save(tokens)
                engine.load(tokens)
                engine.close()
                for driver in (engine.leader, *engine.workers):
                    driver.hook("shutdown")()
        left = [thread.name for thread in threading.enumerate() if thread.ident not in before]
        must_equal("threads that run on after shutdown", left, [])

    def test_reopened_connector_has_what_it_promises(self, target: Target, rng: random.Random) -> None:
        """Durable: a new instance over the same medium offers what was saved."""
        needs(target.capabilities.durable, "durable")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
        with StepEngine(target) as engine:
            must_equal("tokens loaded by a new instance", engine.load(tokens), _BLOCKS * BLOCK)

    def test_instances_share_what_they_promise(self, target: Target, rng: random.Random) -> None:
        """Shared: what one living instance saved, another that was there before offers."""
        needs(target.capabilities.shared, "shared")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as one, StepEngine(target) as other:
            one.save(tokens)
            must_equal("tokens loaded by the other instance", other.load(tokens), _BLOCKS * BLOCK)

    # -- engines -------------------------------------------------------------------------------------------------

    def test_asynchronous_load_is_reported_once(self, target: Target, rng: random.Random) -> None:
        """A parked request is named by `get_finished` once a rank, and its pages are right by then."""
        needs(target.capabilities.async_load, "async_load")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, engine=_PARKING) as engine:
            engine.save(tokens)
        with StepEngine(target, engine=_PARKING) as engine:
            engine.save(self.tokens(rng, _PROMPT))
            if target.capabilities.durable:
                must_equal("tokens loaded, all right", engine.load(tokens), _BLOCKS * BLOCK)
            engine.save(tokens)
            must_equal("tokens loaded, all right", engine.load(tokens), _BLOCKS * BLOCK)

    def test_aborted_load_touches_no_page_after_it_is_reported(self, target: Target, rng: random.Random) -> None:
        """A request that ends while it is parked keeps its pages until `get_finished` names it; then all is still."""
        needs(target.capabilities.async_load, "async_load")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, engine=_PARKING) as engine:
            engine.save(tokens)
        with StepEngine(target, engine=_PARKING) as engine:
            request = engine.arrive(tokens)
            match = engine.offer(request)
            engine.allocate(request, match.num_tokens or 0)
            engine.leader.request_finished(request.view(), request.tables)
            if match.load_async:
                engine.wait_loaded(request)
            before = engine.pages.snapshot()
            engine.settle()
            must_equal("pages written after the report", len(engine.pages.changed_pages(before)), 0)

    def test_undeclared_asynchronous_load_is_never_offered(self, target: Target, rng: random.Random) -> None:
        """Without `async_load`, an engine that could park is offered synchronous loads only."""
        needs(not target.capabilities.async_load, "(async_load is declared)")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, engine=_PARKING) as engine:
            engine.save(tokens)
            must_equal("load_async of the offer", engine.offer(engine.arrive(tokens)).load_async, False)

    @pytest.mark.parametrize("missing", ["can_ask_again", "load_errors", "layer_hooks", "steps_when_idle", "reports"])
    def test_engine_that_lacks_something_is_served_or_refused(
        self, target: Target, rng: random.Random, missing: str
    ) -> None:
        """An engine without an ability is refused at start with the reason, or served within what it can do."""
        tokens = self.tokens(rng, _PROMPT)
        changes: dict[str, Any] = {missing: "none" if missing == "load_errors" else False}
        engine_like = msgspec.structs.replace(ENGINE, **changes)
        try:
            engine = StepEngine(target, engine=engine_like)
        except UnsupportedError as error:
            must(missing in str(error), expected=f"a reason that names {missing!r}", got=str(error))
            return
        with engine:
            engine.save(tokens)
            match = engine.ask(engine.arrive(tokens))
            if missing == "can_ask_again":
                must(
                    match.num_tokens is not None,
                    expected="a number: this engine does not ask again",
                    got="Match(None, False)",
                )
            must_equal("load_async of the offer to an engine that cannot park", match.load_async, False)
            engine.load(tokens)

    def test_engine_without_loads_in_a_step_is_offered_parked_ones_or_refused(
        self, target: Target, rng: random.Random
    ) -> None:
        """An engine that could not take back a load that failed within a step gets asynchronous offers only."""
        tokens = self.tokens(rng, _PROMPT)
        limited = msgspec.structs.replace(ENGINE, sync_load=False, async_load=True)
        if not target.capabilities.async_load:
            with pytest.raises(UnsupportedError):
                StepEngine(target, engine=limited).close()
            return
        with StepEngine(target, engine=limited) as engine:
            engine.save(tokens)
            match = engine.offer(engine.arrive(tokens))
            must(
                match.load_async or not match.num_tokens,
                expected="an asynchronous offer, or none",
                got=f"{match}: the engine could not take it back",
                hint="see EngineCapabilities.sync_load",
            )
            engine.load(tokens)

    @pytest.mark.parametrize("listens", [True, False])
    def test_events_tell_once_what_can_be_loaded(self, target: Target, rng: random.Random, listens: bool) -> None:
        """`take_events` gives events of the protocol, each once, whose tokens are those of the blocks; else nothing."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, engine=msgspec.structs.replace(ENGINE, takes_events=listens)) as engine:
            engine.save(tokens)
            events = list(engine.leader.take_events())
            must_equal("events told twice", list(engine.leader.take_events()), [])
            if not listens:
                must_equal("events for an engine that does not listen", events, [])
                return
            strange = [event for event in events if not isinstance(event, CacheEvent)]
            must(not strange, expected="BlocksStored, BlocksRemoved or CacheCleared", got=f"{strange[:1]}")
            stored = [event for event in events if isinstance(event, BlocksStored)]
            if not stored:
                not_shown("it tells of no events")
            known: dict[Any, list[int]] = {None: []}
            for event in stored:
                if event.parent_hash not in known:
                    continue
                prefix = known[event.parent_hash]
                for index, block_hash in enumerate(event.block_hashes):
                    prefix = [*prefix, *event.tokens[index * BLOCK : (index + 1) * BLOCK]]
                    known[block_hash] = prefix
            must_equal("the longest prefix told of", max(known.values(), key=len), tokens[: _BLOCKS * BLOCK])

    def test_undeclared_groups_are_refused(self, target: Target) -> None:
        """Without `several_groups`, a cache of two layer groups is an UnsupportedError at start."""
        needs(not target.capabilities.several_groups, "(several_groups is declared)")
        with pytest.raises(UnsupportedError):
            StepEngine(target, shape="mixed").close()

    def test_undeclared_ranks_are_refused(self, target: Target) -> None:
        """Without `several_ranks`, an engine of two ranks is an UnsupportedError at start."""
        needs(not target.capabilities.several_ranks, "(several_ranks is declared)")
        with pytest.raises(UnsupportedError):
            StepEngine(target, num_ranks=2).close()

    # -- all of it together --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("number", range(8))
    def test_any_schedule_reads_right_bytes(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """Chunks, preemption, aborts, eviction, ranks, parked loads and steps planned ahead, in any order."""
        if quick and number >= 3:
            pytest.skip("quick")
        self._simulate(target, rng, seed)

    @pytest.mark.parametrize("number", range(4))
    def test_arena_smaller_than_a_prompt_is_enough(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """With room for a few blocks, loads and saves compete: evictions, rounds, drops, and right bytes."""
        if quick and number >= 1:
            pytest.skip("quick")
        small = target.with_arena(f"{rng.choice([24, 40, 96])}KiB")
        needs(small is not target, "host")
        self._simulate(small, rng, seed)

    def _simulate(self, target: Target, rng: random.Random, seed: int) -> None:
        can = target.capabilities
        setting = Setting.draw(
            rng, several_groups=can.several_groups, several_ranks=can.several_ranks, async_load=can.async_load
        )
        simulate(target, seed, setting, make_prompts(rng))
