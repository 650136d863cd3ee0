"""Suspended blocks and the stores that hold them: answers that come late, renewals, second tries.

The workers' part is played by hand, and the store does what a test says: when an answer comes is what matters here.
`tests/engine/test_suspend.py` has the real disk.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from kvconnect.leader.index import State
from kvconnect.protocol import BlockKey, Plan, RequestView
from kvconnect.protocol.messages import pack_ints
from kvconnect.store import StoreCapabilities, Tier, TierOptions
from tests.leader.script import SIZE, Script
from tests.store.stores import DictStore

TOKENS = list(range(3 * SIZE))


class HoldingStore(DictStore):
    """Says that it has, and holds, whatever it is asked for; waits for `gate` before it says so."""

    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(holds=True, concurrency=2)
    gate: ClassVar[threading.Event]
    granted: ClassVar[Counter[BlockKey]]
    released: ClassVar[Counter[BlockKey]]

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        self.gate.wait(10)
        self.granted.update(keys)
        return [True] * len(keys)

    def release(self, keys: Sequence[BlockKey]) -> None:
        self.released.update(keys)


@pytest.fixture
def store() -> type[HoldingStore]:
    """A store class of the test's own."""
    names: dict[str, Any] = {"gate": threading.Event(), "granted": Counter(), "frames": {}, "released": Counter()}
    made: type[HoldingStore] = type("Store", (HoldingStore,), names)
    made.gate.set()
    return made


def script_over(store: type[HoldingStore], **use: Any) -> Script:
    tier = Tier(name="test", store_class=store, options=store.Options(), use=TierOptions(timeout_s=5.0, **use))
    return Script(slots=16, tiers=[tier])


def suspended(script: Script, name: str = "r") -> RequestView:
    """Compute three blocks, save and demote them, and suspend the request."""
    view = script.arrive(name, TOKENS, cache="write")  # it asks for nothing, so it waits for no lookup
    script.alloc(view, 0)
    script.report(script.plan((view, 0, len(TOKENS))))
    demoted(script)
    assert script.leader.suspend(view, [[0, 1, 2]], len(TOKENS))
    script.report(script.plan())
    return view


def demoted(script: Script) -> None:
    plan = script.plan()
    slots = [move.slot for move in plan.demotes.unpack()]
    script.report(plan, demoted=pack_ints(value for slot in slots for value in (0, slot)))


def step_until(script: Script, done: Callable[[], bool]) -> Plan:
    deadline = time.monotonic() + 10
    while True:
        plan = script.plan()
        if done():
            return plan
        script.report(plan)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def claimed(script: Script) -> int:
    count: int = script.leader.get_stats()["arena"]["claimed"]
    return count


def test_claim_ends_when_the_store_says_that_it_holds(store: type[HoldingStore]) -> None:
    store.gate.clear()
    script = script_over(store)
    suspended(script)
    for _ in range(20):
        script.report(script.plan())
    assert claimed(script) == 3
    store.gate.set()
    script.report(step_until(script, lambda: claimed(script) == 0))
    assert len(store.granted) == 3
    script.leader.shutdown()


def test_hold_that_is_granted_after_the_request_went_on_is_let_go(store: type[HoldingStore]) -> None:
    store.gate.clear()
    script = script_over(store)
    view = suspended(script)
    script.report(script.plan())
    assert script.leader.resume(view, [[-1, -1, -1]])  # all of it was on the device
    store.gate.set()
    script.report(step_until(script, lambda: len(store.released) == 3))
    assert store.granted == store.released
    assert claimed(script) == 0
    script.leader.shutdown()


def test_holds_are_renewed_again_and_again(store: type[HoldingStore]) -> None:
    script = script_over(store, hold_s=0.3)
    suspended(script)
    script.report(step_until(script, lambda: len(store.granted) == 3 and min(store.granted.values()) >= 4))
    script.leader.shutdown()


def test_holds_last_while_the_request_runs_and_end_with_it(store: type[HoldingStore]) -> None:
    script = script_over(store)
    view = suspended(script)
    script.report(step_until(script, lambda: len(store.granted) == 3))
    assert script.leader.resume(view, [[-1, -1, -1]])
    for _ in range(20):
        script.report(script.plan())
    assert not store.released
    assert script.leader.suspend(view, [[0, 1, 2]], len(TOKENS))  # nothing is asked for, and no slot is taken
    assert claimed(script) == 0
    script.report(script.plan())
    script.leader.request_finished(view, [[]])
    script.report(step_until(script, lambda: len(store.released) == 3))
    assert sum(store.granted.values()) == 3
    script.leader.shutdown()


def test_block_that_could_not_be_read_once_is_read_again_at_the_next_resume(store: type[HoldingStore]) -> None:
    script = script_over(store)
    view = suspended(script)
    script.report(step_until(script, lambda: len(store.granted) == 3))
    assert script.leader.resize_tier(0, 1 << 30) is False  # nothing is known of the size of a slot
    index = script.leader._index
    for attempt in range(2):
        for block in list(index.ready(0)):  # host memory went to others
            entry = index.get(0, block)
            assert entry is not None
            index.void(entry)
        assert script.leader.resume(view, [[4, 5, 6]])
        plan = script.plan()
        slots = [move.slot for move in plan.promotes.unpack()]
        assert len(slots) == 3, f"attempt {attempt}"
        script.report(plan, not_promoted=pack_ints(slots))
        plan = script.plan()
        assert len(plan.fails.unpack()) == 3
        assert plan.ends == ("r",)
        script.report(plan)
        if attempt == 0:
            assert script.leader.suspend(view, [[0, 1, 2]], len(TOKENS))
            script.report(script.plan())
    script.leader.shutdown()


def test_prefetch_makes_room_at_the_cost_of_others(store: type[HoldingStore]) -> None:
    script = script_over(store)
    view = suspended(script)
    script.report(step_until(script, lambda: claimed(script) == 0))
    index = script.leader._index
    assert index.resize(5) is not None
    mine = [index.get(0, name) for name in script.leader._requests["r"].hashes]
    lost = mine[0]
    assert lost is not None
    index.void(lost)
    other = script.arrive("other", [7] * (3 * SIZE), cache="write")
    script.alloc(other, 0)
    script.report(script.plan((other, 0, 3 * SIZE)))
    demoted(script)
    assert index.counts()["free"] == 0  # three blocks of the other's, and the two of ours, which are older
    assert script.leader.prefetch(view, 0)
    assert [entry.state for entry in mine[1:] if entry is not None] == [State.READY] * 2
    assert len(script.plan().promotes.unpack()) == 1
    script.leader.shutdown()


def test_request_that_ends_before_its_pages_are_reported_as_saved_leaves_nothing(store: type[HoldingStore]) -> None:
    script = script_over(store)
    view = script.arrive("r", TOKENS, cache="none")
    script.alloc(view, 0)
    script.report(script.plan((view, 0, len(TOKENS))))
    assert script.leader.suspend(view, [[0, 1, 2]], len(TOKENS))
    plan = script.plan()
    assert len(plan.saves.unpack()) == 3
    script.leader.request_finished(view, [])
    script.report(plan)
    script.leader._check_integrity()
    assert script.plan().demotes.unpack() == []
    script.leader._check_integrity()
    assert script.counts()["free"] == 16
    script.leader.shutdown()


def test_pages_are_not_saved_again_once_they_were_reported() -> None:
    script = Script(slots=16)
    view = script.arrive("r", TOKENS, cache="none")
    script.alloc(view, 0)
    script.report(script.plan((view, 0, len(TOKENS))))
    assert script.leader.suspend(view, [[0, 1, 2]], len(TOKENS))
    plan = script.plan()
    assert plan.saved == ("r",)
    assert len(plan.saves.unpack()) == 3
    script.report(plan, failed_saves=pack_ints([plan.saves.unpack()[0].slot]))  # the pages are the engine's again
    plan = script.plan()
    assert plan.saved == ()
    assert plan.saves.unpack() == []
    script.report(plan)
    (stats,) = script.leader.get_stats()["suspended"].values()
    assert [place for _, _, place in stats["blocks"]] == [-1, 0, 0]
