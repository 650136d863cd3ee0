"""Circuit breakers: what opens one, what closes it, and how store threads find out by themselves."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from kvconnect.errors import StoreUnavailable
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, CallEvent, Outcome, StoreCapabilities, StoreThreads
from kvconnect.store.breaker import Breaker
from kvconnect.store.threads import READ, WRITE
from tests.store.stores import dict_store, tier

KEY = BlockKey(b"k" * 72)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(3):
        breaker.failed()
    assert breaker.state == "open"
    return breaker


def test_three_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.num_opened == 0
    for _ in range(3):
        breaker.failed()
    assert breaker.is_open
    assert breaker.num_opened == 1


def test_success_of_a_call_that_began_before_does_not_close_it() -> None:
    breaker = opened(Clock())
    breaker.succeeded()
    assert breaker.is_open


def test_one_thread_probes_once_it_is_due() -> None:
    clock = Clock()
    breaker = opened(clock)
    wait_s = breaker.seconds_to_probe()
    assert wait_s is not None
    assert 0.1 < wait_s < 0.4
    assert not breaker.begin_probe()
    clock.now += wait_s
    assert breaker.seconds_to_probe() == 0
    assert breaker.begin_probe()
    assert not breaker.begin_probe()


def test_failed_probes_wait_longer_and_longer_up_to_a_limit() -> None:
    clock = Clock()
    breaker = opened(clock)
    waits = []
    for _ in range(12):
        wait_s = breaker.seconds_to_probe()
        assert wait_s is not None
        waits.append(wait_s)
        clock.now += wait_s
        assert breaker.begin_probe()
        breaker.probed(answered=False)
    assert waits[3] > 2 * waits[0]
    assert max(waits) <= 5 * 1.25
    assert min(waits[6:]) >= 5 * 0.75


def test_half_open_closes_with_the_first_success_and_opens_with_the_first_failure() -> None:
    for succeeds in (True, False):
        clock = Clock()
        breaker = opened(clock)
        clock.now += 1
        assert breaker.begin_probe()
        breaker.probed(answered=True)
        assert breaker.state == "half open"
        (breaker.succeeded if succeeds else breaker.failed)()
        assert breaker.state == ("closed" if succeeds else "open")


class Medium:
    """A store's medium that can be away."""

    def __init__(self) -> None:
        self.away = False
        self.calls = 0

    def contains(self, store: Any, keys: Sequence[BlockKey]) -> Sequence[bool]:
        self.calls += 1
        if self.away:
            raise OSError("away")
        return [False] * len(keys)


def run(threads: StoreThreads, count: int = 1) -> list[CallEvent]:
    for number in range(count):
        threads.submit(number, READ, lambda store: store.contains([KEY]))
    events: list[CallEvent] = []
    deadline = time.monotonic() + 10
    while len(events) < count:
        assert time.monotonic() < deadline
        events += threads.poll()
        time.sleep(0.001)
    return events


@pytest.mark.parametrize("concurrency", [1, 4])
def test_dead_store_is_not_called_and_one_that_is_back_is_found_without_a_call(concurrency: int) -> None:
    medium = Medium()

    def contains(store: BlockStore, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return medium.contains(store, keys)

    threads = StoreThreads(
        tier(dict_store(contains=contains, capabilities=StoreCapabilities(concurrency=concurrency))), "test"
    )
    medium.away = True
    for _ in range(3):
        (event,) = run(threads)
        assert isinstance(event.error, OSError)
    calls = medium.calls
    for event in run(threads, 200):
        assert event.outcome is Outcome.FAILED
        assert isinstance(event.error, StoreUnavailable)
    assert medium.calls - calls <= 3  # probes
    medium.away = False
    deadline = time.monotonic() + 10
    while threads.breaker.is_open:  # nobody calls it meanwhile
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (event,) = run(threads)
    assert event.outcome is Outcome.DONE
    assert threads.breaker.state == "closed"
    assert threads.close()


def test_what_was_queued_before_it_opened_fails_without_a_call() -> None:
    gate = threading.Event()
    made = []
    threads = StoreThreads(tier(dict_store()), "test")

    def fail(store: BlockStore) -> None:
        made.append(1)
        gate.wait(10)
        raise OSError("away")

    for number in range(50):
        threads.submit(number, WRITE, fail)
    gate.set()
    events: list[CallEvent] = []
    while len(events) < 50:
        events += threads.poll()
    assert len(made) == 3
    assert all(event.outcome is Outcome.FAILED for event in events)
    assert threads.close()


def test_store_of_which_other_threads_hang_is_looked_after_by_an_idle_one() -> None:
    gate = threading.Event()
    threads = StoreThreads(tier(dict_store(capabilities=StoreCapabilities(concurrency=4)), timeout_s=0.05), "test")
    for number in range(3):
        threads.submit(number, READ, lambda store: gate.wait(10))
    deadline = time.monotonic() + 10
    while not threads.breaker.num_opened or threads.breaker.is_open:
        threads.poll()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    gate.set()
    assert threads.close()


def test_probe_that_hangs_does_not_keep_other_threads_from_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvconnect.store.breaker._LONGEST_WAIT_S", 0.5)
    gate = threading.Event()
    calls: list[threading.Thread] = []

    def contains(store: BlockStore, keys: Sequence[BlockKey]) -> Sequence[bool]:
        calls.append(threading.current_thread())
        if len(calls) == 1:  # on a connection that is dead
            gate.wait(30)
        return [False] * len(keys)

    def raises(store: BlockStore) -> None:
        raise OSError("no medium")

    store = dict_store(contains=contains, capabilities=StoreCapabilities(concurrency=3))
    threads = StoreThreads(tier(store), "test")
    for number in range(3):
        threads.submit(number, READ, raises)
    deadline = time.monotonic() + 10
    while threads.breaker.state != "half open":
        assert time.monotonic() < deadline, threads.breaker.state
        time.sleep(0.001)
    assert len(set(calls)) == 2
    threads.submit("read", READ, lambda store: None)
    while threads.breaker.state != "closed":
        assert time.monotonic() < deadline
        time.sleep(0.001)
    gate.set()
    assert threads.close()
    assert threads.breaker.state == "closed"
