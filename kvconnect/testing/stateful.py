"""A hypothesis machine: saves, loads, aborts, preemptions, suspensions, restarts in any order, against a dictionary."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import Any

from kvconnect.testing.harness import BLOCK, KitRequest
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import BrokenPromise, must, not_here
from kvconnect.testing.suspending import SuspendEngine
from kvconnect.testing.target import Target

__all__ = ["StatefulTests"]

_STEPS = 40
_SHRINK_S = 20.0  # to look for a shorter program that breaks the promise too; hypothesis would take minutes


class StatefulTests(Kit):
    """Compares a connector with a dictionary of what was computed, over programs that hypothesis writes and shrinks."""

    def test_any_program_of_operations_reads_right_bytes(self, target: Target, seed: int, quick: bool) -> None:
        """Whatever is saved, loaded, aborted, preempted, suspended, forgotten or reopened, in any order: right."""
        try:
            import hypothesis
            from hypothesis import stateful
        except ImportError:
            not_here('hypothesis is not installed: pip install "kvconnect[test]"')
        phases = {hypothesis.Phase.generate, *([] if quick else [hypothesis.Phase.shrink])}
        settings = hypothesis.settings(
            phases=phases,
            max_examples=3 if quick else 10,
            stateful_step_count=_STEPS,
            deadline=None,
            database=None,
            report_multiple_bugs=False,  # one promise, not a group of them
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        machine = _make_machine(target)
        hypothesis.seed(seed)(machine)
        stateful.run_state_machine_as_test(machine, settings=settings)


def _make_machine(target: Target) -> Any:
    from hypothesis import reject
    from hypothesis import strategies as st
    from hypothesis.control import current_build_context
    from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

    broken_at: list[float] = []  # when a program broke the promise
    rng = random.Random(0)
    stems = [[rng.randrange(50_000) for _ in range(6 * BLOCK)] for _ in range(3)]
    prompts = st.builds(
        lambda stem, missing, tail: stems[stem][: 6 * BLOCK - missing] + tail,  # the simplest has most to load
        st.integers(0, 2),
        st.integers(0, 6 * BLOCK - 1),
        st.lists(st.integers(0, 5), max_size=BLOCK + 1),
    )

    class Machine(RuleBasedStateMachine):
        """Requests that run, the prefixes that were computed and may be offered, and all that ever were."""

        def __init__(self) -> None:
            super().__init__()
            if broken_at and time.monotonic() > broken_at[0] + _SHRINK_S and not current_build_context().is_final:
                reject()
            self.model = f"id:conformance-{uuid.uuid4().hex}"  # a medium without anything from the programs before
            self.engine = self._open()
            self.broken = False
            self.running: list[KitRequest] = []
            self.suspended: list[KitRequest] = []
            self.computed: set[tuple[int, ...]] = set()
            self.ever: set[tuple[int, ...]] = set()

        def _open(self) -> SuspendEngine:
            return SuspendEngine(target, num_pages=64, model=self.model)

        @initialize(data=st.data())
        def serve(self, data: Any) -> None:
            """A request is computed to its end, so that there is something to load."""
            for operation in (self._arrive, self._compute, self._finish):
                self._do(operation, data)

        @rule(data=st.data())
        def work(self, data: Any) -> None:
            """One operation; a rule for each would leave whole programs without most of them."""
            often, seldom = ["arrive"], ["forget", "reopen"]
            if self.running:
                often.append("compute")
                seldom += ["finish", "preempt"]
                seldom += ["suspend"] * target.capabilities.suspend
            if self.suspended:
                seldom += ["resume", "prefetch"]
            name = data.draw(st.sampled_from(3 * often + seldom), label="operation")
            self._do(getattr(self, f"_{name}"), data)

        def _arrive(self, data: Any) -> None:
            """A request comes and takes what is offered; every loaded byte is looked at."""
            if len(self.running) >= 4:
                self.engine.finish(self.running.pop(0))
            tokens = data.draw(prompts, label="tokens")
            request = self.engine.arrive(tokens)
            self.running.append(request)
            loaded = self.engine.admit(request)
            known = tuple(tokens[:loaded])
            must(
                any(seen[:loaded] == known for seen in self.computed) or not loaded,
                expected="only what was computed to be offered",
                got=f"{loaded} tokens of a prompt that nobody computed",
            )
            self.engine.step()  # loads what was claimed
            self.engine.check_loaded(request)
            request.loaded = 0

        def _compute(self, data: Any) -> None:
            """A step computes a chunk of some requests."""
            parts = []
            for request in self.running:
                left = len(request.tokens) - request.computed
                count = left - data.draw(st.integers(0, left), label=f"tokens of {request.request_id} left for later")
                if count:
                    parts.append((request, count))
            self.engine.step(*parts)
            for request, _ in parts:
                self.computed.add(tuple(request.tokens[: request.computed]))
            self.ever |= self.computed

        def _finish(self, data: Any) -> None:
            """A request ends, computed or not."""
            request = self._choose(data)
            self.running.remove(request)
            self.engine.finish(request)

        def _preempt(self, data: Any) -> None:
            """A request loses its pages and takes what is offered again."""
            request = self._choose(data)
            self.engine.reset(request)
            self.engine.admit(request)
            self.engine.step()
            self.engine.check_loaded(request)
            request.loaded = 0

        def _suspend(self, data: Any) -> None:
            """A request gives its pages away, or goes on in them if there is no room below."""
            request = self._choose(data)
            if self.engine.suspend(request):
                self.running.remove(request)
                self.suspended.append(request)

        def _prefetch(self, data: Any) -> None:
            """A suspended request's blocks come up to some tier, if they may."""
            tier = data.draw(st.integers(0, len(target.resolved.tiers)), label="tier")
            self.engine.leader.prefetch(self.suspended[0].view(), tier)

        def _resume(self, data: Any) -> None:
            """A suspended request has all its bytes again."""
            if len(self.running) >= 4:
                self.engine.finish(self.running.pop(0))
            request = self.suspended.pop(0)
            before = request.computed
            must(self.engine.resume(request), expected="a suspended request to be resumed", got="False")
            must(
                request.computed == before,
                expected=f"all {before} tokens of a suspended request to come back",
                got=f"{request.computed}",
            )
            self.running.append(request)

        def _forget(self, data: Any) -> None:
            """Everything from before is unmatchable, as the next request sees."""
            self._end_all()
            self.engine.leader.reset_cache()
            self.computed.clear()
            self._arrive(data)

        def _reopen(self, data: Any) -> None:
            """The connector is shut down and opened again; what is left of it, the next request sees."""
            self._settle()
            self.engine.close()
            self.engine.check_hooks()
            self.engine = self._open()
            # what is not durable may be forgotten; what is shared may lie with a server that has not been shut down
            may_be_there = target.capabilities.durable or target.capabilities.shared
            self.computed = set(self.ever) if may_be_there else set()
            self._arrive(data)

        def teardown(self) -> None:
            if not self.broken:
                self._do(self._settle)
            self.engine.close()

        def _do(self, operation: Callable[..., None], *args: Any) -> None:
            try:
                operation(*args)
                self.engine.check_hooks()
            except BrokenPromise:
                self.broken = True
                broken_at.append(time.monotonic())
                raise

        def _choose(self, data: Any) -> KitRequest:
            number: int = data.draw(st.integers(0, len(self.running) - 1), label="number of a running request")
            return self.running[number]

        def _settle(self) -> None:
            self._end_all()
            self.engine.settle()

        def _end_all(self) -> None:
            for request in (*self.running, *self.suspended):
                self.engine.finish(request)
            self.running.clear()
            self.suspended.clear()

    return Machine
