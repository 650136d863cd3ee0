"""Fixtures: a quick stand-in for S3 (moto), and a real gateway (Ceph)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.remote.processes import Server, free_ports, listens, needs_program
from tests.remote.s3.gateways import Place, Proxy


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A moto server: answers like S3, in one process; it checks no signatures, and its conditional puts can race."""
    needs_program("moto_server")
    (port,) = free_ports(1)
    command = ["moto_server", "-H", "127.0.0.1", "-p", str(port)]
    log = tmp_path_factory.mktemp("moto") / "log"
    with Server(command, log, lambda: listens(port)) as server:
        yield server


@pytest.fixture(scope="session")
def ceph_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real gateway; about 15 seconds."""
    needs_program("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "setpriv")
    while True:
        (port,) = free_ports(1)
        if not listens(port + 1) and not listens(port + 2):
            break
    folder = tmp_path_factory.mktemp("ceph")
    script = Path(__file__).parents[1] / "ceph.sh"
    command = ["bash", str(script), str(folder / "cluster"), str(port)]
    with Server(command, folder / "log", (folder / "cluster" / "ready").exists, start_s=120.0):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def place(moto: Server) -> Place:
    """A new bucket in moto."""
    return Place(f"http://127.0.0.1:{moto.command[-1]}")


@pytest.fixture
def ceph(ceph_endpoint: str) -> Place:
    """A new bucket in Ceph."""
    return Place(ceph_endpoint)


@pytest.fixture
def proxy(place: Place) -> Iterator[Proxy]:
    """A proxy in front of moto."""
    with Proxy(place.endpoint) as opened:
        yield opened
