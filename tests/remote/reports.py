"""Writes the reports of the remote stores' conformance into `docs/conformance`, over servers of its own.

Run it by ``python -m tests.remote.reports``, with `.venv/bin` in the path.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.remote.conformance import run_kits
from tests.remote.faults.redis_server import RedisServer
from tests.remote.mooncake.pool import Pool
from tests.remote.processes import Server, free_ports
from tests.remote.s3.gateways import ACCESS_KEY, SECRET_KEY, Place

__all__ = ["main"]

REPORTS = Path(__file__).parents[2] / "docs" / "conformance"


def main() -> int:
    """Write all three; return 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with RedisServer(folder) as server:
            print("redis", run_kits("redis", {"host": "127.0.0.1", "port": server.port}, REPORTS / "redis.json"))
        with Pool(folder) as pool:
            options = {"host": "127.0.0.1", "port": pool.port}
            print("mooncake", run_kits("mooncake", options, REPORTS / "mooncake.json"))
        (gateway,) = free_ports(1)
        command = ["bash", str(Path(__file__).with_name("ceph.sh")), str(folder / "ceph"), str(gateway)]
        with Server(command, folder / "ceph.log", (folder / "ceph" / "ready").exists, start_s=120.0):
            place = Place(f"http://127.0.0.1:{gateway}")
            bucket = {"host": place.bucket, "endpoint": place.endpoint, "region": "us-east-1"}
            credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
            print("s3", run_kits("s3", bucket, REPORTS / "s3.json", credentials))
    return 0


if __name__ == "__main__":
    sys.exit(main())
