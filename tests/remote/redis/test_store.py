"""What the store does with a healthy server, seen by redis-py's own client."""

from __future__ import annotations

import os
import random
import threading

import pytest

from kvconnect.errors import StoreUnavailable
from kvconnect.store import BlockStore
from tests.remote.faults.load import wait_until
from tests.remote.faults.redis_server import RedisCluster, RedisServer
from tests.remote.redis.conftest import OpenStore
from tests.remote.redis.servers import Doors, Held, name_of, open_store
from tests.remote.s3.blocks import frame, key, read, write

PREFIXES = ["kv:", "", "a*b?[c]\\é: ", "{same}"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_and_values_are_what_the_format_says(server: Doors, opened: OpenStore, prefix: str) -> None:
    store = opened(server.url, prefix=prefix)
    write(store, 1, 2)
    assert set(server.do("KEYS", "*")) == {name_of(1, prefix), name_of(2, prefix)}
    assert server.do("GET", name_of(1, prefix)) == frame(1)
    server.do("SET", name_of(3, prefix), b"from elsewhere")
    assert read(store, 3, 1) == [b"from elsewhere", frame(1)]
    store.remove([key(1)])
    assert set(server.do("KEYS", "*")) == {name_of(2, prefix), name_of(3, prefix)}


def test_database_is_the_one_that_was_asked_for(server: Doors, opened: OpenStore) -> None:
    write(opened(server.url + "/2"), 1)
    write(opened(server.url, db=3), 1)
    write(opened(server.socket_url, db=4), 1)
    kept = server.do("INFO", "keyspace")
    assert {name: each["keys"] for name, each in kept.items()} == {"db2": 1, "db3": 1, "db4": 1}


def test_connections_have_a_name(server: Doors, opened: OpenStore) -> None:
    opened(server.url)
    opened(server.url, client_name="engine-7")
    clients = server.do("CLIENT", "LIST").decode()
    assert " name=kvconnect " in clients
    assert " name=engine-7 " in clients


def test_blocks_expire_only_if_told_to(server: Doors, opened: OpenStore) -> None:
    write(opened(server.url), 1)
    brief = opened(server.url, ttl_s=7.5)
    write(brief, 2)
    assert server.do("PTTL", name_of(1)) == -1
    assert 6000 < server.do("PTTL", name_of(2)) <= 7500
    server.do("PEXPIRE", name_of(2), 100)
    write(brief, 2)
    assert server.do("PTTL", name_of(2)) > 6000, "the time is counted from the last write"


def test_expired_block_is_a_miss(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url, ttl_s=0.05)
    write(store, 1)
    wait_until(lambda: not server.do("EXISTS", name_of(1)), 5.0, "expiry")
    assert read(store, 1) == [None]
    assert store.contains([key(1)]) == [False]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_scan_names_blocks_of_its_own_prefix_only(server: Doors, opened: OpenStore, prefix: str) -> None:
    store = opened(server.url, prefix=prefix)
    write(store, *range(5))
    digits = key(9).hex()
    others = [digits[:-1], digits + "0", digits.upper(), "zz" * 72, "٣" * 144, digits[:-2] + " 1"]
    names = [(prefix + other).encode() for other in others]
    names += [other.encode() + digits.encode() for other in ("aXbYc\\é: ", "KV:", "kv:kv:", "\n")]
    for name in names:
        server.do("SET", name, b"x")
    found = list(store.scan())
    assert sorted(found) == sorted(key(number) for number in range(5))


def test_scan_names_every_block_once(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url)
    count = 3500
    write(store, *range(count), size=1)
    found = list(store.scan())
    assert len(found) == count
    assert set(found) == {key(number) for number in range(count)}


def test_blocks_that_come_and_go_do_not_disturb_a_scan(server: Doors, opened: OpenStore) -> None:
    """Those that are there all the while are named, once, while the table grows."""
    store = opened(server.url)
    write(store, *range(2000), size=1)
    scan = store.scan()
    found = [next(scan)]
    write(store, *range(2000, 5000), size=1)
    found += scan
    assert len(found) == len(set(found))
    assert set(found) >= {key(number) for number in range(2000)}


@pytest.mark.parametrize("door", ["url", "tls_url", "socket_url"])
@pytest.mark.parametrize("size", [1, 20 << 20])
def test_values_of_any_size(server: Doors, opened: OpenStore, door: str, size: int) -> None:
    store = opened(getattr(server, door))
    sent = random.Random(size).randbytes(size)
    assert store.write([key(1)], [memoryview(sent)]) == [True]
    assert server.do("GET", name_of(1)) == sent
    buffer = bytearray(size)
    assert store.read([key(1)], [memoryview(buffer)]) == [size]
    assert buffer == sent


def test_empty_value_is_no_bytes(server: Doors, opened: OpenStore) -> None:
    server.do("SET", name_of(1), b"")
    assert read(opened(server.url), 1) == [b""]


@pytest.mark.parametrize("door", ["url", "tls_url", "socket_url"])
@pytest.mark.parametrize("size", [8193, 12_000, 3 << 20])
def test_value_longer_than_its_buffer_is_a_miss_and_its_neighbours_come_right(
    server: Doors, opened: OpenStore, door: str, size: int
) -> None:
    store = opened(getattr(server, door))
    write(store, 1, 3)
    server.do("SET", name_of(2), b"$5\r\n" * (size // 4) + b"+" * (size % 4))
    assert read(store, 1, 2, 3, 2, 1) == [frame(1), None, frame(3), None, frame(1)]
    assert read(store, 3) == [frame(3)]


def test_memory_behind_and_around_is_left_alone(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url)
    write(store, 1)
    memory = memoryview(bytearray(b"\x5a" * 20_000))
    assert store.read([key(1), key(1)], [memory[1000:1100], memory[2000:9000]]) == [None, 5000]
    assert memory[2000:7000] == frame(1)
    assert set(memory[:1000]) | set(memory[1100:2000]) | set(memory[7000:]) == {0x5A}


def test_something_else_under_our_name_is_a_miss_until_it_is_overwritten(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url)
    write(store, 1, 3)
    server.do("LPUSH", name_of(2), b"a list")
    assert read(store, 1, 2, 3) == [frame(1), None, frame(3)]
    write(store, 2)
    assert server.do("GET", name_of(2)) == frame(2)


def test_thousands_of_keys_in_one_call(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url)
    numbers = range(3000)
    write(store, *numbers[::2], size=100)
    assert store.contains([key(n) for n in numbers]) == [n % 2 == 0 for n in numbers]
    assert read(store, *numbers, size=128) == [frame(n, 100) if n % 2 == 0 else None for n in numbers]
    store.remove([key(n) for n in numbers])
    assert server.do("DBSIZE") == 0


def test_keys_that_come_twice(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url)
    assert store.write([key(1), key(2), key(1)], [memoryview(x) for x in (b"first", b"other", b"last")]) == [True] * 3
    assert server.do("GET", name_of(1)) == b"last"
    assert read(store, 1, 2, 1, 1) == [b"last", b"other", b"last", b"last"]
    store.remove([key(1), key(1), key(9)])
    assert store.contains([key(1), key(2), key(1)]) == [False, True, False]


def test_evicted_block_is_a_miss(own_server: RedisServer, opened: OpenStore) -> None:
    store = opened(f"redis://127.0.0.1:{own_server.port}")
    own_server.do("CONFIG", "SET", "maxmemory", 12 << 20, "maxmemory-policy", "allkeys-lru")
    numbers = range(40)
    for number in numbers:
        write(store, number, size=500_000)
    found = read(store, *numbers, size=500_000)
    assert 0 < found.count(None) < 40
    assert all(each in (None, frame(number, 500_000)) for number, each in zip(numbers, found, strict=True))
    names = set(own_server.do("KEYS", "*"))  # reading takes memory too, for which the server evicts
    assert store.contains([key(number) for number in numbers]) == [name_of(number) in names for number in numbers]


def test_full_server_declines_and_is_read_all_the_same(own_server: RedisServer, opened: OpenStore) -> None:
    store = opened(f"redis://127.0.0.1:{own_server.port}")
    write(store, 1)
    own_server.do("CONFIG", "SET", "maxmemory", 1, "maxmemory-policy", "noeviction")
    frames = [memoryview(frame(number, 200_000)) for number in (2, 3)]
    assert store.write([key(2), key(3)], frames) == [False, False]
    assert read(store, 1, 2) == [frame(1), None]
    own_server.do("CONFIG", "SET", "maxmemory", 0)
    assert store.write([key(2), key(3)], frames) == [True, True]


def test_many_threads_use_one_store(server: Doors, opened: OpenStore) -> None:
    store = opened(server.url)
    wrong: list[object] = []

    def work(own: int) -> None:
        numbers = range(own * 100, own * 100 + 20)
        try:
            for size in range(1000, 41_000, 4000):
                write(store, *numbers, size=size)
                if read(store, *numbers, size=41_000) != [frame(n, size) for n in numbers]:
                    wrong.append((own, size))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.num_clients() <= store.capabilities.concurrency, "at rest it keeps no more than run at once"


@pytest.mark.parametrize(("door", "times"), [("url", 30), ("tls_url", 10), ("socket_url", 30)])
def test_opening_and_closing_leaves_nothing(server: Doors, door: str, times: int) -> None:
    def once() -> None:
        store = open_store(getattr(server, door))
        write(store, 1)
        store.close()

    once()
    before = Held.now()
    clients = server.num_clients()
    for _ in range(times):
        once()
    assert Held.now() == before
    wait_until(lambda: server.num_clients() <= clients, 5.0, lambda: f"{server.num_clients()} clients")


def calls_raise(store: BlockStore, what: str) -> None:
    """See that every call raises `what`."""
    memory = memoryview(bytearray(10))
    for call in (
        lambda: store.contains([key(1)]),
        lambda: store.read([key(1)], [memory]),
        lambda: store.write([key(1)], [memory]),
        lambda: store.remove([key(1)]),
        lambda: list(store.scan()),
    ):
        with pytest.raises(StoreUnavailable, match=what):
            call()


def test_closed_store_refuses_calls(server: Doors) -> None:
    store = open_store(server.url)
    write(store, 1)
    store.close()
    store.close()
    calls_raise(store, "closed")


def test_closed_store_refuses_calls_on_a_cluster(cluster: RedisCluster) -> None:
    store = open_store(f"redis+cluster://127.0.0.1:{cluster.masters[0].port}")
    write(store, *range(9))
    store.close()
    store.close()
    calls_raise(store, "closed")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that forking threads is a risk is known
def test_forked_child_is_refused(server: Doors, opened: OpenStore) -> None:
    """And what it tries does not put the parent's connection out of step."""
    store = opened(server.url)
    write(store, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            calls_raise(store, "fork")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(store, 1) == [frame(1)]
