"""The log: ordered by conditional puts alone, shared by all, short, and never trusted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import kvconnect_s3.journal as journal
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvconnect_s3 import S3Store
from kvconnect_s3.records import Checkpoint, Entry, decode

from kvconnect.errors import MetadataError
from tests.remote.s3.blocks import frame, key, read, write
from tests.remote.s3.gateways import Place, Proxy, Request


@pytest.fixture
def store(place: Place) -> Iterator[S3Store]:
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture
def other(place: Place, store: S3Store) -> Iterator[S3Store]:
    """Opened while there was nothing."""
    opened = place.open()
    yield opened
    opened.close()


def test_no_entry_is_lost_when_instances_append_at_once(ceph: Place) -> None:
    stores = [ceph.open() for _ in range(3)]

    def work(number: int) -> None:
        for i in range(12):
            write(stores[number % 3], number * 100 + i, size=100)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    written = [number * 100 + i for number in range(6) for i in range(12)]
    entries = ceph.packed_keys()
    assert sorted(ceph.objects("log/")) == [f"log/{number:020}" for number in range(len(entries))]
    assert sorted(each for entry in entries for each in entry) == sorted(key(number) for number in written)
    for store in stores:
        assert list(store.contains([key(number) for number in written])) == [True] * len(written)
        store.close()


def test_writers_of_one_instance_share_an_entry(place: Place, proxy: Proxy) -> None:
    store = place.open(endpoint=proxy.endpoint)
    held = threading.Event()

    def hold(request: Request) -> None:
        if request.method == "PUT" and "/log/" in request.path:
            assert held.wait(10)

    proxy.before = hold
    with ThreadPoolExecutor(6) as pool:
        writers = [pool.submit(write, store, number) for number in range(6)]
        deadline = time.monotonic() + 10
        while len(place.objects("packs/")) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # until the answers to the last puts have arrived
        assert place.objects("log/") == {}  # so far nobody else can see anything
        held.set()
        for writer in writers:
            writer.result()
    first, second = place.packed_keys()  # what waited while the first was on its way
    assert sorted(first + second) == sorted(key(number) for number in range(6))
    store.close()


def test_what_one_removes_is_a_miss_for_others(store: S3Store, other: S3Store) -> None:
    write(store, 1, 2)
    assert read(other, 1, 2) == [frame(1), frame(2)]
    store.remove([key(1)])
    assert list(other.contains([key(1), key(2)])) == [False, True]
    assert read(other, 1, 2) == [None, frame(2)]


def test_what_one_replaces_others_read_soon(
    store: S3Store, other: S3Store, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvconnect_s3.store._LOOK_S", 0.0)
    write(store, 1)
    assert read(other, 1) == [frame(1)]
    store.write([key(1)], [memoryview(b"new")])
    deadline = time.monotonic() + 5
    while (found := read(other, 1)) != [b"new"]:  # it knows of the old one, and looks at the log beside reading that
        assert found == [frame(1)]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_listed_but_at_the_start_and_in_scans(place: Place, proxy: Proxy) -> None:
    store = place.open(endpoint=proxy.endpoint)
    other = place.open()
    proxy.requests.clear()
    for number in range(5):
        write(store, 2 * number)
        write(other, 2 * number + 1)
        assert read(store, *range(2 * number + 2)) == [frame(n) for n in range(2 * number + 2)]
        assert list(store.contains([key(n) for n in range(2 * number + 3)]))[-1] is False
        store.remove([key(99)])
    assert proxy.count("HEAD", "/log/") > 0
    assert not [request for request in proxy.requests if "list-type" in request.query]
    list(store.scan())
    assert [request for request in proxy.requests if "list-type" in request.query]
    store.close()
    other.close()


def test_asking_costs_one_request_however_many_keys(place: Place, proxy: Proxy) -> None:
    store = place.open(endpoint=proxy.endpoint)
    write(store, *range(50))
    proxy.requests.clear()
    assert list(store.contains([key(n) for n in range(100)])) == [True] * 50 + [False] * 50
    assert [(request.method, request.path[-24:]) for request in proxy.requests] == [("HEAD", f"log/{1:020}")]
    store.close()


def test_an_entry_that_was_taken_though_nobody_said_so_is_not_written_again(place: Place, proxy: Proxy) -> None:
    store = place.open(endpoint=proxy.endpoint)
    lost: list[Request] = []

    def lose(request: Request, status: int) -> int:
        if request.method == "PUT" and "/log/" in request.path and len(lost) < 1:
            lost.append(request)
            return 500
        return status

    proxy.answer = lose
    write(store, 1)
    assert lost
    assert place.packed_keys() == [[key(1)]]
    store.close()


def test_a_restart_reads_a_checkpoint_and_what_came_after(
    place: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_CHECKPOINT_EVERY", 8)
    store = place.open()
    for number in range(19):
        write(store, number)
    store.remove([key(3)])
    _wait_for(lambda: f"checkpoints/{15:020}" in place.objects("checkpoints/"))
    store.close()
    again = place.open(endpoint=proxy.endpoint)
    fetched = sorted(
        request.path[-24:] for request in proxy.requests if request.method == "GET" and "/log/" in request.path
    )
    assert fetched == [f"log/{number:020}" for number in (16, 17, 18, 19)]
    assert proxy.count("GET", "/checkpoints/") == 1
    assert list(again.contains([key(n) for n in range(20)])) == [n not in (3, 19) for n in range(20)]
    assert read(again, 0, 18) == [frame(0), frame(18)]
    again.close()


@pytest.mark.parametrize("damage", [b"", b"rubbish", b"\x93\x01\x63\x90"], ids=["empty", "rubbish", "wrong number"])
def test_a_bad_checkpoint_is_passed_over(place: Place, damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_CHECKPOINT_EVERY", 4)
    store = place.open()
    for number in range(8):
        write(store, number)
    _wait_for(lambda: len(place.objects("checkpoints/")) == 2)
    store.close()
    place.put(f"checkpoints/{7:020}", damage)
    again = place.open()
    assert list(again.contains([key(n) for n in range(9)])) == [True] * 8 + [False]
    again.close()


def test_the_log_is_kept_short_and_nobody_takes_its_gap_for_its_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(journal, "_KEEP_LOG", timedelta(0))
    store, sleeper = place.open(), place.open()
    write(store, 0)
    assert list(sleeper.contains([key(0)])) == [True]
    for number in range(1, 16):
        write(store, number)
        time.sleep(0.1 if number % 4 == 3 else 0)  # moto's clock has seconds, and each checkpoint its own clean-up
    _wait_for(lambda: f"log/{2:020}" not in place.objects("log/"))
    kept = sorted(place.objects("log/"))
    assert len(place.objects("checkpoints/")) == 2
    monkeypatch.setattr(journal, "_UNSURE_S", -1.0)  # as if it had slept for long
    write(sleeper, 100)
    assert sorted(place.objects("log/"))[-1] == f"log/{16:020}"
    assert sorted(place.objects("log/"))[:-1] == kept
    assert list(sleeper.contains([key(n) for n in range(16)])) == [True] * 16
    assert list(store.contains([key(100)])) == [True]
    store.close()
    sleeper.close()


_ID = b"i" * 16
_BAD: dict[str, Any] = {
    "no record": b"rubbish",
    "empty": b"",
    "too deep": b"\x91" * 100_000,
    "another version": [2, _ID, [], b"", []],
    "short id": [1, b"i", [], b"", []],
    "short key": [1, _ID, [[b"p" * 16, b"k" * 71, b"\0" * 8]], b"", []],
    "short removed key": [1, _ID, [], b"k" * 71, []],
    "short name": [1, _ID, [[b"p", b"k" * 72, b"\0" * 8]], b"", []],
    "missing span": [1, _ID, [[b"p" * 16, b"k" * 144, b"\0" * 8]], b"", []],
    "short lost key": [1, _ID, [], b"", [[b"p" * 16, b"k" * 71, b"\0" * 8]]],
    "span beyond all packs": [1, _ID, [[b"p" * 16, b"k" * 72, b"\0\0\0\0\1\0\0\x40"]], b"", []],
}


@pytest.mark.parametrize("bad", _BAD.values(), ids=_BAD)
def test_a_bad_entry_is_skipped_and_counted(
    store: S3Store, place: Place, bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, 1)
    place.put(f"log/{1:020}", bad if isinstance(bad, bytes) else msgspec.msgpack.encode(bad))
    write(store, 2)
    assert list(store.contains([key(1), key(2)])) == [True, True]
    assert "s3 log entry failed (1 since last logged)" in caplog.text
    other = place.open()
    assert read(other, 1, 2) == [frame(1), frame(2)]
    other.close()


@given(st.binary(max_size=300))
def test_random_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(MetadataError):
        decode(data, Entry)
    with pytest.raises(MetadataError):
        decode(data, Checkpoint)


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
