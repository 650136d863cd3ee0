"""Blocks as files in a folder: ``disk:///var/cache/kv?capacity=200GiB``. Survives restarts; processes may share it."""

from typing import Any

from kvconnect.protocol import hookimpl
from kvconnect_disk.store import DiskOptions, DiskStore

__all__ = ["DiskOptions", "DiskStore", "kvconnect_register"]


@hookimpl
def kvconnect_register(registry: Any) -> None:
    """Register ``disk``, also as ``file``."""
    registry.add("disk", "kvconnect_disk:DiskStore", schemes=("file",))
