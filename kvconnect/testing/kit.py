"""What every kit has: the target, the seed, and tokens that nobody else uses. Subclass a kit and give it a `connector`.

class TestMine(StoreTests, ConnectorTests):
@pytest.fixture
def connector(self, tmp_path):
return f"mine://{tmp_path}/kv"
"""

from __future__ import annotations

import pickle
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvconnect.testing.promise import BrokenPromise
from kvconnect.testing.target import PATIENCE_S, Target

__all__ = ["Kit"]


class Kit:
    """Base of the kits. A test's docstring is the promise; its first line is what reports print.

    Attributes:
        expected_failures: Known bugs: a test's name to a link to the bug. Strict: it must fail, and a name that no test
            has is an error.
        may_unpickle: Modules, by their full names, that unpickle what has nothing to do with a connector: an engine may
            do so when it starts.
        kv_kit: How the pytest plugin, which imports nothing of ours, knows a kit.
    """

    expected_failures: ClassVar[dict[str, str]] = {}
    may_unpickle: ClassVar[tuple[str, ...]] = ()
    kv_kit: ClassVar[bool] = True

    @pytest.fixture
    def connector(self) -> Any:
        """What is under test: whatever ``connector=`` takes, or a class, or a class and its options as a pair."""
        raise pytest.UsageError(f"{type(self).__name__} needs a fixture named 'connector'")

    @pytest.fixture
    def seed(self, request: pytest.FixtureRequest) -> int:
        """The run's seed; ``--kv-seed`` sets it, ``--kv-seeds`` runs several."""
        return int(getattr(request.config.option, "kv_seed", 0))

    @pytest.fixture
    def quick(self, request: pytest.FixtureRequest) -> bool:
        """Whether only the shortest form of each test is wanted."""
        return bool(getattr(request.config.option, "kv_quick", False))

    @pytest.fixture
    def rng(self, seed: int, request: pytest.FixtureRequest) -> random.Random:
        """Randomness that belongs to this test, its parameters and the seed, whatever the connector."""
        given = getattr(getattr(request.node, "callspec", None), "params", {})
        place = [f"{name}={value}" for name, value in sorted(given.items()) if name not in ("connector", "seed")]
        return random.Random(":".join([request.node.originalname, *place, str(seed)]))

    @pytest.fixture
    def patience_s(self, request: pytest.FixtureRequest) -> float:
        """Seconds after which "not yet" counts as "never"; ``--kv-patience`` sets it."""
        return float(getattr(request.config.option, "kv_patience", PATIENCE_S))

    @pytest.fixture
    def deadline_s(self, patience_s: float) -> float:
        """Seconds after which a test that has not ended is broken: somebody hangs."""
        return 3 * patience_s

    @pytest.fixture
    def target(self, connector: Any, tmp_path: Path, patience_s: float) -> Target:
        """The connector under test, over a medium of this test's own."""
        return Target(connector, tmp_path, patience_s=patience_s)

    @pytest.fixture
    def failures(self) -> list[str]:
        """What hooks raised or answered against their contract."""
        return []

    @pytest.fixture(autouse=True)
    def deadline(self, deadline_s: float) -> Iterator[None]:
        """Promise 2: whatever is asked, an answer comes."""

        def late(*_: object) -> None:
            raise BrokenPromise(
                expected=f"an answer within {deadline_s:.0f} s", got="none", hint="a call that never returns"
            )

        if threading.current_thread() is not threading.main_thread():  # signals come to that one only
            yield
            return
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, deadline_s, 5.0)  # again: a driver may take it for a hook's own error
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    @pytest.fixture(autouse=True)
    def unpickled(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What was asked to unpickle while the test ran; each call of it is a broken promise where it happens."""
        used: list[str] = []

        def forbid(name: str) -> Any:
            allowed = getattr(pickle, name)

            def forbidden(*args: Any, **kwargs: Any) -> Any:
                if sys._getframe(1).f_globals.get("__name__") in self.may_unpickle:
                    return allowed(*args, **kwargs)
                used.append(f"pickle.{name}")
                raise BrokenPromise(
                    expected="no pickle, anywhere", got=f"a call of {used[-1]}", hint="parse with msgspec"
                )

            return forbidden

        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, forbid(name))
        return used

    @pytest.fixture(autouse=True)
    def no_pickle(self, unpickled: list[str]) -> Iterator[None]:
        """Promise 6: no bytes are unpickled, whoever wrote them, and whoever swallowed the error."""
        yield
        if unpickled:
            raise BrokenPromise(expected="no pickle, anywhere", got=f"calls of {', '.join(sorted(set(unpickled)))}")

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        """Return random token ids."""
        return [rng.randrange(50_000) for _ in range(count)]
