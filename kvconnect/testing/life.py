"""The life of requests and instances: resets, lost plans, restarts, events."""

from __future__ import annotations

import random
import threading

import pytest

from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs
from kvconnect.testing.target import Target

__all__ = ["LifeTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2


class LifeTests(Kit):
    """Nothing is left of what ended, and what should be there is."""

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
            engine.allocate(request, engine.offer(request).num_tokens or 0)
            engine.reset(request)  # before its plan: the pages of its load are somebody else's by then
            before = engine.pages.snapshot()
            engine.step()
            written = len(engine.pages.changed_pages(before))
            must_equal("pages written that the request has lost", written, 0, "drop its loads in request_reset")
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
            must_equal("tokens offered of a step whose plan was lost", engine.offered(tokens), 0)
            engine.load(tokens)  # computes and saves it
            must_equal("tokens loaded after it was computed again", engine.load(tokens), _BLOCKS * BLOCK)

    def test_reset_cache_forgets_everything(self, target: Target, rng: random.Random) -> None:
        """After `reset_cache`, as after new weights, nothing from before is offered; what comes after is."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens)
            must_equal("reset_cache()", engine.leader.reset_cache(), True)
            must_equal("tokens offered from before", engine.offered(tokens), 0)
            engine.load(tokens)  # computes and saves it
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
