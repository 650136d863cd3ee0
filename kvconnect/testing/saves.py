"""What a connector saves and when it may be matched: the commit rule."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from kvconnect.protocol.keys import BlockKey
from kvconnect.store import BlockStore
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.target import Target

__all__ = ["SaveTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2


class SaveTests(Kit):
    """What was computed is saved, once it is certain."""

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
            must_equal(f"tokens offered of a step that failed on rank {rank}", engine.offered(tokens), 0)
            engine.load(tokens)  # computes and saves it
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
            engine.save(tokens[: 6 * BLOCK + 1])  # what the first of the two steps should have computed
            offered = engine.offer(engine.arrive(tokens)).num_tokens or 0
            must(
                offered <= 6 * BLOCK,
                expected=f"at most the {6 * BLOCK} tokens that were computed again",
                got=f"{offered} tokens offered, computed by a step that was planned on a failed one",
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

    def test_full_cache_takes_new_blocks(self, target: Target, rng: random.Random) -> None:
        """With room for a few prompts, the last one saved is there: what has ended or was aborted keeps no place."""
        small = target.with_arena("48KiB")
        needs(small is not target, "host")
        with StepEngine(small) as engine:
            for number in range(16):
                tokens = [*self.tokens(rng, _BLOCKS * BLOCK), 1]
                engine.save(tokens)
                held = "something that has ended still holds its blocks"
                must_equal(f"tokens loaded of prompt {number}", engine.load(tokens), _BLOCKS * BLOCK, held)
                gone = engine.arrive(tokens)
                engine.allocate(gone, engine.offer(gone).num_tokens or 0)
                if number % 2:
                    engine.reset(gone)
                engine.finish(gone)

    def test_frames_stay_as_they_are_while_they_are_written(self, target: Target, rng: random.Random) -> None:
        """Memory that a store is writing from is not filled with another block, however little there is of it."""
        small = target.with_arena("48KiB")
        needs(small is not target, "host")
        needs(target.capabilities.durable, "durable")
        if not target.resolved.tiers:
            not_shown("there is no store to look from")
        changed: list[str] = []

        def slow(kind: type[BlockStore]) -> type[BlockStore]:
            def write(self: BlockStore, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
                before = [bytes(frame) for frame in frames]
                time.sleep(0.02)
                changed.extend(key.hex() for key, old, now in zip(keys, before, frames, strict=True) if old != now)
                return kind.write(self, keys, frames)

            return type(kind.__name__, (kind,), {"write": write})

        with StepEngine(small.with_store(slow)) as engine:
            for _ in range(12):
                request = engine.arrive(self.tokens(rng, _PROMPT))
                engine.allocate(request, 0)
                engine.step((request, _PROMPT))
                engine.finish(request)
            engine.settle()
        must_equal("frames that changed while a store wrote them", len(changed), 0, "a claimed block was evicted")
