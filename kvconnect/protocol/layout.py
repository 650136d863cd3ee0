"""Describes an engine's paged KV cache: which tensor holds which layers, roles and axes. Moves nothing, needs no torch.

A region is one tensor whose index 0 is the block id. An engine with a tensor a layer and role has many regions; one
with a single pool has one, with ``layer`` and ``role`` among its axes. What a block holds is named by axes, or opaque.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import prod
from typing import Any

import msgspec

from kvconnect.errors import LayoutMismatch

__all__ = ["KVCacheLayout", "LayerGroup", "Region", "first_needed_block", "longest_match"]

AXES = ("layer", "role", "token", "head", "dim")


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the cache.

    Attributes:
        tensor: ``(num_blocks, *axes)``, any strides; ``tensor[i]`` is what the region holds of block ``i``. The engine
            owns it and keeps it alive until the worker's `shutdown`.
        axes: Names of the dimensions after the first, from ``layer, role, token, head, dim``; empty when opaque.
        layers: Layer indices in the order of the ``layer`` axis, or the one layer if there is no such axis.
        roles: What is held (``"key"``, ``"value"``, ...), in the order of the ``role`` axis, or the one role.
        opaque: Names a packing that only this backend and instruction set read, ``""`` when the axes say it all.
    """

    tensor: Any
    axes: tuple[str, ...]
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    opaque: str = ""

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block's part of this region."""
        return tuple(self.tensor.shape[1:])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's part of this region."""
        return prod(self.block_shape) * int(self.tensor.element_size())


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that share one block table.

    Attributes:
        block_size: Tokens a block.
        layers: Layer indices, ascending.
        regions: The tensors that hold them; a block's payload is its parts of these, in this order.
        window: Sliding window in tokens, None for full attention.
    """

    block_size: int
    layers: tuple[int, ...]
    regions: tuple[Region, ...]
    window: int | None = None

    @property
    def payload_bytes(self) -> int:
        """Bytes of one block of this group, all its layers together."""
        return sum(region.block_bytes for region in self.regions)


class KVCacheLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's whole cache: `groups` in the order of the block tables, and which KV heads this rank holds.

    Attributes:
        groups: One per block table.
        heads: KV heads ``[start, end)`` of the model that lie on this rank.
        total_heads: KV heads of the whole model.
    """

    groups: tuple[LayerGroup, ...]
    heads: tuple[int, int]
    total_heads: int

    def check(self) -> None:
        """Compare the description with the tensors.

        Raises:
            LayoutMismatch: Names the first group, region and axis that do not fit.
        """
        if not self.groups:
            raise LayoutMismatch("a KV cache layout needs at least one layer group")
        start, end = self.heads
        if not 0 <= start < end <= self.total_heads:
            raise LayoutMismatch(f"KV heads [{start}, {end}) do not lie within the model's {self.total_heads}")
        for number, group in enumerate(self.groups):
            if group.block_size <= 0:
                raise LayoutMismatch(f"group {number}: block size must be positive, not {group.block_size}")
            if not group.regions:
                raise LayoutMismatch(f"group {number} has no regions")
            lengths = {int(region.tensor.shape[0]) for region in group.regions}
            if len(lengths) != 1:
                raise LayoutMismatch(f"group {number}: regions disagree on the number of blocks: {sorted(lengths)}")
            for index, region in enumerate(group.regions):
                self._check_region(f"group {number}, region {index}", group, region)
            held = sorted((layer, role) for r in group.regions for layer in r.layers for role in r.roles)
            if len(held) != len(set(held)):
                raise LayoutMismatch(f"group {number}: a layer's role is held by two regions")
            if {layer for layer, _ in held} != set(group.layers):
                raise LayoutMismatch(f"group {number}: its regions hold other layers than {group.layers}")

    def _check_region(self, where: str, group: LayerGroup, region: Region) -> None:
        if region.opaque:
            if region.axes:
                raise LayoutMismatch(f"{where}: an opaque region has no axes")
            return
        shape = region.block_shape
        if len(shape) != len(region.axes) or not set(region.axes) <= set(AXES) or len(set(region.axes)) != len(shape):
            raise LayoutMismatch(f"{where}: axes {region.axes} do not name the dimensions of a block, {shape}")
        expected = {
            "layer": len(region.layers),
            "role": len(region.roles),
            "token": group.block_size,
            "head": self.heads[1] - self.heads[0],
        }
        for axis, size in expected.items():
            if axis not in region.axes:
                if axis in ("layer", "role") and size == 1:
                    continue
                raise LayoutMismatch(f"{where}: there is no {axis!r} axis, and it would have {size} entries")
            found = shape[region.axes.index(axis)]
            if found != size:
                raise LayoutMismatch(f"{where}: axis {axis!r} has {found} entries, expected {size}")

    def in_memory_order(self) -> KVCacheLayout:
        """Return the same cache with each region's axes in the order in which they lie in memory.

        A block that is dense in memory is then dense as described, whatever view of it the engine registered, and can
        be copied in one piece.
        """
        groups = []
        for group in self.groups:
            regions = []
            for region in group.regions:
                strides = region.tensor.stride()[1:]
                by_stride = sorted(range(len(strides)), key=lambda axis: -strides[axis])
                if not region.opaque and by_stride != list(range(len(strides))):
                    axes = tuple(region.axes[axis] for axis in by_stride)
                    tensor = region.tensor.permute(0, *(axis + 1 for axis in by_stride))
                    region = msgspec.structs.replace(region, tensor=tensor, axes=axes)
                regions.append(region)
            groups.append(msgspec.structs.replace(group, regions=tuple(regions)))
        return msgspec.structs.replace(self, groups=tuple(groups))

    def shard(self, group: int) -> int:
        """Return the digest (u32) of which part of a block of `group` this rank holds: layers and KV heads.

        Never a rank number: ranks that hold the same part give the same digest, and store it once.
        """
        named = json.dumps([self.groups[group].layers, self.heads, self.total_heads])
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=4, person=b"kvconnect-shard1").digest())

    def fingerprint(self, group: int) -> bytes:
        """Return 32 bytes that two caches share only if their blocks hold the same thing, in whatever order.

        It covers block size, layers, roles, KV heads, dtypes, sizes and opaque packings; the order of axes and regions
        is `payload_order`.
        """
        parts = []
        for region in self.groups[group].regions:
            inner = {axis: region.block_shape[i] for i, axis in enumerate(region.axes) if axis not in ("layer", "role")}
            held = sorted(inner.items()) if not region.opaque else [(region.opaque, region.block_shape)]
            parts += [[layer, role, str(region.tensor.dtype), held] for layer in region.layers for role in region.roles]
        text = json.dumps([self.groups[group].block_size, self.heads, self.total_heads, sorted(parts)])
        return hashlib.blake2b(text.encode(), digest_size=32, person=b"kvconnect-layou1").digest()

    def payload_order(self, group: int) -> str:
        """Return the order of a block's payload, at most 40 ASCII characters.

        A string of axis initials, outermost first (``"lrthd"``: layer, role, token, head, dim), when the payload is one
        dense array over them; ``"lr:hdt:htd"`` when each role has its own inner order; otherwise ``"#"`` and a digest,
        which only the same order equals.
        """
        group_layout = self.groups[group]
        regions = group_layout.regions
        first = regions[0]
        roles = tuple(dict.fromkeys(role for region in regions for role in region.roles))
        layers = group_layout.layers
        uniform = len({(r.axes, r.block_shape, str(r.tensor.dtype), r.roles) for r in regions}) == 1
        # the short forms say nothing of which role comes first, so they are only for roles in alphabetical order
        if not any(r.opaque for r in regions) and roles == tuple(sorted(roles)):
            initials = "".join(axis[0] for axis in first.axes)
            if len(regions) == 1 and first.layers == layers:
                missing = "".join(axis for axis in "lr" if axis not in initials)
                return missing + initials
            if uniform and "layer" not in first.axes and tuple(r.layers[0] for r in regions) == layers:
                return "l" + ("" if "role" in first.axes else "r") + initials
            held = [(r.layers[0], r.roles[0]) for r in regions if not {"layer", "role"} & set(r.axes)]
            inner = {role: {r.axes for r in regions if r.roles[0] == role} for role in roles}
            sizes = {tuple(sorted(zip(r.axes, r.block_shape, strict=True))) for r in regions}
            if len(held) == len(regions) and len(sizes) == 1 and all(len(axes) == 1 for axes in inner.values()):
                outer = ""
                if held == [(layer, role) for layer in layers for role in roles]:
                    outer = "lr"
                elif held == [(layer, role) for role in roles for layer in layers]:
                    outer = "rl"
                by_role = ["".join(axis[0] for axis in next(iter(inner[role]))) for role in roles]
                if outer:
                    return outer + (by_role[0] if len(set(by_role)) == 1 else ":" + ":".join(by_role))
        described = [[r.axes, r.block_shape, r.layers, r.roles, r.opaque] for r in regions]
        return "#" + hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def first_needed_block(num_tokens: int, block_size: int, window: int | None) -> int:
    """Return the first block whose KV the token at position `num_tokens` attends to.

    Blocks before it are out of the window and need no page. Source: TensorRT-LLM's stale range,
    ``[0, (history + 1 - window) // block_size)``.
    """
    if window is None:
        return 0
    return max(0, (num_tokens + 1 - window) // block_size)


def longest_match(
    present: Sequence[Sequence[bool]], block_size: int, windows: Sequence[int | None], first: int, limit: int
) -> int:
    """Return the largest number of blocks ``n <= limit`` so that every group has the blocks it needs of ``[first, n)``.

    Args:
        present: For each group, whether block ``i`` is there; each at least `limit` long.
        block_size: Tokens a block, the same in every group.
        windows: For each group, its sliding window in tokens or None.
        first: Blocks already at hand; ``n >= first`` always.
        limit: Never more than this.
    """
    best = limit
    for flags, window in zip(present, windows, strict=True):
        if window is None:
            end = first
            while end < best and flags[end]:
                end += 1
            best = end
    sliding = [(flags, window) for flags, window in zip(present, windows, strict=True) if window is not None]
    while best > first:
        bad = -1  # the last block that is needed for `best` blocks and is missing
        for flags, window in sliding:
            for block in range(best - 1, max(first, first_needed_block(best * block_size, block_size, window)) - 1, -1):
                if not flags[block]:
                    bad = max(bad, block)
                    break
        if bad < 0:
            return best
        best = bad  # no n in (bad, best] can do without it: a smaller n needs earlier blocks, `bad` among them
    return first
