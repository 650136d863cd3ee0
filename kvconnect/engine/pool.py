"""Who holds which page of one layer group, which full pages can be found again, and in which order they go.

A page is free, held by one or more sequences, or cached: full, named by its block hash, held by nobody. Free pages are
handed out first, then cached ones: those that no cached block continues, lowest priority, least recently used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvconnect.eviction import EvictionQueue
from kvconnect.protocol import DEFAULT_PRIORITY, BlockHash

__all__ = ["NO_PAGE", "CachedBlock", "PagePool", "PoolListener"]

NO_PAGE = -1


class CachedBlock(NamedTuple):
    """What a full page holds.

    Attributes:
        block_hash: Its content name.
        parent: Of the block before it; the chain's root for the first one.
        tokens: Its own, for partial reuse and events.
        salted: Whether the hash depends on more than the tokens: then they and the parent do not say what it is.
    """

    block_hash: BlockHash
    parent: BlockHash
    tokens: Sequence[int]
    salted: bool = False


class PoolListener(Protocol):
    """Who is told of blocks that can be found on the device, and of those that cannot any more."""

    def stored(self, block: CachedBlock, priority: int) -> None:
        """It can be found from now on."""

    def removed(self, block: CachedBlock) -> None:
        """It can be found no longer."""

    def updated(self, block: CachedBlock, priority: int) -> None:
        """Its priority changed."""


class PagePool:
    """The pages of one layer group; bookkeeping only.

    Attributes:
        num_pages: How many there are, those that a resize has put away included.
        num_evicted: Cached pages that were handed out for something else.
        num_named: Times that a page became findable.
        listener: Told of named blocks, if there is one.
    """

    def __init__(self, num_pages: int, *, sliding: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with every page free.

        Args:
            num_pages: How many.
            sliding: Whether the group has a window: then a block is of use without those before it.
            clock: Monotonic seconds.
        """
        self.num_pages = num_pages
        self.num_evicted = 0
        self.num_named = 0
        self.listener: PoolListener | None = None
        self._clock = clock
        self._free = list(range(num_pages - 1, -1, -1))
        self._away: list[int] = []  # put away by a resize
        self._holders = [0] * num_pages
        self._blocks: dict[int, CachedBlock] = {}
        self._ranks: dict[int, tuple[int, float]] = {}  # of named pages: priority, and until when it counts
        self._page_of: dict[BlockHash, int] = {}
        self._continuing: dict[BlockHash, list[int]] = {}  # parent -> named pages that continue it
        self._queue: EvictionQueue[BlockHash] = EvictionQueue(follows_parents=not sliding, clock=clock)

    @property
    def num_available(self) -> int:
        """Pages that `take` could hand out."""
        return len(self._free) + len(self._queue)

    @property
    def num_held(self) -> int:
        """Pages that sequences hold."""
        return sum(count > 0 for count in self._holders)

    @property
    def num_used(self) -> int:
        """Pages that are held or cached."""
        return self.num_usable - len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that are in use or may be, after `resize`."""
        return self.num_pages - len(self._away)

    @property
    def blocks(self) -> Sequence[CachedBlock]:
        """The blocks that can be found, oldest name first."""
        return list(self._blocks.values())

    def find(self, block_hash: BlockHash) -> int:
        """Return the page that holds a block, `NO_PAGE` if none does."""
        return self._page_of.get(block_hash, NO_PAGE)

    def priority_of(self, block_hash: BlockHash) -> int:
        """Return the priority that counts now of a block that can be found."""
        priority, until = self._ranks[self._page_of[block_hash]]
        return priority if until > self._clock() else DEFAULT_PRIORITY

    def continuing(self, parent: BlockHash) -> list[tuple[int, CachedBlock]]:
        """Return the named pages whose block comes right behind `parent`."""
        return [(page, self._blocks[page]) for page in self._continuing.get(parent, ())]

    def is_cached(self, page: int) -> bool:
        """Say whether the page has a name and no holder: holding it takes it from those available."""
        return page in self._blocks and self._holders[page] == 0

    def take(self) -> int:
        """Hand out a page; the caller has made sure that one is available."""
        if not self._free:
            self._evict()
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Add a holder to a cached or held page."""
        self._holders[page] += 1
        if page in self._blocks:
            self._queue.withdraw(self._blocks[page].block_hash)

    def release(self, page: int) -> None:
        """Remove a holder; a page without holders is cached if it has a name, free otherwise."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._blocks:
                self._queue.offer(self._blocks[page].block_hash, *self._ranks[page])
            else:
                self._free.append(page)

    def name(
        self, page: int, block: CachedBlock, priority: int = DEFAULT_PRIORITY, duration_s: float | None = None
    ) -> None:
        """Make a full, held page findable; a block that another page holds already stays with that one.

        Args:
            page: The page.
            block: What it holds.
            priority: 0 to 100; lower ones go first.
            duration_s: Seconds after which the priority is the default one; None for never.
        """
        if block.block_hash in self._page_of or page in self._blocks:
            return
        self._page_of[block.block_hash] = page
        self._blocks[page] = block
        self._continuing.setdefault(block.parent, []).append(page)
        self._queue.enter(block.block_hash, block.parent)
        self._ranks[page] = (priority, self._until(duration_s))
        self.num_named += 1
        if self.listener is not None:
            self.listener.stored(block, priority)

    def set_priority(self, page: int, priority: int, duration_s: float | None) -> None:
        """Give a named, held page the priority that its new user asks for; the duration counts from now."""
        known = self.priority_of(self._blocks[page].block_hash)
        self._ranks[page] = (priority, self._until(duration_s))
        if priority != known and self.listener is not None:
            self.listener.updated(self._blocks[page], priority)

    def resize(self, num_pages: int) -> bool:
        """Use `num_pages` of the pages, evicting cached ones; False, with nothing changed, if more are held."""
        fewer = self.num_usable - num_pages
        if not 0 < num_pages <= self.num_pages or fewer > self.num_available:
            return False
        while fewer > len(self._free):
            self._evict()
        if fewer > 0:
            self._away += self._free[:fewer]
            del self._free[:fewer]
        else:
            self._free[:0] = self._away[fewer:] if fewer else []
            del self._away[len(self._away) + fewer :]
        return True

    def forget_names(self) -> None:
        """Make nothing findable any more; cached pages become free."""
        for page, block in list(self._blocks.items()):
            self._forget(page, block)
            if self._holders[page] == 0:
                self._free.append(page)

    def check_integrity(self) -> None:
        """Compare the lists with one another.

        Raises:
            AssertionError: Names the invariant that does not hold.
        """
        free, away = set(self._free), set(self._away)
        cached = {page for page in self._blocks if self._holders[page] == 0}
        held = {page for page, count in enumerate(self._holders) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert min(self._holders, default=0) >= 0, "a page was released more often than held"
        assert len(free) + len(cached) + len(held) + len(away) == len(free | cached | held | away), (
            "a page is in two places"
        )
        assert free | cached | held | away == set(range(self.num_pages)), "a page is lost"
        names = {page: block.block_hash for page, block in self._blocks.items()}
        assert {page: name for name, page in self._page_of.items()} == names, "names and pages disagree"
        assert set(self._queue.present) == set(self._page_of), "the order of eviction knows other blocks"
        offered = {name for name in self._page_of if name in self._queue}
        assert offered == {names[page] for page in cached}, "a page is wrongly evictable or wrongly not"
        continuing = sorted(page for pages in self._continuing.values() for page in pages)
        assert continuing == sorted(self._blocks), "a named page continues nothing, or two blocks"
        self._queue.check_integrity()

    def _evict(self) -> None:
        block_hash = self._queue.pop()
        assert block_hash is not None, "the caller makes sure that a page is available"
        page = self._page_of[block_hash]
        self._forget(page, self._blocks[page])
        self._free.append(page)
        self.num_evicted += 1

    def _forget(self, page: int, block: CachedBlock) -> None:
        self._queue.leave(block.block_hash)
        del self._blocks[page], self._page_of[block.block_hash], self._ranks[page]
        pages = self._continuing[block.parent]
        pages.remove(page)
        if not pages:
            del self._continuing[block.parent]
        if self.listener is not None:
            self.listener.removed(block)

    def _until(self, duration_s: float | None) -> float:
        return math.inf if duration_s is None else self._clock() + duration_s
