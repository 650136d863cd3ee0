"""What can be seen of a worker alone: it takes caches of any description, and moves nothing without a plan."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from kvconnect.driver import WorkerDriver, open_worker
from kvconnect.errors import KVConnectError
from kvconnect.hooks import bind_hooks, hook_names
from kvconnect.protocol import KVCacheLayout, LayerGroup, Region, WorkerContext, WorkerHooks
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import BrokenPromise, must, must_equal, needs
from kvconnect.testing.target import ENGINE, Target
from kvconnect.testing.trap import set_trap, trap_sprung

__all__ = ["LAYOUTS", "WorkerTests", "make_layout"]

_PAGES, _TOKENS, _HEADS, _DIM = 6, 4, 2, 8

LAYOUTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "a tensor a layer and role": (("token", "head", "dim"), False),
    "heads before tokens": (("head", "token", "dim"), False),
    "dims before tokens": (("head", "dim", "token"), False),
    "one pool": (("layer", "role", "token", "head", "dim"), True),
    "one pool, roles last": (("layer", "token", "head", "dim", "role"), True),
}
"""Ways in which engines lay out their caches: axes, and whether all layers and roles share one tensor."""


def make_layout(name: str, dtype: torch.dtype = torch.float32, groups: int = 1) -> KVCacheLayout:
    """Return a small cache of two layers a group, filled with numbers."""
    axes, pooled = LAYOUTS[name]
    sizes = {"layer": 2, "role": 2, "token": _TOKENS, "head": _HEADS, "dim": _DIM}
    made = []
    for group in range(groups):
        layers = (2 * group, 2 * group + 1)
        shape = (_PAGES, *(sizes[axis] for axis in axes))
        if pooled:
            regions = [Region(tensor=_numbers(shape, dtype), axes=axes, layers=layers, roles=("key", "value"))]
        else:
            regions = [
                Region(tensor=_numbers(shape, dtype), axes=axes, layers=(layer,), roles=(role,))
                for layer in layers
                for role in ("key", "value")
            ]
        window = 6 if group else None
        made.append(LayerGroup(block_size=_TOKENS, layers=layers, regions=tuple(regions), window=window))
    return KVCacheLayout(groups=tuple(made), heads=(0, _HEADS), total_heads=_HEADS)


class WorkerTests(Kit):
    """The promises of `WorkerHooks` that hold without a leader's plan."""

    @pytest.fixture
    def worker(self, target: Target, failures: list[str]) -> Iterator[WorkerDriver]:
        """A worker that has no cache yet."""
        driver = open_worker(
            target.with_arena("4MiB").resolved,
            namespace=target.namespace(),
            engine=ENGINE,
            registry=target.registry,
        )
        driver.on_failure = lambda hook, error: failures.append(f"{hook}: {error!r}")
        yield driver
        driver.shutdown()

    def test_worker_implements_the_hooks(self, target: Target) -> None:
        """Every hook is there, with the contract's arguments, without defaults, and no other public method."""
        context = WorkerContext(namespace=target.namespace(), engine=ENGINE, tiers=target.resolved.tiers)
        worker = target.resolved.connector.make_worker(target.resolved.options, context)
        try:
            bound = bind_hooks(WorkerHooks, worker)
            must_equal("bound hooks", tuple(bound), hook_names(WorkerHooks))
        finally:
            worker.shutdown()

    @pytest.mark.parametrize("name", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_cache_of_any_layout_is_taken(
        self, worker: WorkerDriver, failures: list[str], name: str, dtype: torch.dtype
    ) -> None:
        """A described cache is registered, shakes hands, and is not written to."""
        layout = make_layout(name, dtype)
        before = _copies(layout)
        worker.register_kv_caches(layout)
        said = worker.hook("get_handshake_metadata")()
        must(isinstance(said, bytes), expected="get_handshake_metadata to return bytes", got=said)
        must_equal("failures", failures, [])
        _unchanged(layout, before, "register_kv_caches")

    def test_cache_of_several_groups_is_taken(self, target: Target, worker: WorkerDriver, failures: list[str]) -> None:
        """With `several_groups`, a cache of a full and a sliding-window group is registered."""
        needs(target.capabilities.several_groups, "several_groups")
        worker.register_kv_caches(make_layout("a tensor a layer and role", groups=2))
        said = worker.hook("get_handshake_metadata")()
        must(isinstance(said, bytes), expected="get_handshake_metadata to return bytes", got=said)
        must_equal("failures", failures, [])

    def test_steps_without_a_plan_move_nothing(self, worker: WorkerDriver, failures: list[str]) -> None:
        """Layer hooks, `wait_for_save` and reports of a step without a started load do nothing and raise nothing."""
        layout = make_layout("a tensor a layer and role")
        worker.register_kv_caches(layout)
        before = _copies(layout)
        for hook, arguments in (
            ("wait_for_layer_load", (0,)),
            ("save_kv_layer", (0,)),
            ("wait_for_layer_load", (1,)),
            ("save_kv_layer", (1,)),
            ("wait_for_save", ()),
        ):
            worker.hook(hook)(*arguments)
        finished = worker.get_finished(frozenset())
        must_equal("get_finished of nothing", [set(part) for part in finished], [set(), set(), set()])
        errors = worker.hook("get_block_ids_with_load_errors")()
        must(all(not pages for pages in errors), expected="no load errors without a load", got=errors)
        must(
            isinstance(worker.hook("build_worker_report")(), bytes), expected="a report of bytes", got="something else"
        )
        must_equal("failures", failures, [])
        _unchanged(layout, before, "a step without a plan")

    def test_plan_of_nonsense_is_refused_and_moves_nothing(
        self, worker: WorkerDriver, unpickled: list[str], rng: random.Random
    ) -> None:
        """Bytes that are no plan are an error at `bind_connector_meta`, or ignored; nothing is executed or moved."""
        layout = make_layout("a tensor a layer and role")
        worker.register_kv_caches(layout)
        before = _copies(layout)
        for meta in (b"", b"rubbish", rng.randbytes(200), set_trap(), b"\x80\x04N."):
            worker.bind(meta, 0)
            worker.start_load_kv()
            worker.wait_for_layer_load(0)
            worker.save_kv_layer(0)
            worker.wait_for_save()
            worker.get_finished(frozenset())
            worker.get_block_ids_with_load_errors()
            must(isinstance(worker.build_worker_report(), bytes), expected="a report of bytes", got="something else")
        must_equal("calls that unpickle a plan", unpickled, [])
        must(not trap_sprung(), expected="bytes to be parsed, never executed", got="code in a plan was run")
        _unchanged(layout, before, "a plan of nonsense")

    def test_layout_that_does_not_fit_its_tensors_is_refused(self, worker: WorkerDriver) -> None:
        """A description that contradicts its tensors is a KVConnectError at start, or taken; never another error."""
        layout = make_layout("a tensor a layer and role")
        regions = layout.groups[0].regions
        broken = Region(tensor=regions[0].tensor[:, :, :1], axes=regions[0].axes, layers=(0,), roles=("key",))
        group = LayerGroup(block_size=_TOKENS, layers=(0, 1), regions=(broken, *regions[1:]))
        try:
            worker.hook("register_kv_caches")(KVCacheLayout(groups=(group,), heads=(0, _HEADS), total_heads=_HEADS))
        except KVConnectError as error:
            must(str(error) != "", expected="an error that says what does not fit", got="an empty message")
        except Exception as error:
            raise BrokenPromise(
                expected="a KVConnectError that says what does not fit",
                got=f"{type(error).__name__}: {error}",
                hint="call layout.check() first",
            ) from error

    def test_worker_stats_are_a_mapping(self, worker: WorkerDriver, failures: list[str]) -> None:
        """`get_stats` returns a mapping, before and after the cache is registered."""
        worker.get_stats()
        worker.register_kv_caches(make_layout("one pool"))
        worker.get_stats()
        must_equal("failures", failures, [])

    def test_worker_shuts_down_twice(self, worker: WorkerDriver, failures: list[str]) -> None:
        """`shutdown` may come twice."""
        worker.register_kv_caches(make_layout("one pool"))
        worker.hook("shutdown")()
        worker.hook("shutdown")()
        must_equal("failures", failures, [])


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def _copies(layout: KVCacheLayout) -> list[torch.Tensor]:
    return [region.tensor.clone() for group in layout.groups for region in group.regions]


def _unchanged(layout: KVCacheLayout, before: list[torch.Tensor], what: str) -> None:
    tensors = [region.tensor for group in layout.groups for region in group.regions]
    same = all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    must(same, expected=f"the cache to stay as it was in {what}", got="changed pages")
