"""A suspended request: its pages are free, nothing of it is lost, and nobody reads what is its own."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvconnect.engine.pages import NO_PAGE
from kvconnect.testing.harness import BLOCK, KitRequest
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs
from kvconnect.testing.simulation import Setting, make_prompts, simulate
from kvconnect.testing.suspending import SuspendEngine, needs_of, with_room
from kvconnect.testing.target import Target

__all__ = ["SuspendTests"]

_BLOCKS = 5
_PROMPT = _BLOCKS * BLOCK + 2
_ROOM = 12
_SHAPES = ["full", "window", "mixed"]
_USES: list[dict[str, Any]] = [
    {},
    {"cache": "read"},
    {"cache": "write"},
    {"cache": "none"},
    {"cache_salt": "mine"},
    {"uncacheable": "the kit says so"},
]


class SuspendTests(Kit):
    """What `suspend`, `prefetch`, `resume` and `resize_tier` keep, and for whom."""

    @pytest.mark.parametrize("num_ranks", [1, 2])
    @pytest.mark.parametrize("shape", _SHAPES)
    def test_resumed_pages_hold_what_was_computed(
        self, target: Target, rng: random.Random, shape: str, num_ranks: int
    ) -> None:
        """Every byte comes back, the partial block's too, whatever the request may do with the cache."""
        needs_of(target, "suspend", shape, num_ranks)
        with SuspendEngine(target, shape=shape, num_ranks=num_ranks) as engine:
            for fields in _USES:
                for length in (_PROMPT, 4 * BLOCK, BLOCK - 1):
                    request = engine.run(self.tokens(rng, length), **fields)
                    _suspend(engine, request)
                    _come_back(engine, request, length)
                    engine.go_on(request, 1, 2)
                    engine.end(request)

    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_pages_are_the_requests_until_they_are_read(
        self, target: Target, rng: random.Random, num_ranks: int
    ) -> None:
        """`get_finished` names a suspended request once a rank, when its pages were read: then they are others'."""
        needs_of(target, "suspend", "full", num_ranks)
        with SuspendEngine(target, num_ranks=num_ranks) as engine:
            requests = [engine.run(self.tokens(rng, _PROMPT)) for _ in range(2)]
            for request in requests:
                must(engine.ask_to_suspend(request), expected="room for a suspended request", got="False")
                must(not engine.leader.resume(request.view(), []), expected="no resume before that", got="True")
            for request in requests:
                engine.wait_read(request)  # they are NaN now
            engine.settle()
            for request in requests:
                _come_back(engine, request, _PROMPT)
            engine.end(*requests)

    def test_pages_out_of_the_window_need_nothing(self, target: Target, rng: random.Random) -> None:
        """A block id of -1 needs no room and no load; every group's other pages come back."""
        needs_of(target, "suspend", "mixed")
        tokens = self.tokens(rng, 9 * BLOCK + 2)
        with SuspendEngine(with_room(target, 7, shape="mixed"), shape="mixed") as engine:
            request = engine.run(tokens, cache="none")
            must(
                engine.suspend(request),
                expected="room for 13 pages where 14 fit, of a request with 7 holes in its tables",
                got="False",
                hint="a block id of -1 is no page",
            )
            _come_back(engine, request, len(tokens))
            assert NO_PAGE in request.tables[1], "the kit means to have a hole here"
            engine.go_on(request, 1, 2, 3)
            engine.end(request)

    def test_refused_suspension_changes_nothing(self, target: Target, rng: random.Random) -> None:
        """Without room the answer is False: the request computes on, and nothing was taken for it."""
        needs_of(target, "suspend", "full")
        with SuspendEngine(with_room(target, _BLOCKS)) as engine:
            request = engine.run(self.tokens(rng, _PROMPT), cache="none")
            must(not engine.ask_to_suspend(request), expected="False: six blocks do not fit into five", got="True")
            must(not engine.leader.resume(request.view(), request.tables), expected="no resume", got="True")
            engine.go_on(request, 1, 2)
            engine.must_fit(rng, _BLOCKS)
            engine.end(request)

    def test_calls_that_mean_nothing_are_refused(self, target: Target, rng: random.Random) -> None:
        """No suspension of an unknown or suspended request, no resume or prefetch of one that is not suspended."""
        needs_of(target, "suspend", "full")
        stores = len(target.resolved.tiers)
        with SuspendEngine(target) as engine:
            unknown = KitRequest("nobody", self.tokens(rng, _PROMPT), 1, {})
            running = engine.run(self.tokens(rng, _PROMPT))
            for request in (unknown, running):
                who = "an unknown" if request is unknown else "a running"
                _must_refuse(f"prefetch of {who} request", engine.leader.prefetch(request.view(), 0))
                _must_refuse(f"resume of {who} request", engine.leader.resume(request.view(), running.tables))
            _must_refuse(
                "suspend of an unknown request", engine.leader.suspend(unknown.view(), running.tables, _PROMPT)
            )
            _suspend(engine, running)
            _must_refuse("suspend of a suspended request", engine.leader.suspend(running.view(), [[]], 0))
            for tier in (-1, stores + 1, 99):
                _must_refuse(f"prefetch to tier {tier}", engine.leader.prefetch(running.view(), tier))
            _come_back(engine, running, _PROMPT)
            _must_refuse("resume of a resumed request", engine.leader.resume(running.view(), running.tables))
            engine.go_on(running, 1)
            engine.end(running)

    @pytest.mark.parametrize("num_ranks", [1, 2])
    @pytest.mark.parametrize("shape", _SHAPES)
    def test_suspended_blocks_are_never_dropped(
        self, target: Target, rng: random.Random, shape: str, num_ranks: int
    ) -> None:
        """Whatever others save, all that was suspended comes back; what does not fit any more is refused."""
        needs_of(target, "suspend", shape, num_ranks)
        room = with_room(target, _ROOM, shape=shape, num_ranks=num_ranks)
        with SuspendEngine(room, shape=shape, num_ranks=num_ranks) as engine:
            suspended = []
            for fields in _USES[:4]:
                request = engine.run(self.tokens(rng, _PROMPT), **fields)
                if engine.suspend(request):
                    suspended.append(request)
                engine.press(rng)
            must(bool(suspended), expected="room for one request in an empty memory", got="none was suspended")
            for request in suspended:
                _come_back(engine, request, _PROMPT)
                engine.go_on(request, 1)
                engine.end(request)

    def test_partial_block_is_nobody_elses(self, target: Target, rng: random.Random) -> None:
        """A block that is not full is never matched, not even when all of its tokens are known."""
        needs_of(target, "suspend", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(target) as engine:
            request = engine.run(tokens, 3 * BLOCK + 1)
            _suspend(engine, request)
            loaded = engine.load(tokens)  # looks at every byte
            must(loaded <= 3 * BLOCK, expected=f"at most the {3 * BLOCK} tokens of full blocks", got=f"{loaded} tokens")
            _come_back(engine, request, 3 * BLOCK + 1)
            engine.go_on(request, 1)
            engine.end(request)
            must_equal("tokens loaded once it was full", engine.load(tokens), _BLOCKS * BLOCK)

    def test_others_load_the_full_blocks(self, target: Target, rng: random.Random) -> None:
        """Full blocks of a suspended request serve others, and come back all the same."""
        needs_of(target, "suspend", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(target) as engine:
            request = engine.run(tokens)
            _suspend(engine, request)
            engine.settle()
            for _ in range(2):
                must_equal("tokens that another request loads", engine.load([*tokens, 1]), _BLOCKS * BLOCK)
            _come_back(engine, request, _PROMPT)
            must_equal("tokens that another request loads", engine.load([*tokens, 1]), _BLOCKS * BLOCK)
            engine.end(request)

    @pytest.mark.parametrize("use", [1, 3, 4, 5])
    def test_unshared_request_stays_its_own(self, target: Target, rng: random.Random, use: int) -> None:
        """What may not be saved, or was salted, is nobody else's because it was suspended."""
        needs_of(target, "suspend", "full")
        tokens = self.tokens(rng, _PROMPT)
        with SuspendEngine(target) as engine:
            request = engine.run(tokens, **_USES[use])
            _suspend(engine, request)
            engine.settle()
            must_equal("tokens offered of it to another request", engine.offered([*tokens, 1]), 0)
            _come_back(engine, request, _PROMPT)
            must_equal("tokens offered of it afterwards", engine.offered([*tokens, 1]), 0)
            engine.end(request)

    @pytest.mark.parametrize("way", ["finished", "reset", "resumed"])
    def test_nothing_of_it_is_left(self, target: Target, rng: random.Random, way: str) -> None:
        """Finished while suspended, reset, or resumed and ended: then all memory is there for others."""
        needs_of(target, "suspend", "full")
        with SuspendEngine(with_room(target, _ROOM)) as engine:
            for fields in (_USES[0], _USES[3]):
                request = engine.run(self.tokens(rng, _PROMPT), **fields)
                _suspend(engine, request)
                if way == "resumed":
                    _come_back(engine, request, _PROMPT)
                elif way == "reset":
                    _forgotten(engine, request)
                engine.end(request)
                must_equal("has_pending_work()", engine.leader.has_pending_work(), False)
                engine.must_fit(rng, _ROOM)

    @pytest.mark.parametrize("shape", _SHAPES)
    def test_prefetched_blocks_come_back(self, target: Target, rng: random.Random, shape: str) -> None:
        """A prefetch to any tier, granted or refused, loses nothing and changes nothing of what is resumed."""
        needs_of(target, "suspend", shape)
        with SuspendEngine(with_room(target, _ROOM, shape=shape), shape=shape) as engine:
            for tier in range(len(target.resolved.tiers) + 1):
                request = engine.run(self.tokens(rng, _PROMPT), cache="none")
                _suspend(engine, request)
                engine.press(rng)
                engine.prefetch(request, tier)
                engine.prefetch(request, tier)
                engine.press(rng)
                engine.leader.prefetch(request.view(), 0)  # and resumed while it is on its way
                _come_back(engine, request, _PROMPT)
                engine.go_on(request, 1)
                engine.end(request)
            if shape == "full":
                engine.must_fit(rng, _ROOM)

    def test_prefetch_of_what_is_there_is_granted(self, target: Target, rng: random.Random) -> None:
        """With room for it, `prefetch` to host memory is granted, also if there is nothing left to move."""
        needs_of(target, "suspend", "full")
        with SuspendEngine(with_room(target, _ROOM)) as engine:
            request = engine.run(self.tokens(rng, _PROMPT))
            _suspend(engine, request)
            must(engine.prefetch(request, 0), expected="prefetch to host memory to be granted", got="False")
            _come_back(engine, request, _PROMPT)
            engine.end(request)

    def test_reset_request_is_suspended_no_longer(self, target: Target, rng: random.Random) -> None:
        """After `request_reset` there is nothing to resume: it begins again."""
        needs_of(target, "suspend", "full")
        with SuspendEngine(target) as engine:
            for fields in _USES:
                request = engine.run(self.tokens(rng, _PROMPT), **fields)
                _suspend(engine, request)
                _forgotten(engine, request)
                engine.end(request)

    @pytest.mark.parametrize("cache", ["both", "none"])
    def test_nothing_suspended_outlives_reset_cache(self, target: Target, rng: random.Random, cache: str) -> None:
        """After `reset_cache`, as after new weights, a resume is refused, or every block of it is a load error."""
        needs_of(target, "suspend", "full")
        with SuspendEngine(target) as engine:
            request = engine.run(self.tokens(rng, _PROMPT), cache=cache)
            _suspend(engine, request)
            engine.settle()
            must(engine.leader.reset_cache(), expected="reset_cache to be done", got="False")
            if not engine.resume(request):
                engine.reset(request)
            must_equal(
                "tokens that came back from before reset_cache",
                request.computed,
                0,
                "they were computed by weights that are gone",
            )
            engine.go_on(request)
            engine.end(request)

    def test_suspended_again_and_again(self, target: Target, rng: random.Random) -> None:
        """Suspended, resumed, decoded on, and so on, while others come and go: right bytes each time."""
        needs_of(target, "suspend", "full")
        for fields in _USES:
            with SuspendEngine(with_room(target, _ROOM)) as engine:
                request = engine.run(self.tokens(rng, _PROMPT), **fields)
                for number in range(4):
                    engine.settle()  # what goes down to a store needs its room until it is there
                    _suspend(engine, request)
                    if number % 2:
                        engine.press(rng)
                    _come_back(engine, request, len(request.tokens))
                    engine.go_on(request, *self.tokens(rng, 3))
                engine.end(request)
                engine.must_fit(rng, _ROOM)

    def test_suspended_again_at_once(self, target: Target, rng: random.Random) -> None:
        """With nothing to load it is resumed at once; suspended again before the next step, it is named again."""
        needs_of(target, "suspend", "full")
        with SuspendEngine(target) as engine:
            request = engine.arrive(self.tokens(rng, _PROMPT))
            engine.allocate(request, 0)
            for _ in range(3):
                _suspend(engine, request)
                _come_back(engine, request, 0)
            engine.go_on(request, 1)
            engine.end(request)

    def test_resize_to_nonsense_is_refused(self, target: Target, rng: random.Random) -> None:
        """No bytes, fewer than none, more than any machine has, and tiers that do not exist: False."""
        needs_of(target, "suspend", "full")
        stores = len(target.resolved.tiers)
        with SuspendEngine(with_room(target, _ROOM)) as engine:
            for tier, size in [(0, 0), (0, -1), (0, 1 << 62), (-1, 1 << 20), (stores + 1, 1 << 20)]:
                resized = engine.leader.resize_tier(tier, size)
                _must_refuse(f"resize_tier({tier}, {size})", resized)
                engine.settle()
            engine.must_fit(rng, _ROOM)

    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_shrinking_drops_nothing_that_is_suspended(
        self, target: Target, rng: random.Random, num_ranks: int
    ) -> None:
        """A tier that shrinks keeps what is suspended, or refuses; grown again it has its old room."""
        needs_of(target, "suspend", "full", num_ranks)
        full = Setting(block_size=BLOCK, num_ranks=num_ranks).arena_bytes(_ROOM)
        with SuspendEngine(with_room(target, _ROOM, num_ranks=num_ranks), num_ranks=num_ranks) as engine:
            request = engine.run(self.tokens(rng, _PROMPT))
            _suspend(engine, request)
            engine.settle()
            for size in (full // 2, full // _ROOM, full // 3):
                engine.leader.resize_tier(0, size)
                engine.settle()
                engine.press(rng)
            _come_back(engine, request, _PROMPT)
            engine.go_on(request, 1)
            engine.end(request)
            if engine.leader.resize_tier(0, full):
                engine.settle()
                engine.must_fit(rng, _ROOM)

    @pytest.mark.parametrize("number", range(6))
    def test_any_schedule_with_suspensions_reads_right_bytes(
        self, target: Target, rng: random.Random, seed: int, quick: bool, number: int
    ) -> None:
        """Requests are suspended, prefetched and resumed at random moments of a random schedule: right bytes."""
        if quick and number >= 3:
            pytest.skip("quick")
        needs(target.capabilities.suspend, "suspend")
        can = target.capabilities
        setting = Setting.draw(
            rng,
            several_groups=can.several_groups,
            several_ranks=can.several_ranks,
            async_load=can.async_load,
            suspends=True,
        )
        if number % 2 == 0:
            target = target.with_arena(setting.arena_bytes(rng.randrange(8, 60)))
        simulate(target, seed, setting, make_prompts(rng))


def _suspend(engine: SuspendEngine, request: KitRequest) -> None:
    must(engine.suspend(request), expected="room for a suspended request", got="False")


def _come_back(engine: SuspendEngine, request: KitRequest, num_tokens: int) -> None:
    must(engine.resume(request), expected="a suspended request whose pages were read to be resumed", got="False")
    must_equal(
        "tokens that came back", request.computed, num_tokens, "what is suspended is never dropped until it ends"
    )


def _forgotten(engine: SuspendEngine, request: KitRequest) -> None:
    """Reset a suspended request, and compute it anew."""
    engine.reset(request)
    _must_refuse("resume of a request that was reset", engine.leader.resume(request.view(), [[]]))
    _must_refuse("prefetch of a request that was reset", engine.leader.prefetch(request.view(), 0))
    engine.go_on(request)


def _must_refuse(what: str, answer: bool) -> None:
    must(not answer, expected=f"{what} to be refused", got="True")
