"""A hypothesis machine: saves, loads, aborts, preemptions, restarts in any order, against what pages must hold."""

from __future__ import annotations

import random
from typing import Any

from kvconnect.testing.harness import BLOCK, KitRequest, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, not_here
from kvconnect.testing.target import Target

__all__ = ["StatefulTests"]

_STEPS = 40


class StatefulTests(Kit):
    """Compares a connector with a dictionary of what was computed, over programs that hypothesis writes and shrinks."""

    def test_any_program_of_operations_reads_right_bytes(self, target: Target, seed: int, quick: bool) -> None:
        """Whatever is saved, loaded, aborted, preempted, forgotten or reopened, in whatever order: right bytes."""
        try:
            import hypothesis
            from hypothesis import stateful
        except ImportError:
            not_here('hypothesis is not installed: pip install "kvconnect[test]"')
        settings = hypothesis.settings(
            max_examples=3 if quick else 10,
            stateful_step_count=_STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        machine = _make_machine(target)
        hypothesis.seed(seed)(machine)
        stateful.run_state_machine_as_test(machine, settings=settings)


def _make_machine(target: Target) -> Any:
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

    rng = random.Random(target.model)
    stems = [[rng.randrange(50_000) for _ in range(6 * BLOCK)] for _ in range(3)]
    prompts = st.builds(
        lambda stem, length, tail: stems[stem][:length] + tail,
        st.integers(0, 2),
        st.integers(1, 6 * BLOCK),
        st.lists(st.integers(0, 5), max_size=BLOCK + 1),
    )

    class Machine(RuleBasedStateMachine):
        """Requests that run, and the prefixes that were computed to the end, by epoch."""

        def __init__(self) -> None:
            super().__init__()
            self.engine = StepEngine(target, num_pages=64)
            self.running: list[KitRequest] = []
            self.computed: set[tuple[int, ...]] = set()

        @rule(tokens=prompts)
        def arrive(self, tokens: list[int]) -> None:
            """A request comes and takes what is offered; every loaded byte is looked at."""
            if len(self.running) >= 4:
                return
            request = self.engine.arrive(tokens)
            loaded = self.engine.admit(request)
            known = tuple(tokens[:loaded])
            must(
                any(seen[:loaded] == known for seen in self.computed) or not loaded or target.capabilities.durable,
                expected="only what was computed to be offered",
                got=f"{loaded} tokens of a prompt that nobody computed",
            )
            self.engine.step()  # loads what was claimed
            self.engine.check_loaded(request)
            request.loaded = 0
            self.running.append(request)

        @precondition(lambda self: self.running)
        @rule(data=st.data())
        def compute(self, data: Any) -> None:
            """A step computes a chunk of some requests."""
            parts = []
            for request in self.running:
                left = len(request.tokens) - request.computed
                count = data.draw(st.integers(0, left))
                if count:
                    parts.append((request, count))
            self.engine.step(*parts)
            self.computed |= {tuple(request.tokens[: request.computed]) for request, _ in parts}

        @precondition(lambda self: self.running)
        @rule(data=st.data())
        def finish(self, data: Any) -> None:
            """A request ends, computed or not."""
            request = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.engine.finish(request)

        @precondition(lambda self: self.running)
        @rule(data=st.data())
        def preempt(self, data: Any) -> None:
            """A request loses its pages and takes what is offered again."""
            request = data.draw(st.sampled_from(self.running))
            self.engine.reset(request)
            self.engine.admit(request)
            self.engine.step()
            self.engine.check_loaded(request)
            request.loaded = 0

        @rule()
        def forget(self) -> None:
            """Everything from before is unmatchable."""
            self._end_all()
            self.engine.leader.reset_cache()
            self.computed.clear()

        @rule()
        def reopen(self) -> None:
            """The connector is shut down and opened again."""
            self._end_all()
            self.engine.settle()
            self.engine.close()
            self.engine.check_hooks()
            self.engine = StepEngine(target, num_pages=64)
            if not target.capabilities.durable:
                self.computed.clear()

        @invariant()
        def hooks_raise_nothing(self) -> None:
            """No hook raised."""
            self.engine.check_hooks()

        def teardown(self) -> None:
            self._end_all()
            self.engine.settle()
            self.engine.close()

        def _end_all(self) -> None:
            for request in self.running:
                self.engine.finish(request)
            self.running.clear()

    return Machine
