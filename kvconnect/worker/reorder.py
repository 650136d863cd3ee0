"""Loads a payload that was written in another order of axes or regions than the reader's. Moves one block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvconnect.errors import LayoutMismatch
from kvconnect.protocol import LayerGroup, Region

__all__ = ["can_reorder", "scatter_reordered"]

_INNER = "thd"


def can_reorder(order: str, own: str) -> bool:
    """Say whether a payload packed as `order` can be read by a cache packed as `own`."""
    return order == own or not (order.startswith("#") or own.startswith("#"))


def scatter_reordered(payload: torch.Tensor, order: str, group: LayerGroup, block_id: int) -> None:
    """Copy one block from `payload` into its page, permuting axes.

    Args:
        payload: uint8, the block's payload.
        order: The writer's `payload_order`, not opaque.
        group: The reader's layer group, not opaque, of the same fingerprint.
        block_id: The page.

    Raises:
        LayoutMismatch: If `order` does not describe such a payload.
    """
    first = group.regions[0]
    roles = tuple(dict.fromkeys(role for region in group.regions for role in region.roles))
    sizes = {axis[0]: first.block_shape[i] for i, axis in enumerate(first.axes)}
    sizes |= {"l": len(group.layers), "r": len(roles)}
    source = payload.view(first.tensor.dtype)
    for layer, role, target in _pages(group, block_id):
        target.copy_(_part(source, order, sizes, group.layers.index(layer), roles.index(role)))


def _part(source: torch.Tensor, order: str, sizes: dict[str, int], layer: int, role: int) -> torch.Tensor:
    """Return one layer's role as ``(token, head, dim)``."""
    outer, *by_role = order.split(":")
    letters = outer if not by_role else outer + by_role[0]
    if sorted(letters) != sorted("lr" + _INNER) or (by_role and len(by_role) != sizes["r"]):
        raise LayoutMismatch(f"payload order {order!r} is not known")
    if not by_role:
        whole = source.view([sizes[letter] for letter in outer])
        return whole.permute([outer.index(letter) for letter in "lr" + _INNER])[layer, role]
    inner = by_role[role]
    rows = source.view(sizes[outer[0]], sizes[outer[1]], -1)
    row = rows[layer, role] if outer == "lr" else rows[role, layer]
    return row.view([sizes[letter] for letter in inner]).permute([inner.index(letter) for letter in _INNER])


def _pages(group: LayerGroup, block_id: int) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield each layer and role with its part of the page as ``(token, head, dim)``."""
    for region in group.regions:
        page = region.tensor[block_id]
        for layer_index, layer in enumerate(region.layers):
            for role_index, role in enumerate(region.roles):
                yield layer, role, _select(page, region, layer_index, role_index)


def _select(page: torch.Tensor, region: Region, layer: int, role: int) -> torch.Tensor:
    axes = list(region.axes)
    for axis, index in (("layer", layer), ("role", role)):
        if axis in axes:
            page = page.select(axes.index(axis), index)
            axes.remove(axis)
    return page.permute([axes.index(axis) for axis in ("token", "head", "dim")])
