"""What options mean together, and which contradict one another."""

from __future__ import annotations

from typing import Any

import pytest
from kvconnect_redis import RedisOptions
from kvconnect_redis.settings import read_settings

from kvconnect.errors import ConfigError
from kvconnect.options import convert_options, parse_specs


def settings(connector: Any) -> Any:
    (spec,) = parse_specs(connector)
    return read_settings(convert_options(spec.name, spec.options, RedisOptions), spec.name)


@pytest.mark.parametrize(
    ("connector", "expected"),
    [
        ("redis", {"host": "localhost", "port": 6379, "db": 0, "tls": False, "cluster": False, "prefix": b"kv:"}),
        ("redis://u:p%40@h:1/2?prefix=x", {"user": "u", "password": "p@", "host": "h", "db": 2, "prefix": b"x"}),
        ("redis://:p@h/0?db=0", {"user": "", "password": "p", "db": 0}),
        ("rediss://h:7", {"tls": True, "cluster": False, "port": 7, "verify": True}),
        ("redis+cluster://h", {"tls": False, "cluster": True}),
        ("rediss+cluster://[::1]:7", {"tls": True, "cluster": True, "host": "::1"}),
        ("unix:///run/redis.sock?db=3", {"socket_path": "/run/redis.sock", "db": 3, "host": ""}),
        ({"name": "redis", "tls": True, "cluster": True}, {"tls": True, "cluster": True}),
        ({"name": "rediss", "tls": "true", "verify": "false"}, {"tls": True, "verify": False}),
        ("redis://h?ttl_s=1.5", {"ttl_ms": 1500}),
        ("redis://h?ttl_s=0.0001", {"ttl_ms": 1}),
    ],
)
def test_configuration_means(connector: Any, expected: dict[str, Any]) -> None:
    found = settings(connector)
    assert {each: getattr(found, each) for each in expected} == expected


@pytest.mark.parametrize(
    ("connector", "says"),
    [
        ("redis://h/folder", "path '/folder' is not the number of a database.*unix:///folder"),
        ("redis://h/1?db=2", "path says database 1 and db says 2"),
        ("redis+cluster://h/1", "a cluster has database 0 only, not 1; use prefix="),
        ("redis://h?db=-1", "db must not be negative"),
        ("rediss://h?tls=false", "tls=false denies"),
        ("redis+cluster://h?cluster=false", "cluster=false denies"),
        ("unix://", "path is missing; write unix:///"),
        ("unix:///s?tls=true", "a socket has no tls"),
        ("unix:///s?cluster=true", "a socket has no cluster"),
        ("unix://h/s", "a socket has no host"),
        ("redis://h?ca_file=/dev/null", "ca_file is for encrypted connections; write rediss://"),
        ("redis://h?verify=false", "verify is for encrypted connections"),
        ("rediss://h?ca_file=/no/such", "ca_file '/no/such' cannot be read"),
        ("rediss://h?ca_file=/dev/null&verify=false", "leave one of them out"),
        ("rediss://h?cert_file=/dev/null", "cert_file and key_file belong together"),
        ("redis://h?ttl_s=-1", "ttl_s must be"),
        ("redis://h?ttl_s=nan", "ttl_s must be"),
        ({"name": "redis", "port": 70_000}, "port must be between 1 and 65535"),
        ("redis://h?client_name=a b", "client_name must be printable"),
    ],
)
def test_contradiction_is_refused_with_the_way_out(connector: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(connector)
