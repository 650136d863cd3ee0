"""What can be seen of a leader alone: the shape of its answers, before it has heard of any worker. Needs no tensors."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvconnect.driver import LeaderDriver, open_leader
from kvconnect.hooks import bind_hooks, hook_names
from kvconnect.protocol import (
    LeaderContext,
    LeaderHooks,
    Match,
    RequestView,
    ScheduledRequest,
    SchedulerOutput,
)
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, must_refuse, needs, not_shown
from kvconnect.testing.target import ENGINE, Target
from kvconnect.testing.trap import set_trap, trap_sprung

__all__ = ["LeaderTests"]

_SUSPEND: dict[str, tuple[Any, ...]] = {
    "suspend": ([], 0),
    "prefetch": (0,),
    "resume": ([],),
}


def view(name: str, tokens: list[int], **fields: object) -> RequestView:
    """Return a request of these tokens."""
    return RequestView(request_id=name, tokens=tuple(tokens), num_prompt_tokens=len(tokens), **fields)  # type: ignore[arg-type]


class LeaderTests(Kit):
    """The promises of `LeaderHooks` that hold before the handshake, and of the class itself."""

    @pytest.fixture
    def leader(self, target: Target, failures: list[str]) -> Iterator[LeaderDriver]:
        """A leader that has not shaken hands."""
        driver = open_leader(
            target.resolved,
            namespace=target.namespace(),
            engine=ENGINE,
            block_size=4,
            registry=target.registry,
        )
        driver.on_failure = lambda hook, error: failures.append(f"{hook}: {error!r}")
        yield driver
        driver.shutdown()

    def test_leader_implements_the_hooks(self, target: Target) -> None:
        """Every hook is there, with the contract's arguments, without defaults, and no other public method."""
        context = LeaderContext(namespace=target.namespace(), engine=ENGINE, tiers=target.resolved.tiers)
        leader = target.resolved.connector.make_leader(target.resolved.options, context)
        try:
            bound = bind_hooks(LeaderHooks, leader)  # raises PluginError, which names the method
            must_equal("bound hooks", tuple(bound), hook_names(LeaderHooks))
        finally:
            leader.shutdown()

    def test_nothing_is_offered_before_the_handshake(
        self, leader: LeaderDriver, failures: list[str], rng: random.Random
    ) -> None:
        """Until workers have said what their cache is, the answer is Match(0, False)."""
        request = view("a", self.tokens(rng, 40))
        leader.on_new_request(request)
        must_equal("the answer", leader.get_num_new_matched_tokens(request, 0), Match(0, False))
        must_equal("failures", failures, [])

    def test_handshake_of_nonsense_leaves_it_off(
        self, leader: LeaderDriver, unpickled: list[str], rng: random.Random
    ) -> None:
        """Ranks that say nothing, or rubbish, turn the connector off; they do not make it offer."""
        for said in ([], [b""], [b"rubbish"], [b"\x80\x04."], [set_trap()]):
            leader.set_handshake_metadata(said)
            request = view(f"a{said!r}", self.tokens(rng, 40))
            leader.on_new_request(request)
            must_equal(f"the answer after {said!r}", leader.get_num_new_matched_tokens(request, 0).num_tokens, 0)
        must_equal("calls that unpickle what ranks said", unpickled, [])
        must(not trap_sprung(), expected="bytes to be parsed, never executed", got="code in a handshake was run")

    def test_request_lives_without_a_load(self, leader: LeaderDriver, failures: list[str], rng: random.Random) -> None:
        """A request can come, be asked about, run, be reset and end before anything is known; no hook raises."""
        request = view("a", self.tokens(rng, 10))
        leader.on_new_request(request)
        leader.get_num_new_matched_tokens(request, 0)
        leader.update_state_after_alloc(request, [[0, 1, 2]], 0)
        part = ScheduledRequest(
            request_id="a",
            num_computed_tokens=0,
            num_scheduled_tokens=10,
            num_tokens=10,
            new_tokens=(),
            block_ids=[[0, 1, 2]],
        )
        meta = leader.build_connector_meta(SchedulerOutput(step=0, new_requests=(part,)))
        must_equal("failures", failures, [])
        must(isinstance(meta, bytes), expected="build_connector_meta to return bytes", got=meta)
        leader.update_connector_output([b""])
        leader.request_reset(request)
        leader.request_finished(request, [[0, 1, 2]])
        must_equal("failures", failures, [])

    def test_empty_step_has_a_plan(self, leader: LeaderDriver, failures: list[str]) -> None:
        """`build_connector_meta` is called every step, an empty one too, and returns bytes."""
        for step in range(3):
            meta = leader.build_connector_meta(SchedulerOutput(step=step))
            must_equal("failures", failures, [])
            must(isinstance(meta, bytes), expected="build_connector_meta to return bytes", got=meta)

    def test_reports_of_nonsense_are_survived(self, leader: LeaderDriver, unpickled: list[str]) -> None:
        """An empty report means that a rank's hook failed; rubbish must not do more harm than that."""
        leader.build_connector_meta(SchedulerOutput(step=0))
        leader.update_connector_output([b""])
        leader.update_connector_output([])
        leader.update_connector_output([b"\x80\x04K\x01."])
        leader.update_connector_output([set_trap()])
        must_equal("calls that unpickle reports", unpickled, [])
        must(not trap_sprung(), expected="bytes to be parsed, never executed", got="code in a report was run")
        must_equal("the answer afterwards", leader.get_num_new_matched_tokens(view("a", [1] * 9), 0).num_tokens, 0)

    def test_unknown_request_is_no_error(self, leader: LeaderDriver, failures: list[str], rng: random.Random) -> None:
        """Hooks about a request that was never told of do nothing: engines drop and repeat such calls."""
        request = view("never", self.tokens(rng, 12))
        must_equal("the answer", leader.get_num_new_matched_tokens(request, 0), Match(0, False))
        leader.update_state_after_alloc(request, [[0, 1, 2]], 0)
        leader.cancel_load(request, 0, 4)
        leader.request_reset(request)
        must_equal("request_finished", leader.request_finished(request, [[0, 1, 2]]), False)
        must_equal("failures", failures, [])

    def test_leader_stats_are_a_mapping(self, leader: LeaderDriver, failures: list[str]) -> None:
        """`get_stats` returns a mapping, any time."""
        leader.get_stats()
        must_equal("failures", failures, [])

    def test_no_work_is_pending_at_the_start(self, leader: LeaderDriver) -> None:
        """An idle connector does not keep the engine stepping."""
        must_equal("has_pending_work()", leader.has_pending_work(), False)

    def test_undeclared_batch_claim_is_refused(self, target: Target, leader: LeaderDriver, failures: list[str]) -> None:
        """Without `batch_claim`, `claim_match` and `release_match` raise UnsupportedError."""
        needs(not target.capabilities.batch_claim, "(batch_claim is declared)")
        self._refuses(leader, "claim_match", 4)
        self._refuses(leader, "release_match")

    def test_undeclared_suspend_is_refused(self, target: Target, leader: LeaderDriver) -> None:
        """Without `suspend`, `suspend`, `prefetch`, `resume` and `resize_tier` raise UnsupportedError."""
        needs(not target.capabilities.suspend, "(suspend is declared)")
        for hook, arguments in _SUSPEND.items():
            self._refuses(leader, hook, *arguments)
        must_refuse("resize_tier", lambda: leader.hook("resize_tier")(0, 1))

    def test_leader_shuts_down_twice(self, target: Target, leader: LeaderDriver, failures: list[str]) -> None:
        """`shutdown` may come twice."""
        leader.hook("shutdown")()
        leader.hook("shutdown")()
        must_equal("failures", failures, [])

    def test_class_is_loaded_without_torch(self, target: Target) -> None:
        """Discovery and reading capabilities load no torch: the class that is registered imports none."""
        program = "\n".join(
            (
                "import importlib, sys",
                f"module = importlib.import_module({target.kind.__module__!r})",
                "sys.exit(7 if 'torch' in sys.modules else 0)",
            )
        )
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=found
        )
        if done.returncode not in (0, 7):
            not_shown(f"{target.kind.__module__} cannot be imported in another process: it is not installed")
        must_equal(
            f"torch among the modules after importing {target.kind.__module__}",
            done.returncode == 7,
            False,
            hint="import what needs torch where it is used, in make_worker",
        )

    def _refuses(self, leader: LeaderDriver, hook: str, *arguments: object) -> None:
        must_refuse(hook, lambda: leader.hook(hook)(view("a", [1, 2, 3, 4, 5]), *arguments))
