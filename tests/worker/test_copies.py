"""Gather and scatter: every byte of every block, for any strides, several groups, and payloads of another order.

Pages hold a function of (token prefix, layer, role, position), so that a byte that is shifted, swapped, torn or missing
is another value and not merely another copy of the same one.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kvconnect.protocol import KVCacheLayout, LayerGroup, Region
from kvconnect.store import HEADER_BYTES
from kvconnect.worker.arena import Arena
from kvconnect.worker.copies import BlockCopier
from kvconnect.worker.reorder import can_reorder

BLOCK, HEADS, DIM, PAGES = 4, 2, 8, 9
SIZES = {"layer": 3, "role": 2, "token": BLOCK, "head": HEADS, "dim": DIM}
INNER = ("token", "head", "dim")


def value(prefix: int, layer: int, role: int, dtype: Any) -> torch.Tensor:
    """Return what one layer's role of the block with that prefix holds, as (token, head, dim)."""
    seed = torch.arange(BLOCK * HEADS * DIM, dtype=torch.int64).view(BLOCK, HEADS, DIM)
    mixed = (seed * 2654435761 + prefix * 40503 + layer * 69069 + role * 1013904223) % 509
    return (mixed - 254).to(dtype)


def fill(layout: KVCacheLayout, block: int, prefix: int, dtype: Any) -> None:
    for layer, role, page in pages(layout, block):
        page.copy_(value(prefix, layer, role, dtype))


def check(layout: KVCacheLayout, block: int, prefix: int, dtype: Any) -> None:
    for layer, role, page in pages(layout, block):
        assert torch.equal(page, value(prefix, layer, role, dtype)), (block, layer, role)


def pages(layout: KVCacheLayout, block: int) -> Any:
    for region in layout.groups[0].regions:
        for i, layer in enumerate(region.layers):
            for j, role in enumerate(region.roles):
                page, axes = region.tensor[block], list(region.axes)
                for axis, index in (("layer", i), ("role", j)):
                    if axis in axes:
                        page = page.select(axes.index(axis), index)
                        axes.remove(axis)
                yield layer, ("key", "value").index(role), page.permute([axes.index(axis) for axis in INNER])


def layout_of(*regions: Region) -> KVCacheLayout:
    group = LayerGroup(block_size=BLOCK, layers=(0, 1, 2), regions=regions)
    layout = KVCacheLayout(groups=(group,), heads=(0, HEADS), total_heads=HEADS)
    layout.check()
    return layout


def per_layer(axes: tuple[str, ...], dtype: Any, roles: Any = None) -> KVCacheLayout:
    return layout_of(
        *(
            Region(
                tensor=torch.zeros(PAGES, *(SIZES[axis] for axis in inner), dtype=dtype),
                axes=inner,
                layers=(layer,),
                roles=(role,),
            )
            for layer in range(3)
            for role, inner in (roles or {"key": axes, "value": axes}).items()
        )
    )


def one_pool(axes: tuple[str, ...], dtype: Any) -> KVCacheLayout:
    tensor = torch.zeros(PAGES, *(SIZES[axis] for axis in axes), dtype=dtype)
    return layout_of(Region(tensor=tensor, axes=axes, layers=(0, 1, 2), roles=("key", "value")))


def roles_first(dtype: Any) -> KVCacheLayout:
    """One tensor a layer of (2, pages, ...), seen with the block first: FlashAttention's layout."""
    return layout_of(
        *(
            Region(
                tensor=torch.zeros(2, PAGES, BLOCK, HEADS, DIM, dtype=dtype).transpose(0, 1),
                axes=("role", *INNER),
                layers=(layer,),
                roles=("key", "value"),
            )
            for layer in range(3)
        )
    )


def padded(dtype: Any) -> KVCacheLayout:
    """Pages that do not touch, heads that are strided: nothing of a block is contiguous."""
    return layout_of(
        *(
            Region(
                tensor=torch.zeros(PAGES, BLOCK, HEADS * 3, DIM + 5, dtype=dtype)[:, :, ::3, 2 : 2 + DIM],
                axes=INNER,
                layers=(layer,),
                roles=(role,),
            )
            for layer in range(3)
            for role in ("key", "value")
        )
    )


LAYOUTS = {
    "a view, dense below": lambda dtype: per_layer(("dim", "head", "token"), dtype).in_memory_order(),
    "a tensor a layer": lambda dtype: per_layer(INNER, dtype),
    "heads before tokens": lambda dtype: per_layer(("head", "token", "dim"), dtype),
    "keys transposed": lambda dtype: per_layer(
        INNER, dtype, {"key": ("head", "dim", "token"), "value": ("head", "token", "dim")}
    ),
    "one pool": lambda dtype: one_pool(("layer", "role", *INNER), dtype),
    "one pool, roles first": lambda dtype: one_pool(("role", "layer", *INNER), dtype),
    "one pool, layers last": lambda dtype: one_pool(("role", *INNER, "layer"), dtype),
    "roles outside blocks": roles_first,
    "padded": padded,
}


def copier(layout: KVCacheLayout, arena: Arena, pool: ThreadPoolExecutor | None = None) -> BlockCopier:
    return BlockCopier(layout.groups[0], arena, layout.payload_order(0), pool)


def arena_for(layout: KVCacheLayout) -> Arena:
    return Arena(12 * 4096, layout.groups[0].payload_bytes, pinned=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_block_that_went_to_a_slot_and_back_is_the_same(name: str, dtype: Any) -> None:
    if dtype is torch.uint8:
        dtype = torch.int8  # one byte, signed: 509 values would not fit, equality does not need them to
    layout = LAYOUTS[name](dtype)
    arena = arena_for(layout)
    copies = copier(layout, arena)
    saved, slots = [7, 2, 5], [4, 0, 9]
    for prefix, block in enumerate(saved):
        fill(layout, block, prefix, dtype)
    copies.gather(saved, slots)
    for block in range(PAGES):
        fill(layout, block, 100 + block, dtype)
    copies.scatter([1, 8, 3], slots, [layout.payload_order(0)] * 3)
    for prefix, block in enumerate([1, 8, 3]):
        check(layout, block, prefix, dtype)
    for block in {0, 2, 4, 5, 6, 7}:
        check(layout, block, 100 + block, dtype)  # neighbours are untouched


def test_gather_writes_the_payload_and_nothing_else() -> None:
    layout = per_layer(INNER, torch.float32)
    arena = arena_for(layout)
    arena.slots.fill_(0xAA)
    fill(layout, 3, 1, torch.float32)
    copier(layout, arena).gather([3], [5])
    end = HEADER_BYTES + layout.groups[0].payload_bytes
    untouched = torch.ones_like(arena.slots, dtype=torch.bool)
    untouched[5, HEADER_BYTES:end] = False
    assert bool((arena.slots[untouched] == 0xAA).all())
    expected = torch.stack([value(1, layer, role, torch.float32) for layer in range(3) for role in range(2)])
    assert torch.equal(arena.slots[5, HEADER_BYTES:end].view(torch.float32).view_as(expected), expected)


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", LAYOUTS)
def test_payload_of_another_order_is_permuted(writer: str, reader: str) -> None:
    dtype = torch.bfloat16
    source, target = LAYOUTS[writer](dtype), LAYOUTS[reader](dtype)
    assert source.fingerprint(0) == target.fingerprint(0)
    order = source.payload_order(0)
    arena = arena_for(source)
    fill(source, 4, 77, dtype)
    fill(source, 5, 78, dtype)
    copier(source, arena).gather([4, 5], [2, 3])
    copier(target, arena).scatter([6, 0], [2, 3], [order, order])
    check(target, 6, 77, dtype)
    check(target, 0, 78, dtype)


def test_every_layout_here_can_be_read_by_every_other() -> None:
    orders = [make(torch.float32).payload_order(0) for make in LAYOUTS.values()]
    assert all(can_reorder(a, b) for a in orders for b in orders)


def test_large_copies_are_shared_among_threads_and_still_right() -> None:
    tensor = torch.randint(-(2**31), 2**31, (16, 1 << 17), dtype=torch.int32)
    region = Region(tensor=tensor.clone(), axes=(), layers=(0, 1, 2), roles=("key",), opaque="words")
    layout = layout_of(region)
    arena = Arena(20 << 20, layout.groups[0].payload_bytes, pinned=False)
    with ThreadPoolExecutor(1) as pool:
        copies = copier(layout, arena, pool)
        copies.gather(list(range(16)), list(range(16)))
        region.tensor.zero_()
        copies.scatter(list(range(15, -1, -1)), list(range(16)), [layout.payload_order(0)] * 16)
    assert torch.equal(region.tensor, tensor.flip(0))


@pytest.mark.parametrize("inference", [False, True])
def test_long_runs_of_neighbours_go_over_torchs_threads_and_are_still_right(
    inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # pytest's workers have one
    with torch.inference_mode(inference):  # as vLLM makes its cache; its tensors may not be written to outside
        tensor = torch.randint(-(2**31), 2**31, (24, 1 << 17), dtype=torch.int32)
        layout = layout_of(Region(tensor=tensor.clone(), axes=(), layers=(0, 1, 2), roles=("key",), opaque="words"))
    kept = layout.groups[0].regions[0].tensor
    arena = Arena(30 << 20, layout.groups[0].payload_bytes, pinned=False)
    arena.slots.fill_(0xAA)
    pages, slots = [*range(2, 14), *range(16, 20)], [*range(8, 20), *range(1, 5)]  # two runs of both
    with ThreadPoolExecutor(1) as pool:
        copies = copier(layout, arena, pool)
        with monkeypatch.context() as patch:
            patch.setattr(pool, "submit", lambda *_: pytest.fail("these are runs for torch"))
            copies.gather(pages, slots)
            kept.numpy().fill(0)
            copies.scatter([page + 4 for page in pages], slots, [layout.payload_order(0)] * len(pages))
    expected = torch.zeros_like(tensor)
    expected[[page + 4 for page in pages]] = tensor[pages]
    assert torch.equal(kept, expected)
    payload = slice(HEADER_BYTES, HEADER_BYTES + layout.groups[0].payload_bytes)
    untouched = torch.ones_like(arena.slots, dtype=torch.bool)
    for slot in slots:
        untouched[slot, payload] = False
    assert bool((arena.slots[untouched] == 0xAA).all())


@pytest.mark.parametrize(("page", "slot"), [(PAGES, 0), (-1, 0), (0, 10**6), (0, -1)])
@pytest.mark.parametrize("dense", [True, False])
def test_page_or_slot_that_is_none_is_an_error_and_moves_nothing(page: int, slot: int, dense: bool) -> None:
    tensor = torch.zeros(PAGES, 1, 3, 2, *(SIZES[axis] for axis in INNER))[:, 0]
    if not dense:
        tensor = torch.zeros(3, 2, *(SIZES[axis] for axis in INNER), PAGES).movedim(-1, 0)
    layout = layout_of(Region(tensor=tensor, axes=("layer", "role", *INNER), layers=(0, 1, 2), roles=("key", "value")))
    group = layout.groups[0]
    arena = Arena(1 << 20, group.payload_bytes, pinned=False)
    copier = BlockCopier(group, arena, layout.payload_order(0), None)
    with pytest.raises(IndexError):
        copier.gather([page], [slot])
    with pytest.raises(IndexError):
        copier.scatter([0, page], [0, slot], [layout.payload_order(0)] * 2)
    assert not tensor.any()
