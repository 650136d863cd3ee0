"""Discovery: lazy, by name, with owners and ways out in every error; and one mapping whatever the source."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kvconnect_disk import DiskStore
from kvconnect_host import HostConnector

from kvconnect.errors import ConfigError, DuplicateConnector, PluginError, ProtocolMismatch, UnknownConnector
from kvconnect.options import ByteSize, ConnectorSpec, Secret, parse_specs, specs_from_environment, specs_from_toml
from kvconnect.registry import Registrar, Registry, load_registry


@pytest.fixture
def registry() -> Registry:
    return load_registry({})


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a module and the environment that names it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def make(name: str, body: str) -> dict[str, str]:
        (tmp_path / f"{name}.py").write_text("from kvconnect import hookimpl\n" + body)
        names.append(name)
        return {"KVCONNECT_PLUGINS": ",".join(names)}

    yield make
    for name in names:
        sys.modules.pop(name, None)


def register(line: str) -> str:
    return f"@hookimpl\ndef kvconnect_register(registry):\n    {line}\n"


def test_first_party_plugins_come_through_entry_points(registry: Registry) -> None:
    found = {entry.name: entry for entry in registry.entries}
    assert {"disk", "host"} <= set(found)
    assert (found["disk"].owner, found["disk"].schemes) == ("kvconnect", ("file",))
    assert found["disk"].version
    assert registry.load("disk") is registry.load("file") is DiskStore
    assert registry.load("host") is HostConnector


def test_module_named_in_the_environment_is_a_plugin(plugin: Any) -> None:
    environ = plugin("my_plugin", register('registry.add("mine", "kvconnect_disk:DiskStore", schemes=("my",))'))
    registry = load_registry(environ)
    assert registry.load("my") is DiskStore
    assert next(entry for entry in registry.entries if entry.name == "mine").owner == "my_plugin"


def test_plugin_can_be_blocked_by_name() -> None:
    registry = load_registry({"KVCONNECT_PLUGINS": "no:kvconnect_disk"})
    assert "disk" not in {entry.name for entry in registry.entries}
    assert "host" in {entry.name for entry in registry.entries}


def test_two_owners_of_one_name_are_both_named(plugin: Any) -> None:
    environ = plugin("rival", register('registry.add("disk", "rival:Store")'))
    with pytest.raises(DuplicateConnector, match=r"both kvconnect and rival register 'disk'.*no:"):
        load_registry(environ)


def test_scheme_of_another_is_a_duplicate_too(plugin: Any) -> None:
    with pytest.raises(DuplicateConnector, match="'file'"):
        load_registry(plugin("rival", register('registry.add("other", "rival:Store", schemes=("file",))')))


def test_blocking_one_of_two_owners_settles_it(plugin: Any) -> None:
    environ = plugin("rival", register('registry.add("disk", "kvconnect_host:HostConnector")'))
    environ = {"KVCONNECT_PLUGINS": environ["KVCONNECT_PLUGINS"] + ",no:kvconnect_disk"}
    assert load_registry(environ).load("disk") is HostConnector


def test_other_protocol_version_is_refused(plugin: Any) -> None:
    with pytest.raises(ProtocolMismatch, match="written for protocol 2; this kvconnect speaks 1"):
        load_registry(plugin("future", register('registry.add("f", "future:Store", protocol=2)')))


def test_plugin_that_cannot_be_imported_is_left_out_and_named(plugin: Any) -> None:
    registry = load_registry(plugin("broken", "raise RuntimeError('no such driver')"))
    assert registry.load("disk") is DiskStore
    with pytest.raises(UnknownConnector, match=r"could not be loaded: broken \(RuntimeError: no such driver\)"):
        registry.load("whatever")


def test_plugin_that_cannot_register_is_left_out_and_named(plugin: Any) -> None:
    registry = load_registry(plugin("clumsy", register("raise RuntimeError('oops')")))
    assert registry.load("disk") is DiskStore
    assert registry.broken == {"clumsy": "RuntimeError: oops"}


def test_password_in_a_url_that_cannot_be_read_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="begins with 'redis'") as error:
        parse_specs("redis://:s3cr/et@host")
    assert "s3cr" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_unknown_name_lists_known_ones_and_where_to_get_it(registry: Registry) -> None:
    with pytest.raises(
        UnknownConnector, match=r"unknown connector 'dsik'; installed: .*disk.*did you mean 'disk'"
    ) as error:
        registry.load("dsik")
    assert error.value.name == "dsik"
    assert "host" in error.value.known
    with pytest.raises(UnknownConnector, match=r"to get it: pip install .kvconnect\[redis\]"):
        Registry().load("redis")


def test_class_is_imported_only_when_asked_for(registry: Registry) -> None:
    Registrar(registry, "me", "1").add("late", "no_such_module:Store")
    with pytest.raises(PluginError, match="'late' of me cannot be imported"):
        registry.load("late")


@pytest.mark.parametrize("target", ["nomodule", "a:b:c"])
def test_malformed_target_is_refused(registry: Registry, target: str) -> None:
    with pytest.raises(PluginError, match="module:Class"):
        Registrar(registry, "me", "1").add("bad", target)


def test_class_that_is_neither_is_refused(registry: Registry) -> None:
    Registrar(registry, "me", "1").add("odd", "kvconnect.options:ByteSize")
    with pytest.raises(PluginError, match="neither a BlockStore nor a Connector"):
        registry.load("odd")


def test_wrapper_of_neither_half_is_refused(registry: Registry) -> None:
    with pytest.raises(PluginError, match="only 'leader' and 'worker'"):
        Registrar(registry, "me", "1").add_wrapper("engine", "a:B")  # type: ignore[arg-type]


# -- configuration -----------------------------------------------------------------------------------------------


def test_stores_are_wrapped_in_the_offload_connector(registry: Registry) -> None:
    resolved = registry.resolve("disk:///tmp/kv?capacity=8GiB&timeout_s=3&mode=r")
    assert isinstance(resolved.connector, HostConnector)
    assert resolved.options.capacity == ByteSize("2GiB")
    (tier,) = resolved.tiers
    assert (tier.store_class, tier.options.path, tier.options.capacity) == (DiskStore, "/tmp/kv", 8 << 30)
    assert (tier.use.timeout_s, tier.use.mode, tier.use.codec) == (3.0, "r", "none")


def test_host_sizes_the_arena_and_comes_first_and_once(registry: Registry) -> None:
    assert registry.resolve(["host://?capacity=1GiB", "disk:///a"]).options.capacity == 1 << 30
    with pytest.raises(ConfigError, match="give it first"):
        registry.resolve(["disk:///a", "host://"])
    with pytest.raises(ConfigError, match="once"):
        registry.resolve(["host://", "host://"])
    with pytest.raises(ConfigError, match="no connector given"):
        registry.resolve([])


def test_whole_connector_stands_alone(registry: Registry, plugin: Any) -> None:
    Registrar(registry, "me", "1").add("whole", "kvconnect_host:HostConnector")
    assert registry.resolve("whole").name == "whole"
    with pytest.raises(ConfigError, match="stands alone"):
        registry.resolve(["whole", "disk:///a"])


def test_url_mapping_toml_and_environment_say_the_same(tmp_path: Path) -> None:
    url = parse_specs("disk:///var/kv?capacity=8GiB")
    assert parse_specs({"name": "disk", "path": "/var/kv", "capacity": "8GiB"}) == url
    toml = tmp_path / "kv.toml"
    toml.write_text('connector = ["disk:///var/kv?capacity=8GiB"]')
    assert specs_from_toml(toml) == url
    toml.write_text('[[connector]]\nname = "disk"\npath = "/var/kv"\ncapacity = "8GiB"')
    assert specs_from_toml(toml) == url
    environ = {"KVCONNECT_CONNECTOR": "disk:///var/kv", "KVCONNECT_DISK_CAPACITY": "8GiB", "KVCONNECT_PLUGINS": "x"}
    assert [ConnectorSpec(s.name, dict(sorted(s.options.items()))) for s in specs_from_environment(environ)] == [
        ConnectorSpec(s.name, dict(sorted(s.options.items()))) for s in url
    ]


def test_specs_of_a_file_are_taken_as_they_are(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text('connector = ["host://?capacity=1GiB", "disk:///tmp/kv"]')
    resolved = registry.resolve(specs_from_toml(tmp_path / "kv.toml"))
    assert resolved.options.capacity == 1 << 30
    assert [tier.name for tier in resolved.tiers] == ["disk"]


def test_environment_sets_what_an_entry_does_not_say(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCONNECT_DISK_CAPACITY", "3GiB")
    assert registry.resolve("disk:///a").tiers[0].options.capacity == 3 << 30
    assert registry.resolve("disk:///a?capacity=1GiB").tiers[0].options.capacity == 1 << 30


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("Options, capabilities = None, 1", "no Options, __init__"),
        ("Options, capabilities = 1, 1", "no __init__, close"),
    ],
)
def test_store_that_is_not_whole_says_what_is_missing(plugin: Any, body: str, why: str) -> None:
    lines = f"from kvconnect import BlockStore\nclass Bare(BlockStore):\n    {body}\n"
    registry = load_registry(plugin("bare", lines + register('registry.add("bare", "bare:Bare")')))
    with pytest.raises(PluginError, match=why):
        registry.load("bare")


def test_plugin_that_registers_nothing_is_named(plugin: Any) -> None:
    registry = load_registry(plugin("mute", "def kvconnect_register(registry): ...\n"))
    assert "no kvconnect_register" in registry.broken["mute"]


def test_connector_can_be_blocked_by_the_name_that_users_know() -> None:
    assert "disk" not in {entry.name for entry in load_registry({"KVCONNECT_PLUGINS": "no:disk"}).entries}


def test_environment_is_used_when_nothing_is_given(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCONNECT_CONNECTOR", "host:// disk:///var/kv")
    monkeypatch.setenv("KVCONNECT_HOST_CAPACITY", "3GiB")
    resolved = registry.resolve(None)
    assert resolved.options.capacity == 3 << 30
    assert [tier.name for tier in resolved.tiers] == ["disk"]


@pytest.mark.parametrize(
    ("connector", "why"),
    [
        ("disk:///a?capcity=1GiB", "unknown option 'capcity' for 'disk'; did you mean 'capacity'"),
        ("disk:///a?capacity=lots", "'lots' is not a size"),
        ("disk:///a?capacity=-1", "not a size"),
        ("disk:///a?mode=x", "mode|Invalid enum"),
        ("disk://", "path"),
        ("disk://a/b", "unknown option 'host' for 'disk'; what stands behind // is a host: write disk:///folder"),
        ("disk:///a?timeout_s=0", "timeout_s must be more than 0"),
        ({"name": "disk", "path": "/a", "capacity": 1.5}, "1.5 is not a size"),
        ("disk:///a?path=/b", "stands twice"),
        ("disk:///a?capacity=1&capacity=2", "stands twice"),
        ({"path": "/a"}, "needs a 'name'"),
        (7, "URL or a mapping"),
        ("Disk Store", "not a connector name"),
    ],
)
def test_bad_configuration_names_the_thing(registry: Registry, connector: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        registry.resolve([connector])


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1kB", 1000), ("8GiB", 8 << 30), ("1.5 MiB", 3 << 19), ("2gib", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize(text) == size


def test_secrets_do_not_show() -> None:
    secret = "hunter2"
    assert secret not in repr(Secret(secret))
    (spec,) = parse_specs(f"redis://user:{secret}@host:6379/0")
    assert secret not in repr(spec)
    assert str(spec.options["password"]) == secret
    resolved = load_registry({}).resolve(f"host://?key_secret={secret}")
    assert secret not in repr(resolved)


def test_import_discovery_and_listing_leave_torch_unloaded() -> None:
    program = (
        "import sys, kvconnect\n"
        "from kvconnect.registry import load_registry\n"
        "from kvconnect.cli.main import main\n"
        "load_registry().resolve(['host://', 'disk:///nowhere'])\n"
        "assert main(['plugins', '--json']) == 0\n"
        "assert main(['plugins']) == 0\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, stdout=subprocess.DEVNULL)
