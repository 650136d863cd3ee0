"""Logs a kind of failure once a minute with how often it happened, so that a dead store does not fill a disk."""

from __future__ import annotations

import logging
import time
from collections import Counter

__all__ = ["FailureLog"]


class FailureLog:
    """Counts failures by kind; logs the first of a kind at once and then at most one a minute."""

    def __init__(self, logger: logging.Logger, interval_s: float = 60.0) -> None:
        """Log to `logger`."""
        self.counts: Counter[str] = Counter()
        self._logger = logger
        self._interval_s = interval_s
        self._logged: dict[str, tuple[float, int]] = {}  # kind -> (when, count then)

    def failed(self, kind: str, error: BaseException | str, number: int = 1) -> None:
        """Count `number` failures of `kind`, and log if it is time.

        Args:
            kind: A short name, such as ``"disk read"``; also the counter's name.
            error: What happened last.
            number: How many things failed.
        """
        self.counts[kind] += number
        now = time.monotonic()
        when, then = self._logged.get(kind, (-self._interval_s, 0))
        if now - when >= self._interval_s:
            self._logged[kind] = (now, self.counts[kind])
            what = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
            self._logger.warning(
                "kvconnect: %s failed (%d since last logged): %s", kind, self.counts[kind] - then, what
            )
