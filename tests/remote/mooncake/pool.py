"""A real Mooncake master and a process that gives it memory; what an independent client finds there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore
from kvconnect.testing.promise import not_here
from tests.remote.processes import Server, free_ports, listens, needs_program

__all__ = ["LEASE_S", "Client", "Pool", "buffer_of", "name_of", "needs_mooncake"]

LEASE_S = 0.2
_PROVIDER = Path(__file__).with_name("provider.py")


def needs_mooncake() -> None:
    """Skip, for the environment's sake, unless Mooncake's master and its client library are installed."""
    needs_program("mooncake_master")
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        if os.environ.get("KVCONNECT_NEEDS_REMOTE"):
            raise
        not_here(f"mooncake cannot be imported: {error}")


def name_of(key: BlockKey) -> str:
    """Return what an object is called under the default prefix."""
    return f"kv:{key.hex()}"


class Pool:
    """A master and one provider; a context manager that kills both.

    Attributes:
        port: The master's.
        master: Its process.
        provider: The process that gives memory.
    """

    def __init__(self, folder: Path, size: int = 512 << 20) -> None:
        """Start both; `size` bytes of memory."""
        self.port, metrics = free_ports(2)
        self.master = Server(
            [
                "mooncake_master",
                f"--rpc_port={self.port}",
                f"--metrics_port={metrics}",
                "--rpc_address=127.0.0.1",
                "--metrics_host=127.0.0.1",
                f"--default_kv_lease_ttl={LEASE_S * 1000:.0f}",  # `remove` waits for leases; 10 s by default
            ],
            folder / "master.log",
            lambda: listens(self.port),
        )
        self._log = folder / "provider.log"
        try:
            self.provider = Server(
                [sys.executable, str(_PROVIDER), str(self.port), str(size)], self._log, self._provides
            )
        except BaseException:
            self.master.kill()
            raise
        self._starts = 1

    @property
    def url(self) -> str:
        """What ``connector=`` takes."""
        return f"mooncake://127.0.0.1:{self.port}"

    def provide_again(self) -> None:
        """Start a provider in the place of one that was killed; it has none of its objects."""
        self._starts += 1
        self.provider.start()

    def _provides(self) -> bool:
        starts = getattr(self, "_starts", 1)
        return self._log.read_text("utf-8", "replace").count("provides") >= starts

    def __enter__(self) -> Pool:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill both."""
        self.provider.kill()
        self.master.kill()


class Client:
    """Mooncake's own client, to look at what a store did; a context manager."""

    def __init__(self, pool: Pool) -> None:
        """Set it up."""
        from mooncake.store import MooncakeDistributedStore

        self.raw: Any = MooncakeDistributedStore()
        code = self.raw.setup("127.0.0.1", "P2PHANDSHAKE", 0, 32 << 20, "tcp", "", f"127.0.0.1:{pool.port}")
        assert code == 0

    def get(self, key: BlockKey) -> bytes:
        """Return an object's bytes, none if it is not there."""
        found: bytes = self.raw.get(name_of(key))
        return found

    def __enter__(self) -> Client:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.raw.close()


def buffer_of(size: int) -> npt.NDArray[np.uint8]:
    """Return writable bytes that stay where they are."""
    return np.full(size, 0xA5, np.uint8)


def read_one(store: BlockStore, key: BlockKey, size: int) -> bytes | None:
    """Read one key into fresh memory; None for a miss."""
    memory = bytearray(size)
    (length,) = store.read([key], [memoryview(memory)])
    return None if length is None else bytes(memory[:length])
