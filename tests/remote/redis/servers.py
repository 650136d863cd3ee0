"""Ways into real Redis servers, how to open a store through them as a configuration does, and what it left open."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from kvconnect_redis import RedisOptions, RedisStore

from kvconnect.errors import StoreUnavailable
from kvconnect.options import convert_options, parse_specs
from kvconnect.store import StoreContext
from tests.remote.faults.load import wait_until
from tests.remote.faults.redis_server import RedisServer
from tests.remote.processes import free_ports, needs_program
from tests.remote.s3.blocks import key

__all__ = ["Authority", "Doors", "Held", "name_of", "open_patiently", "open_store", "said"]

TIMEOUT_S = 10.0  # of a call that nothing is wrong with, on a busy machine


def open_store(url: str, *, timeout_s: float = TIMEOUT_S, **options: Any) -> RedisStore:
    """Open a store as a URL and options say."""
    (spec,) = parse_specs(url)
    converted = convert_options(spec.name, {**spec.options, **options}, RedisOptions)
    return RedisStore(converted, StoreContext(name=spec.name, timeout_s=timeout_s))


def open_patiently(url: str, timeout_s: float) -> RedisStore:
    """Open a store whose calls may take `timeout_s` only, trying again where a busy machine takes longer to open it."""
    opened: list[RedisStore] = []

    def opens() -> bool:
        with contextlib.suppress(StoreUnavailable):
            opened.append(open_store(url, timeout_s=timeout_s))
        return bool(opened)

    wait_until(opens, TIMEOUT_S, "a store")
    return opened[0]


def name_of(number: int, prefix: str = "kv:") -> bytes:
    """Return what a block's key is called in Redis, by the format's definition."""
    return prefix.encode() + key(number).hex().encode()


def said(error: BaseException) -> str:
    """Return all that a traceback shows of an error and of those behind it, also where these are hidden."""
    text = "".join(traceback.format_exception(error)) + repr(error)
    for behind in (error.__cause__, error.__context__):
        if behind is not None:
            text += said(behind)
    return text


class Held(NamedTuple):
    """What this process holds open."""

    num_fds: int
    threads: tuple[str, ...]

    @classmethod
    def now(cls) -> Held:
        """Count."""
        return cls(len(os.listdir("/proc/self/fd")), tuple(sorted(each.name for each in threading.enumerate())))


class Authority:
    """Signs certificates for servers and clients on loopback.

    Attributes:
        certificate: Its own.
    """

    def __init__(self, folder: Path) -> None:
        """Make it.

        Args:
            folder: Where keys and certificates go.
        """
        needs_program("openssl")
        self._folder = folder
        self.certificate, self._key = self._make("authority", "-subj", "/CN=test authority")

    def sign(self, name: str, subject: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """Return a certificate for `subject`, and its key, in files that are called `name`."""
        signer = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        return self._make(name, *signer, "-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}")

    def _make(self, name: str, *arguments: str) -> tuple[Path, Path]:
        certificate, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-keyout", str(key_file), "-out", str(certificate), *arguments]
        subprocess.run(command, check=True, capture_output=True)
        return certificate, key_file


class Doors(RedisServer):
    """One server that is entered over TCP, over TLS and over a Unix socket.

    Attributes:
        tls_port: Where it speaks TLS.
        socket: Its Unix socket.
        authority: Who signed its certificate.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        """Start it.

        Args:
            folder: Where its files go.
            arguments: More of the command line.
        """
        self.authority = Authority(folder)
        certificate, key_file = self.authority.sign("server")
        (self.tls_port,) = free_ports(1)
        self.socket = folder / "socket"
        encrypted = ["--tls-port", str(self.tls_port), "--tls-cert-file", str(certificate)]
        encrypted += ["--tls-key-file", str(key_file), "--tls-ca-cert-file", str(self.authority.certificate)]
        encrypted += ["--tls-auth-clients", "no"]
        super().__init__(folder, "--unixsocket", str(self.socket), *encrypted, *arguments)

    @property
    def url(self) -> str:
        """Over TCP."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        """Over TLS, trusting who signed."""
        return f"rediss://127.0.0.1:{self.tls_port}?ca_file={self.authority.certificate}"

    @property
    def socket_url(self) -> str:
        """Over the Unix socket."""
        return f"unix://{self.socket}"
