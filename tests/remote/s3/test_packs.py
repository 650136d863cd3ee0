"""Packs: one object a call, read by ranges, given up when the bucket has dropped them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from kvconnect_s3 import S3Store

from tests.remote.s3.blocks import frame, key, read, write
from tests.remote.s3.gateways import Place, Proxy


@pytest.fixture
def store(place: Place, proxy: Proxy) -> Iterator[S3Store]:
    opened = place.open(endpoint=proxy.endpoint)
    yield opened
    opened.close()


def test_blocks_of_one_call_are_one_object_and_nothing_else(store: S3Store, place: Place) -> None:
    write(store, *range(40))
    (pack,) = place.objects("packs/")
    assert place.read(pack) == b"".join(frame(n) for n in range(40))


def test_only_the_ranges_that_are_wanted_are_read(store: S3Store, place: Place, proxy: Proxy) -> None:
    size = 300_000
    write(store, *range(10), size=size)
    proxy.requests.clear()
    assert read(store, 7, 1, 2, size=size) == [frame(n, size) for n in (7, 1, 2)]
    ranges = {request.range for request in proxy.requests if "/packs/" in request.path}
    assert ranges == {f"{size}-{3 * size - 1}", f"{7 * size}-{8 * size - 1}"}


def test_a_long_read_is_several_requests(store: S3Store, proxy: Proxy) -> None:
    size = 2 << 20
    write(store, *range(8), size=size)
    proxy.requests.clear()
    assert read(store, *range(8), size=size) == [frame(n, size) for n in range(8)]
    assert proxy.count("GET", "/packs/") == 4


def test_a_large_write_is_sent_in_parts(store: S3Store, place: Place) -> None:
    numbers, size = range(10), 8 << 20
    write(store, *numbers, size=size)
    (pack,) = place.objects("packs/")
    found = place.client.head_object(Bucket=place.bucket, Key=f"some/prefix/{pack}")
    assert found["ETag"].strip('"').endswith("-5")  # 80 MiB in parts of 16
    assert read(store, 3, size=size) == [frame(3, size)]


def test_an_expired_pack_is_a_miss_and_is_forgotten(store: S3Store, place: Place, proxy: Proxy) -> None:
    write(store, 1, 2)
    (pack,) = place.objects("packs/")
    write(store, 3)
    place.delete(pack)
    assert read(store, 1, 2, 3) == [None, None, frame(3)]
    assert list(store.contains([key(1), key(2), key(3)])) == [False, False, True]
    write(store, 1)
    assert read(store, 1) == [frame(1)]


def test_others_learn_of_an_expired_pack_from_whoever_looked(store: S3Store, place: Place) -> None:
    other = place.open()
    write(store, 1, 2)
    (pack,) = place.objects("packs/")
    assert list(other.contains([key(1), key(2)])) == [True, True]
    write(store, 2)
    place.delete(pack)
    assert read(store, 1, 2) == [None, frame(2)]
    deadline = time.monotonic() + 10
    while list(other.contains([key(1), key(2)])) != [False, True]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other.close()


def test_a_pack_that_is_too_short_is_a_miss(store: S3Store, place: Place) -> None:
    write(store, 1, 2, size=300_000)  # too far apart for one request when 2 is asked for alone
    (pack,) = place.objects("packs/")
    place.put(pack, place.read(pack)[:400_000])
    assert read(store, 2, size=300_000) == [None]
    assert read(store, 1, size=300_000) == [frame(1, 300_000)]
    place.put(pack, b"")
    assert read(store, 1, size=300_000) == [None]


def test_a_frame_that_is_too_long_for_its_buffer_costs_no_request(store: S3Store, proxy: Proxy) -> None:
    write(store, 1)
    proxy.requests.clear()
    assert read(store, 1, size=4999) == [None]
    assert proxy.count("GET", "/packs/") == 0


def test_an_empty_frame_comes_back(store: S3Store) -> None:
    write(store, 1, size=0)
    assert read(store, 1) == [b""]


def test_scan_leaves_out_what_has_expired(store: S3Store, place: Place) -> None:
    write(store, 1)
    (pack,) = place.objects("packs/")
    write(store, 2)
    place.delete(pack)
    assert list(store.scan()) == [key(2)]


def test_only_so_many_blocks_are_known_the_newest(place: Place) -> None:
    store = place.open(index_blocks=10)
    write(store, *range(8))
    write(store, *range(8, 14))
    assert [found is not None for found in read(store, *range(14))] == [False] * 4 + [True] * 10
    store.close()
