"""What pages must hold: bytes that follow from (token prefix, layer, role, position), so that every mistake shows.

A byte that is stale, shifted, torn, of another sequence, layer, role or rank, or was never written differs from what is
expected, and `Pages.explain` says what it is instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvconnect.engine.pages import NO_PAGE, KVGeometry, PagedCache

__all__ = ["Pages", "WrongBytes", "prefix_states"]

_U64 = np.uint64
_ROLES = ("key", "value")
_FINITE = {2: 0xBFFF, 4: 0xBFFFFFFF}  # clears an exponent bit: no pattern is NaN or infinite
_WORDS = {2: torch.int16, 4: torch.int32}


class WrongBytes(NamedTuple):
    """A position whose KV is not what it must be."""

    group: int
    layer: int
    role: str
    position: int
    page: int
    what: str

    def __str__(self) -> str:
        """Say where, and what is there."""
        return f"{self.role} of position {self.position}, layer {self.layer} (page {self.page}): {self.what}"


def prefix_states(tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return, for each position, 64 bits that depend on every token up to it; shares nothing with block keys."""
    states = np.empty(len(tokens), dtype=_U64)
    state = 0x9E3779B97F4A7C15
    for position, token in enumerate(tokens):
        state = ((state ^ (token + 0x165667B19E3779F9)) * 0xFF51AFD7ED558CCD) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 32
        states[position] = state
    return states


class Pages:
    """Writes the right bytes into a paged cache, and compares."""

    def __init__(self, geometry: KVGeometry, cache: PagedCache) -> None:
        """Bind a cache of float32 or bfloat16."""
        self.cache = cache
        self._heads = geometry.num_kv_heads
        self._dim = geometry.head_dim
        self._bytes = geometry.dtype.itemsize
        self._known: dict[str, np.ndarray[Any, Any]] = {}  # sequences by name, for explanations

    def remember(self, name: str, states: np.ndarray[Any, Any]) -> None:
        """Know a sequence by name, so that its bytes can be recognised elsewhere."""
        self._known[name] = states

    def write(self, states: np.ndarray[Any, Any], table: Sequence[int], layer: int, start: int, end: int) -> None:
        """Write one layer's KV of positions ``[start, end)``."""
        rows = self._rows(table, start, end)
        for role in _ROLES:
            self._words(layer, role).flatten(0, 1)[rows] = torch.from_numpy(
                self._expected(states[start:end], layer, role)
            )

    def check(
        self, states: np.ndarray[Any, Any], table: Sequence[int], group: int, layer: int, start: int, end: int
    ) -> list[WrongBytes]:
        """Return the wrong positions of ``[start, end)`` in one layer, K before V; every one of them has a page."""
        if end <= start:
            return []
        rows = self._rows(table, start, end)
        wrong = []
        for role in _ROLES:
            found = self._words(layer, role).flatten(0, 1)[rows].numpy()
            good = (found == self._expected(states[start:end], layer, role)).all(axis=(1, 2))
            for index in np.flatnonzero(~good):
                position = start + int(index)
                what = self._explain(states, found[index], layer, role, position)
                page = table[position // self.cache.block_size]
                wrong.append(WrongBytes(group, layer, role, position, page, what))
        return wrong

    def snapshot(self) -> list[torch.Tensor]:
        """Return copies of every page, to see whether somebody wrote where they must not."""
        return [self._words(layer, role).clone() for layer in range(len(self.cache.layers)) for role in _ROLES]

    def changed_pages(self, before: Sequence[torch.Tensor]) -> list[tuple[int, str, int]]:
        """Return (layer, role, page) of what differs from a snapshot."""
        changed = []
        places = [(layer, role) for layer in range(len(self.cache.layers)) for role in _ROLES]
        for (layer, role), old in zip(places, before, strict=True):
            same = (self._words(layer, role) == old).flatten(1).all(dim=1)
            changed += [(layer, role, page) for page in torch.nonzero(~same).flatten().tolist()]
        return changed

    def _rows(self, table: Sequence[int], start: int, end: int) -> torch.Tensor:
        size = self.cache.block_size
        assert all(table[block] != NO_PAGE for block in range(start // size, -(-end // size))), "position without page"
        return torch.tensor([table[position // size] * size + position % size for position in range(start, end)])

    def _words(self, layer: int, role: str) -> torch.Tensor:
        return getattr(self.cache.layers[layer], role).view(_WORDS[self._bytes])  # type: ignore[no-any-return]

    def _expected(self, states: np.ndarray[Any, Any], layer: int, role: str) -> np.ndarray[Any, Any]:
        """Return ``(positions, heads, dim)`` words."""
        place = _U64((layer * 2 + _ROLES.index(role) + 1) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF)
        elements = np.arange(self._heads * self._dim, dtype=_U64) * _U64(0x9E3779B97F4A7C15)
        mixed = (states[:, None] ^ place) + elements[None, :]
        mixed = (mixed ^ (mixed >> _U64(31))) * _U64(0xBF58476D1CE4E5B9)
        words = ((mixed >> _U64(24)) & _U64(_FINITE[self._bytes])).astype(f"u{self._bytes}")
        shaped: np.ndarray[Any, Any] = words.view(f"i{self._bytes}").reshape(-1, self._heads, self._dim)
        return shaped

    def _explain(
        self, states: np.ndarray[Any, Any], found: np.ndarray[Any, Any], layer: int, role: str, position: int
    ) -> str:
        """Say what wrong bytes are, if they are anything known."""
        if np.isnan(torch.from_numpy(found.copy()).view(_floats(self._bytes)).float().numpy()).all():
            return "nobody wrote it"
        for other_layer in range(len(self.cache.layers)):
            for other_role in _ROLES:
                same_place = other_layer == layer and other_role == role
                for name, known in [("this sequence", states), *self._known.items()]:
                    expected = self._expected(known, other_layer, other_role)
                    for where in np.flatnonzero((expected == found).all(axis=(1, 2))):
                        place = "" if same_place else f", {other_role} of layer {other_layer}"
                        return f"it is position {int(where)} of {name}{place}"
        expected = self._expected(states[position : position + 1], layer, role)[0]
        right = int((expected == found).sum())
        if right:
            wrong = [head for head in range(self._heads) if not (expected[head] == found[head]).all()]
            return f"only {right} of {expected.size} elements are right (wrong heads: {wrong})"
        if sorted(expected.flatten().tolist()) == sorted(found.flatten().tolist()):
            return "its elements are there in another order"
        return "bytes of nothing known"


def _floats(size: int) -> torch.dtype:
    return {2: torch.bfloat16, 4: torch.float32}[size]
