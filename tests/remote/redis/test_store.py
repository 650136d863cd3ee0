"""The store on a real server: bytes, refusals, and what a start finds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvconnect_redis import RedisStore

from kvconnect.errors import ConfigError, StoreUnavailable
from tests.remote.processes import free_ports
from tests.remote.redis.servers import PASSWORD, USER, Redis, eventually, frame, key, name_of, open_store, read

WAYS = ("plain", "tls", "socket")


@pytest.fixture
def store(shared: Redis) -> Iterator[RedisStore]:
    opened = open_store(shared.options)
    yield opened
    opened.close()


@pytest.fixture(params=WAYS)
def any_store(request: pytest.FixtureRequest, shared: Redis, redis_ways: dict[str, Any]) -> Iterator[RedisStore]:
    name, options = redis_ways[request.param]
    opened = open_store(options, name=name)
    yield opened
    opened.close()


def test_keys_and_values_are_what_is_promised(store: RedisStore, shared: Redis) -> None:
    assert store.write([key(1)], [frame(1)]) == [True]
    assert shared.client.get(name_of(1)) == bytes(frame(1))
    assert shared.client.pttl(name_of(1)) == -1


@pytest.mark.parametrize("size", [1, 4083, 4096, 5000, 1 << 20, 20 << 20])
def test_value_of_any_length_comes_back(any_store: RedisStore, shared: Redis, size: int) -> None:
    value = os.urandom(size)
    assert any_store.write([key(1)], [memoryview(value)]) == [True]
    assert shared.client.get(name_of(1)) == value
    assert read(any_store, 1, size=size) == [value]
    assert read(any_store, 1, size=size + 9) == [value]


def test_long_pipelines_answer_in_order(any_store: RedisStore) -> None:
    numbers = range(100)
    assert any_store.write([key(n) for n in numbers[::2]], [frame(n, 17 * n + 1) for n in numbers[::2]]) == [True] * 50
    assert read(any_store, *numbers) == [bytes(frame(n, 17 * n + 1)) if n % 2 == 0 else None for n in numbers]
    assert any_store.contains([key(n) for n in numbers]) == [n % 2 == 0 for n in numbers]
    many = [key(n) for n in range(3000)]
    assert list(any_store.contains(many)) == [n < 100 and n % 2 == 0 for n in range(3000)]
    any_store.remove(many)
    assert not any(any_store.contains(many))


@pytest.mark.parametrize("excess", [1, 5000, 3 << 20])
def test_value_that_is_too_long_misses_alone_and_leaves_the_stream_in_step(
    any_store: RedisStore, shared: Redis, excess: int
) -> None:
    any_store.write([key(n) for n in range(3)], [frame(0), frame(1, 5000 + excess), frame(2)])
    before = shared.client.info("stats")["total_connections_received"]
    memory = bytearray(b"\x5a" * 15_100)
    views = [memoryview(memory)[5000 * n : 5000 * n + 5000] for n in range(3)]
    assert any_store.read([key(n) for n in range(3)], views) == [5000, None, 5000]
    assert memory[:5000] == frame(0)
    assert memory[10_000:15_000] == frame(2)
    assert memory[15_000:] == b"\x5a" * 100
    assert read(any_store, 2) == [bytes(frame(2))]
    assert shared.client.info("stats")["total_connections_received"] == before


def test_foreign_value_under_our_name_misses_alone(store: RedisStore, shared: Redis) -> None:
    store.write([key(1)], [frame(1)])
    shared.client.lpush(name_of(2), b"a list")
    assert read(store, 1, 2, 1) == [bytes(frame(1)), None, bytes(frame(1))]
    assert store.write([key(2)], [frame(2)]) == [True]
    assert read(store, 2) == [bytes(frame(2))]


def test_scan_names_our_keys_and_nobody_elses(shared: Redis) -> None:
    store = open_store({**shared.options, "prefix": "k[v]*?:"})
    store.write([key(n) for n in range(2500)], [frame(n, 1) for n in range(2500)])
    stem = b"k[v]*?:" + key(1).hex().encode()
    for foreign in (
        stem[:-2],
        stem + b"00",
        stem.upper(),
        stem[:-1] + b"g",
        b"kv:" + key(1).hex().encode(),
        b"x" * 9000,
    ):
        shared.client.set(foreign, b"not ours")
    shared.client.set(b"k[v]*?:" + b"y" * 9000, b"a name longer than we read")
    assert sorted(store.scan()) == sorted(key(n) for n in range(2500))
    store.close()


def test_prefixes_and_databases_keep_deployments_apart(shared: Redis) -> None:
    stores = [open_store({**shared.options, **each}) for each in ({}, {"prefix": "other:"}, {"path": "/4"})]
    stores[0].write([key(1)], [frame(1)])
    assert [list(store.contains([key(1)])) for store in stores] == [[True], [False], [False]]
    for store in stores:
        store.close()


def test_expired_block_is_a_miss(shared: Redis) -> None:
    store = open_store({**shared.options, "ttl_s": 0.2})
    assert store.write([key(1)], [frame(1)]) == [True]
    assert 0 < shared.client.pttl(name_of(1)) <= 200
    assert read(store, 1) == [bytes(frame(1))]
    eventually(lambda: store.contains([key(1)]) == [False])
    assert read(store, 1) == [None]
    store.close()


def test_full_server_declines_and_takes_again_what_fits(start: Callable[..., Redis]) -> None:
    redis = start("--maxmemory", "12mb", "--maxmemory-policy", "noeviction")
    store = open_store(redis.options)
    taken = list(store.write([key(n) for n in range(6)], [frame(n, 4 << 20) for n in range(6)]))
    assert taken[0]
    assert not taken[-1]
    assert list(store.contains([key(n) for n in range(6)])) == taken
    store.remove([key(n) for n in range(6)])
    eventually(lambda: list(store.write([key(1)], [frame(1)])) == [True])
    assert read(store, 1) == [bytes(frame(1))]
    store.close()


def test_user_who_may_not_write_reads(shared: Redis, redis_ways: dict[str, Any]) -> None:
    shared.client.acl_setuser(
        "reader", enabled=True, passwords=["+" + PASSWORD], keys=["kv:*"], commands=["+get", "+exists"]
    )
    shared.client.set(name_of(1), bytes(frame(1)))
    store = open_store({**shared.options, "user": "reader", "password": PASSWORD})
    with pytest.raises(StoreUnavailable, match="refuses SET with NOPERM") as refused:
        store.write([key(2)], [frame(2)])
    assert PASSWORD not in str(refused.value)
    assert read(store, 1) == [bytes(frame(1))]
    with pytest.raises(StoreUnavailable, match="refuses UNLINK with NOPERM"):
        store.remove([key(1)])
    with pytest.raises(StoreUnavailable, match="refuses SCAN with NOPERM"):
        list(store.scan())
    store.close()


def test_replica_refuses_writes_and_serves_reads(start: Callable[..., Redis]) -> None:
    redis = start()
    store = open_store(redis.options)
    store.write([key(1)], [frame(1)])
    redis.client.replicaof("127.0.0.1", "1")
    with pytest.raises(StoreUnavailable, match="refuses SET with READONLY"):
        store.write([key(2)], [frame(2)])
    assert read(store, 1) == [bytes(frame(1))]
    store.close()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"user": USER, "password": "wrong-" + PASSWORD}, "refuses AUTH with WRONGPASS; check user and password"),
        ({"user": "nobody", "password": "wrong-" + PASSWORD}, "refuses AUTH with WRONGPASS"),
        ({"password": "wrong-" + PASSWORD}, "refuses AUTH with ERR; check db, user and password"),
        ({"user": USER, "password": PASSWORD, "prefix": "elsewhere:"}, "refuses EXISTS with NOPERM; let the user do"),
        ({"path": "/9999"}, "refuses SELECT with ERR"),
        ({"cluster": True}, "is not in a cluster; write redis://"),
    ],
)
def test_start_names_what_is_configured_wrongly_and_no_password(
    shared: Redis, changed: dict[str, Any], says: str
) -> None:
    before = shared.connections
    with pytest.raises(ConfigError, match=says) as refused:
        open_store({**shared.options, **changed})
    chain: BaseException | None = refused.value
    while chain is not None:
        assert PASSWORD not in str(chain) + repr(chain)
        chain = chain.__cause__ or chain.__context__
    assert f"127.0.0.1:{shared.port}" in str(refused.value)
    eventually(lambda: shared.connections == before)


def test_missing_password_is_named(start: Callable[..., Redis]) -> None:
    redis = start("--requirepass", PASSWORD)
    with pytest.raises(ConfigError, match="refuses EXISTS with NOAUTH; give a user or a password"):
        open_store(redis.options)
    store = open_store({**redis.options, "password": PASSWORD})
    assert store.write([key(1)], [frame(1)]) == [True]
    assert PASSWORD not in repr(store)
    store.close()


def test_nobody_there_at_start_is_named_with_its_address(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(StoreUnavailable, match=f"redis at 127.0.0.1:{port} cannot be reached: Connection refused"):
        open_store({"host": "127.0.0.1", "port": port})
    with pytest.raises(StoreUnavailable, match=r"/no\.sock cannot be reached: No such file"):
        open_store({"path": str(tmp_path / "no.sock")}, name="unix")


def test_server_at_its_limit_of_clients_is_no_mistake_of_ours(start: Callable[..., Redis]) -> None:
    redis = start()
    redis.client.config_set("maxclients", 1)
    with pytest.raises(StoreUnavailable):
        open_store(redis.options)


def test_certificate_that_nobody_vouches_for_is_refused(redis_ways: dict[str, Any]) -> None:
    name, options = redis_ways["tls"]
    own = {each: value for each, value in options.items() if each != "ca_file"}
    with pytest.raises(ConfigError, match=r"certificate.*; give the certificate .* ca_file="):
        open_store(own, name=name)
    store = open_store({**own, "verify": False}, name=name)
    assert store.contains([key(1)]) == [False]
    store.close()


def test_client_shows_its_certificate(start: Callable[..., Redis], pems: dict[str, str]) -> None:
    (port,) = free_ports(1)
    files = ["--tls-ca-cert-file", pems["ca"], "--tls-cert-file", pems["cert"], "--tls-key-file", pems["key"]]
    start("--tls-port", str(port), "--tls-auth-clients", "yes", *files)
    options = {"host": "127.0.0.1", "port": port, "ca_file": pems["ca"]}
    with pytest.raises(StoreUnavailable):
        open_store(options, name="rediss")
    store = open_store({**options, "cert_file": pems["cert"], "key_file": pems["key"]}, name="rediss")
    assert store.write([key(1)], [frame(1)]) == [True]
    store.close()


def test_connections_are_few_and_named_and_end_with_the_store(shared: Redis) -> None:
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    store = open_store(shared.options)
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        for n in range(20):
            store.write([key(n)], [frame(n)])

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert 1 <= shared.connections <= store.capabilities.concurrency
    assert len(os.listdir("/proc/self/fd")) <= files + store.capabilities.concurrency
    store.close()
    store.close()
    eventually(lambda: shared.connections == 0)
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads
    with pytest.raises(StoreUnavailable, match="closed"):
        store.contains([key(1)])


def test_child_of_a_fork_is_refused_and_does_no_harm(store: RedisStore) -> None:
    store.write([key(1)], [frame(1)])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store.contains([key(1)])
        except StoreUnavailable:
            status = 0
        store.close()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert read(store, 1) == [bytes(frame(1))]


def test_opening_and_calls_take_no_longer_than_they_must(store: RedisStore) -> None:
    """The rest that a server gets after an outage is not taken without one."""
    started = time.monotonic()
    for _ in range(50):
        store.contains([key(1)])
    assert time.monotonic() - started < 2.0
