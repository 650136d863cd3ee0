"""Memory that Mooncake may read and write: the arena as it lies, and a staging buffer for everything else."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from typing import Any

from kvconnect.errors import ConfigError
from kvconnect.options import ByteSize
from kvconnect_mooncake.client import MooncakeClient

__all__ = ["RegisteredMemory", "address_of"]


def address_of(memory: memoryview) -> int:
    """Return where the bytes of a view that is not empty begin."""
    if not memory.readonly:  # 0.4 us instead of 2.5
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if not memory.readonly:  # 0.4 us instead of 2.5
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    import numpy as np  # late: listing connectors needs it not

    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address


class RegisteredMemory:
    """What one client has registered. Thread-safe."""

    def __init__(self, client: MooncakeClient, staging_bytes: int) -> None:
        """Register nothing yet.

        Args:
            client: Whose it is.
            staging_bytes: Of the staging buffer, taken when first used.
        """
        self.staging_bytes = staging_bytes
        self._client = client
        self._attached: memoryview | None = None
        self._start = self._end = 0
        self._staging: memoryview | None = None
        self._lock = threading.Lock()

    def attach(self, memory: memoryview) -> None:
        """Register the memory in which most frames lie, once.

        Raises:
            ConfigError: If Mooncake refuses.
        """
        self._register(memory)
        self._start = address_of(memory)
        self._end = self._start + memory.nbytes
        self._attached = memory

    def address_in_attached(self, memory: memoryview) -> int | None:
        """Return where a view that is not empty begins, None unless all of it lies in what was attached."""
        start = address_of(memory)
        return start if self._start <= start and start + memory.nbytes <= self._end else None

    @contextlib.contextmanager
    def staged(self, num_bytes: int) -> Iterator[memoryview]:
        """Lend that much registered memory to one caller, of the staging buffer or, if it is too small, new.

        Raises:
            ConfigError: If Mooncake refuses.
        """
        if num_bytes > self.staging_bytes:
            own = self._take(num_bytes)
            try:
                yield own
            finally:
                self._unregister(own)
            return
        with self._lock:
            if self._staging is None:
                self._staging = self._take(self.staging_bytes)
            yield self._staging[:num_bytes]

    def close(self) -> None:
        """Unregister everything; twice is fine."""
        with self._lock:
            for memory in (self._attached, self._staging):
                if memory is not None:
                    self._unregister(memory)
            self._attached = self._staging = None
            self._start = self._end = 0

    def _take(self, num_bytes: int) -> memoryview:
        memory = memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._register(memory)
        return memory

    def _register(self, memory: memoryview) -> None:
        with self._client.calling() as client:
            code: Any = client.register_buffer(address_of(memory), memory.nbytes)
        if code != 0:
            raise ConfigError(
                f"Mooncake does not register {ByteSize(memory.nbytes)} of memory (code {code}); "
                "over RDMA the process must be allowed to lock that much: ulimit -l"
            )

    def _unregister(self, memory: memoryview) -> None:
        with self._client.calling() as client:
            client.unregister_buffer(address_of(memory))
