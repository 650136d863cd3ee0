"""The connections to one server: made when needed, kept while in step; a server that does not answer gets a rest."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kvconnect.errors import ConfigError, StoreUnavailable
from kvconnect_redis.settings import Settings
from kvconnect_redis.wire import Late, Lost, Refusal, Refused, Wire, command

__all__ = ["Node", "Untrusted"]

_REST_S = 0.25  # for up to twice as long nobody tries a server that did not answer: half at random, against stampedes
_CONNECT_SHARE = 0.5  # of the time left: a name often has two addresses, and the second needs a chance

T = TypeVar("T")


class Untrusted(StoreUnavailable):
    """The server's certificate is not what it should be."""


class Node:
    """One server. Any number of threads; each conversation has a connection of its own.

    Attributes:
        host: As it is connected to; empty for a Unix socket.
        port: 0 for a Unix socket.
        where: For messages.
        away: Whether it was not to be reached, or did not answer, when it was last talked to.
    """

    def __init__(self, settings: Settings, host: str, port: int, most_idle: int) -> None:
        """Describe it; nothing is opened.

        Args:
            settings: How to connect.
            host: Its host, which in a cluster is not the configured one.
            port: Its port.
            most_idle: Connections that are kept while nobody uses them.

        Raises:
            ConfigError: If redis-py is not installed.
        """
        self.host = host
        self.port = port
        self.where = f"redis at {settings.socket_path or f'{host}:{port}'}"
        self._make = _connection_maker(settings, host, port)
        self._handshake = _handshake(settings)
        self._most_idle = most_idle
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._closed = False
        self._rests_until = 0.0
        self.away = False

    @property
    def resting(self) -> bool:
        """Whether it did not answer a moment ago, and is not asked now."""
        return time.monotonic() < self._rests_until

    def talk(self, deadline: float, conversation: Callable[[Wire], T]) -> T:
        """Hold a conversation.

        A connection that turns out to have died while it was idle is replaced once, if nothing was answered: the
        conversation must be one that may be repeated.

        Args:
            deadline: Of `time.monotonic`; nothing blocks longer.
            conversation: Sends, and reads every reply.

        Raises:
            StoreUnavailable: If the server cannot be reached, does not answer in time, does not follow the protocol, or
                refuses the connection.
        """
        if self.resting:
            raise StoreUnavailable(f"{self.where} did not answer a moment ago")
        try:
            wire = self._take()
            if wire is not None:
                try:
                    return self._converse(wire, deadline, conversation)
                except Lost:
                    if wire.answered:
                        raise
                    self._drop_idle()  # they have idled as long
            return self._converse(self._connect(deadline), deadline, conversation)
        except Late:
            self._rest()
            raise

    def close(self) -> None:
        """Close every connection: now, or when its conversation ends."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _take(self) -> Wire | None:
        with self._lock:
            if self._closed:
                raise StoreUnavailable(f"{self.where}: closed")
            return self._idle.pop() if self._idle else None

    def _converse(self, wire: Wire, deadline: float, conversation: Callable[[Wire], T]) -> T:
        try:
            wire.begin(deadline)
            result = conversation(wire)
        except BaseException:
            wire.close()  # replies may still come: it is out of step
            raise
        self.away = False
        with self._lock:
            keep = not self._closed and len(self._idle) < self._most_idle
            if keep:
                self._idle.append(wire)
        if not keep:
            wire.close()
        return result

    def _connect(self, deadline: float) -> Wire:
        """Open a connection and let the server know who comes."""
        from redis.exceptions import RedisError

        left = deadline - time.monotonic()
        if left <= 0:
            raise Late(f"{self.where} did not answer in time")
        connection = self._make(left * _CONNECT_SHARE)
        opened: list[Wire] = []

        def greet(_: Any) -> None:
            # Instead of redis-py's own handshake, which waits anew for each reply.
            wire = Wire(connection._sock, self.where, connection.disconnect)
            wire.begin(deadline)
            wire.send([words for _, words in self._handshake])
            for name, _ in self._handshake:
                answer = wire.reply()
                if isinstance(answer, Refusal) and name != "CLIENT":  # a name is only for people
                    raise Refused(self.where, name, answer)
            opened.append(wire)

        connection.redis_connect_func = greet
        try:
            connection.connect()
        except RedisError as error:
            connection.disconnect()
            self._rest()
            reason = _first_cause(error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise Untrusted(f"{self.where}: {reason.verify_message}") from error
            raise StoreUnavailable(f"{self.where} cannot be reached: {_in_words(reason)}") from error
        except BaseException:
            connection.disconnect()
            raise
        connection.redis_connect_func = None  # it holds the connection, which holds it
        return opened[0]

    def _rest(self) -> None:
        self.away = True
        self._rests_until = time.monotonic() + _REST_S * (1 + random.random())

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()


def _handshake(settings: Settings) -> list[tuple[str, bytes]]:
    """Return the names and the bytes of the commands that open a connection."""
    commands = []
    password = settings.password.encode()
    if settings.user:
        commands.append(("AUTH", command(b"AUTH", settings.user.encode(), password)))
    elif settings.password:
        commands.append(("AUTH", command(b"AUTH", password)))
    if settings.db:
        commands.append(("SELECT", command(b"SELECT", b"%d" % settings.db)))
    if settings.client_name:
        commands.append(("CLIENT", command(b"CLIENT", b"SETNAME", settings.client_name.encode())))
    return commands


def _connection_maker(settings: Settings, host: str, port: int) -> Callable[[float], Any]:
    """Return what makes an unconnected connection of redis-py, given its timeout in seconds."""
    try:
        from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
    except ImportError as error:
        raise ConfigError("redis-py is not installed: pip install 'kvconnect[redis]'") from error
    kind: Any = Connection
    options: dict[str, Any] = {"host": host, "port": port}
    if settings.socket_path:
        kind, options = UnixDomainSocketConnection, {"path": settings.socket_path}
    elif settings.tls:
        kind = SSLConnection
        options["ssl_cert_reqs"] = "required" if settings.verify else "none"
        options["ssl_check_hostname"] = settings.verify
        options["ssl_ca_certs"] = settings.ca_file or None
        options["ssl_certfile"] = settings.cert_file or None
        options["ssl_keyfile"] = settings.key_file or None
    return lambda timeout_s: kind(**options, protocol=2, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)


def _first_cause(error: BaseException) -> BaseException:
    """Return what redis-py has wrapped."""
    inner = error.__cause__ or error.__context__
    return error if inner is None else _first_cause(inner)


def _in_words(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
