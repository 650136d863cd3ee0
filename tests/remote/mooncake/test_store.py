"""What the store does with a real pool, seen by Mooncake's own client."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvconnect_mooncake import MooncakeOptions, MooncakeStore

from kvconnect.errors import Closed, ConfigError, StoreUnavailable
from kvconnect.protocol import BlockKey
from kvconnect.protocol.keys import KEY_BYTES
from kvconnect.store import StoreContext
from tests.remote.mooncake.pool import LEASE_S, Client, Pool, buffer_of, name_of, read_one

TIMEOUT_S = 10.0


def new_store(pool: Pool, **options: Any) -> MooncakeStore:
    return MooncakeStore(
        MooncakeOptions(host="127.0.0.1", port=pool.port, **options), StoreContext(name="mooncake", timeout_s=TIMEOUT_S)
    )


@pytest.fixture
def store(pool: Pool) -> Iterator[MooncakeStore]:
    opened = new_store(pool)
    yield opened
    opened.close()


@pytest.fixture
def peer(pool: Pool) -> Iterator[Client]:
    with Client(pool) as client:
        yield client


def fresh(count: int) -> list[BlockKey]:
    """Return keys that nobody else has: objects are written once."""
    return [BlockKey(os.urandom(KEY_BYTES)) for _ in range(count)]


def eventually(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(StoreUnavailable):
            if what():
                return True
        time.sleep(0.1)
    return False


class Calls:
    """A client that writes down what is registered, and what it is asked to move."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []
        self.addresses: list[int] = []

    def register_buffer(self, address: int, size: int) -> Any:
        self.registered.append((address, size))
        return self._raw.register_buffer(address, size)

    def unregister_buffer(self, address: int) -> Any:
        self.unregistered.append(address)
        return self._raw.unregister_buffer(address)

    def batch_put_from(self, names: Any, addresses: list[int], sizes: Any, config: Any) -> Any:
        self.addresses += addresses
        return self._raw.batch_put_from(names, addresses, sizes, config)

    def batch_get_into(self, names: Any, addresses: list[int], sizes: Any) -> Any:
        self.addresses += addresses
        return self._raw.batch_get_into(names, addresses, sizes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def watch(store: MooncakeStore) -> Calls:
    calls = Calls(store._client._raw)
    store._client._raw = calls
    return calls


def test_arena_is_registered_once_and_moved_as_it_lies(store: MooncakeStore, peer: Client) -> None:
    arena = buffer_of(8 << 20)
    calls = watch(store)
    store.attach(arena.data)
    keys = fresh(3)
    rng = np.random.default_rng(1)
    slots = [arena.data[at : at + (1 << 20)] for at in (0, 2 << 20, 4 << 20)]
    for slot in slots:
        np.frombuffer(slot, np.uint8)[:] = rng.integers(0, 255, len(slot), np.uint8)
    frames = [slot[:700_001] for slot in slots]
    kept = [bytes(frame) for frame in frames]
    assert store.write(keys, frames) == [True] * 3
    assert [peer.get(key) for key in keys] == kept
    arena[:] = 0x5A
    assert store.read(keys, slots) == [700_001] * 3
    assert [bytes(slot[:700_001]) for slot in slots] == kept
    assert all(set(slot[700_001:]) == {0x5A} for slot in slots)
    starts = [arena.ctypes.data + at for at in (0, 2 << 20, 4 << 20)]
    assert calls.addresses == starts + starts
    store.close()
    assert calls.registered == [(arena.ctypes.data, arena.nbytes)]
    assert calls.unregistered == [arena.ctypes.data]


@pytest.mark.parametrize("size", [1, 255, 70_001, 3 << 20])
def test_other_memory_goes_through_registered_staging(pool: Pool, peer: Client, size: int) -> None:
    store = new_store(pool, local_buffer=1 << 20)  # the longest frame does not fit
    calls = watch(store)
    (key,) = fresh(1)
    frame = random.Random(size).randbytes(size)
    try:
        assert store.write([key], [memoryview(frame)]) == [True]  # read-only memory
        assert peer.get(key) == frame
        assert read_one(store, key, size + 1000) == frame
        assert all(
            any(start <= address < start + length for start, length in calls.registered) for address in calls.addresses
        )
    finally:
        store.close()
    assert sorted(calls.unregistered) == sorted(start for start, _ in calls.registered)


def test_one_batch_has_memory_of_both_kinds_and_more_than_the_staging_holds(pool: Pool, peer: Client) -> None:
    store = new_store(pool, local_buffer=1 << 20)
    arena = buffer_of(4 << 20)
    store.attach(arena.data)
    keys = fresh(9)
    frames = [random.Random(number).randbytes(300_000 + number) for number in range(9)]
    given = []
    for number, frame in enumerate(frames):
        view = arena.data[number * 400_000 :][: len(frame)] if number % 2 else memoryview(bytearray(frame))
        view[:] = frame
        given.append(view)
    try:
        assert store.write(keys, given) == [True] * 9
        assert [peer.get(key) for key in keys] == frames
        arena[:] = 0
        buffers = [view if number % 2 else memoryview(bytearray(len(view))) for number, view in enumerate(given)]
        assert store.read(keys, buffers) == [len(frame) for frame in frames]
        assert [bytes(buffer) for buffer in buffers] == frames
    finally:
        store.close()


def test_name_that_another_writer_has_not_finished_is_not_confirmed(store: MooncakeStore, peer: Client) -> None:
    (key,) = fresh(1)
    assert peer.raw.batch_put_session_start([name_of(key)], [1000]) == [0]
    assert store.write([key], [memoryview(bytes(1000))]) == [False]
    assert store.contains([key]) == [False]
    assert read_one(store, key, 1000) is None


def test_object_that_was_read_a_moment_ago_is_removed_when_its_lease_has_ended(
    store: MooncakeStore, peer: Client
) -> None:
    """Until then nobody can have its memory written anew below the reader."""
    (key,) = fresh(1)
    assert store.write([key], [memoryview(b"goes")]) == [True]
    assert read_one(store, key, 9) == b"goes"
    assert peer.raw.remove(name_of(key), False) < 0, "the pool says that it is leased"
    store.remove([key])
    assert peer.get(key) == b""


@contextlib.contextmanager
def slow_for(pool: Pool, seconds: float) -> Iterator[None]:
    """Stop the provider for so long."""
    pool.provider.signal(signal.SIGSTOP)
    going_on = threading.Timer(seconds, pool.provider.signal, [signal.SIGCONT])
    going_on.start()
    try:
        yield
    finally:
        going_on.join()


def test_object_whose_lease_ended_before_it_had_come_is_got_again(tmp_path: Path) -> None:
    """A provider that is slow for longer than a lease lasts: Mooncake's own client gives up."""
    keys = fresh(2)
    frames = [b"comes late", b"comes too"]
    with Pool(tmp_path, 64 << 20) as pool, Client(pool) as peer:
        store = new_store(pool)
        try:
            assert store.write(keys, [memoryview(frame) for frame in frames]) == [True, True]
            with slow_for(pool, 3 * LEASE_S):
                assert peer.get(keys[0]) == b""
            with slow_for(pool, 3 * LEASE_S):
                buffers = [bytearray(64) for _ in keys]
                lengths = store.read(keys, [memoryview(buffer) for buffer in buffers])
            assert list(lengths) == [len(frame) for frame in frames]
            assert [bytes(buffer[:length]) for buffer, length in zip(buffers, lengths, strict=True)] == frames
        finally:
            store.close()


def test_object_that_is_read_without_end_is_removed_at_the_deadline(pool: Pool, peer: Client) -> None:
    (key,) = fresh(1)
    store = MooncakeStore(
        MooncakeOptions(host="127.0.0.1", port=pool.port), StoreContext(name="mooncake", timeout_s=2.0)
    )
    try:
        assert store.write([key], [memoryview(b"goes")]) == [True]
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                peer.get(key)

        reader = threading.Thread(target=read)
        reader.start()
        started = time.monotonic()
        store.remove([key])
        seconds = time.monotonic() - started
        stop.set()
        reader.join()
        assert 0.5 < seconds < 5
        assert peer.get(key) == b""
    finally:
        store.close()


def test_process_gives_memory_to_the_pool(tmp_path: Path) -> None:
    with Pool(tmp_path, 16 << 20) as own:
        giver, reader = new_store(own, segment=128 << 20), new_store(own)
        try:
            keys = fresh(40)
            frames = [bytes([number]) * (1 << 20) for number in range(40)]
            assert reader.write(keys, [memoryview(frame) for frame in frames]) == [True] * 40
            assert [read_one(reader, key, 1 << 20) for key in keys] == frames
            giver.close()
            assert sum(read_one(reader, key, 1 << 20) is not None for key in keys) <= 16
        finally:
            reader.close()
            giver.close()


def test_stores_of_one_process_live_alone(pool: Pool, store: MooncakeStore) -> None:
    (key,) = fresh(1)
    arena = buffer_of(1 << 20)
    store.attach(arena.data)
    other = new_store(pool)
    other.attach(arena.data)
    assert other.write([key], [arena.data[:5000]]) == [True]
    other.close()
    assert store.read([key], [arena.data]) == [5000]


def test_closed_store_refuses_calls(pool: Pool) -> None:
    store = new_store(pool)
    store.close()
    for call in (lambda: store.contains(fresh(1)), lambda: store.remove(fresh(1))):
        with pytest.raises(Closed):
            call()


def test_opening_and_closing_leaves_nothing(pool: Pool) -> None:
    def left() -> tuple[int, int, list[str]]:
        own = Path("/proc/self")
        return (
            len(list((own / "task").iterdir())),
            len(list((own / "fd").iterdir())),
            sorted(each.name for each in Path("/dev/shm").iterdir() if "ooncake" in each.name),
        )

    def once() -> None:
        store = new_store(pool)
        store.attach(buffer_of(1 << 20).data)
        store.write(fresh(1), [memoryview(b"staged")])
        store.close()

    for _ in range(2):  # the library starts threads of the process by the first clients
        once()
    before = left()
    for _ in range(3):
        once()
    assert eventually(lambda: left() <= before, 5.0), (before, left())


def test_pool_that_is_full_declines_or_evicts(tmp_path: Path) -> None:
    with Pool(tmp_path, 64 << 20) as small:
        store = new_store(small)
        try:
            keys = fresh(24)
            frames = [bytes([number]) * (8 << 20) for number in range(24)]
            taken = [store.write([key], [memoryview(frame)])[0] for key, frame in zip(keys, frames, strict=True)]
            found = [read_one(store, key, 8 << 20) for key in keys]
            assert not all(one is not None for one in found)
            assert all(one in (None, frame) for one, frame in zip(found, frames, strict=True))
            assert any(one is not None for one in found)
            assert all(one is None for one, kept in zip(found, taken, strict=True) if not kept)
            assert store.write(fresh(1), [memoryview(bytes(128 << 20))]) == [False]
        finally:
            store.close()


def test_provider_that_dies_is_a_miss_and_comes_back(tmp_path: Path) -> None:
    with Pool(tmp_path) as own:
        store = new_store(own)
        try:
            keys = fresh(4)
            assert store.write(keys, [memoryview(bytes([n]) * 5000) for n in range(4)]) == [True] * 4
            own.provider.kill()
            started = time.monotonic()
            assert [read_one(store, key, 5000) for key in keys] == [None] * 4
            assert time.monotonic() - started < TIMEOUT_S
            own.provide_again()

            def works() -> bool:
                keys = fresh(1)
                return store.write(keys, [memoryview(b"again")]) == [True] and read_one(store, keys[0], 9) == b"again"

            assert eventually(works, 30.0)
        finally:
            store.close()


def test_master_that_restarts_is_found_again(tmp_path: Path) -> None:
    with Pool(tmp_path) as own:
        store = new_store(own)
        arena = buffer_of(1 << 20)
        store.attach(arena.data)
        try:
            (key, other) = fresh(2)
            assert store.write([key], [arena.data[:5000]]) == [True]
            own.master.kill()
            calls: list[Callable[[], object]] = [
                lambda: store.contains([key]),
                lambda: store.read([key], [arena.data]),
                lambda: store.write([other], [arena.data[:5000]]),
                lambda: store.remove([key]),
            ]
            for call in calls:
                started = time.monotonic()
                with pytest.raises(StoreUnavailable, match=str(own.port)):
                    call()
                assert time.monotonic() - started < TIMEOUT_S
            own.master.start()
            assert eventually(lambda: store.write([other], [arena.data[:5000]]) == [True], 30.0)
            assert store.read([other], [arena.data[4096:]]) == [5000]
        finally:
            store.close()


def test_no_master_is_named_within_the_deadline() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = taken.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}"):
            MooncakeStore(MooncakeOptions(host="127.0.0.1", port=port), StoreContext(name="m", timeout_s=2.0))
        assert time.monotonic() - started < 2.0


def test_master_that_is_none_is_named_within_the_deadline(pool: Pool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}"):
            MooncakeStore(MooncakeOptions(host="127.0.0.1", port=port), StoreContext(name="m", timeout_s=2.0))
        assert time.monotonic() - started < 4.0


_OPENS = """
import os, sys
from kvconnect.store import StoreContext
from kvconnect_mooncake import MooncakeOptions, MooncakeStore
before = dict(os.environ)
MooncakeStore(MooncakeOptions(host="127.0.0.1", port=int(sys.argv[1])), StoreContext(name="m", timeout_s=10.0)).close()
assert dict(os.environ) == before
"""


def test_library_keeps_its_chatter_to_itself_and_the_environment_stays(pool: Pool) -> None:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("MC_", "GLOG_"))}
    run = subprocess.run(
        [sys.executable, "-c", _OPENS, str(pool.port)], env=quiet, capture_output=True, text=True, check=True
    )
    assert [line for line in run.stderr.splitlines() if line.startswith("I")] == []


@pytest.mark.parametrize("options", [{"port": 0}, {"replicas": 0}, {"local_buffer": 0}])
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MooncakeOptions(host="h", **options)


def test_close_waits_for_calls(store: MooncakeStore) -> None:
    """The native client crashes the process when it is called after its end."""
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with store._client.calling():
            entered.set()
            leave.wait(10)

    caller = threading.Thread(target=call)
    closer = threading.Thread(target=store.close)
    caller.start()
    entered.wait(10)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    leave.set()
    closer.join(10)
    assert not closer.is_alive()
    caller.join()
