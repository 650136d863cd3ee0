"""The store on a real cluster of three: slots that move, and nodes that are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from kvconnect_redis import RedisStore

from kvconnect.errors import ConfigError, StoreUnavailable
from tests.remote.redis.servers import Cluster, Redis, eventually, frame, key, name_of, open_store, read

NUMBERS = range(60)
KEYS = [key(n) for n in NUMBERS]
FRAMES = [frame(n) for n in NUMBERS]


@pytest.fixture
def store(cluster: Cluster) -> Iterator[RedisStore]:
    opened = open_store(cluster.options, name="redis+cluster", timeout_s=5.0)
    yield opened
    opened.close()


def test_keys_are_spread_and_found(cluster: Cluster, store: RedisStore) -> None:
    assert store.write(KEYS, FRAMES) == [True] * 60
    assert [node.client.dbsize() > 0 for node in cluster.nodes] == [True] * 3
    assert sum(node.client.dbsize() for node in cluster.nodes) == 60
    assert read(store, *NUMBERS) == [bytes(each) for each in FRAMES]
    assert sorted(store.scan()) == sorted(KEYS)
    store.remove(KEYS)
    assert not any(store.contains(KEYS))


def test_single_connection_to_a_cluster_is_named(cluster: Cluster) -> None:
    said = []
    for node in cluster.nodes:
        try:
            open_store(node.options).close()
        except ConfigError as error:
            said.append(str(error))
    assert len(said) == 2, "the third has the slot that is looked at"
    assert all("it is in a cluster: write redis+cluster://" in each for each in said)


def move(cluster: Cluster, number: int, *, finish: bool) -> tuple[Redis, Redis]:
    """Begin to move a key's slot, or do all of it; return from where and where to."""
    source = cluster.owner(number)
    target = next(node for node in cluster.nodes if node is not source)
    slot = cluster.slot(number)
    ids = {node.port: node.client.execute_command("CLUSTER", "MYID").decode() for node in cluster.nodes}
    target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
    source.client.execute_command("MIGRATE", "127.0.0.1", target.port, name_of(number), 0, 5000)
    if finish:
        settle(cluster, number, target)
    return source, target


def settle(cluster: Cluster, number: int, target: Redis) -> None:
    """Give a slot to a node for good."""
    owner = target.client.execute_command("CLUSTER", "MYID").decode()
    for node in [target, *cluster.nodes]:
        node.client.execute_command("CLUSTER", "SETSLOT", cluster.slot(number), "NODE", owner)


def test_slot_on_its_way_is_asked_for_at_both_ends(cluster: Cluster, store: RedisStore) -> None:
    store.write(KEYS, FRAMES)
    source, target = move(cluster, 7, finish=False)
    assert cluster.owner(7) is source
    assert read(store, *NUMBERS) == [bytes(each) for each in FRAMES]
    assert store.contains([key(7)]) == [True]
    assert store.write([key(7)], [frame(7, 99)]) == [True]
    assert read(store, 7) == [bytes(frame(7, 99))]
    assert cluster.owner(7) is source, "all of this happened during the move"
    settle(cluster, 7, target)
    assert read(store, 7) == [bytes(frame(7, 99))]


def test_slot_that_has_moved_is_followed(cluster: Cluster, store: RedisStore) -> None:
    store.write(KEYS, FRAMES)
    _, target = move(cluster, 11, finish=True)
    assert cluster.owner(11) is target
    assert read(store, *NUMBERS) == [bytes(each) for each in FRAMES]
    assert store.write(KEYS, FRAMES) == [True] * 60
    assert target.client.execute_command("GET", name_of(11)) == bytes(frame(11))
    store.remove(KEYS)
    assert sum(node.client.dbsize() for node in cluster.nodes) == 0


def test_lost_node_loses_its_own_keys_only_and_is_found_again(cluster: Cluster, store: RedisStore) -> None:
    store.write(KEYS, FRAMES)
    lost = cluster.nodes[2]
    own = [cluster.owner(n) is lost for n in NUMBERS]
    assert 0 < sum(own) < 60
    lost.server.kill()
    try:
        started = time.monotonic()
        for _ in range(20):
            assert read(store, *NUMBERS) == [
                None if away else bytes(each) for away, each in zip(own, FRAMES, strict=True)
            ]
            assert store.contains(KEYS) == [not away for away in own]
        assert store.write(KEYS, FRAMES) == [not away for away in own]
        assert time.monotonic() - started < 5.0
        with pytest.raises(StoreUnavailable):
            read(store, *[n for n in NUMBERS if own[n]])
        with pytest.raises(StoreUnavailable):
            store.remove(KEYS)
    finally:
        lost.server.start()
    eventually(lambda: store.write(KEYS, FRAMES) == [True] * 60)
    assert read(store, *NUMBERS) == [bytes(each) for each in FRAMES]
    eventually(cluster.whole)


def test_configured_node_is_needed_at_start_only(cluster: Cluster, store: RedisStore) -> None:
    store.write(KEYS, FRAMES)
    seed = cluster.nodes[0]
    own = [cluster.owner(n) is seed for n in NUMBERS]
    target = next(node for node in cluster.nodes if node is not seed)
    seed.server.kill()
    try:
        assert [each is None for each in read(store, *NUMBERS)] == own
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{seed.port} cannot be reached"):
            open_store(cluster.options, name="redis+cluster", timeout_s=2.0)
        other = open_store(target.options, name="redis+cluster", timeout_s=5.0)
        assert [each is None for each in read(other, *NUMBERS)] == own
        other.close()
    finally:
        seed.server.start()
        eventually(cluster.whole)
