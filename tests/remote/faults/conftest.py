"""Fixtures of the faults: an alarm for what hangs, and engines that must leave nothing behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvconnect import LLM
from tests.conftest import Reference
from tests.remote.faults.load import Census, Load, open_engine, wait_until

_ALARM_S = 90
_CLOSE_S = 10.0


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Break off a test whose step never returns: a hang is a failure, not a hung suite."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"the test hangs: {_ALARM_S} s have passed")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_ALARM_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


OpenLoad = Callable[..., Load]


@pytest.fixture
def open_load(llama: Any, references: dict[str, Reference]) -> Iterator[OpenLoad]:
    """Open loads; when the test is over, closing their engines must end every thread and socket of theirs.

    Ask for it last: servers and proxies must be there until then, and what they hold is not the engine's.
    `connection_sockets` is how many sockets of this process a connection may take, all servers together: one, or three
    through a proxy, for each server.
    """
    engines: list[LLM] = []
    before = Census.take()

    def make(store: str, *, connection_sockets: int = 1, **options: Any) -> Load:
        engines.append(open_engine(llama, store, **options))
        users = sum(thread.startswith(("kvconnect-leader", "kvconnect-worker")) for thread in Census.take().threads)
        return Load(engines[-1], references["llama"], before.num_sockets + users * connection_sockets)

    yield make
    for llm in engines:
        llm.close()
    left = before

    def gone() -> bool:
        nonlocal left
        left = Census.take()
        return left.threads == before.threads and left.num_sockets <= before.num_sockets

    wait_until(gone, _CLOSE_S, lambda: f"{left} after closing, {before} before opening")
