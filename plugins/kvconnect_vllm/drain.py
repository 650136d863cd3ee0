"""Finishes what an engine's last step left to do, where scheduler and worker share a process.

vLLM steps no more when the last answer is out, if it was started inside the user's own process; what that step computed
would be committed by nobody and never reach a store. In processes of their own, vLLM keeps stepping while
`has_pending_push_work` says so.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from typing import ClassVar

from kvconnect_vllm.scheduler_side import SchedulerSide
from kvconnect_vllm.worker_side import WorkerSide

__all__ = ["LocalEngines"]

logger = logging.getLogger(__name__)

_DRAIN_S = 30.0


class LocalEngines:
    """The halves of one vLLM engine that live in this process.

    Attributes:
        scheduler: The scheduler's half, if it is here.
        worker: The worker's, if it is here.
    """

    _by_engine: ClassVar[weakref.WeakValueDictionary[str, LocalEngines]] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        """Know neither half."""
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        atexit.register(_drain_at_exit, weakref.ref(self))

    @classmethod
    def of(cls, engine_id: str) -> LocalEngines:
        """Return the one of an engine, or of one of its connectors; it lives as long as one of its halves."""
        found = cls._by_engine.get(engine_id)
        if found is None:
            found = cls._by_engine[engine_id] = cls()
        return found

    def drain(self) -> None:
        """Step until nothing is on its way, or for 30 seconds; once, and only if this is the whole engine."""
        try:
            self._drain()
        except Exception:  # an end must come to its end
            logger.exception("kvconnect: not everything reached the stores")

    def _drain(self) -> None:
        scheduler, worker = self.scheduler, self.worker
        self.scheduler = self.worker = None
        if scheduler is None or worker is None or scheduler.setup.num_ranks > 1:
            return
        deadline = time.monotonic() + _DRAIN_S
        while scheduler.leader.has_pending_work():
            if time.monotonic() > deadline:
                logger.warning("kvconnect: not everything reached the stores within %g s of the end", _DRAIN_S)
                return
            worker.bind(scheduler.empty_step())
            worker.worker.start_load_kv()
            worker.get_ended()
            scheduler.update_connector_output(worker.build_reports(), set(), set())


def _drain_at_exit(engine: weakref.ref[LocalEngines]) -> None:
    found = engine()
    if found is not None:
        found.drain()
