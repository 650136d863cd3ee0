"""A TCP proxy on loopback that can be made slow, silent or broken while connections run through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Final, Literal

from tests.remote.processes import free_ports

__all__ = ["Direction", "Proxy"]

Direction = Literal["up", "down"]  # towards the server; from it

_CHUNK: Final = 16 << 10
_AHEAD: Final = 16  # chunks read and not sent yet, a direction; then the sender is made to wait, as by a full window
_TICK_S: Final = 0.01
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close sends RST


class Proxy:
    """Forwards connections to one port; one thread, none of which is left after `close`.

    The switches may be changed at any time, from any thread, and hold for connections that are open too.

    Attributes:
        port: Where clients connect.
        target: Where the server listens, on loopback; connections that are open stay where they are.
        rate: Bytes a second each way, all connections together; None for no limit.
        latency_s: Seconds by which all bytes come later, each way.
        hole: Whether nothing passes any more, without a word: bytes are held until it is False again.
        refuses: Whether new connections are reset at once.
        num_connections: Those taken so far.
        num_resets: Those ended by `reset_after` or `cut`.
        num_bytes: Those passed on so far, by direction.
    """

    def __init__(self, target: int, port: int | None = None) -> None:
        """Listen.

        Args:
            target: The server's port on loopback.
            port: Where to listen; a free one if None.
        """
        self.target = target
        self.rate: float | None = None
        self.latency_s = 0.0
        self.hole = False
        self.refuses = False
        self.num_connections = 0
        self.num_resets = 0
        self.num_bytes: dict[Direction, int] = {"up": 0, "down": 0}
        self.port = port if port is not None else free_ports(1)[0]
        self._left: dict[Direction, int | None] = {"up": None, "down": None}
        self._free_at: dict[Direction, float] = {"up": 0.0, "down": 0.0}
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._loop = asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="test-proxy")
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Connections that run now."""
        return len(self._links)

    @property
    def armed(self) -> bool:
        """Whether a `reset_after` has not come to pass yet."""
        return any(left is not None for left in self._left.values())

    def reset_after(self, num_bytes: int, direction: Direction) -> None:
        """Let that many more bytes through, of all connections, then reset the one that would send the next; once."""
        self._left[direction] = num_bytes

    def cut(self) -> int:
        """Reset every connection; return how many."""

        async def reset_all() -> int:
            writers = list(self._links.values())
            for each in writers:
                self._reset(each)
            return len(writers)

        return asyncio.run_coroutine_threadsafe(reset_all(), self._loop).result()

    def close(self) -> None:
        """End everything; twice is fine."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Proxy:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._take, sock=self._listener, limit=_CHUNK)
        await self._stop.wait()
        server.close()
        links = dict(self._links)
        for task, writers in links.items():
            for writer in writers:
                writer.transport.abort()
            task.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = writers = [writer]
        try:
            if self.refuses:
                _abort(writer)
                return
            try:
                there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=_CHUNK)
            except OSError:
                _abort(writer)
                return
            writers.append(back)
            for each in writers:
                each.transport.set_write_buffer_limits(high=_CHUNK)
            with contextlib.suppress(asyncio.CancelledError):  # by `close`; asyncio would log it as an error
                await self._forward(reader, writer, there, back)
        finally:
            for each in writers:
                each.transport.abort()
            del self._links[task]

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there: asyncio.StreamReader,
        back: asyncio.StreamWriter,
    ) -> None:
        """Pump both ways until one side ends."""
        queues: list[asyncio.Queue[tuple[float, bytes]]] = [asyncio.Queue(_AHEAD), asyncio.Queue(_AHEAD)]
        jobs = [
            self._receive(reader, queues[0]),
            self._send(queues[0], [back, writer], "up"),
            self._receive(there, queues[1]),
            self._send(queues[1], [writer, back], "down"),
        ]
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            await asyncio.wait([tasks[1], tasks[3]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, reader: asyncio.StreamReader, ahead: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            data = b""
            with contextlib.suppress(OSError):
                data = await reader.read(_CHUNK)
            await ahead.put((self._loop.time(), data))

    async def _send(
        self, ahead: asyncio.Queue[tuple[float, bytes]], writers: list[asyncio.StreamWriter], direction: Direction
    ) -> None:
        while True:
            came, data = await ahead.get()
            while self.hole or self._loop.time() < came + self.latency_s:
                await asyncio.sleep(_TICK_S if self.hole else came + self.latency_s - self._loop.time())
            if not data:
                return
            await self._wait_for_link(len(data), direction)
            left = self._left[direction]
            passes = len(data) if left is None else min(left, len(data))
            self.num_bytes[direction] += passes
            with contextlib.suppress(OSError):
                writers[0].write(data[:passes])
                await writers[0].drain()
            if left is None:
                continue
            if passes < len(data):
                self._left[direction] = None
                self._reset(writers)
                return
            self._left[direction] = left - passes

    async def _wait_for_link(self, count: int, direction: Direction) -> None:
        if self.rate is not None:
            now = self._loop.time()
            self._free_at[direction] = max(now, self._free_at[direction]) + count / self.rate
            await asyncio.sleep(self._free_at[direction] - now)

    def _reset(self, writers: list[asyncio.StreamWriter]) -> None:
        self.num_resets += 1
        for writer in writers:
            _abort(writer)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close a socket with RST."""
    sock: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
