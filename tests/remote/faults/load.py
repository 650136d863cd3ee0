"""A steady load of generations on one engine, what they must come to, and what may be left behind afterwards.

The oracle of every answer is `model.generate`; the clock's is `BOUND_S`. A request that is wrong or late ends the test
at once, so whatever a test does between two calls of a `Load` is under test.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from kvconnect import LLM, SamplingParams
from tests.conftest import Reference

__all__ = ["BOUND_S", "TIMEOUT_S", "Answer", "Census", "LateAnswer", "Load", "WrongTokens", "open_engine", "wait_until"]

TIMEOUT_S: Final = 1.0  # of every store under test

# What a request may take whatever a store does: a lookup that never answers, then promotions that never end, each given
# up after the store's timeout; the third is for a load that failed and is asked for again. Two seconds to compute,
# which takes 0.05 s on an idle machine.
BOUND_S: Final = 3 * TIMEOUT_S + 2.0

BLOCK: Final = 32  # tokens; frames of 16.25 KiB, several segments of TCP
_FAMILIES: Final = 8  # prompts of a family share their full blocks
_FAMILY_BLOCKS: Final = 6
_TAILS: Final = 2
_ARENA_SLOTS: Final = 20  # of 48 blocks: most of a family has left the arena when it is asked for again
_SLOT_BYTES: Final = 20480
_PAGES: Final = 32
_IN_FLIGHT: Final = 3
_PARAMS: Final = SamplingParams(max_tokens=4, ignore_eos=True)
_REST_S: Final = 15.0
_OTHERS: Final = ("MainThread", "test-")
_GROWTH: Final = 16 << 20  # bytes that memory may grow by over the faults of one test; 2 MiB were seen


class WrongTokens(AssertionError):
    """A request was answered with other tokens than the model's own."""


class LateAnswer(AssertionError):
    """A request was not answered within `BOUND_S`."""


class Answer(NamedTuple):
    """A request that was right and in time."""

    loaded_tokens: int
    seconds: float
    ended: float


class Census(NamedTuple):
    """What an engine at rest holds of the process.

    Attributes:
        threads: Names of all but the main thread and the tests' own.
        num_sockets: Open ones, of whatever kind.
        rss: Bytes resident.
    """

    threads: tuple[str, ...]
    num_sockets: int
    rss: int

    @classmethod
    def take(cls) -> Census:
        """Count now."""
        gc.collect()
        names = sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith(_OTHERS))
        with open("/proc/self/statm", encoding="ascii") as statm:
            rss = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(tuple(names), sum(_is_socket(fd) for fd in os.listdir("/proc/self/fd")), rss)


def open_engine(model: Any, store: str, *, host: str = "", timeout_s: float = TIMEOUT_S, **options: Any) -> LLM:
    """Open an engine whose host memory holds less than half of what the load asks for, over one store.

    Args:
        model: The model that the load's reference has too.
        store: The store's URL.
        host: More options of the arena, as a query.
        timeout_s: Of the store; answers are not awaited longer for a longer one.
        options: Of the engine.
    """
    capacity = _ARENA_SLOTS * _SLOT_BYTES
    url = f"{store}{'&' if '?' in store else '?'}timeout_s={timeout_s}"
    return LLM(
        model,
        [f"host://?capacity={capacity}{'&' + host if host else ''}", url],
        block_size=BLOCK,
        kv_cache_bytes=_PAGES * BLOCK * 512,
        max_batch_tokens=256,
        max_num_seqs=_IN_FLIGHT,
        **options,
    )


class Load:
    """Prompts of eight families in an order without end, three in flight, each answer looked at.

    Attributes:
        answers: Those that were right and in time, in order.
    """

    def __init__(self, llm: LLM, reference: Reference, most_sockets: int, seed: int = 0) -> None:
        """Start with nothing in flight.

        Args:
            llm: From `open_engine`.
            reference: The same model, run by transformers alone.
            most_sockets: What this process may have open at rest.
            seed: Another one makes other prompts.
        """
        self._most_sockets = most_sockets
        self.answers: list[Answer] = []
        self._llm = llm
        self._reference = reference
        self._open: dict[str, tuple[Sequence[int], float]] = {}
        rng = random.Random(seed)
        families = [[rng.randrange(1, 300) for _ in range(_FAMILY_BLOCKS * BLOCK)] for _ in range(_FAMILIES)]
        tails = [[rng.randrange(1, 300) for _ in range(rng.randrange(1, BLOCK - 8))] for _ in range(_TAILS)]
        self.prompts = [family + tail for tail in tails for family in families]
        for prompt in self.prompts:  # before any clock runs
            reference(prompt, _PARAMS.max_tokens)
        self._next: Iterator[Sequence[int]] = itertools.cycle(self.prompts)

    def another(self, seed: int) -> Load:
        """Return a load of other prompts on the same engine; use one of them at a time."""
        return Load(self._llm, self._reference, self._most_sockets, seed)

    # -- the load ------------------------------------------------------------------------------------------------

    def step(self, *, feed: bool = True) -> None:
        """Keep three requests in flight if `feed`, run one step, and look at what it ended.

        Raises:
            WrongTokens: By name of the first difference.
            LateAnswer: Also for a request that has not ended yet.
        """
        while feed and len(self._open) < _IN_FLIGHT:
            prompt = next(self._next)
            self._llm.reset_prefix_cache()  # what is not computed comes through the connector
            self._open[self._llm.add_request(prompt, _PARAMS)] = (prompt, time.monotonic())
        outputs = self._llm.step()
        now = time.monotonic()
        for output in outputs:
            if output.finished is None:
                continue
            prompt, started = self._open.pop(output.finished.request_id)
            self._judge(prompt, output.finished.token_ids, now - started)
            self.answers.append(Answer(output.finished.loaded_tokens, now - started, now))
        for request_id, (_, started) in self._open.items():
            if now - started > BOUND_S:
                raise LateAnswer(f"{request_id} has no answer after {now - started:.1f} s: {self._llm.get_stats()}")

    def run(self, count: int) -> list[Answer]:
        """Go on until `count` more requests have ended; return those."""
        first = len(self.answers)
        while len(self.answers) < first + count:
            self.step()
        return self.answers[first:]

    def run_for(self, seconds: float) -> list[Answer]:
        """Go on for some time; return what ended in it."""
        first, until = len(self.answers), time.monotonic() + seconds
        while time.monotonic() < until:
            self.step()
        return self.answers[first:]

    def run_until(self, done: Callable[[], bool], within_s: float, what: str) -> float:
        """Go on until `done` says so; return the seconds that it took.

        Raises:
            AssertionError: Says that `what` did not come `within_s`.
        """
        started = time.monotonic()
        while not done():
            waited = time.monotonic() - started
            assert waited < within_s, f"{what}: not within {within_s} s: {self._llm.get_stats()}"
            self.step()
        return time.monotonic() - started

    def warm(self) -> None:
        """Go on until the store has taken all full blocks, and some have come back."""
        all_blocks = self.demoted + _FAMILIES * _FAMILY_BLOCKS
        self.run_until(lambda: self.demoted >= all_blocks, 15.0, "everything stored")
        self.hits_come_back(10.0)

    def run_into_promotion(self) -> None:
        """Go on until blocks are on their way up from the store."""
        self.run_until(lambda: self.arena["promoting"] > 0, 10.0, "a promotion")

    def hits_come_back(self, within_s: float, blocks: int = 2 * _FAMILY_BLOCKS) -> float:
        """Go on until that many more blocks came up from the store and a request has loaded; return the seconds.

        Raises:
            AssertionError: If that is not `within_s`.
        """
        before, first = self.promoted, len(self.answers)
        return self.run_until(
            lambda: self.promoted >= before + blocks and any(answer.loaded_tokens for answer in self.answers[first:]),
            within_s,
            f"{blocks} blocks from the store",
        )

    def _judge(self, prompt: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        expected = self._reference(prompt, _PARAMS.max_tokens)
        if list(tokens) != expected:
            number = self.prompts.index(list(prompt))
            raise WrongTokens(f"prompt {number}: {list(tokens)} instead of {expected}")
        if seconds > BOUND_S:
            raise LateAnswer(f"answered after {seconds:.1f} s, more than {BOUND_S} s")

    # -- what is counted -----------------------------------------------------------------------------------------

    @property
    def promoted(self) -> int:
        """Blocks that came up from the store so far."""
        return int(self._llm.get_stats()["leader"]["promoted_blocks"])

    @property
    def demoted(self) -> int:
        """Blocks that the store took so far."""
        return int(self._llm.get_stats()["leader"]["demoted_blocks"])

    @property
    def lookup_hits(self) -> int:
        """Blocks that the store said it has so far."""
        return int(self._llm.get_stats()["leader"]["lookup_hits"])

    @property
    def promote_failures(self) -> int:
        """Blocks that the store did not bring although it was believed to have them."""
        return int(self._llm.get_stats()["leader"]["promote_failures"])

    @property
    def arena(self) -> dict[str, int]:
        """How the slots stand."""
        counts: dict[str, int] = self._llm.get_stats()["leader"]["arena"]
        return counts

    @property
    def failures(self) -> dict[str, int]:
        """What the workers counted as failed, by kind, and the leader's lookups."""
        stats = self._llm.get_stats()
        counts = {"lookup": stats["leader"]["lookup_failures"], "demote": stats["leader"]["demote_failures"]}
        for worker in stats["workers"]:
            counts |= worker["failures"]
        return counts

    @property
    def num_failures(self) -> int:
        """All `failures` together."""
        return sum(self.failures.values())

    @property
    def slowest_s(self) -> float:
        """Seconds of the slowest answer so far."""
        return max(answer.seconds for answer in self.answers)

    # -- rest ----------------------------------------------------------------------------------------------------

    def rest(self) -> Census:
        """End what is in flight, wait until the connector is idle, see that no slot or claim is lost, and count.

        Raises:
            AssertionError: If something is held although nothing runs.
        """
        while self._open:
            self.step(feed=False)
        busy = ("reserved", "promoting", "claimed", "quarantined")

        def idle() -> bool:
            self.step(feed=False)
            stats = self._llm.get_stats()["leader"]
            return not (self._llm._core.has_connector_work or any(stats["arena"][name] for name in busy))

        wait_until(idle, _REST_S, lambda: f"slots at rest: {self._llm.get_stats()['leader']}")
        stats = self._llm.get_stats()
        assert stats["leader"]["requests"] == 0, stats["leader"]
        assert self.arena["free"] + self.arena["ready"] == self.arena["slots"] == _ARENA_SLOTS, self.arena
        for half in (stats["leader"], *stats["workers"]):
            assert not half["hooks"]["failures"], half["hooks"]
        assert stats["unwritten_kv_seen"] == 0
        assert self._llm._leader is not None
        leader: Any = self._llm._leader.hook("get_stats")
        leader.__self__._check_integrity()
        return Census.take()

    def rests_as(self, before: Census) -> None:
        """See that the engine at rest has its threads and not more sockets than they use; stuck calls may return.

        Raises:
            AssertionError: Names what is too much.
        """
        self.rest()
        now = before

        def same() -> bool:
            nonlocal now
            now = Census.take()
            return now.threads == before.threads and now.num_sockets <= self._most_sockets

        wait_until(same, _REST_S, lambda: f"{now} at rest, {before} before, at most {self._most_sockets} sockets")
        assert now.rss - before.rss < _GROWTH, f"{now} at rest, {before} before"


def wait_until(done: Callable[[], bool], within_s: float, what: str | Callable[[], str]) -> float:
    """Wait until `done` says so; return the seconds that it took.

    Raises:
        AssertionError: Says `what` did not come `within_s`.
    """
    started = time.monotonic()
    while not done():
        waited = time.monotonic() - started
        assert waited < within_s, f"not within {within_s} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.02)
    return time.monotonic() - started


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:  # the folder's own
        return False
