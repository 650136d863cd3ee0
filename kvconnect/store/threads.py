"""Runs a store's calls on bounded threads, off the scheduling path, each with a deadline. Knows no slots, no plans.

A call that misses its deadline is reported once as failed; when it returns after all it is reported as returned,
because until then it may still touch the memory it was given. A store with every thread stuck takes no new calls, nor
does one whose breaker is open: one of its threads looks from time to time whether it answers again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from kvconnect.errors import KVConnectError, StoreUnavailable
from kvconnect.protocol.keys import KEY_BYTES, BlockKey
from kvconnect.store.base import BlockStore
from kvconnect.store.breaker import Breaker
from kvconnect.store.tier import Tier

__all__ = ["LOOKUP", "READ", "WRITE", "CallEvent", "Outcome", "StoreThreads"]

# Priorities: what a request waits for goes before what nobody waits for.
LOOKUP, READ, WRITE = 0, 1, 2
_STOP = 9


class Outcome(Enum):
    """How a call ended, or did not."""

    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"  # still running: what it was given must not be reused
    RETURNED = "returned"  # timed out earlier, has ended now


class CallEvent(NamedTuple):
    """What `StoreThreads.poll` tells: the call's tag, how it went, its result or error, and the seconds it ran."""

    tag: Any
    outcome: Outcome
    result: Any = None
    error: BaseException | None = None
    seconds: float = 0.0


class _Call:
    __slots__ = ("deadline", "tag", "timed_out", "work")

    def __init__(self, tag: Any, work: Callable[[BlockStore], Any]) -> None:
        self.tag = tag
        self.work = work
        self.deadline = 0.0
        self.timed_out = False


class StoreThreads:
    """One opened store and the threads that may call it.

    Thread-safe for one owner: `submit` and `poll` are called from one thread, the work runs on others.

    Attributes:
        breaker: Opens when calls fail one after the other; then `submit` fails at once.
    """

    def __init__(self, tier: Tier, role: str, memory: memoryview | None = None) -> None:
        """Open the store.

        Args:
            tier: What to open.
            role: Who uses it, for thread names: ``leader`` or ``worker0``.
            memory: Where the frames lie that it will read and write; None if it will not.

        Raises:
            StoreUnavailable: If it did not open, with the reason, or not within its deadline. A `KVConnectError` of its
                own passes through.
        """
        self.tier = tier
        self.timeout_s = tier.use.timeout_s
        self._memory = memory
        self.breaker = Breaker()
        self._queue: queue.PriorityQueue[tuple[int, int, _Call | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._running: set[_Call] = set()
        self._events: deque[CallEvent] = deque()
        self._unfinished = 0
        self._closed = False
        self._store: BlockStore | None = None
        self._open_error: BaseException | None = None
        self._opened = threading.Event()
        count = max(1, tier.store_class.capabilities.concurrency)
        self._threads = [
            # daemons: a hung medium must not keep the process alive after its deadline
            threading.Thread(target=self._run, args=(i,), name=f"kvconnect-{role}-{tier.name}-{i}", daemon=True)
            for i in range(count)
        ]
        self._alive = count
        for thread in self._threads:
            thread.start()
        if not self._opened.wait(self.timeout_s):
            self.close(0)  # should it open after all
            raise StoreUnavailable(f"store {tier.name!r} did not open within {self.timeout_s} s")
        if isinstance(self._open_error, KVConnectError):
            raise self._open_error
        if self._open_error is not None:
            what = f"{type(self._open_error).__name__}: {self._open_error}"
            raise StoreUnavailable(f"store {tier.name!r} cannot be opened: {what}") from self._open_error

    @property
    def num_unfinished(self) -> int:
        """Calls submitted and neither ended nor timed out."""
        return self._unfinished

    @property
    def stuck(self) -> bool:
        """Whether every thread runs a call that has missed its deadline."""
        with self._lock:
            return sum(call.timed_out for call in self._running) >= len(self._threads)

    def submit(self, tag: Any, priority: int, work: Callable[[BlockStore], Any]) -> None:
        """Queue ``work(store)``; `poll` tells of it under `tag`.

        Args:
            tag: Comes back in the event.
            priority: `LOOKUP`, `READ` or `WRITE`.
            work: Runs on a store thread; its deadline starts when it starts.
        """
        self._unfinished += 1
        reason = self._refusal()
        if reason:
            self._events.append(self._refused(tag, reason))
            return
        self._queue.put((priority, next(self._order), _Call(tag, work)))

    def poll(self) -> list[CallEvent]:
        """Return what ended or missed its deadline since the last poll. Never blocks."""
        if not self._unfinished and not self._running and not self._events:
            return []
        now = time.monotonic()
        events = []
        with self._lock:
            late = [call for call in self._running if not call.timed_out and now > call.deadline]
            for call in late:
                call.timed_out = True
        for call in late:  # before what has ended: the same call may be there as returned already
            self.breaker.failed()
            self._queue.put((LOOKUP, next(self._order), None))  # its thread cannot look again: let an idle one
            error = StoreUnavailable(f"store {self.tier.name!r} gave no answer within {self.timeout_s} s")
            events.append(CallEvent(call.tag, Outcome.TIMED_OUT, error=error, seconds=self.timeout_s))
        while self._events:
            events.append(self._events.popleft())
        if late and self.stuck:
            events += self._fail_queued()
        self._unfinished -= sum(event.outcome is not Outcome.RETURNED for event in events)
        return events

    def close(self, timeout_s: float | None = None) -> bool:
        """Close the store after the calls that are queued, or give up on it.

        Args:
            timeout_s: Seconds to wait; the store's own timeout if None.

        Returns:
            Whether every thread has ended. Threads that hang are left behind: they are daemons.
        """
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._queue.put((_STOP, next(self._order), None))
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _fail_queued(self) -> list[CallEvent]:
        events: list[CallEvent] = []
        stops = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item[0] == _STOP:
                stops.append(item)
            elif item[2] is not None:
                events.append(self._refused(item[2].tag, "has all its threads stuck"))
        for item in stops:
            self._queue.put(item)
        return events

    def _refusal(self) -> str:
        if self._closed:
            return "is closed"
        if self.stuck:
            return "has all its threads stuck"
        return "does not answer" if self.breaker.is_open else ""

    def _refused(self, tag: Any, reason: str) -> CallEvent:
        return CallEvent(tag, Outcome.FAILED, error=StoreUnavailable(f"store {self.tier.name!r} {reason}"))

    def _run(self, number: int) -> None:
        if number == 0:
            try:
                self._store = self._open()
            except BaseException as error:  # handed to the constructor, which raises it
                self._open_error = error
            self._opened.set()
        self._opened.wait()
        store = self._store
        if store is None:
            return
        while True:
            try:
                priority, _, call = self._queue.get(timeout=self.breaker.seconds_to_probe())
            except queue.Empty:
                self._look_again(store)
                continue
            if priority == _STOP:
                break
            if call is None:
                continue
            if self.breaker.is_open:  # it was queued before: its turn would only bring another failure
                with self._lock:
                    self._events.append(self._refused(call.tag, "does not answer"))
                continue
            with self._lock:
                call.deadline = time.monotonic() + self.timeout_s
                self._running.add(call)
            event = self._perform(store, call)
            with self._lock:
                self._running.discard(call)
                self._events.append(CallEvent(call.tag, Outcome.RETURNED) if call.timed_out else event)
                late = call.timed_out
            if not late:
                (self.breaker.succeeded if event.outcome is Outcome.DONE else self.breaker.failed)()
        with self._lock:
            self._alive -= 1
            last = self._alive == 0
        if last:
            store.close()

    def _open(self) -> BlockStore:
        opened = self.tier.open()
        try:
            if self._memory is not None:
                opened.attach(self._memory)
        except BaseException:
            with contextlib.suppress(Exception):  # why it cannot be used is what matters
                opened.close()
            raise
        return opened

    def _look_again(self, store: BlockStore) -> None:
        if self.breaker.begin_probe():
            self._queue.put((LOOKUP, next(self._order), None))  # should it hang: let another thread look later
            # no block's key, and another each time: a store of many parts may miss one of them for long
            event = self._perform(store, _Call(None, lambda opened: opened.contains([BlockKey(os.urandom(KEY_BYTES))])))
            self.breaker.probed(answered=event.outcome is Outcome.DONE)

    def _perform(self, store: BlockStore, call: _Call) -> CallEvent:
        started = time.perf_counter()
        try:
            result = call.work(store)
            return CallEvent(call.tag, Outcome.DONE, result, seconds=time.perf_counter() - started)
        except BaseException as error:  # a store may raise anything, foreign panics too: the batch missed
            return CallEvent(call.tag, Outcome.FAILED, error=error, seconds=time.perf_counter() - started)
