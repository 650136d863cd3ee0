"""The engine's paged KV cache: tensors, who holds which page, and which full pages can be used again. No scheduling.

A page is free, held by one or more sequences, or cached: full, named by its block hash, held by nobody. Cached pages
are handed out last, least recently used first. Fresh pages are filled with NaN, so that KV that nobody wrote is seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvconnect.protocol import (
    BlockHash,
    KVCacheLayout,
    LayerGroup,
    Region,
    first_needed_block,
    longest_match,
)

__all__ = ["NO_PAGE", "KVGeometry", "LayerCache", "PagePool", "PagedCache"]

NO_PAGE = -1


class KVGeometry(NamedTuple):
    """The shape of a model's KV.

    Attributes:
        layers: Layer indices of each group; layers of one group have the same window.
        windows: Each group's sliding window in tokens, None for full attention.
        num_kv_heads: KV heads a layer.
        head_dim: Elements a head.
        dtype: Of K and V.
    """

    layers: tuple[tuple[int, ...], ...]
    windows: tuple[int | None, ...]
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token in all layers."""
        layers = sum(len(group) for group in self.layers)
        return 2 * layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class LayerCache:
    """One layer's pages: `key` and `value` of ``(num_pages, block_size, num_kv_heads, head_dim)``."""

    __slots__ = ("group", "key", "value", "window")

    def __init__(self, key: torch.Tensor, value: torch.Tensor, group: int, window: int | None) -> None:
        """Name the pages of a layer."""
        self.key = key
        self.value = value
        self.group = group
        self.window = window


class PagePool:
    """The pages of one layer group; bookkeeping only."""

    def __init__(self, num_pages: int) -> None:
        """Start with every page free."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._hash_of: dict[int, BlockHash] = {}
        self._page_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, least recently used first

    @property
    def num_available(self) -> int:
        """Pages that `take` could hand out."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that sequences hold."""
        return sum(count > 0 for count in self._holders)

    def find(self, block_hash: BlockHash) -> int:
        """Return the page that holds a block, `NO_PAGE` if none does."""
        return self._page_of.get(block_hash, NO_PAGE)

    def is_cached(self, page: int) -> bool:
        """Say whether the page has a name and no holder: holding it takes it from those available."""
        return page in self._cached

    def take(self) -> int:
        """Hand out a page; the caller has made sure that one is available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Add a holder to a cached or held page."""
        self._holders[page] += 1
        self._cached.pop(page, None)

    def release(self, page: int) -> None:
        """Remove a holder; a page without holders is cached if it has a name, free otherwise."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, block_hash: BlockHash) -> None:
        """Make a full page findable; a block that another page holds already stays with that one."""
        if block_hash not in self._page_of and page not in self._hash_of:
            self._page_of[block_hash] = page
            self._hash_of[page] = block_hash

    def forget_names(self) -> None:
        """Make nothing findable any more; cached pages become free."""
        self._page_of.clear()
        self._hash_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def check_integrity(self) -> None:
        """Compare the lists with one another.

        Raises:
            AssertionError: Names the invariant that does not hold.
        """
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._holders) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert min(self._holders, default=0) >= 0, "a page was released more often than held"
        assert len(free) + len(cached) + len(held) == len(free | cached | held), "a page is in two places"
        assert free | cached | held == set(range(self.num_pages)), "a page is lost"
        assert cached <= set(self._hash_of), "a page is cached without a name"
        assert {page: name for name, page in self._page_of.items()} == self._hash_of, "names and pages disagree"


class PagedCache:
    """Pools and tensors of every layer group.

    Attributes:
        block_size: Tokens a page.
        windows: Each group's sliding window.
        pools: One a group.
        layers: Each layer's pages.
    """

    def __init__(self, geometry: KVGeometry, *, block_size: int, num_pages: int) -> None:
        """Make `num_pages` pages for every group."""
        self.block_size = block_size
        self.windows = geometry.windows
        self.pools = [PagePool(num_pages) for _ in geometry.layers]
        self._geometry = geometry
        shape = (num_pages, block_size, geometry.num_kv_heads, geometry.head_dim)
        by_layer = {}
        for group, (layers, window) in enumerate(zip(geometry.layers, geometry.windows, strict=True)):
            for layer in layers:
                key, value = (torch.empty(shape, dtype=geometry.dtype) for _ in range(2))  # filled when handed out
                by_layer[layer] = LayerCache(key, value, group, window)
        self.layers = [by_layer[layer] for layer in sorted(by_layer)]

    def layout(self, rank: int = 0, num_ranks: int = 1) -> KVCacheLayout:
        """Describe one rank's part of the tensors for a connector: its share of every page's KV heads.

        Args:
            rank: Whose part, in ``[0, num_ranks)``.
            num_ranks: A divisor of the model's KV heads.
        """
        total = self._geometry.num_kv_heads
        heads = (rank * total // num_ranks, (rank + 1) * total // num_ranks)
        part = slice(*heads)
        groups = []
        for layers, window in zip(self._geometry.layers, self.windows, strict=True):
            regions = [
                Region(
                    tensor=tensor[:, :, part],
                    axes=("token", "head", "dim"),
                    layers=(layer,),
                    roles=(role,),
                )
                for layer in layers
                for role, tensor in (("key", self.layers[layer].key), ("value", self.layers[layer].value))
            ]
            groups.append(LayerGroup(block_size=self.block_size, layers=layers, regions=tuple(regions), window=window))
        return KVCacheLayout(groups=tuple(groups), heads=heads, total_heads=total)

    def match(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """Return how many of the first `limit` blocks lie in pages, as far as every group needs them."""
        present = [[pool.find(block_hash) != NO_PAGE for block_hash in hashes[:limit]] for pool in self.pools]
        return longest_match(present, self.block_size, self.windows, 0, limit)

    def first_needed(self, group: int, num_tokens: int) -> int:
        """Return the first block that `group` needs when `num_tokens` tokens are computed."""
        return first_needed_block(num_tokens, self.block_size, self.windows[group])

    def extend(
        self, tables: list[list[int]], hashes: Sequence[BlockHash], num_matched: int, num_computed: int, num_tokens: int
    ) -> list[list[int]] | None:
        """Grow a sequence's tables so that `num_tokens` tokens have pages; all or nothing.

        Args:
            tables: One a group; empty ones get the matched pages first.
            hashes: The sequence's block hashes.
            num_matched: Blocks found by `match`, 0 for a sequence that has tables.
            num_computed: Tokens that need not be computed; what lies out of the window there gets no page.
            num_tokens: Tokens to have pages for.

        Returns:
            The pages taken, by group, to be filled with NaN; None, with nothing changed, if there are too few.
        """
        end = -(-num_tokens // self.block_size)
        matched: list[list[int]] = []
        missing: list[range] = []
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            first = self.first_needed(group, num_computed)
            found = [pool.find(hashes[i]) if i >= first else NO_PAGE for i in range(len(table), num_matched)]
            start = len(table) + len(found)
            matched.append(found + [NO_PAGE] * (min(first, end) - start))
            missing.append(range(start + max(0, min(first, end) - start), end))
            evictable = sum(page != NO_PAGE and pool.is_cached(page) for page in found)
            if len(missing[group]) > pool.num_available - evictable:
                return None
        fresh = []
        for pool, table, found, needed in zip(self.pools, tables, matched, missing, strict=True):
            for page in found:
                if page != NO_PAGE:
                    pool.hold(page)
            taken = [pool.take() for _ in needed]
            table += found + taken
            fresh.append(taken)
        return fresh

    def fill_fresh(self, fresh: Sequence[Sequence[int]]) -> None:
        """Fill pages with NaN before anything is loaded or computed into them."""
        for cache in self.layers:
            if fresh[cache.group]:
                pages = torch.tensor(fresh[cache.group])
                cache.key[pages] = torch.nan
                cache.value[pages] = torch.nan

    def name_full(self, tables: Sequence[Sequence[int]], hashes: Sequence[BlockHash], start: int, end: int) -> None:
        """Make blocks ``[start, end)`` of a sequence findable: they are full and right."""
        for pool, table in zip(self.pools, tables, strict=True):
            for block in range(start, end):
                if table[block] != NO_PAGE:
                    pool.name(table[block], hashes[block])

    def release_stale(self, tables: Sequence[list[int]], num_computed: int) -> None:
        """Free pages that fell out of their group's window; -1 stays in their place."""
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            for block in range(min(self.first_needed(group, num_computed), len(table)) - 1, -1, -1):
                if table[block] == NO_PAGE:
                    break
                pool.release(table[block])
                table[block] = NO_PAGE

    def release_all(self, tables: Sequence[list[int]]) -> None:
        """Free a sequence's pages: its end is handed out again before its beginning."""
        for pool, table in zip(self.pools, tables, strict=True):
            for page in reversed(table):
                if page != NO_PAGE:
                    pool.release(page)
            table.clear()
