"""How a connector meets engines that can more or less than the kit's own: parking, missing abilities."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from kvconnect.errors import UnsupportedError
from kvconnect.protocol import BlocksStored, CacheEvent
from kvconnect.protocol.keys import BlockKey
from kvconnect.store import BlockStore
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.target import ENGINE, Target

__all__ = ["FitTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2
_PARKING = msgspec.structs.replace(ENGINE, async_load=True)


class FitTests(Kit):
    """An engine is served within what it can do, or refused."""

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

    def test_load_that_fails_is_said_to_have_failed(self, target: Target, rng: random.Random) -> None:
        """A store loses blocks after it was asked: a request that is parked for them is named as loaded and failed."""
        needs(target.capabilities.async_load, "async_load")
        needs(target.capabilities.durable, "durable")
        if not target.resolved.tiers:
            not_shown("what its medium loses cannot be arranged from outside")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, engine=_PARKING) as engine:
            engine.save(tokens)

        def lose(kind: type[BlockStore]) -> type[BlockStore]:
            def read(self: BlockStore, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
                return [None] * len(keys)

            return type(kind.__name__, (kind,), {"read": read})

        with StepEngine(target.with_store(lose), engine=_PARKING) as engine:
            must_equal("tokens loaded from a store that lost them", engine.load(tokens), 0)
            must_equal("tokens loaded after they were computed", engine.load(tokens), _BLOCKS * BLOCK)

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
            must(not strange, expected="an event of the protocol", got=f"{strange[:1]}")
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
