"""The engine's paged KV cache: tensors and the pools of their pages. No scheduling.

Fresh pages are filled with NaN, so that KV that nobody wrote is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvconnect.engine.pool import NO_PAGE, CachedBlock, PagePool
from kvconnect.protocol import (
    DEFAULT_PRIORITY,
    BlockChain,
    BlockHash,
    KVCacheLayout,
    LayerGroup,
    Region,
    Retention,
    first_needed_block,
    longest_match,
)

__all__ = ["NO_PAGE", "KVGeometry", "LayerCache", "PagedCache", "PartialMatch"]


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
        return sum(map(self.group_bytes_per_token, range(len(self.layers))))

    def group_bytes_per_token(self, group: int) -> int:
        """K and V of one token in a group's layers."""
        return 2 * len(self.layers[group]) * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class PartialMatch(NamedTuple):
    """Pages whose first tokens continue a sequence, and whose others do not.

    Attributes:
        pages: One a group; `NO_PAGE` where the group needs none.
        num_tokens: How many tokens they share, fewer than a block.
    """

    pages: tuple[int, ...]
    num_tokens: int


class LayerCache:
    """One layer's pages: `key` and `value` of ``(num_pages, block_size, num_kv_heads, head_dim)``."""

    __slots__ = ("group", "key", "value", "window")

    def __init__(self, key: torch.Tensor, value: torch.Tensor, group: int, window: int | None) -> None:
        """Name the pages of a layer."""
        self.key = key
        self.value = value
        self.group = group
        self.window = window


class PagedCache:
    """Pools and tensors of every layer group.

    Attributes:
        block_size: Tokens a page.
        windows: Each group's sliding window.
        pools: One a group.
        layers: Each layer's pages.
    """

    def __init__(self, geometry: KVGeometry, *, block_size: int, num_pages: int) -> None:
        """Make `num_pages` pages for every group; memory is taken when they are first written to."""
        self.block_size = block_size
        self.windows = geometry.windows
        self.pools = [PagePool(num_pages, sliding=window is not None) for window in geometry.windows]
        self._geometry = geometry
        shape = (num_pages, block_size, geometry.num_kv_heads, geometry.head_dim)
        by_layer = {}
        for group, (layers, window) in enumerate(zip(geometry.layers, geometry.windows, strict=True)):
            for layer in layers:
                key, value = (torch.empty(shape, dtype=geometry.dtype) for _ in range(2))  # filled when handed out
                by_layer[layer] = LayerCache(key, value, group, window)
        self.layers = [by_layer[layer] for layer in sorted(by_layer)]

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page in every group, all layers together."""
        return sum(self.page_bytes)

    @property
    def page_bytes(self) -> list[int]:
        """Bytes of one page of each group, its layers together."""
        groups = range(len(self.pools))
        return [self._geometry.group_bytes_per_token(group) * self.block_size for group in groups]

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

    def match_partial(
        self, chain: BlockChain, tokens: Sequence[int], num_blocks: int, max_tokens: int
    ) -> PartialMatch | None:
        """Find pages that begin like what follows a sequence's first blocks; they share fewer tokens than a block.

        A whole block can lie there too, where the connector brought those before it; it is used but for its last token.

        Args:
            chain: Of the sequence.
            tokens: Its tokens.
            num_blocks: Blocks that need not be looked for.
            max_tokens: Look at no token beyond these.
        """
        parent = chain.hashes[num_blocks - 1] if num_blocks else chain.root
        start = num_blocks * self.block_size
        wanted = tuple(tokens[start : min(start + self.block_size - 1, max_tokens)])
        best: PartialMatch | None = None
        for _, block in self.pools[0].continuing(parent):
            shared = _common_prefix(block.tokens, wanted)
            if not shared or (best is not None and shared <= best.num_tokens):
                continue
            needed = [num_blocks >= self.first_needed(group, start + shared) for group in range(len(self.pools))]
            pages = tuple(
                pool.find(block.block_hash) if need else NO_PAGE for pool, need in zip(self.pools, needed, strict=True)
            )
            if all(page != NO_PAGE for page, need in zip(pages, needed, strict=True) if need):
                best = PartialMatch(pages, shared)
        return best

    def copy_partial(self, partial: PartialMatch, tables: Sequence[Sequence[int]], block: int) -> None:
        """Copy the shared tokens of a partial match into a sequence's own pages of that block."""
        for cache in self.layers:
            source, target = partial.pages[cache.group], tables[cache.group][block]
            if source != NO_PAGE and target != NO_PAGE:
                cache.key[target, : partial.num_tokens] = cache.key[source, : partial.num_tokens]
                cache.value[target, : partial.num_tokens] = cache.value[source, : partial.num_tokens]

    def first_needed(self, group: int, num_tokens: int) -> int:
        """Return the first block that `group` needs when `num_tokens` tokens are computed."""
        return first_needed_block(num_tokens, self.block_size, self.windows[group])

    def pages_needed(self, hashes: Sequence[BlockHash], num_matched: int, num_computed: int, end: int) -> list[int]:
        """Return how many of each group's available pages `extend` would use for a new sequence of `end` tokens."""
        blocks = -(-end // self.block_size)
        needed = []
        for group, pool in enumerate(self.pools):
            first = self.first_needed(group, num_computed)
            found = [pool.find(hashes[block]) for block in range(first, num_matched)]
            needed.append(max(0, blocks - max(first, num_matched)) + sum(map(pool.is_cached, found)))
        return needed

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

    def resize(self, num_pages: int) -> bool:
        """Use `num_pages` pages of every group; False, with nothing changed, if more are held in one of them."""
        if any(not 0 < num_pages <= pool.num_pages or pool.num_held > num_pages for pool in self.pools):
            return False
        for pool in self.pools:
            pool.resize(num_pages)
        return True

    def fill_fresh(self, fresh: Sequence[Sequence[int]]) -> None:
        """Fill pages with NaN before anything is loaded or computed into them."""
        for cache in self.layers:
            if fresh[cache.group]:
                pages = torch.tensor(fresh[cache.group])
                cache.key[pages] = torch.nan
                cache.value[pages] = torch.nan

    def name_full(
        self,
        tables: Sequence[Sequence[int]],
        chain: BlockChain,
        tokens: Sequence[int],
        start: int,
        end: int,
        *,
        num_prompt_tokens: int = 0,
        retention: Retention | None = None,
        salted: bool = False,
    ) -> None:
        """Make blocks ``[start, end)`` of a sequence findable: they are full and right."""
        size = self.block_size
        for block in range(start, end):
            parent = chain.hashes[block - 1] if block else chain.root
            held = CachedBlock(chain.hashes[block], parent, tuple(tokens[block * size : (block + 1) * size]), salted)
            rank = retention.of_block(block, size, num_prompt_tokens) if retention else (DEFAULT_PRIORITY, None)
            for pool, table in zip(self.pools, tables, strict=True):
                if table[block] != NO_PAGE:
                    pool.name(table[block], held, *rank)

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


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first elements are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
