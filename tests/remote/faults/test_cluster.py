"""A Redis Cluster loses a node, fails over and moves slots under a steady load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from tests.remote.faults.conftest import OpenLoad
from tests.remote.faults.load import Load
from tests.remote.faults.redis_server import RedisCluster
from tests.remote.faults.test_redis import BACK_S

_MASTERS = 3


@pytest.fixture(params=[False, True], ids=["others answer", "nobody answers"])
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path, _MASTERS, covers_all=request.param) as cluster:
        yield cluster


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path, _MASTERS, replicated=True) as cluster:
        yield cluster


def load_on(cluster: RedisCluster, open_load: OpenLoad, **options: Any) -> Load:
    nodes = len(cluster.masters) + len(cluster.replicas)
    return open_load(f"redis+cluster://127.0.0.1:{cluster.masters[0].port}", connection_sockets=nodes, **options)


@pytest.mark.parametrize("number", [0, 2], ids=["the node of the URL", "another node"])
def test_node_killed_and_started_again(
    cluster: RedisCluster, open_load: OpenLoad, number: int, request: pytest.FixtureRequest
) -> None:
    """Its blocks are computed; those of the others are loaded, unless the cluster wants all of its nodes."""
    load = load_on(cluster, open_load)
    load.warm()
    before = load.rest()
    node = cluster.masters[number]
    load.run_into_promotion()
    node.kill()
    if "others answer" in request.node.name:
        load.hits_come_back(BACK_S)
        load.run_for(2.0)
        load.hits_come_back(BACK_S)
    else:
        load.run_until(lambda: not cluster.settled(), 10.0, "a cluster that is down")
        load.run_for(1.0)
    node.start()
    load.run_until(cluster.settled, 20.0, "a cluster")
    load.hits_come_back(BACK_S)
    load.run_until(lambda: bool(node.do("DBSIZE")), BACK_S, "a block on the node that was lost")
    load.rests_as(before)


def test_replica_takes_over(replicated: RedisCluster, open_load: OpenLoad) -> None:
    """Nothing is started again, and hits come back on every slot."""
    load = load_on(replicated, open_load)
    load.warm()
    before = load.rest()
    lost, heir = replicated.masters[1], replicated.replicas[1]
    load.run_into_promotion()
    lost.kill()
    load.run_until(lambda: heir.do("INFO", "replication")["role"] == "master", 20.0, "an heir")
    load.hits_come_back(BACK_S)
    heir.do("FLUSHALL")
    load.run_until(lambda: bool(heir.do("DBSIZE")), BACK_S, "a block on the heir")
    load.rests_as(before)


def test_slots_moved(cluster: RedisCluster, open_load: OpenLoad) -> None:
    """From node to node and back while they are read: nobody's fault, so nothing fails and nothing is lost."""
    load = load_on(cluster, open_load, timeout_s=10.0)  # a busy machine is no fault
    load.warm()
    before = load.rest()
    failures, demoted, promoted = load.num_failures, load.demoted, load.promoted
    moved = [0]

    def reshard() -> None:
        for source, sink in ((0, 1), (1, 2), (2, 0)):
            names = cluster.masters[source].frames()
            for slot in sorted({key_slot(name) for name in names}):
                cluster.masters[source].migrate(slot, cluster.masters[sink])
                moved[0] += 1

    mover = threading.Thread(target=reshard, name="test-mover")
    mover.start()
    load.run_until(lambda: not mover.is_alive(), 30.0, "all slots moved")
    mover.join()
    load.hits_come_back(BACK_S)
    assert moved[0] >= 48
    assert load.promoted - promoted > 48
    assert load.num_failures == failures, load.failures
    assert load.demoted == demoted, "blocks were lost and computed again"
    load.rests_as(before)
