"""Fixtures: one server with every way in, new ones for tests that hurt them, and a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.remote.processes import free_ports, needs_program
from tests.remote.redis.servers import (
    PASSWORD,
    RIGHTS,
    USER,
    Cluster,
    Redis,
    Rubbish,
    certificates,
)


@pytest.fixture(scope="session")
def pems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of an authority, and of a certificate and key that are good for both sides."""
    needs_program("openssl")
    return certificates(tmp_path_factory.mktemp("pems"))


@pytest.fixture(scope="session")
def redis_ways(tmp_path_factory: pytest.TempPathFactory, pems: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One server; what to open it with, by way: ``plain``, ``user``, ``tls`` and ``socket``."""
    needs_program("redis-server")
    folder = tmp_path_factory.mktemp("redis")
    port, tls_port = free_ports(2)
    socket_path = str(folder / "sock")
    arguments = ["--unixsocket", socket_path, "--tls-port", str(tls_port), "--tls-auth-clients", "no"]
    arguments += ["--tls-ca-cert-file", pems["ca"], "--tls-cert-file", pems["cert"], "--tls-key-file", pems["key"]]
    arguments += ["--user", USER, "on", f">{PASSWORD}", *RIGHTS.split()]
    with Redis(folder, *arguments, port=port) as redis:
        yield {
            "plain": ("redis", redis.options),
            "user": ("redis", {**redis.options, "user": USER, "password": PASSWORD}),
            "tls": ("rediss", {"host": "127.0.0.1", "port": tls_port, "ca_file": pems["ca"]}),
            "socket": ("unix", {"path": socket_path}),
            "redis": redis,
        }


@pytest.fixture
def shared(redis_ways: dict[str, Any]) -> Redis:
    """The server that everybody uses, emptied."""
    redis: Redis = redis_ways["redis"]
    redis.client.flushall()
    return redis


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Redis]]:
    """Start servers of this test's own, with more arguments."""
    needs_program("redis-server")
    with ExitStack() as servers:
        yield lambda *arguments: servers.enter_context(Redis(tmp_path / f"redis{id(arguments)}", *arguments))


@pytest.fixture(scope="session")
def cluster_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; about four seconds."""
    needs_program("redis-server", "redis-cli")
    with ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), stack)
        yield cluster


@pytest.fixture
def cluster(cluster_nodes: Cluster) -> Cluster:
    """The cluster, emptied."""
    for node in cluster_nodes.nodes:
        node.client.flushall()
    return cluster_nodes


@pytest.fixture
def rubbish() -> Iterator[Rubbish]:
    """A peer that speaks rubbish."""
    with Rubbish() as peer:
        yield peer
