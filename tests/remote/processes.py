"""Real servers as child processes on loopback: free ports, started and stopped by pid, their output kept."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from kvconnect.testing.promise import not_here

__all__ = ["HIGHEST_PORT", "Server", "free_ports", "listens", "needs_program"]

HIGHEST_PORT = 45_000  # a Redis Cluster node also listens 10,000 ports above its own
_LOWEST_PORT = 20_000
_START_S = 60.0


def needs_program(*names: str) -> None:
    """Skip, for the environment's sake, unless all programs are installed; `make test-remote` allows no such skip."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        if os.environ.get("KVCONNECT_NEEDS_REMOTE"):
            raise FileNotFoundError(f"not installed: {', '.join(missing)}; tests/remote/install.sh installs it")
        not_here(f"{', '.join(missing)} not installed")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, below the range that clients get theirs from."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(_LOWEST_PORT, HIGHEST_PORT), HIGHEST_PORT - _LOWEST_PORT):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports")


class Server:
    """One server process; a context manager that kills it.

    Attributes:
        pid: Of the process now running.
        log: Where its output goes.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        *,
        env: Mapping[str, str] | None = None,
        start_s: float = _START_S,
    ) -> None:
        """Start it and wait until it is ready.

        Args:
            command: In the foreground; a server that forks away cannot be stopped by its pid.
            log: A file to append its output to.
            ready: Whether it answers; called until it says so. An OSError means not yet.
            env: Its environment; this process's if None.
            start_s: Seconds to become ready.

        Raises:
            RuntimeError: If it ended, or is not ready in time; with the end of its log.
        """
        self.command = list(command)
        self.log = log
        self._ready = ready
        self._env = env
        self._start_s = start_s
        self.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def start(self) -> None:
        """Start it, again if it was killed, and wait until it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env
            )
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            if not self.running:
                raise RuntimeError(f"{self.command[0]} ended with {self._process.returncode}: {self.tail()}")
            with contextlib.suppress(OSError):
                if self._ready():
                    return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"{self.command[0]} was not ready within {self._start_s} s: {self.tail()}")

    def tail(self) -> str:
        """Return the end of its output."""
        return self.log.read_text("utf-8", "replace")[-2000:]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP and SIGCONT."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone; twice is fine."""
        if self.running:
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill it."""
        self.kill()


def listens(port: int) -> bool:
    """Say whether somebody takes connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
