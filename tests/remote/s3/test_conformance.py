"""All kits, over a real gateway."""

from __future__ import annotations

from pathlib import Path

from tests.remote.conformance import run_kits
from tests.remote.s3.gateways import ACCESS_KEY, SECRET_KEY, Place


def test_every_promise_of_the_kits_is_kept(ceph: Place, tmp_path: Path) -> None:
    options = {"host": ceph.bucket, "path": "kits", "endpoint": ceph.endpoint, "region": "us-east-1"}
    credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    found = run_kits("s3", options, tmp_path / "report.json", credentials)
    assert found["kept"] > 200
    assert found["broken"] == 0
