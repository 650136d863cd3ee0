"""Opening: what cannot work is refused with the reason and without secrets; deadlines hold; nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kvconnect_s3 import S3Options, S3Store

from kvconnect.errors import Closed, ConfigError, KVConnectError, StoreUnavailable
from kvconnect.options import Secret, convert_options, parse_specs
from kvconnect.store import StoreContext
from tests.remote.processes import Server
from tests.remote.s3.blocks import frame, key, read, write
from tests.remote.s3.gateways import ACCESS_KEY, SECRET_KEY, Place, Proxy


def test_an_endpoint_that_ignores_conditions_is_refused(place: Place, proxy: Proxy) -> None:
    proxy.without = frozenset({"if-none-match"})
    with pytest.raises(ConfigError, match="ignores If-None-Match"):
        place.open(endpoint=proxy.endpoint)
    proxy.without = frozenset()
    place.open(endpoint=proxy.endpoint).close()


def test_it_is_refused_also_where_the_store_was_used_before(place: Place, proxy: Proxy) -> None:
    place.open().close()
    proxy.without = frozenset({"if-none-match"})
    with pytest.raises(ConfigError, match="ignores If-None-Match"):
        place.open(endpoint=proxy.endpoint)


def test_a_wrong_secret_is_named_without_it(ceph: Place, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"denied \(PUT 403 SignatureDoesNotMatch\)") as raised:
        ceph.open(secret_access_key=Secret("hunter2hunter2"))
    assert "hunter2" not in str(raised.value) + repr(raised.value.__cause__) + caplog.text
    assert raised.value.__suppress_context__
    with pytest.raises(ConfigError) as raised:
        ceph.open(access_key_id="NOBODY", session_token=Secret("tokentoken"))
    assert "tokentoken" not in str(raised.value)


def test_an_absent_bucket_is_named(ceph: Place, place: Place) -> None:
    for each in (ceph, place):
        with pytest.raises(ConfigError, match=r"there is no bucket 'no-such-bucket' at 127\.0\.0\.1"):
            each.open(host="no-such-bucket")


def test_a_bucket_that_goes_away_is_no_miss(place: Place) -> None:
    store = place.open()
    write(store, 1)
    for path in place.objects():
        place.delete(path)
    place.client.delete_bucket(Bucket=place.bucket)
    with pytest.raises(ConfigError, match="there is no bucket"):
        read(store, 1)
    store.close()


def test_nobody_there_is_unavailable_by_name() -> None:
    options = S3Options(
        host="some-bucket",
        endpoint="http://user:hunter2@127.0.0.1:9",
        access_key_id="id",
        secret_access_key=Secret("hunter2"),
    )
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9") as raised:
        S3Store(options, StoreContext(name="s3", timeout_s=2.0))
    assert time.monotonic() - started < 2.0
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "marker", [b'{"format": "kvconnect-s3", "version": 2}', b'{"format": "x", "version": 1}', b"{"]
)
def test_another_format_is_refused_and_left_alone(place: Place, marker: bytes) -> None:
    place.put("kvconnect-s3.json", marker)
    with pytest.raises(ConfigError, match="use another prefix"):
        place.open()
    assert place.read("kvconnect-s3.json") == marker
    assert place.objects("log/") == {}


def test_missing_obstore_is_said_with_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r'pip install "kvconnect\[s3\]"'):
        S3Store(S3Options(host="some-bucket"), StoreContext(name="s3", timeout_s=2.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": ""}, "needs a bucket"),
        ({"host": "b", "access_key_id": "a"}, "go together"),
        ({"host": "b", "secret_access_key": "hunter2"}, "go together"),
        ({"host": "b", "index_blocks": 0}, "index_blocks"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        convert_options("s3", options, S3Options)
    assert "hunter2" not in str(raised.value)


def test_a_url_says_it_all(place: Place) -> None:
    url = (
        f"s3://{place.bucket}/some/prefix?endpoint={place.endpoint}&region=us-east-1"
        f"&access_key_id={ACCESS_KEY}&secret_access_key={SECRET_KEY}"
    )
    (spec,) = parse_specs(url)
    options = convert_options(spec.name, spec.options, S3Options)
    assert SECRET_KEY not in repr(options) + repr(spec)
    store = S3Store(options, StoreContext(name="s3", timeout_s=5.0))
    write(store, 1)
    assert len(place.objects("packs/")) == 1
    store.close()


def test_credentials_come_from_the_environment(ceph: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", ceph.endpoint)
    options = S3Options(host=ceph.bucket, allow_http=True)
    store = S3Store(options, StoreContext(name="s3", timeout_s=5.0))
    write(store, 1)
    assert read(store, 1) == [frame(1)]
    store.close()


@pytest.mark.parametrize("said_by", ["option", "environment"])
def test_credentials_come_from_a_profile(
    ceph: Place, tmp_path: Path, said_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(
        f"[cache]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n", "utf-8"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    changes: dict[str, Any] = {"access_key_id": "", "secret_access_key": Secret("")}
    if said_by == "environment":
        monkeypatch.setenv("AWS_PROFILE", "cache")
    else:
        changes["profile"] = "cache"
        with pytest.raises(ConfigError, match="profile 'nobody'"):
            ceph.open(**{**changes, "profile": "nobody"})
    store = ceph.open(**changes)
    write(store, 1)
    assert read(store, 1) == [frame(1)]
    store.close()


def test_deadlines_hold_while_the_gateway_hangs(place: Place, moto: Server) -> None:
    store = place.open(timeout_s=1.0)
    write(store, 1)
    moto.signal(signal.SIGSTOP)
    try:
        for call in (
            lambda: store.contains([key(1)]),
            lambda: read(store, 1),
            lambda: write(store, 2),
            lambda: store.remove([key(1)]),
            lambda: place.open(timeout_s=1.0),
        ):
            started = time.monotonic()
            with pytest.raises(KVConnectError) as raised:
                call()
            assert isinstance(raised.value, StoreUnavailable)
            assert time.monotonic() - started < 1.0
    finally:
        moto.signal(signal.SIGCONT)
    deadline = time.monotonic() + 10
    while True:
        try:
            assert read(store, 1) in ([frame(1)], [None])  # the removal may have arrived after all
            write(store, 3)
            break
        except StoreUnavailable:
            assert time.monotonic() < deadline
    assert read(store, 3) == [frame(3)]
    store.close()


def test_closing_ends_a_call_that_hangs(place: Place, moto: Server) -> None:
    store = place.open(timeout_s=20.0)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            store.contains([key(1)])
        except KVConnectError as error:
            raised.append(error)

    moto.signal(signal.SIGSTOP)
    try:
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.2)
        store.close()
        thread.join(5)
    finally:
        moto.signal(signal.SIGCONT)
    assert [type(error) for error in raised] == [Closed]
    with pytest.raises(Closed):
        store.contains([key(1)])


def test_nothing_is_left_behind_by_many_openings(place: Place) -> None:
    def open_once(number: int) -> None:
        store = place.open()
        write(store, number)
        assert read(store, number) == [frame(number)]
        store.close()

    def used() -> tuple[int, int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    for number in range(5):
        open_once(number)
    before = used()
    for number in range(50):
        open_once(number)
    after = used()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 4, "threads of the client's runtime that come and go"
    assert after[2] <= before[2] + 4, "connections that the client has not closed yet"
