"""What a configuration means: where the server is, how to get in, what keys are called. Opens nothing."""

from __future__ import annotations

import math
import os
import ssl

import msgspec

from kvconnect.errors import ConfigError
from kvconnect.options import Options, Secret

__all__ = ["RedisOptions", "Settings", "read_settings"]

_PORT = 6379
_SOCKET = "unix"
_CLUSTERED = ("redis+cluster", "rediss+cluster")
_ENCRYPTED = ("rediss", "rediss+cluster")


class RedisOptions(Options, frozen=True):
    """Options of ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://`` and ``rediss+cluster://``.

    Attributes:
        host: Of the server, or of any node of the cluster; ``localhost`` if there is none.
        port: 6379 if it is 0.
        user: Of the server's access list; the default user if empty.
        password: Of that user.
        path: ``/2`` for database 2; for ``unix://`` the socket.
        db: Number of the database.
        tls: What ``rediss`` means.
        cluster: What ``+cluster`` means.
        prefix: What keys begin with: other deployments of one server take others.
        ttl_s: Seconds after which a block expires, counted from its last write; 0 for never.
        ca_file: Certificates that may have signed the server's; the system's if empty.
        cert_file: This client's certificate.
        key_file: Its private key.
        verify: Whether the server's certificate and name are checked.
        client_name: What ``CLIENT LIST`` calls the connections.
    """

    host: str = ""
    port: int = 0
    user: str = ""
    password: Secret = Secret("")
    path: str = ""
    db: int | None = None
    tls: bool | None = None
    cluster: bool | None = None
    prefix: str = "kv:"
    ttl_s: float = 0.0
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    verify: bool = True
    client_name: str = "kvconnect"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options without contradictions.

    Attributes:
        host: Empty for a Unix socket.
        socket_path: Empty for TCP.
        ttl_ms: Milliseconds; 0 for no expiry.
        prefix: As it stands in keys.
    """

    host: str
    port: int
    socket_path: str
    user: str
    password: Secret
    db: int
    tls: bool
    cluster: bool
    prefix: bytes
    ttl_ms: int
    ca_file: str
    cert_file: str
    key_file: str
    verify: bool
    client_name: str


def read_settings(options: RedisOptions, name: str) -> Settings:
    """Put options and the scheme together.

    Args:
        options: As configured.
        name: The scheme or name they stood under.

    Raises:
        ConfigError: If they contradict one another; it names them and what to write instead.
    """
    over_socket = name == _SOCKET
    cluster = _agreed(options.cluster, name in _CLUSTERED, "cluster", name)
    tls = _agreed(options.tls, name in _ENCRYPTED, "tls", name)
    if over_socket:
        _check_socket(options, tls=tls, cluster=cluster)
        db = options.db or 0
    else:
        db = _database(options, name)
    if cluster and db:
        raise ConfigError(f"{name!r}: a cluster has database 0 only, not {db}; use prefix= to keep deployments apart")
    if db < 0:
        raise ConfigError(f"{name!r}: db must not be negative, not {db}")
    if not 0 <= options.port <= 65_535:
        raise ConfigError(f"{name!r}: port must be between 1 and 65535, not {options.port}")
    if not (math.isfinite(options.ttl_s) and options.ttl_s >= 0):
        raise ConfigError(f"{name!r}: ttl_s must be a number of seconds, 0 for no expiry, not {options.ttl_s}")
    if " " in options.client_name or not options.client_name.isprintable():
        raise ConfigError(f"{name!r}: client_name must be printable and have no spaces, not {options.client_name!r}")
    _check_certificates(options, name, tls=tls)
    return Settings(
        host="" if over_socket else options.host or "localhost",
        port=0 if over_socket else options.port or _PORT,
        socket_path=options.path if over_socket else "",
        user=options.user,
        password=options.password,
        db=db,
        tls=tls,
        cluster=cluster,
        prefix=options.prefix.encode(),
        ttl_ms=0 if options.ttl_s == 0 else max(1, round(options.ttl_s * 1000)),
        ca_file=options.ca_file,
        cert_file=options.cert_file,
        key_file=options.key_file,
        verify=options.verify,
        client_name=options.client_name,
    )


def _agreed(option: bool | None, by_scheme: bool, what: str, name: str) -> bool:
    if option is False and by_scheme:
        raise ConfigError(f"{name!r} means {what}, and {what}=false denies it; leave one of them out")
    return bool(option) or by_scheme


def _check_socket(options: RedisOptions, *, tls: bool, cluster: bool) -> None:
    if not options.path.startswith("/"):
        raise ConfigError("'unix': the socket's path is missing; write unix:///run/redis/redis.sock?db=0")
    said = {"host": options.host, "port": options.port, "tls": tls, "cluster": cluster}
    for option, value in said.items():
        if value:
            raise ConfigError(f"'unix': a socket has no {option}; write redis:// for a server on the network")


def _database(options: RedisOptions, name: str) -> int:
    number = options.path.strip("/")
    if not number:
        return options.db or 0
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        way = f"write {name}://host:port/0 for database 0, or unix://{options.path} for a socket"
        raise ConfigError(f"{name!r}: path {options.path!r} is not the number of a database; {way}")
    if options.db not in (None, int(number)):
        raise ConfigError(f"{name!r}: path says database {number} and db says {options.db}; leave one of them out")
    return int(number)


def _check_certificates(options: RedisOptions, name: str, *, tls: bool) -> None:
    files = {"ca_file": options.ca_file, "cert_file": options.cert_file, "key_file": options.key_file}
    for option, path in files.items():
        if path and not tls:
            raise ConfigError(f"{name!r}: {option} is for encrypted connections; write rediss:// or tls=true")
        if path and not os.access(path, os.R_OK):
            raise ConfigError(f"{name!r}: {option} {path!r} cannot be read")
    if not options.verify and not tls:
        raise ConfigError(f"{name!r}: verify is for encrypted connections; write rediss:// or tls=true")
    if options.ca_file and not options.verify:
        raise ConfigError(f"{name!r}: with verify=false nothing is checked against ca_file; leave one of them out")
    if bool(options.cert_file) != bool(options.key_file):
        raise ConfigError(f"{name!r}: cert_file and key_file belong together; give both or none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if options.ca_file:
            context.load_verify_locations(options.ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"{name!r}: ca_file {options.ca_file!r} holds no certificates: {error.reason}") from error
    try:
        if options.cert_file:
            context.load_cert_chain(options.cert_file, options.key_file)
    except ssl.SSLError as error:
        pair = f"cert_file {options.cert_file!r} and key_file {options.key_file!r}"
        raise ConfigError(f"{name!r}: {pair} are no certificate and its key: {error.reason}") from error
