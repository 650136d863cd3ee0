"""Blocks in the memory pool of a Mooncake Store: ``mooncake://master:50051``. Many machines share them."""

from typing import Any

from kvconnect.protocol import hookimpl
from kvconnect_mooncake.store import MooncakeOptions, MooncakeStore

__all__ = ["MooncakeOptions", "MooncakeStore", "kvconnect_register"]


@hookimpl
def kvconnect_register(registry: Any) -> None:
    """Register ``mooncake``."""
    registry.add("mooncake", "kvconnect_mooncake:MooncakeStore")
