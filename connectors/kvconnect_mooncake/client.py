"""One Mooncake client, from its setup to its end: what it is told, how long it may take, who may still call it.

Mooncake's native client crashes the process when it is used after its close or without a setup that worked, so nobody
gets at it but through `MooncakeClient.calling`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from kvconnect.errors import Closed, ConfigError, StoreUnavailable
from kvconnect.options import ByteSize, Options
from kvconnect.store import StoreContext

__all__ = ["MooncakeClient", "MooncakeOptions"]

# A call makes up to three round trips to the master beside its transfer, and setting up tries three ports.
_CALLS = 4
_TRIES = 3

_environment = threading.Lock()


class MooncakeOptions(Options, frozen=True):
    """Options of ``mooncake://``.

    Attributes:
        host: Where the master is.
        port: Of its RPC service.
        protocol: How data moves; all processes of one pool use the same.
        devices: RDMA devices, comma-separated; ``""`` lets Mooncake choose.
        metadata: ``P2PHANDSHAKE``, or the address of a metadata service, such as ``http://host:8080/metadata``.
        segment: Bytes of this process's memory given to the pool, in every process that opens the store; 0 uses memory
            that others give, such as Mooncake's own `mooncake_client`.
        local_buffer: Bytes through which frames go that lie outside the arena: compressed ones. Taken when first used.
        local_host: Under which peers reach this process; ``""`` for the address from which the master is reached.
        prefix: What the names of objects start with.
        replicas: Copies of each object, in different segments.
    """

    host: str
    port: int = 50051
    protocol: Literal["tcp", "rdma"] = "tcp"
    devices: str = ""
    metadata: str = "P2PHANDSHAKE"
    segment: ByteSize = ByteSize(0)
    local_buffer: ByteSize = ByteSize("16MiB")
    local_host: str = ""
    prefix: str = "kv:"
    replicas: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: If the port, the number of replicas or the buffer's size is out of range.
        """
        if not 0 < self.port < 65536:
            raise ConfigError(f"port must be between 1 and 65535, not {self.port}")
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, not {self.replicas}")
        if not self.local_buffer:
            raise ConfigError("local_buffer must be more than 0")


class MooncakeClient:
    """A set-up `MooncakeDistributedStore` that cannot be called once it is closed. Thread-safe."""

    def __init__(self, options: MooncakeOptions, context: StoreContext) -> None:
        """Reach the master and set the client up, within the context's deadline.

        Raises:
            ConfigError: If Mooncake is not installed.
            StoreUnavailable: If the master does not answer, or Mooncake refuses; it names the master.
        """
        self.master = f"{options.host}:{options.port}"
        with _told(context.timeout_s):  # the log's level is read when the library is loaded
            store_class = _load()
        try:  # setting up would try for 90 s
            with socket.create_connection((options.host, options.port), context.timeout_s / _CALLS) as probe:
                local_host = options.local_host or str(probe.getsockname()[0])
        except OSError as error:
            raise StoreUnavailable(f"no Mooncake master answers at {self.master}: {error}") from error
        self._raw: Any = store_class()
        with _told(context.timeout_s):
            code = self._raw.setup(
                local_host,
                options.metadata,
                int(options.segment),
                0,  # its own staging: ours is only taken when it is needed
                options.protocol,
                options.devices,
                self.master,
            )
        if code != 0:
            raise StoreUnavailable(
                f"Mooncake's client could not be set up (code {code}) as {local_host!r} over {options.protocol} "
                f"with the master at {self.master}"
            )
        self._state = threading.Condition()
        self._callers = 0
        self._open = True

    @contextlib.contextmanager
    def calling(self) -> Iterator[Any]:
        """Give the client to one caller; it stays usable until the block ends.

        Raises:
            Closed: If it was closed.
        """
        with self._state:
            if not self._open:
                raise Closed("the store is closed")
            self._callers += 1
        try:
            yield self._raw
        finally:
            with self._state:
                self._callers -= 1
                self._state.notify_all()

    def close(self) -> None:
        """Take no new callers, wait for those that are there, and end the client. Twice is fine."""
        with self._state:
            if not self._open:
                return
            self._open = False
            self._state.wait_for(lambda: not self._callers)
        self._raw.close()


def _load() -> Any:
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise ConfigError(
            f"mooncake:// needs Mooncake's client: pip install 'kvconnect[mooncake]', or without CUDA "
            f"pip install mooncake-transfer-engine-non-cuda; both need libibverbs1 of the system ({error})"
        ) from error
    return MooncakeDistributedStore


@contextlib.contextmanager
def _told(timeout_s: float) -> Iterator[None]:
    """Set what Mooncake takes from the environment only, where the user has not, while a client is set up.

    The deadline of a transfer cannot be told this way: it is read once, by the first transfer of the process.
    """
    settings: Mapping[str, str] = {
        "MC_LOG_LEVEL": "ERROR",
        "MC_RPC_TIMEOUT_MS": str(max(1, round(timeout_s * 1000 / _CALLS))),
        "MC_STORE_CLIENT_SETUP_RETRIES": str(_TRIES),
    }
    with _environment:
        added = [name for name in settings if name not in os.environ]
        os.environ.update({name: settings[name] for name in added})
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)
