"""Blocks in an object store that speaks S3: ``s3://bucket/prefix``. Many machines share them, cheap and large."""

from typing import Any

from kvconnect.protocol import hookimpl
from kvconnect_s3.store import S3Options, S3Store

__all__ = ["S3Options", "S3Store", "kvconnect_register"]


@hookimpl
def kvconnect_register(registry: Any) -> None:
    """Register ``s3``."""
    registry.add("s3", "kvconnect_s3:S3Store")
