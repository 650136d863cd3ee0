"""The KV of one request, to be suspended, prefetched and resumed by whoever knows when it is needed again."""

from __future__ import annotations

from collections import Counter

from kvconnect.engine.config import CacheLevel
from kvconnect.engine.core import EngineCore
from kvconnect.engine.pool import NO_PAGE
from kvconnect.engine.request import EngineRequest
from kvconnect.errors import ConfigError, UnsupportedError

__all__ = ["Sequence"]


class Sequence:
    """A handle; it holds nothing. `LLM.sequence` gives one for each request that is not finished.

    Attributes:
        request_id: Whose KV it is.
    """

    def __init__(self, core: EngineCore, request: EngineRequest, level_names: tuple[str, ...]) -> None:
        """Stand for one request.

        Args:
            core: The engine.
            request: The request.
            level_names: Of the device, of host memory, and of the connector's stores in their order.
        """
        self.request_id = request.request_id
        self._core = core
        self._request = request
        self._names = level_names

    @property
    def status(self) -> str:
        """``"waiting"``, ``"running"``, ``"loading"``, ``"suspended"`` or ``"finished"``.

        It loads until what `resume`, or an asynchronous load, brings back is there.
        """
        scheduler = self._core.scheduler
        if self.request_id in scheduler.suspended:
            return "suspended"
        if self.request_id in scheduler.parked:
            return "loading"
        if self._request in scheduler.running:
            return "running"
        return "waiting" if self._request in scheduler.waiting else "finished"

    def suspend(self) -> bool:
        """Move everything that was computed below the device, the partial last block included, and free the pages.

        On return the pages are free. What is below may move further down, into stores that can hold it; it is never
        dropped before `resume` has ended or the request is aborted. Tokens of other requests come with the next step.

        Returns:
            False if there is no room for all of it, or if its last token came meanwhile; then it goes on. What is on
            its way to a store keeps its room until it is there, and is waited for.

        Raises:
            ConfigError: If the request is suspended already, loading, or finished.
            UnsupportedError: If there is no connector, or one that cannot suspend.
        """
        if self.status not in ("running", "waiting"):
            raise ConfigError(f"{self.request_id} is {self.status}; only a running or waiting request can be suspended")
        if self.status == "running":
            self._check_connector()
        return self._core.suspend(self._request)

    def prefetch(self, level: CacheLevel | int) -> bool:
        """Begin to bring a suspended request's blocks up to `level`, those below it; the rest stays where it is.

        Returns once there is room for all of them; they arrive while the engine steps, see `wait`.

        Args:
            level: HOST or lower: a store that can hold.

        Returns:
            False if there is no room for all of them, however many others could be pushed down; then nothing has moved.
            What is on its way to a store keeps its room until it is there, and is waited for.

        Raises:
            ConfigError: If the request is not suspended, or there is no such level.
        """
        if self.status != "suspended":
            raise ConfigError(f"{self.request_id} is {self.status}; only a suspended request can be prefetched")
        if not CacheLevel.HOST <= level < len(self._names):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(self._names) if number)
            raise ConfigError(
                f"there is no level {int(level)} to prefetch to; levels: {known}. `resume` goes to the device"
            )
        if not self._request.num_computed:
            return True
        return self._core.prefetch(self._request, level)

    def resume(self) -> bool:
        """Give the request pages for all that it had computed, and let it go on as soon as they are filled.

        Blocks that are still on the device are used there; the others are loaded while the engine steps. A block that
        is lost all the same is computed again.

        Returns:
            False if there are too few pages, or as many requests running as may; then it stays suspended.

        Raises:
            ConfigError: If the request is not suspended.
        """
        if self.status != "suspended":
            raise ConfigError(f"{self.request_id} is {self.status}; only a suspended request can be resumed")
        return self._core.scheduler.resume(self._request)

    def wait(self, timeout_s: float = 30.0) -> bool:
        """Run steps that compute nothing until nothing moves between the tiers; False if the time is over before."""
        return self._core.idle_until(lambda: not self._core.has_connector_work, timeout_s)

    def blocks_by_level(self) -> dict[str, int]:
        """Return how many of its blocks, of all layer groups, lie at which highest level, by the level's name.

        ``"lost"`` ones, if there are any, are nowhere and will be computed again. What is on its way up counts where
        it comes from.
        """
        cache = self._core.cache
        counts: Counter[str] = Counter(dict.fromkeys(self._names, 0))
        request = self._request
        if self.status != "suspended":
            counts[self._names[0]] = sum(page != NO_PAGE for table in request.tables for page in table)
            return dict(counts)
        full = request.num_computed // cache.block_size
        for group, ordinal, place in self._core.suspended_blocks(self.request_id):
            on_device = ordinal < full and cache.pools[group].find(request.chain.hashes[ordinal]) != NO_PAGE
            counts[self._names[0] if on_device else self._names[place + 1] if place >= 0 else "lost"] += 1
        return dict(counts)

    def _check_connector(self) -> None:
        if len(self._names) == 1:
            raise UnsupportedError("there is nowhere to suspend to: give the LLM a connector, such as host://")
        if not self._core.can_suspend:
            raise UnsupportedError("the connector does not declare 'suspend'")
