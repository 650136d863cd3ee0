"""A cluster of three nodes: keys find their way while slots move, and a lost node takes only its own with it."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time

import pytest
from kvconnect_redis.wire import Lost, Refusal, Wire
from redis.crc import key_slot

from kvconnect.errors import StoreUnavailable
from tests.remote.faults.load import wait_until
from tests.remote.faults.redis_server import RedisCluster, RedisServer
from tests.remote.redis.conftest import OpenStore
from tests.remote.redis.servers import name_of
from tests.remote.redis.test_open import QUOTED, rights
from tests.remote.s3.blocks import frame, key, read, write

BACK_S = 10.0
NUMBERS = range(120)


def url(cluster: RedisCluster, number: int = 0) -> str:
    return f"redis+cluster://127.0.0.1:{cluster.masters[number].port}"


def home(cluster: RedisCluster, number: int) -> RedisServer:
    """Return the node that a block is on when no slot has moved."""
    share = 16_384 / len(cluster.masters)
    return next(node for i, node in enumerate(cluster.masters) if key_slot(name_of(number)) < round((i + 1) * share))


def of_one_slot() -> tuple[int, int]:
    """Return the numbers of two blocks whose keys have the same slot."""
    seen: dict[int, int] = {}
    for number in itertools.count(1000):
        slot = key_slot(name_of(number))
        if slot in seen:
            return seen[slot], number
        seen[slot] = number
    raise AssertionError("numbers do not end")


def moved_replies(node: RedisServer) -> int:
    """Return how often a node has sent somebody elsewhere."""
    found = node.do("INFO", "errorstats").get("errorstat_MOVED", {"count": 0})
    return int(found["count"])


def test_each_node_has_its_share_of_a_batch(cluster: RedisCluster, opened: OpenStore) -> None:
    store = opened(url(cluster))
    write(store, *NUMBERS)
    for node in cluster.masters:
        assert set(node.do("KEYS", "*")) == {name_of(number) for number in NUMBERS if home(cluster, number) is node}
        assert node.do("DBSIZE") > 10
    order = [*reversed(NUMBERS), 500, *NUMBERS[::7], 501]
    wanted = [frame(number) if number < 500 else None for number in order]
    assert read(store, *order) == wanted
    assert store.contains([key(number) for number in order]) == [each is not None for each in wanted]
    assert sorted(store.scan()) == sorted(key(number) for number in NUMBERS)
    store.remove([key(number) for number in NUMBERS])
    assert [node.do("DBSIZE") for node in cluster.masters] == [0, 0, 0]


def test_prefix_with_a_tag_puts_all_on_one_node(cluster: RedisCluster, opened: OpenStore) -> None:
    """As the cluster's own rule for braces says."""
    store = opened(url(cluster), prefix="{kv}:")
    write(store, *range(30))
    assert sorted(node.do("DBSIZE") for node in cluster.masters) == [0, 0, 30]
    assert read(store, *range(30)) == [frame(number) for number in range(30)]


def test_slots_that_have_moved_are_found_and_then_known(cluster: RedisCluster, opened: OpenStore) -> None:
    store = opened(url(cluster))
    write(store, *NUMBERS)
    source, sink = cluster.masters[0], cluster.masters[2]
    slots = sorted({key_slot(name) for name in source.do("KEYS", "*")})[:5]
    for slot in slots:
        source.migrate(slot, sink)
    try:
        before = moved_replies(source)
        assert read(store, *NUMBERS) == [frame(number) for number in NUMBERS]
        assert moved_replies(source) > before, "nothing had moved"
        write(store, *NUMBERS, size=100)
        assert read(store, *NUMBERS) == [frame(number, 100) for number in NUMBERS]

        def knows() -> bool:
            before = moved_replies(source)
            assert read(store, *NUMBERS) == [frame(number, 100) for number in NUMBERS]
            return moved_replies(source) == before

        wait_until(knows, BACK_S, "nobody who is sent elsewhere")
        assert sorted(store.scan()) == sorted(key(number) for number in NUMBERS)
    finally:
        for slot in slots:
            sink.migrate(slot, source)
    assert read(store, *NUMBERS) == [frame(number, 100) for number in NUMBERS]


def test_slot_in_the_middle_of_a_migration(cluster: RedisCluster, opened: OpenStore) -> None:
    """Of its two keys one is here and one there; whoever has the rights of docs/security.md finds both."""
    stays, goes = of_one_slot()
    slot = key_slot(name_of(stays))
    source = home(cluster, stays)
    sink = next(node for node in cluster.masters if node is not source)
    for node in cluster.masters:
        node.do(*rights(cluster=True))
        node.do("ACL", "LOG", "RESET")
    store = opened(url(cluster).replace("//", f"//kv:{QUOTED}@"))
    write(store, stays, goes, *NUMBERS)
    sink.do("CLUSTER", "SETSLOT", slot, "IMPORTING", source.node_id)
    source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", sink.node_id)
    source.do("MIGRATE", "127.0.0.1", sink.port, name_of(goes), 0, 5000)
    try:
        order = [5, goes, 6, stays, 7, goes]
        assert read(store, *order) == [frame(number) for number in order]
        assert store.contains([key(number) for number in order]) == [True] * 6
        write(store, stays, goes, 6, size=99)
        assert name_of(goes) in sink.do("KEYS", "*")
        assert name_of(stays) in source.do("KEYS", "*")
        assert read(store, stays, goes, 6) == [frame(stays, 99), frame(goes, 99), frame(6, 99)]
        store.remove([key(goes)])
        assert read(store, stays, goes) == [frame(stays, 99), None]
        assert [node.do("ACL", "LOG") for node in cluster.masters] == [[], [], []]
    finally:
        source.migrate(slot, sink)
        sink.migrate(slot, source)
        for node in cluster.masters:
            node.do("ACL", "DELUSER", "kv")


@pytest.mark.parametrize("number", [0, 2], ids=["the node of the URL", "another node"])
def test_dead_node_takes_only_its_own_keys_with_it(cluster: RedisCluster, opened: OpenStore, number: int) -> None:
    store = opened(url(cluster), timeout_s=2.0)
    write(store, *NUMBERS)
    dead = cluster.masters[number]
    lost = [n for n in NUMBERS if home(cluster, n) is dead]
    dead.kill()
    try:
        wanted = [None if n in lost else frame(n) for n in NUMBERS]
        for _ in range(3):
            started = time.monotonic()
            assert read(store, *NUMBERS) == wanted
            assert time.monotonic() - started < 3.0
        assert store.contains([key(n) for n in NUMBERS]) == [each is not None for each in wanted]
        frames = [memoryview(frame(n)) for n in NUMBERS]
        assert store.write([key(n) for n in NUMBERS], frames) == [n not in lost for n in NUMBERS]
        assert read(store, *lost[:3]) == [None] * 3
        with pytest.raises(StoreUnavailable):
            store.remove([key(lost[0])])
        with pytest.raises(StoreUnavailable):
            list(store.scan())
        later = opened(url(cluster, 1), timeout_s=2.0)
        assert read(later, *NUMBERS) == wanted
    finally:
        dead.start()
        wait_until(cluster.settled, 20.0, "a cluster")

    def back() -> bool:
        return store.write([key(n) for n in NUMBERS], frames) == [True] * len(NUMBERS)

    wait_until(back, BACK_S, "a cluster that takes everything")
    assert read(store, *NUMBERS) == [frame(n) for n in NUMBERS]


def test_what_came_before_a_node_was_lost_has_come(
    cluster: RedisCluster, opened: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(url(cluster))
    write(store, *NUMBERS)
    lost = [n for n in NUMBERS if home(cluster, n) is cluster.masters[1]]
    came = 0

    def reply_into(self: Wire, buffer: memoryview) -> int | Refusal | None:
        nonlocal came
        if f":{cluster.masters[1].port}" in self.where:
            came += 1
            if came > 5:  # a server cannot be made to die at a certain reply
                raise Lost("away")
        return received(self, buffer)

    received = Wire.reply_into
    monkeypatch.setattr(Wire, "reply_into", reply_into)
    told: list[tuple[int, int | None]] = []
    buffers = [bytearray(5000) for _ in NUMBERS]
    store.read_each(
        [key(n) for n in NUMBERS],
        [memoryview(buffer) for buffer in buffers],
        lambda index, length: told.append((index, length)),
    )
    assert sorted(told) == [(n, None if n in lost[5:] else 5000) for n in NUMBERS]
    assert all(buffers[n] == frame(n) for n, length in told if length)


def test_cluster_that_does_not_answer_at_all_is_an_outage(cluster: RedisCluster, opened: OpenStore) -> None:
    store = opened(url(cluster), brief_s=0.5)
    write(store, *NUMBERS)
    for node in cluster.masters:
        node.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            read(store, *NUMBERS)
        assert time.monotonic() - started < 1.5
    finally:
        for node in cluster.masters:
            node.signal(signal.SIGCONT)
    wait_until(cluster.settled, 20.0, "a cluster")

    def back() -> bool:
        with contextlib.suppress(StoreUnavailable):
            return read(store, *NUMBERS) == [frame(n) for n in NUMBERS]
        return False

    wait_until(back, BACK_S, "hits")
