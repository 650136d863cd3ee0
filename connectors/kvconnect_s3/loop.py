"""An event loop on a thread of its own, for callers that block: whole calls get deadlines, and leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from kvconnect.errors import Closed, StoreUnavailable

__all__ = ["LoopThread", "all_of"]

T = TypeVar("T")
V = TypeVar("V")


class LoopThread:
    """Runs coroutines for other threads."""

    def __init__(self, name: str) -> None:
        """Start the thread."""
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run `work` to its end and return its result; when this returns it has ended, also if it was late.

        Raises:
            StoreUnavailable: If it was not done after `timeout_s` seconds.
            Closed: If the loop is closed, or is while it runs.
        """
        return self.call_each(lambda _: work, timeout_s, lambda _: None)

    def call_each(
        self,
        make_work: Callable[[Callable[[V], None]], Coroutine[Any, Any, T]],
        timeout_s: float,
        take: Callable[[V], None],
    ) -> T:
        """Run some work to its end and return its result, and do a part of it in this thread meanwhile.

        Args:
            make_work: Makes the work from what it hands parts over with, in their order.
            timeout_s: For the work, not for `take`.
            take: Called in this thread with each part. When it raises, the work is cancelled, and may not have ended.

        Raises:
            StoreUnavailable: If the work was not done after `timeout_s` seconds.
            Closed: If the loop is closed, or is while it runs.
        """
        parts: SimpleQueue[tuple[V] | None] = SimpleQueue()
        work = make_work(lambda part: parts.put((part,)))
        with self._lock:
            if self._closed:
                work.close()
                raise Closed(f"{self._name} is closed")
            future = asyncio.run_coroutine_threadsafe(_within(work, timeout_s), self._loop)
        future.add_done_callback(lambda _: parts.put(None))
        try:
            while (part := parts.get()) is not None:
                take(*part)
        except BaseException:
            future.cancel()
            raise
        try:
            return future.result()
        except TimeoutError:
            raise StoreUnavailable(f"{self._name} gave no answer within {timeout_s:.1f} s") from None
        except CancelledError:
            raise Closed(f"{self._name} was closed") from None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` beside whatever runs; for coroutines on this loop. It has to handle its own errors."""
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Cancel what runs, and end the thread; twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            running = asyncio.all_tasks(self._loop)
            for task in running:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _within(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    async with asyncio.timeout(timeout_s):
        return await work


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run `works` side by side; raise what one raises, once all have ended: they may share the caller's memory."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast("list[T]", results)
