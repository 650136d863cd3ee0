"""Opening: what cannot work is refused with the reason, by its name, and without the password; least rights suffice."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvconnect_redis import RedisOptions

from kvconnect.errors import ConfigError, KVConnectError, StoreUnavailable
from kvconnect.options import Secret, convert_options, parse_specs
from kvconnect.store import BlockStore, Tier
from tests.remote.faults.load import wait_until
from tests.remote.faults.redis_server import RedisCluster, RedisServer
from tests.remote.processes import free_ports, needs_program
from tests.remote.redis.conftest import OpenStore
from tests.remote.redis.servers import Authority, Doors, Held, name_of, open_store, said
from tests.remote.s3.blocks import frame, key, read, write

PASSWORD = "hunter2/@:%s$pa55"
QUOTED = "hunter2%2F%40%3A%25s%24pa55"
PARTS = re.compile("hunter2|pa55")
SECURITY = Path(__file__).parents[3] / "docs" / "security.md"


@pytest.fixture
def closed_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server whose default user has a password, and that renames nothing."""
    needs_program("redis-server")
    with RedisServer(tmp_path) as server:
        server.do("ACL", "SETUSER", "operator", "on", "nopass", "~*", "&*", "+@all")
        yield server


def refused(kind: type[KVConnectError], what: str, url: str, **options: Any) -> str:
    """See that opening is refused without a trace left or a part of the password told; return what was said."""
    before = Held.now()
    with pytest.raises(kind, match=what) as raised:
        open_store(url, **options)
    text = said(raised.value)
    assert not PARTS.search(text), text
    del raised
    assert Held.now() == before
    return text


def test_each_scheme_opens_what_it_says(server: Doors, cluster: RedisCluster, opened: OpenStore) -> None:
    urls = [server.url, server.tls_url, server.socket_url, f"redis+cluster://127.0.0.1:{cluster.masters[2].port}"]
    urls += [f"redis://127.0.0.1:{server.tls_port}?tls=true&ca_file={server.authority.certificate}"]
    urls += [f"redis://127.0.0.1:{cluster.masters[0].port}?cluster=true", f"redis://localhost:{server.port}/0"]
    for url in urls:
        store = opened(url)
        write(store, 1)
        assert read(store, 1) == [frame(1)], url
        store.remove([key(1)])


def test_encrypted_cluster(tmp_path: Path, opened: OpenStore) -> None:
    """Nodes tell the port at which they speak TLS; one node that has all slots is a cluster."""
    needs_program("redis-server", "openssl")
    with Doors(tmp_path, "--cluster-enabled", "yes", "--tls-cluster", "yes") as node:
        node.do("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: b"cluster_state:ok" in node.do("CLUSTER", "INFO"), 10.0, "a cluster")
        store = opened(node.tls_url.replace("rediss", "rediss+cluster"))
        write(store, *range(20))
        assert read(store, *range(20)) == [frame(number) for number in range(20)]


@pytest.mark.parametrize(
    ("credentials", "what"),
    [
        ("worker:" + QUOTED + "x@", "AUTH with WRONGPASS; check user and password"),
        ("nobody:" + QUOTED + "@", "AUTH with WRONGPASS"),
        (":" + QUOTED + "x@", "AUTH with WRONGPASS"),
        ("", "NOAUTH; give a user or a password"),
        ("cannot:" + QUOTED + "@", "EXISTS with NOPERM; let the user do GET, SET"),
        ("elsewhere:" + QUOTED + "@", "EXISTS with NOPERM.*keys that begin with the prefix"),
    ],
)
def test_who_may_not_come_in_is_told_why_and_no_password(
    closed_server: RedisServer, caplog: pytest.LogCaptureFixture, credentials: str, what: str
) -> None:
    caplog.set_level("DEBUG")
    closed_server.do("ACL", "SETUSER", "worker", "on", ">" + PASSWORD, "~*", "+@all")
    closed_server.do("ACL", "SETUSER", "cannot", "on", ">" + PASSWORD, "~*", "+get")
    closed_server.do("ACL", "SETUSER", "elsewhere", "on", ">" + PASSWORD, "~other:*", "+@all")
    closed_server.do("ACL", "SETUSER", "default", "resetpass", ">" + PASSWORD)
    refused(ConfigError, what, f"redis://{credentials}127.0.0.1:{closed_server.port}")
    for user in ("worker:", ":"):
        open_store(f"redis://{user}{QUOTED}@127.0.0.1:{closed_server.port}").close()
    assert not PARTS.search(caplog.text)


def test_password_that_the_server_repeats_is_not_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that does not know AUTH answers with its arguments."""
    needs_program("redis-server")
    caplog.set_level("DEBUG")
    with RedisServer(tmp_path, "--rename-command", "AUTH", "") as server:
        refused(ConfigError, "AUTH with ERR", f"redis://:{QUOTED}@127.0.0.1:{server.port}")
    assert not PARTS.search(caplog.text)


def test_password_that_nobody_asked_for_is_a_mistake(server: Doors) -> None:
    refused(ConfigError, "AUTH", f"redis://:{QUOTED}@127.0.0.1:{server.port}")


def test_password_does_not_show_in_options_and_tiers() -> None:
    (spec,) = parse_specs(f"redis://worker:{QUOTED}@cache:6379")
    options = convert_options("redis", spec.options, RedisOptions)
    assert options.password == PASSWORD
    store_class: Any = BlockStore
    shown = f"{spec!r} {options!r} {options} {Tier(name='redis', store_class=store_class, options=options)!r}"
    assert not PARTS.search(shown), shown


def test_database_that_is_not_there_is_named(server: Doors) -> None:
    refused(ConfigError, "SELECT with ERR; check db", server.url + "/99")


def test_single_server_is_not_a_cluster(server: Doors) -> None:
    refused(ConfigError, rf"127\.0\.0\.1:{server.port} is not in a cluster; write redis://", server.url + "?cluster=1")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_node_of_a_cluster_is_not_a_single_server(cluster: RedisCluster, number: int) -> None:
    """Whichever it is: each has some of the slots, and would answer for these."""
    refused(ConfigError, "write redis\\+cluster://", f"redis://127.0.0.1:{cluster.masters[number].port}")


def test_certificate_of_an_unknown_authority_is_refused(server: Doors, tmp_path: Path) -> None:
    port = server.tls_port
    way = "give the certificate of who signed it as ca_file="
    refused(ConfigError, way, f"rediss://:{QUOTED}@127.0.0.1:{port}")
    stranger = Authority(tmp_path).certificate
    refused(ConfigError, way, f"rediss://:{QUOTED}@127.0.0.1:{port}?ca_file={stranger}")
    open_store(f"rediss://127.0.0.1:{port}?verify=false").close()


def test_certificate_for_another_host_is_refused(server: Doors, tmp_path: Path) -> None:
    certificate, key_file = server.authority.sign("other", "DNS:cache.example")
    refiled = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key_file)]
    with Doors(tmp_path, *refiled) as other:
        url = f"rediss://127.0.0.1:{other.tls_port}?ca_file={server.authority.certificate}"
        refused(ConfigError, "127.0.0.1", url)


def test_client_proves_who_it_is(server: Doors, tmp_path: Path, opened: OpenStore) -> None:
    certificate, key_file = server.authority.sign("client")
    server.do("CONFIG", "SET", "tls-auth-clients", "yes")
    try:
        refused(StoreUnavailable, f"127.0.0.1:{server.tls_port}", server.tls_url)
        store = opened(f"{server.tls_url}&cert_file={certificate}&key_file={key_file}")
        write(store, 1)
        assert read(store, 1) == [frame(1)]
    finally:
        server.do("CONFIG", "SET", "tls-auth-clients", "no")


def test_plain_client_at_a_port_for_tls_and_the_other_way_round(server: Doors) -> None:
    refused(StoreUnavailable, f"127.0.0.1:{server.tls_port}", f"redis://127.0.0.1:{server.tls_port}", timeout_s=2.0)
    refused(StoreUnavailable, f"127.0.0.1:{server.port}", f"rediss://127.0.0.1:{server.port}", timeout_s=2.0)


def test_nobody_there_is_unavailable_by_name(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    urls = {f"{scheme}://:{QUOTED}@127.0.0.1:{port}": f"127.0.0.1:{port}" for scheme in ("redis", "rediss")}
    urls[f"redis+cluster://:{QUOTED}@127.0.0.1:{port}"] = f"127.0.0.1:{port}"
    urls[f"redis://:{QUOTED}@no-such-host.invalid"] = "no-such-host.invalid:6379"
    urls[f"unix://{tmp_path}/absent"] = f"{tmp_path}/absent"
    for url, where in urls.items():
        started = time.monotonic()
        refused(StoreUnavailable, re.escape(where), url, timeout_s=3.0)
        assert time.monotonic() - started < 3.5


CONTRADICTIONS = {
    "rediss://h?tls=false": "tls=false denies it",
    "redis+cluster://h?cluster=false": "cluster=false denies it",
    "redis+cluster://h/3": "a cluster has database 0 only, not 3",
    "redis://h/1?db=2": "path says database 1 and db says 2",
    "redis://h/two": "'/two' is not the number of a database",
    "redis://h?db=-1": "db must not be negative",
    "redis://h?ttl_s=-1": "ttl_s must be a number of seconds",
    "redis://h?ttl_s=nan": "ttl_s must be a number of seconds",
    "redis://h?port=70000": "port must be between",
    "redis://h?client_name=two%20words": "client_name must",
    "redis://h?ca_file=/etc/hosts": "ca_file is for encrypted connections",
    "redis://h?verify=false": "verify is for encrypted connections",
    "rediss://h?ca_file=/no/such": "ca_file '/no/such' cannot be read",
    "rediss://h?ca_file=/etc/hosts&verify=false": "leave one of them out",
    "rediss://h?cert_file=/etc/hosts": "cert_file and key_file belong together",
    "unix://": "unix:///run/redis/redis.sock",
    "unix://h/socket": "a socket has no host",
    "unix:///socket?tls=true": "a socket has no tls",
    "unix:///socket?cluster=true": "a socket has no cluster",
    "redis://h?prefx=a": "did you mean 'prefix'",
}


@pytest.mark.parametrize(("url", "what"), CONTRADICTIONS.items())
def test_options_that_contradict_one_another_are_refused(url: str, what: str) -> None:
    refused(ConfigError, what, url, password=Secret(PASSWORD))


def test_certificate_file_that_is_none_is_a_mistake(server: Doors) -> None:
    url = f"rediss://127.0.0.1:{server.tls_port}"
    refused(ConfigError, "ca_file '/etc/hosts'", f"{url}?ca_file=/etc/hosts")
    refused(ConfigError, "cert_file '/etc/hosts'", f"{url}?cert_file=/etc/hosts&key_file=/etc/hosts")


def rights(*, cluster: bool = False) -> list[str]:
    """Return the command that docs/security.md gives, in words."""
    text = SECURITY.read_text("utf-8")
    (line,) = re.findall(r"^ +(ACL SETUSER kv .*)$", text, re.MULTILINE)
    (more,) = re.findall(r"In a Cluster also `([^`]*)`", text)
    words: str = line.replace(">PASSWORD", ">" + PASSWORD) + (" " + more if cluster else "")
    return words.split()


def everything(url: str) -> None:
    """Do all that a store can do."""
    store = open_store(url)
    try:
        write(store, *range(20))
        assert read(store, *range(20)) == [frame(number) for number in range(20)]
        assert store.contains([key(1), key(99)]) == [True, False]
        store.remove([key(1)])
        assert set(store.scan()) == {key(number) for number in range(20) if number != 1}
    finally:
        store.close()


def test_rights_of_the_documentation_are_enough_and_none_is_too_many(closed_server: RedisServer) -> None:
    url = f"redis://kv:{QUOTED}@127.0.0.1:{closed_server.port}/1"
    closed_server.do(*rights())
    everything(url)
    assert closed_server.do("ACL", "LOG") == []
    for right in (word for word in rights() if word.startswith("+")):
        closed_server.do("ACL", "SETUSER", "kv", "reset")
        closed_server.do(*(word for word in rights() if word != right))
        with contextlib.suppress(KVConnectError):
            everything(url)
        assert closed_server.do("ACL", "LOG"), f"{right} is not needed"
        closed_server.do("ACL", "LOG", "RESET")


def test_rights_of_the_documentation_end_at_the_prefix(closed_server: RedisServer) -> None:
    closed_server.do(*rights())
    refused(ConfigError, "NOPERM", f"redis://kv:{QUOTED}@127.0.0.1:{closed_server.port}?prefix=other:")


def test_rights_of_the_documentation_are_enough_for_a_cluster(cluster: RedisCluster) -> None:
    """Those that only a move of slots needs are taken in `test_cluster`."""
    for node in cluster.masters:
        node.do(*rights(cluster=True))
        node.do("ACL", "LOG", "RESET")
    try:
        everything(f"redis+cluster://kv:{QUOTED}@127.0.0.1:{cluster.masters[0].port}")
        assert [node.do("ACL", "LOG") for node in cluster.masters] == [[], [], []]
    finally:
        for node in cluster.masters:
            node.do("ACL", "DELUSER", "kv")


def test_reader_needs_no_right_to_write(closed_server: RedisServer) -> None:
    closed_server.do("SET", name_of(1), b"frame")
    closed_server.do(*(word for word in rights() if word not in ("+set", "+unlink")))
    store = open_store(f"redis://kv:{QUOTED}@127.0.0.1:{closed_server.port}")
    assert read(store, 1) == [b"frame"]
    with pytest.raises(StoreUnavailable, match="SET with NOPERM") as raised:
        store.write([key(2)], [memoryview(b"x")])
    assert not PARTS.search(said(raised.value))
    store.close()
