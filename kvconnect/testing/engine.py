"""The contract from the engine's side: a recording connector with scripted answers lies under it.

Every test compares what comes out with `EngineUnderTest.expected`, and ends with every rule of
`kvconnect.testing.contract`, but for those in which hooks raise or answer rubbish: there the connector was not told
everything. The numbers are TensorRT-LLM's own connector tests', in blocks.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvconnect.errors import UnsupportedError
from kvconnect.protocol import Match
from kvconnect.testing.contract import check_contract
from kvconnect.testing.engines import EngineSetting, EngineUnderTest
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import BrokenPromise, must, must_equal, needs
from kvconnect.testing.recording import Call, Planned, Script

__all__ = ["EngineTests"]

_HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_reset",
    "handle_preemptions",
    "bind_connector_meta",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "build_worker_report",
)

_RUBBISH: dict[str, Any] = {
    "None": None,
    "a number": 4,
    "nothing, asynchronously": Match(0, True),
    "a part of a block": Match(3, False),
    "less than nothing": Match(-4, False),
    "more than there is": Match(1 << 20, False),
}


class _Session:
    """An engine, its script, and what was asked of it."""

    def __init__(self, engine: EngineUnderTest, script: Script, patience_s: float) -> None:
        self.engine = engine
        self.script = script
        self.size = engine.block_size
        self._patience_s = patience_s
        self._asked: dict[str, tuple[list[int], int]] = {}
        self.can = script.engine

    def add(self, prompt: Sequence[int], max_tokens: int = 3) -> str:
        """Queue a prompt whose output is compared in the end."""
        name = self.engine.add(prompt, max_tokens)
        self._asked[name] = (list(prompt), max_tokens)
        return name

    def abort(self, name: str) -> None:
        """End a request; what came out of it is not looked at."""
        self.engine.abort(name)
        self._asked.pop(name, None)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Step until `done`.

        Raises:
            BrokenPromise: If that never comes.
        """
        deadline = time.monotonic() + self._patience_s
        while not done():
            must(
                time.monotonic() < deadline,
                expected=f"{what} within {self._patience_s:.0f} s of steps",
                got="nothing of the kind",
            )
            self.engine.step()

    def run(self, *prompts: Sequence[int], max_tokens: int = 3) -> list[str]:
        """Serve prompts to the end and let the engine come to rest; return their ids in the script."""
        names = [self.add(prompt, max_tokens) for prompt in prompts]
        self.until(lambda: all(self.engine.output(name) is not None for name in names), "answers to every request")
        self.settle()
        return [self.script.request(prompt) for prompt in prompts]

    def settle(self) -> None:
        """Step until the engine says that it is idle, and compare what came out."""
        self.until(self.engine.is_idle, "rest, with every request answered and no work of the connector's")
        for name, (prompt, count) in self._asked.items():
            output = self.engine.output(name)
            expected = self.engine.expected(prompt, count)
            must(
                output == expected,
                expected=f"the {count} tokens that come out without a connector",
                got=f"{output} instead of {expected}, for a prompt of {len(prompt)} tokens",
                hint="KV was not there when it was read, or pages were somebody else's",
            )
        self._asked.clear()


class EngineTests(Kit):
    """What an engine owes to a connector: order, once-only rules, numbers, and an answer whatever a connector does."""

    @pytest.fixture
    def engine(self) -> type[EngineUnderTest]:
        """The engine under test: a class of its adapter."""
        raise pytest.UsageError(f"{type(self).__name__} needs a fixture named 'engine'")

    @pytest.fixture
    def script(self) -> Script:
        """What the connector will do, and what it sees."""
        return Script()

    @pytest.fixture
    def open_engine(
        self,
        engine: type[EngineUnderTest],
        script: Script,
        patience_s: float,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Iterator[Callable[..., _Session]]:
        """Start the engine with settings; it is closed in the end. `check` looks at the contract."""
        plugins = [os.environ.get("KVCONNECT_PLUGINS", ""), "kvconnect.testing.recording"]
        monkeypatch.setenv("KVCONNECT_PLUGINS", ",".join(filter(None, plugins)))
        opened: list[EngineUnderTest] = []

        def start(**setting: Any) -> _Session:
            try:
                opened.append(engine(script.url, EngineSetting(**setting), tmp_path))
            except UnsupportedError as error:
                needs(False, str(error))
            return _Session(opened[-1], script, patience_s)

        yield start
        for each in opened:
            each.close()

    def prompt(self, rng: random.Random, engine: type[EngineUnderTest], blocks: float) -> list[int]:
        """Return a random prompt of that many blocks."""
        return [rng.randrange(1, engine.vocabulary) for _ in range(int(blocks * engine.block_size))]

    def check(self, session: _Session) -> None:
        """Let the engine come to rest, shut it down, and check every rule of the contract."""
        session.settle()
        session.engine.close()
        check_contract(session.script)

    # -- numbers -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("overlap", [False, True])
    def test_one_request_makes_the_calls_of_its_steps(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, overlap: bool
    ) -> None:
        """N tokens are N plans, loads, saves and polls, L layer hooks a step, one allocation of one block, one end."""
        session = open_engine(async_scheduling=overlap)
        prompt, count = self.prompt(rng, engine, 0.25), engine.block_size // 2
        (name,) = session.run(prompt, max_tokens=count)
        parts = script.plans(name)
        must_equal("steps that the request was part of", len(parts), count)
        must_equal("tokens of its steps", [part.scheduled for part in parts], [len(prompt)] + [1] * (count - 1))
        must_equal("steps that name it as new", [part.new for part in parts], [True] + [False] * (count - 1))
        known = [len(part.new_tokens) for part in parts]
        late = [0, 0] + [1] * (count - 2) if overlap and known[1:2] == [0] else [0] + [1] * (count - 1)
        must_equal("tokens that became known, step by step", known, late)
        allocated = self.only(script, "update_state_after_alloc", name)
        must_equal("blocks of its allocation", {len(_pages(table)) for table in allocated.data["tables"]}, {1})
        ended = self.only(script, "request_finished", name)
        must_equal("blocks at its end", {len(_pages(table)) for table in ended.data["tables"]}, {1})
        for hook in ("start_load_kv", "wait_for_save", "get_finished", "build_worker_report"):
            calls = len(script.of(hook, 0))
            must_equal(f"{hook} calls, one a plan", calls, len(script.of("build_connector_meta")))
        self.check(session)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_every_token_and_block_is_told_once(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, overlap: bool
    ) -> None:
        """A prompt of 1.5 blocks and a block of output: two blocks, then a new one when its first token is computed."""
        session = open_engine(async_scheduling=overlap)
        size = engine.block_size
        prompt = self.prompt(rng, engine, 1.5)
        (name,) = session.run(prompt, max_tokens=size)
        parts = script.plans(name)
        first = parts[0]
        must_equal("position, tokens and blocks of the first step", _shape(first), (0, len(prompt), 2))
        for number, part in enumerate(parts[1:], len(prompt)):
            must_equal("position and tokens of a later step", (part.computed, part.scheduled), (number, 1))
            blocks = {len(_pages(table)) for table in part.tables}
            least = math.ceil((number + 1) / size)
            must(
                min(blocks) >= least,
                expected=f"{least} blocks when position {number} is computed",
                got=f"{sorted(blocks)}",
            )
        must_equal("the last position that is computed", parts[-1].computed, len(prompt) + size - 2)
        ended = self.only(script, "request_finished", name)
        must_equal("blocks at the end", len(_pages(ended.data["tables"][0])), 3)
        must_equal("tokens at the end", len(ended.data["tokens"]), len(prompt) + size)
        self.check(session)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_prompt_in_chunks_goes_on_where_it_was(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, overlap: bool
    ) -> None:
        """A prompt of 8 blocks in chunks of 4: all its tokens are told at first, then 4 blocks are computed a step."""
        session = open_engine(async_scheduling=overlap, batch_blocks=4)
        size = engine.block_size
        prompt = self.prompt(rng, engine, 8)
        (name,) = session.run(prompt, max_tokens=size)
        first, second, *rest = script.plans(name)
        must_equal("position and tokens of the first chunk", (first.computed, first.scheduled), (0, 4 * size))
        must_equal("tokens known at the first chunk", first.num_tokens, 8 * size)
        must_equal("position and tokens of the second chunk", (second.computed, second.scheduled), (4 * size, 4 * size))
        must_equal("tokens that became known by the second chunk", len(second.new_tokens), 0)
        must_equal("steps for the rest of the output", len(rest), size - 1)
        ended = self.only(script, "request_finished", name)
        must_equal("blocks at the end", len(_pages(ended.data["tables"][0])), 9)
        self.check(session)

    @pytest.mark.parametrize("parks", [False, True])
    @pytest.mark.parametrize("blocks", [2, 6])
    @pytest.mark.parametrize("chunk", [32, 4])
    def test_loaded_prefix_shrinks_the_forward_pass(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, parks: bool, blocks: int, chunk: int
    ) -> None:
        """An offer of 2 or 6 of 8 blocks: the rest is computed, in chunks of 4, from where the load ends."""
        session = open_engine(batch_blocks=chunk, async_load=parks)
        script.parks = parks
        self.needs_loads(session, parks=parks)
        size = engine.block_size
        prompt = self.prompt(rng, engine, 8)
        session.run([*prompt[: blocks * size], 1])
        session.engine.forget()
        (name,) = session.run(prompt)
        must_equal("tokens that were taken of the offer", _taken(script, name), blocks * size)
        parts = [part for part in script.plans(name) if part.computed < len(prompt)]
        must_equal("position of the first step", parts[0].computed, blocks * size)
        must_equal("tokens computed of the prompt", sum(part.scheduled for part in parts), (8 - blocks) * size)
        must(
            all(part.scheduled <= chunk * size for part in parts),
            expected=f"chunks of {chunk} blocks at most",
            got=[part.scheduled for part in parts],
        )
        asks = [i for i, call in enumerate(script.calls) if _is_ask(call, name)]
        planned = next(i for i, call in enumerate(script.calls) if _plans(call, name))
        must(max(asks) < planned, expected="no question after the first step", got=f"{len(asks)} questions")
        self.check(session)

    def test_load_goes_on_where_the_device_ends(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """Two blocks are on the device, four are offered on top: those are loaded, into pages behind the first two."""
        session = open_engine(async_load=True)
        self.needs_loads(session, parks=None)
        size = engine.block_size
        prompt = self.prompt(rng, engine, 6.5)
        session.run(prompt)
        session.engine.forget()
        script.offer = lambda request, computed, known: Match(0, False)
        session.run([*prompt[: 2 * size], 1])  # computed, and on the device from here on
        (again,) = session.run([*prompt[: 2 * size], 2])
        needs(script.plans(again)[0].computed == 2 * size, "a prefix cache on the device")
        script.offer = None
        (name,) = session.run(prompt)
        asks = [
            call.data["computed"] for call in script.of("get_num_new_matched_tokens") if call.data["request"] == name
        ]
        must_equal("num_computed_tokens of the question", asks[-1], 2 * size)
        must_equal("tokens taken on top", _taken(script, name), 4 * size)
        must_equal("the first position", script.plans(name)[0].computed, 6 * size)
        self.check(session)

    @pytest.mark.parametrize("offered", [0, 1])
    def test_offer_becomes_the_allocation(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, offered: int
    ) -> None:
        """What is offered, nothing or a block, is what `update_state_after_alloc` says is taken."""
        session = open_engine(async_load=True)
        self.needs_loads(session, parks=None)
        prompt = self.prompt(rng, engine, 3.5)
        if offered:
            session.run([*prompt[: engine.block_size], 1])
            session.engine.forget()
        (name,) = session.run(prompt)
        must_equal("num_external_tokens", _taken(script, name), offered * engine.block_size)
        must_equal("the first position", script.plans(name)[0].computed, offered * engine.block_size)
        self.check(session)

    def test_request_that_waits_is_asked_about_again(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """Match(None, False) means "next step": the request is asked about again, and others go on."""
        session = open_engine(async_load=True)
        needs(session.can is not None and session.can.can_ask_again, "can_ask_again")
        slow = self.prompt(rng, engine, 2.5)
        left = 5

        def offer(request: Any, computed: int, known: int) -> Match:
            nonlocal left
            if tuple(request.tokens) == tuple(slow) and left:
                left -= 1
                return Match(None, False)
            return Match(0, False)

        script.offer = offer
        waiting = session.add(slow)
        other = session.add(self.prompt(rng, engine, 1.5), 2)
        session.until(lambda: session.engine.output(other) is not None, "an answer to a request that need not wait")
        session.until(lambda: session.engine.output(waiting) is not None, "an answer to the one that waited")
        name = script.request(slow)
        asks = [call for call in script.of("get_num_new_matched_tokens") if call.data["request"] == name]
        must(len(asks) >= 6, expected="a question a step until there is an answer", got=f"{len(asks)} questions")
        steps = [call.step for call in asks]
        must_equal("questions of one request in one step", len(steps) - len(set(steps)), 0)
        self.check(session)

    # -- asynchronous loads --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_parked_request_waits_for_every_rank(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, num_ranks: int
    ) -> None:
        """An asynchronous load parks the request until all ranks have named it; meanwhile others run."""
        session = open_engine(async_load=True, num_ranks=num_ranks)
        self.needs_loads(session, parks=True)
        script.parks = True
        prompt, other = self.prompt(rng, engine, 4.5), self.prompt(rng, engine, 1.5)
        session.run(prompt)
        session.engine.forget()
        script.load_steps = 3
        session.run(prompt, other, max_tokens=4)
        name = script.request(prompt)
        must_equal("tokens loaded", _taken(script, name), 4 * engine.block_size)
        first = next(call for call in script.of("build_connector_meta") if _plans(call, name)).data["step"]
        before = [
            part.request_id
            for call in script.of("build_connector_meta")
            for part in call.data["parts"]
            if call.data["step"] < first
        ]
        must(
            script.request(other) in before,
            expected="another request to run while one is parked",
            got="none did",
        )
        self.check(session)

    @pytest.mark.parametrize("moment", [1, 2])
    def test_aborted_load_keeps_its_pages_until_it_is_named(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, moment: int
    ) -> None:
        """A request is aborted while its load is in flight: its pages serve nobody until every rank has named it."""
        session = open_engine(async_load=True, num_blocks=12)
        self.needs_loads(session, parks=True)
        script.parks = True
        prompt = self.prompt(rng, engine, 6.5)
        session.run(prompt)
        session.engine.forget()
        script.load_steps = 8
        parked = session.add(prompt)
        for _ in range(moment):
            session.engine.step()
        session.abort(parked)
        prompts = [self.prompt(rng, engine, 3.5) for _ in range(3)]
        session.run(*prompts, max_tokens=engine.block_size)
        (abort, *_) = [call for call in script.of("request_finished") if call.data["request"] == script.request(prompt)]
        must_equal("what the connector was told of the aborted one", abort.data["answer"], False)
        session.run(prompt)
        self.check(session)

    @pytest.mark.parametrize("parks", [False, True])
    @pytest.mark.parametrize("rank", [None, 0, 1])
    def test_failed_load_is_computed(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, parks: bool, rank: int | None
    ) -> None:
        """Blocks that could not be loaded, on whichever rank, are computed from the first of them on."""
        session = open_engine(async_load=parks, num_ranks=1 if rank is None else 2)
        self.needs_loads(session, parks=parks)
        script.parks = parks
        script.failing_rank = rank
        prompt = self.prompt(rng, engine, 6.5)
        session.run(prompt)
        session.engine.forget()
        script.failing = lambda request_id, block: block == 3
        (name,) = session.run(prompt)
        must(
            any(call.data["failed"] for call in script.of("get_block_ids_with_load_errors")),
            expected="the scripted load to have failed",
            got="no load at all",
        )
        parts = script.plans(name)
        again = [part for part in parts if part.new][-1]
        must(
            again.computed <= 3 * engine.block_size,
            expected="the request to be computed from the block on that failed, or from before it",
            got=f"from position {again.computed} on",
        )
        self.check(session)

    # -- saves ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_ended_request_keeps_its_pages_until_they_are_saved(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, num_ranks: int
    ) -> None:
        """`request_finished` answers True: the pages stay as they are until every rank has named it, however long."""
        session = open_engine(num_ranks=num_ranks, num_blocks=16, async_load=True)
        script.save_steps = 3
        prompts = [self.prompt(rng, engine, 3.5) for _ in range(8)]
        session.run(*prompts, max_tokens=2)
        blocks = 3 * num_ranks * len(script.layouts[0].groups) * len(prompts)
        must_equal("blocks that were saved after their request had ended", len(script.blocks), blocks)
        session.engine.forget()
        script.save_steps = 0
        self.needs_loads(session, parks=None)
        for prompt in prompts:  # what was saved late is right: the output stands on it
            (name,) = session.run(prompt, max_tokens=2)
            must_equal("tokens loaded of what was saved late", _taken(script, name), 3 * engine.block_size)
        self.check(session)

    def test_saved_pages_come_back_for_others(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """Two requests with late saves hold most of the cache; a third runs in their pages when they are named."""
        session = open_engine(num_blocks=13)
        script.save_steps = 4
        first, second = self.prompt(rng, engine, 4.5), self.prompt(rng, engine, 4.5)
        names = [session.add(prompt, 2) for prompt in (first, second)]
        session.until(lambda: all(session.engine.output(name) is not None for name in names), "two answers")
        third = session.add(self.prompt(rng, engine, 9.5), 2)
        session.until(lambda: session.engine.output(third) is not None, "an answer once the others' pages are free")
        self.check(session)

    def test_layer_hooks_surround_their_layer(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """A layer's load is waited for before it attends, its KV is in the pages when `save_kv_layer` comes."""
        session = open_engine(async_load=True)
        needs(session.can is not None and session.can.layer_hooks, "layer_hooks")
        self.needs_loads(session, parks=None)
        prompt = self.prompt(rng, engine, 5.5)
        session.run(prompt)  # copied layer by layer, in save_kv_layer
        session.engine.forget()
        (name,) = session.run(prompt)  # and written back layer by layer, in wait_for_layer_load
        must_equal("tokens loaded", _taken(script, name), 5 * engine.block_size)
        layers = [layer for group in script.layouts[0].groups for layer in group.layers]
        computing = [call for call in script.of("build_connector_meta") if call.data["parts"]]
        must_equal("save_kv_layer calls", len(script.of("save_kv_layer", 0)), len(layers) * len(computing))
        self.check(session)

    # -- pages ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", ["window", "mixed"])
    def test_window_leaves_holes_in_place(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, shape: str
    ) -> None:
        """With a window a load has no pages for what no layer will read: -1 in place, the rest distinct pages."""
        session = open_engine(shape=shape, async_load=True)
        self.needs_loads(session, parks=None)
        size = engine.block_size
        blocks = 2 * math.ceil(engine.window / size) + 2
        prompt = self.prompt(rng, engine, blocks + 0.5)
        session.run(prompt)
        session.engine.forget()
        (name,) = session.run(prompt)
        must_equal("tokens loaded", _taken(script, name), blocks * size)
        loads = [call for call in script.of("update_state_after_alloc") if call.data["request"] == name]
        for group, table in zip(script.layouts[0].groups, loads[-1].data["tables"], strict=True):
            leading = next(block for block, page in enumerate(table) if page >= 0)
            most = 0 if group.window is None else max(0, blocks * size + 1 - group.window) // size
            what = f"blocks without a page at the head of a group with window {group.window}"
            must(leading <= most, expected=f"at most {most} {what}", got=leading)
            must_equal("holes behind the first page", table[leading:blocks].count(-1), 0)
            if group.window is not None:
                must(leading > 0, expected=f"{what}: nobody reads them", got="none")
        self.check(session)

    def test_preempted_request_begins_again(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """With too few pages one request gives way: `request_reset`, then a new life with its whole block list."""
        session = open_engine(num_blocks=12)
        size = engine.block_size
        session.run(*[self.prompt(rng, engine, 2.5) for _ in range(4)], max_tokens=3 * size)
        resets = [call.data["request"] for call in script.of("request_reset")]
        must(
            bool(resets),
            expected="a preemption: four requests need 24 blocks of 12, and request_reset tells of it",
            got="none",
        )
        parts = script.plans(resets[0])
        must(
            sum(part.new for part in parts) >= 2,
            expected="the replay among new_requests, with every block",
            got="cached_requests only",
        )
        self.check(session)

    # -- whatever a connector does -------------------------------------------------------------------------------

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("hook", _HOOKS)
    def test_connector_that_raises_costs_no_answer(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, hook: str, overlap: bool
    ) -> None:
        """Whichever hook raises, every third time: each request is answered, with the tokens it would have had."""
        session = open_engine(async_load=True, async_scheduling=overlap)
        stem = self.prompt(rng, engine, 4)
        session.run([*stem, 1])
        session.engine.forget()
        script.raising[hook] = 3
        for _ in range(3):
            names = [session.add([*stem, *self.prompt(rng, engine, 0.5 * each)], 3) for each in range(1, 4)]
            session.until(
                lambda names=names: all(session.engine.output(name) is not None for name in names),
                f"answers while {hook} raises",
            )
            session.engine.forget()
        script.raising.clear()
        session.run(self.prompt(rng, engine, 3.5))

    @pytest.mark.parametrize("answer", _RUBBISH)
    def test_rubbish_answers_are_no_match(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, answer: str
    ) -> None:
        """An answer that breaks the rules is no match: nothing is loaded, the request is computed."""
        session = open_engine(async_load=True)
        script.offer = lambda request, computed, known: _RUBBISH[answer]
        (name,) = session.run(self.prompt(rng, engine, 3.5))
        must_equal(f"tokens taken of an answer that is {answer}", _taken(script, name), 0)
        script.offer = lambda request, computed, known: Match(0, False)
        session.run(self.prompt(rng, engine, 2.5))

    def test_load_errors_of_nonsense_trust_nothing(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """If what a worker says of its load errors cannot be read, no load of the step counts."""
        session = open_engine(async_load=True)
        prompt = self.prompt(rng, engine, 4.5)
        session.run(prompt)
        session.engine.forget()
        script.answering["get_block_ids_with_load_errors"] = "nonsense"
        script.failing = lambda request_id, block: block == 2  # what the nonsense should have said
        session.run(prompt)
        script.answering.clear()
        session.run(self.prompt(rng, engine, 2.5))

    # -- life ----------------------------------------------------------------------------------------------------

    def test_engine_steps_while_the_connector_has_work(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random
    ) -> None:
        """While `has_pending_work` says so, empty steps go on, each with a plan and reports; then the engine rests."""
        script.busy_steps = 6
        session = open_engine()
        needs(session.can is not None and session.can.steps_when_idle, "steps_when_idle")
        session.run(self.prompt(rng, engine, 1.5))
        empty = [call for call in script.of("build_connector_meta") if not call.data["parts"]]
        must(len(empty) >= 6, expected="six empty steps", got=len(empty))
        must_equal(
            "plans that nobody reported",
            len(script.of("update_connector_output")),
            len(script.of("build_connector_meta")),
        )
        self.check(session)

    def test_shutdown_ends_both_halves(self, open_engine: Any, engine: Any, script: Script, rng: random.Random) -> None:
        """Closing an engine in the middle of requests ends each of them, then both halves; twice is fine."""
        session = open_engine(async_load=True)
        session.run(self.prompt(rng, engine, 2.5))
        for _ in range(2):
            session.abort(session.add(self.prompt(rng, engine, 2.5), engine.block_size))
        running = session.add(self.prompt(rng, engine, 2.5), engine.block_size)
        session.engine.step()
        session.abort(running)
        session.engine.close()
        session.engine.close()
        check_contract(script)

    # -- everything at once --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("number", range(6))
    def test_any_schedule_keeps_the_contract(
        self, open_engine: Any, engine: Any, script: Script, rng: random.Random, quick: bool, number: int
    ) -> None:
        """Arrivals, aborts, preemption, chunks, late saves, parked and failing loads, in any order."""
        if quick and number >= 2:
            pytest.skip("quick")
        setting = EngineSetting(
            num_blocks=rng.randrange(14, 40),
            batch_blocks=rng.randrange(3, 12),
            num_ranks=rng.choice([1, 2]),
            async_scheduling=rng.random() < 0.5,
            async_load=rng.random() < 0.6,
            shape=rng.choice(["full", "full", "window", "mixed"]),
        )
        session = self._open_any(open_engine, setting)
        script.parks = setting.async_load
        script.load_steps = rng.randrange(3)
        script.save_steps = rng.choice([0, 0, 2])
        fails = random.Random(rng.random())
        script.failing = lambda request_id, block: fails.random() < 0.04
        stems = [self.prompt(rng, engine, 2), self.prompt(rng, engine, 4)]
        living: list[str] = []
        for _ in range(24):
            if rng.random() < 0.7:
                tail = self.prompt(rng, engine, rng.choice([0.5, 1.25, 3]))
                living.append(session.add([*rng.choice([[], *stems]), *tail], rng.randrange(1, 2 * engine.block_size)))
            for _ in range(rng.randrange(4)):
                session.engine.step()
            living = [name for name in living if session.engine.output(name) is None]
            if living and rng.random() < 0.15:
                session.abort(living.pop(rng.randrange(len(living))))
            if rng.random() < 0.1:
                session.engine.forget()
        self.check(session)

    def only(self, script: Script, hook: str, name: str) -> Call:
        """Return the one call of a hook for a request."""
        calls = [call for call in script.of(hook) if call.data["request"] == name]
        must_equal(f"calls of {hook} for one request", len(calls), 1)
        return calls[0]

    def _open_any(self, open_engine: Any, setting: EngineSetting) -> _Session:
        """Open the engine with what it can do of a setting."""
        plain = EngineSetting()
        for simpler in ({}, {"shape": plain.shape}, {"shape": plain.shape, "num_ranks": 1}):
            try:
                session: _Session = open_engine(**msgspec.structs.asdict(msgspec.structs.replace(setting, **simpler)))
                return session
            except pytest.skip.Exception:
                continue
        needs(False, "any setting of a random schedule")
        raise AssertionError

    def needs_loads(self, session: _Session, *, parks: bool | None) -> None:
        """End a test of loads that this engine cannot make: parked (True), within a step (False), any (None)."""
        can = session.can
        if can is None:
            raise BrokenPromise(expected="the engine to open its connector at start", got="no leader")
        if parks is not False:
            needs(can.async_load or parks is None, "async_load")
        if parks is not True:
            needs(can.sync_load or parks is None, "sync_load")


def _pages(table: Sequence[int]) -> list[int]:
    return [page for page in table if page >= 0]


def _shape(part: Planned) -> tuple[int, int, int]:
    return part.computed, part.scheduled, len(_pages(part.tables[0]))


def _taken(script: Script, name: str) -> int:
    """Return the external tokens of a request's allocations, all of them."""
    calls = [call for call in script.of("update_state_after_alloc") if call.data["request"] == name]
    return sum(call.data["external"] for call in calls)


def _is_ask(call: Any, name: str) -> bool:
    return bool(call.hook == "get_num_new_matched_tokens" and call.data["request"] == name)


def _plans(call: Any, name: str) -> bool:
    return any(part.request_id == name for part in call.data.get("parts", ()))
