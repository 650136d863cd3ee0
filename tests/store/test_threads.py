"""Store threads: deadlines, calls that return late, stores whose threads are all stuck, and the one-thread promise."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from kvconnect import StoreCapabilities
from kvconnect.errors import ConfigError, StoreUnavailable
from kvconnect.store import BlockStore, CallEvent, Outcome, StoreThreads
from kvconnect.store.threads import LOOKUP, READ, WRITE
from tests.store.stores import dict_store, tier


def append(to: list[Any], what: object, store: BlockStore) -> None:
    to.append(what)


def wait(threads: StoreThreads, done: Callable[[list[CallEvent]], bool]) -> list[CallEvent]:
    events: list[CallEvent] = []
    deadline = time.monotonic() + 10
    while not done(events):
        assert time.monotonic() < deadline, events
        events += threads.poll()
        time.sleep(0.001)
    return events


def test_results_and_errors_come_back_under_their_tag() -> None:
    def broken(store: BlockStore) -> None:
        raise OSError("no medium")

    threads = StoreThreads(tier(dict_store()), "test")
    threads.submit("good", READ, lambda store: store.contains([]))
    threads.submit("bad", READ, broken)
    events = {event.tag: event for event in wait(threads, lambda events: len(events) == 2)}
    assert events["good"].outcome is Outcome.DONE
    assert events["good"].result == []
    assert events["bad"].outcome is Outcome.FAILED
    assert isinstance(events["bad"].error, OSError)
    assert threads.num_unfinished == 0
    assert threads.close()


def test_call_that_misses_its_deadline_fails_once_and_is_told_when_it_returns() -> None:
    gate = threading.Event()
    threads = StoreThreads(tier(dict_store(), timeout_s=0.05), "test")
    threads.submit("hung", READ, lambda store: gate.wait(10))
    events = wait(threads, bool)
    assert [(event.tag, event.outcome) for event in events] == [("hung", Outcome.TIMED_OUT)]
    assert threads.num_unfinished == 0
    gate.set()
    events = wait(threads, bool)
    assert [(event.tag, event.outcome) for event in events] == [("hung", Outcome.RETURNED)]
    assert threads.close()


def test_store_with_every_thread_stuck_takes_no_calls_until_one_returns() -> None:
    gate = threading.Event()
    threads = StoreThreads(tier(dict_store(), timeout_s=0.05), "test")
    threads.submit("hung", READ, lambda store: gate.wait(10))
    threads.submit("queued", READ, lambda store: "never runs")
    events = {event.tag: event.outcome for event in wait(threads, lambda events: len(events) == 2)}
    assert events == {"hung": Outcome.TIMED_OUT, "queued": Outcome.FAILED}
    assert threads.stuck
    threads.submit("refused", READ, lambda store: "never runs")
    (event,) = wait(threads, bool)
    assert (event.tag, event.outcome) == ("refused", Outcome.FAILED)
    assert "stuck" in str(event.error)
    gate.set()
    wait(threads, bool)
    threads.submit("again", READ, lambda store: "runs")
    (event,) = wait(threads, bool)
    assert event.result == "runs"
    assert threads.close()


def test_one_thread_opens_calls_and_closes_a_store_with_concurrency_one() -> None:
    seen: list[int] = []

    def close(self: Any) -> None:
        seen.append(threading.get_ident())

    threads = StoreThreads(tier(dict_store(close=close)), "test")
    for number in range(20):
        threads.submit(number, WRITE, lambda store: (getattr(store, "thread"), threading.get_ident()))  # noqa: B009
    events = wait(threads, lambda events: len(events) == 20)
    assert threads.close()
    assert {ident for event in events for ident in event.result} == set(seen)
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_what_requests_wait_for_goes_first() -> None:
    gate = threading.Event()
    order: list[str] = []
    threads = StoreThreads(tier(dict_store()), "test")
    threads.submit("first", READ, lambda store: gate.wait(10))
    for tag, priority in (("write", WRITE), ("read", READ), ("lookup", LOOKUP)):
        threads.submit(tag, priority, partial(append, order, tag))
    gate.set()
    wait(threads, lambda events: len(events) == 4)
    assert order == ["lookup", "read", "write"]
    assert threads.close()


def test_close_runs_what_is_queued_first_and_leaves_hung_threads_behind() -> None:
    gate = threading.Event()
    done: list[int] = []
    threads = StoreThreads(tier(dict_store()), "test")
    for number in range(5):
        threads.submit(number, WRITE, partial(append, done, number))
    assert threads.close()
    assert done == list(range(5))
    hung = StoreThreads(tier(dict_store()), "test")
    hung.submit("hung", READ, lambda store: gate.wait(10))
    assert not hung.close(timeout_s=0.05)
    gate.set()
    assert hung.close()


def test_store_that_refuses_its_configuration_says_so_to_the_opener() -> None:
    def refuse(self: Any, options: Any, context: Any) -> None:
        raise ConfigError("no such folder")

    with pytest.raises(ConfigError, match="no such folder"):
        StoreThreads(tier(dict_store(__init__=refuse, capabilities=StoreCapabilities(concurrency=3))), "test")


def test_store_that_does_not_open_in_time_is_unavailable() -> None:
    gate, closed = threading.Event(), threading.Event()

    def hang(self: Any, options: Any, context: Any) -> None:
        gate.wait(10)

    store = dict_store(__init__=hang, close=lambda self: closed.set(), capabilities=StoreCapabilities(concurrency=3))
    with pytest.raises(StoreUnavailable, match="did not open"):
        StoreThreads(tier(store, timeout_s=0.05), "test")
    gate.set()
    assert closed.wait(10), "a store that opened after all was left open"


def test_store_that_cannot_take_the_memory_is_closed_again() -> None:
    closed: list[object] = []

    def refuse(self: Any, memory: memoryview) -> None:
        raise OSError("cannot be registered")

    store = dict_store(attach=refuse, close=lambda self: closed.append(self))
    with pytest.raises(StoreUnavailable, match="cannot be registered"):
        StoreThreads(tier(store), "test", memoryview(bytearray(8)))
    assert len(closed) == 1


def test_panic_of_a_foreign_library_is_a_failed_call_and_no_dead_thread() -> None:
    class Panic(BaseException):
        pass

    def panics(store: BlockStore) -> None:
        raise Panic

    threads = StoreThreads(tier(dict_store()), "test")
    threads.submit("panic", READ, panics)
    (event,) = wait(threads, bool)
    assert event.outcome is Outcome.FAILED
    threads.submit("after", READ, lambda store: "fine")
    (event,) = wait(threads, bool)
    assert event.result == "fine"
    assert threads.close()
