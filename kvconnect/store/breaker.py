"""A circuit breaker: stops calls to a store that fails, and finds out by itself when it answers again.

closed ──3 failures in a row──► open ──a probe that succeeds──► half open ──a call that succeeds──► closed
                                 ▲  └─a probe that fails: wait longer           │
                                 └──────────────a call that fails───────────────┘
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

__all__ = ["Breaker"]

_FAILURES = 3  # in a row: one lost connection or one slow call is no outage
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 5.0  # a probe is one lookup: hits are back soon after a long outage, for next to nothing
_JITTER = 0.25  # engines that lost the same server must not come back in step


class Breaker:
    """Of one opened store; any thread may call it.

    Attributes:
        num_opened: How often it has opened.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin closed.

        Args:
            clock: Monotonic seconds.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._state = "closed"
        self._failures = 0
        self._wait_s = _FIRST_WAIT_S
        self._probe_at = 0.0
        self.num_opened = 0

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half open``."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether calls are of no use now."""
        return self._state == "open"

    def succeeded(self) -> None:
        """Learn that a call came back with an answer."""
        if self._state == "closed" and not self._failures:
            return
        with self._lock:
            if self._state != "open":  # a call that began before it opened says nothing of now
                self._state = "closed"
                self._failures = 0
                self._wait_s = _FIRST_WAIT_S

    def failed(self) -> None:
        """Learn that a call raised or missed its deadline."""
        with self._lock:
            self._failures += 1
            if self._state == "half open" or (self._state == "closed" and self._failures >= _FAILURES):
                self._open()

    def seconds_to_probe(self) -> float | None:
        """Return how long until a probe may be due, 0 if it is, None while there is nothing to find out."""
        if self._state != "open":
            return None
        return max(0.0, self._probe_at - self._clock())

    def begin_probe(self) -> bool:
        """Say whether the caller is to probe now: one of many threads, once it is due; it must then call `probed`.

        A probe that hangs, on a connection that is dead for all that is known, does not keep others from theirs.
        """
        with self._lock:
            if self._state != "open" or self._clock() < self._probe_at:
                return False
            self._probe_at = self._clock() + _LONGEST_WAIT_S
            return True

    def probed(self, *, answered: bool) -> None:
        """Learn how a probe ended."""
        with self._lock:
            if self._state != "open":  # another thread's was answered meanwhile
                return
            if answered:
                self._state = "half open"
            else:
                self._open()

    def _open(self) -> None:
        self.num_opened += self._state != "open"
        self._state = "open"
        self._probe_at = self._clock() + self._wait_s * random.uniform(1 - _JITTER, 1 + _JITTER)
        self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
