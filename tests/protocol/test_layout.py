"""Layouts: what is checked, what counts for a fingerprint, and how long a match may be."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.errors import LayoutMismatch
from kvconnect.protocol import KVCacheLayout, LayerGroup, Region, first_needed_block, longest_match

NHD = ("token", "head", "dim")


def per_layer(
    axes: tuple[str, ...] = NHD, heads: int = 2, dtype: Any = torch.float32, layers: int = 2
) -> KVCacheLayout:
    sizes = {"token": 4, "head": heads, "dim": 8}
    regions = tuple(
        Region(tensor=torch.zeros(3, *(sizes[a] for a in axes), dtype=dtype), axes=axes, layers=(i,), roles=(role,))
        for i in range(layers)
        for role in ("key", "value")
    )
    group = LayerGroup(block_size=4, layers=tuple(range(layers)), regions=regions)
    return KVCacheLayout(groups=(group,), heads=(0, heads), total_heads=heads)


def single_pool(order: tuple[str, ...] = ("layer", "role", *NHD)) -> KVCacheLayout:
    sizes = {"layer": 2, "role": 2, "token": 4, "head": 2, "dim": 8}
    tensor = torch.zeros(3, *(sizes[axis] for axis in order))
    region = Region(tensor=tensor, axes=order, layers=(0, 1), roles=("key", "value"))
    return KVCacheLayout(
        groups=(LayerGroup(block_size=4, layers=(0, 1), regions=(region,)),), heads=(0, 2), total_heads=2
    )


def test_one_pool_and_tensors_a_layer_describe_the_same_thing() -> None:
    assert single_pool().fingerprint(0) == per_layer().fingerprint(0)
    assert single_pool().payload_order(0) == per_layer().payload_order(0) == "lrthd"
    assert single_pool(("role", "layer", *NHD)).payload_order(0) == "rlthd"
    assert per_layer(("head", "token", "dim")).payload_order(0) == "lrhtd"
    assert per_layer(("head", "token", "dim")).fingerprint(0) == per_layer().fingerprint(0)


def test_keys_and_values_in_different_orders_are_named_by_role() -> None:
    key, value = torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 4, 8)
    regions = (
        Region(tensor=key, axes=("head", "dim", "token"), layers=(0,), roles=("key",)),
        Region(tensor=value, axes=("head", "token", "dim"), layers=(0,), roles=("value",)),
    )
    layout = KVCacheLayout(
        groups=(LayerGroup(block_size=4, layers=(0,), regions=regions),), heads=(0, 2), total_heads=2
    )
    layout.check()
    assert layout.payload_order(0) == "lr:hdt:htd"
    assert layout.fingerprint(0) == per_layer(layers=1).fingerprint(0)


@pytest.mark.parametrize(
    "other",
    [per_layer(dtype=torch.bfloat16), per_layer(heads=4), per_layer(layers=3)],
    ids=["dtype", "heads", "layers"],
)
def test_other_dtype_heads_or_layers_is_another_fingerprint(other: KVCacheLayout) -> None:
    assert other.fingerprint(0) != per_layer().fingerprint(0)


def test_view_is_described_as_it_lies_in_memory() -> None:
    seen = torch.zeros(3, 4, 2, 8).transpose(1, 2)  # registered with heads first, stored with tokens first
    region = Region(tensor=seen, axes=("head", "token", "dim"), layers=(0,), roles=("key",))
    group = LayerGroup(block_size=4, layers=(0,), regions=(region,))
    layout = KVCacheLayout(groups=(group,), heads=(0, 2), total_heads=2)
    dense = layout.in_memory_order()
    dense.check()
    assert dense.groups[0].regions[0].axes == NHD
    assert dense.groups[0].regions[0].tensor[0].is_contiguous()
    assert dense.groups[0].regions[0].tensor.data_ptr() == seen.data_ptr()
    assert dense.fingerprint(0) == layout.fingerprint(0)


def test_values_before_keys_is_not_taken_for_keys_before_values() -> None:
    def pool(roles: tuple[str, str]) -> KVCacheLayout:
        region = Region(tensor=torch.zeros(3, 2, 4, 2, 8), axes=("role", *NHD), layers=(0,), roles=roles)
        return KVCacheLayout(
            groups=(LayerGroup(block_size=4, layers=(0,), regions=(region,)),), heads=(0, 2), total_heads=2
        )

    def tensors(roles: tuple[str, str]) -> KVCacheLayout:
        regions = tuple(Region(tensor=torch.zeros(3, 4, 2, 8), axes=NHD, layers=(0,), roles=(role,)) for role in roles)
        return KVCacheLayout(
            groups=(LayerGroup(block_size=4, layers=(0,), regions=regions),), heads=(0, 2), total_heads=2
        )

    for make in (pool, tensors):
        usual, swapped = make(("key", "value")), make(("value", "key"))
        assert usual.payload_order(0) == "lrthd"
        assert swapped.payload_order(0).startswith("#")


def test_shard_is_what_a_rank_holds_not_its_number() -> None:
    tensors = per_layer(heads=2).groups
    halves = [KVCacheLayout(groups=tensors, heads=heads, total_heads=4) for heads in ((0, 2), (2, 4), (0, 2))]
    assert halves[0].shard(0) == halves[2].shard(0) != halves[1].shard(0)
    assert halves[0].fingerprint(0) != halves[1].fingerprint(0)


def test_opaque_blocks_are_read_only_by_their_own_kind() -> None:
    def opaque(kind: str) -> KVCacheLayout:
        region = Region(tensor=torch.zeros(3, 64), axes=(), layers=(0,), roles=("key", "value"), opaque=kind)
        return KVCacheLayout(
            groups=(LayerGroup(block_size=4, layers=(0,), regions=(region,)),), heads=(0, 1), total_heads=1
        )

    opaque("amx").check()
    assert opaque("amx").fingerprint(0) != opaque("vec").fingerprint(0)
    assert opaque("amx").payload_order(0).startswith("#")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"axes": ("token", "head")}, "do not name the dimensions"),
        ({"axes": ("token", "head", "head")}, "do not name the dimensions"),
        ({"axes": ("head", "token", "dim")}, "axis 'token' has 2 entries, expected 4"),
        ({"layers": (0, 1)}, "no 'layer' axis"),
        ({"opaque": "x"}, "opaque region has no axes"),
    ],
)
def test_description_that_does_not_fit_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    parts: dict[str, Any] = {"tensor": torch.zeros(3, 4, 2, 8), "axes": NHD, "layers": (0,), "roles": ("key",)}
    group = LayerGroup(block_size=4, layers=(0,), regions=(Region(**{**parts, **change}),))
    with pytest.raises(LayoutMismatch, match=why):
        KVCacheLayout(groups=(group,), heads=(0, 2), total_heads=2).check()


@given(st.integers(0, 300), st.integers(1, 16), st.integers(1, 100))
def test_first_needed_block_holds_the_first_position_in_the_window(position: int, size: int, window: int) -> None:
    attended = [p for p in range(position + 1) if p > position - window]
    assert first_needed_block(position, size, window) == min(attended) // size
    assert first_needed_block(position, size, None) == 0


@given(st.data())
def test_longest_match_is_the_longest_that_has_what_it_needs(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    windows = data.draw(st.lists(st.one_of(st.none(), st.integers(1, 20)), min_size=1, max_size=3))
    limit = data.draw(st.integers(0, 12))
    first = data.draw(st.integers(0, limit))
    present = [data.draw(st.lists(st.booleans(), min_size=limit, max_size=limit)) for _ in windows]

    def fits(count: int) -> bool:
        return all(
            flags[block]
            for flags, window in zip(present, windows, strict=True)
            for block in range(max(first, first_needed_block(count * size, size, window)), count)
        )

    expected = max(count for count in range(first, limit + 1) if fits(count))
    assert longest_match(present, size, windows, first, limit) == expected
