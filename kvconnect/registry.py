"""Finds plugins, knows connectors and stores by name, and turns a configuration into one connector. Opens nothing.

A plugin is anything under the entry-point group ``kvconnect``, or a module named in ``KVCONNECT_PLUGINS``
(comma-separated; ``no:NAME`` keeps a plugin out). A class is registered as ``"module:Class"`` and imported late.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import pluggy

from kvconnect.errors import ConfigError, DuplicateConnector, PluginError, ProtocolMismatch, UnknownConnector
from kvconnect.options import (
    ConnectorConfig,
    ConnectorSpec,
    convert_options,
    is_connector_name,
    option_names,
    parse_specs,
    specs_from_environment,
    with_environment,
)
from kvconnect.protocol import PROTOCOL_VERSION, Connector, RegistrationHooks
from kvconnect.store import BlockStore, Tier, TierOptions

__all__ = ["ENTRY_POINT_GROUP", "Registered", "Registrar", "Registry", "ResolvedConnector", "load_registry"]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "kvconnect"

# Registered by `kvconnect_host`; it wraps every list of stores.
OFFLOAD_CONNECTOR = "host"

# Where to get what is not installed.
_INSTALL_HINTS = {
    "redis": 'pip install "kvconnect[redis]"',
    "s3": 'pip install "kvconnect[s3]"',
    "mooncake": 'pip install "kvconnect[mooncake]", or mooncake-transfer-engine-non-cuda on a machine without a GPU',
    "sqlite": "pip install ./examples/custom_connector (from kvconnect's source)",
}


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """One registered name.

    Attributes:
        name: What users write.
        target: ``"module:Class"``.
        schemes: Other names for it in URLs.
        owner: The distribution or module that brought it.
        version: The distribution's version, ``""`` for a module.
    """

    name: str
    target: str
    schemes: tuple[str, ...]
    owner: str
    version: str


class ResolvedConnector(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration, converted: one connector, its options, and the stores under it."""

    name: str
    connector: Connector
    options: Any
    tiers: tuple[Tier, ...]


class Registrar:
    """What `kvconnect_register` gets: a registry that knows who is speaking."""

    def __init__(self, registry: Registry, owner: str, version: str) -> None:
        """Bind the registry to a plugin."""
        self._registry = registry
        self._owner = owner
        self._version = version

    def add(self, name: str, target: str, schemes: Sequence[str] = (), protocol: int = 1) -> None:
        """Register a connector or a store.

        Args:
            name: What users write; lower case.
            target: ``"module:Class"`` of a torch-free `Connector` or `BlockStore`; imported when asked for.
            schemes: Other URL schemes that mean it.
            protocol: The protocol version that the class was written for.

        Raises:
            ProtocolMismatch: If this kvconnect speaks another version.
            DuplicateConnector: If somebody else has the name or a scheme; the message names both.
        """
        if protocol != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"{name!r} of {self._owner} was written for protocol {protocol}; this kvconnect speaks "
                f"{PROTOCOL_VERSION}: install a version of either that fits the other"
            )
        if name in self._registry.blocked:
            return
        if not all(is_connector_name(each) for each in (name, *schemes)):
            raise PluginError(f"{self._owner} registers {name!r}; names and schemes are lower case, such as 'disk'")
        if target.count(":") != 1:
            raise PluginError(f"{name!r} of {self._owner}: {target!r} is not 'module:Class'")
        self._registry.insert(
            Registered(name=name, target=target, schemes=tuple(schemes), owner=self._owner, version=self._version)
        )

    def add_wrapper(self, half: Literal["leader", "worker"], target: str) -> None:
        """Register an observer: a class of no arguments whose ``@hookimpl(wrapper=True)`` methods wrap hooks.

        Raises:
            PluginError: If `half` is neither.
        """
        if half not in ("leader", "worker"):
            raise PluginError(f"{self._owner} wraps {half!r}; there are only 'leader' and 'worker'")
        self._registry.wrappers[half].append(target)


class Registry:
    """Names and wrappers of one process."""

    def __init__(self) -> None:
        """Know nothing."""
        self.wrappers: dict[str, list[str]] = {"leader": [], "worker": []}
        self.broken: dict[str, str] = {}
        self.blocked: frozenset[str] = frozenset()
        self._names: dict[str, Registered] = {}
        self._classes: dict[str, type[BlockStore] | type[Connector]] = {}
        self._entries: list[Registered] = []

    @property
    def entries(self) -> tuple[Registered, ...]:
        """What is registered, by name."""
        return tuple(sorted(self._entries, key=lambda entry: entry.name))

    def insert(self, entry: Registered) -> None:
        """Add one entry.

        Raises:
            DuplicateConnector: If the name or a scheme is taken; both owners are named.
        """
        for name in dict.fromkeys((entry.name, *entry.schemes)):
            other = self._names.get(name)
            if other is not None:
                raise DuplicateConnector(
                    f"both {other.owner} and {entry.owner} register {name!r}; uninstall one, or block one with "
                    f"KVCONNECT_PLUGINS=no:{entry.owner}"
                )
        for name in (entry.name, *entry.schemes):
            self._names[name] = entry
        self._entries.append(entry)

    def insert_class(self, name: str, kind: type[BlockStore] | type[Connector]) -> None:
        """Let `name` mean a class that is at hand, in this registry only; it wins over an installed one."""
        self._classes[name] = kind
        self._names[name] = Registered(
            name=name, target=f"{kind.__module__}:{kind.__qualname__}", schemes=(), owner=kind.__module__, version=""
        )

    def load(self, name: str) -> type[BlockStore] | type[Connector]:
        """Import the class registered as `name` (or under a scheme of that name).

        Raises:
            UnknownConnector: If there is none; the known ones are listed, and where to get it if that is known.
            PluginError: If it cannot be imported or is neither a store nor a connector.
        """
        entry = self._names.get(name)
        if entry is None:
            raise self._unknown(name)
        module, _, attribute = entry.target.partition(":")
        try:
            loaded = self._classes.get(name) or getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            hint = f"; try: {_INSTALL_HINTS[entry.name]}" if entry.name in _INSTALL_HINTS else ""
            raise PluginError(f"{name!r} of {entry.owner} cannot be imported: {error}{hint}") from error
        if not isinstance(loaded, type) or not issubclass(loaded, (BlockStore, Connector)):
            raise PluginError(f"{name!r} of {entry.owner}: {entry.target} is neither a BlockStore nor a Connector")
        missing = [part for part in ("Options", "capabilities") if getattr(loaded, part, None) is None]
        missing += sorted(getattr(loaded, "__abstractmethods__", ()))
        if missing:
            raise PluginError(f"{name!r} of {entry.owner}: {loaded.__name__} has no {', '.join(missing)}")
        return loaded

    def resolve(self, connector: ConnectorConfig) -> ResolvedConnector:
        """Turn what ``connector=`` takes into one connector.

        A list of stores is wrapped in the offload connector, which ``host://`` configures. Without an argument,
        ``KVCONNECT_CONNECTOR`` is read.

        Raises:
            ConfigError: If the mix or an option is wrong; `UnknownConnector` if a name is.
        """
        specs = parse_specs(connector) if connector else specs_from_environment()
        specs = [with_environment(spec) for spec in specs]
        if not specs:
            raise ConfigError("no connector given: name one, such as 'host://' or 'disk:///var/cache/kv'")
        loaded = [(spec, self.load(spec.name)) for spec in specs]
        connectors = [(spec, kind) for spec, kind in loaded if issubclass(kind, Connector)]
        stores = [(spec, kind) for spec, kind in loaded if issubclass(kind, BlockStore)]
        offload = self._names.get(OFFLOAD_CONNECTOR)
        for spec, _ in connectors:
            if self._names[spec.name] is not offload and len(loaded) > 1:
                raise ConfigError(f"{spec.name!r} is a whole connector and stands alone; only stores can be stacked")
        if len(connectors) > 1:
            raise ConfigError(f"{OFFLOAD_CONNECTOR}:// may be given once")
        if connectors and loaded[0][0] is not connectors[0][0]:
            raise ConfigError(f"{OFFLOAD_CONNECTOR}:// is the first tier; give it first")
        spec, kind = (
            connectors[0]
            if connectors
            else (with_environment(ConnectorSpec(OFFLOAD_CONNECTOR, {})), self.load(OFFLOAD_CONNECTOR))
        )
        assert issubclass(kind, Connector)
        return ResolvedConnector(
            name="+".join(spec.name for spec in specs),
            connector=kind(),
            options=convert_options(spec.name, spec.options, kind.Options),
            tiers=tuple(_tier(spec, store) for spec, store in stores),
        )

    def load_wrappers(self, half: Literal["leader", "worker"]) -> list[object]:
        """Make the observers of one half.

        Raises:
            PluginError: If one cannot be imported or made.
        """
        made = []
        for target in self.wrappers[half]:
            module, _, attribute = target.partition(":")
            try:
                made.append(getattr(importlib.import_module(module), attribute)())
            except Exception as error:
                raise PluginError(f"wrapper {target} cannot be made: {error}") from error
        return made

    def _unknown(self, name: str) -> UnknownConnector:
        known = tuple(sorted(self._names))
        message = f"unknown connector {name!r}; installed: {', '.join(known) or 'none'}"
        near = difflib.get_close_matches(name, known, n=1)
        if name in _INSTALL_HINTS:
            message += f"; to get it: {_INSTALL_HINTS[name]}"
        elif near:
            message += f"; did you mean {near[0]!r}?"
        if self.broken:
            message += "; plugins that could not be loaded: " + "; ".join(f"{k} ({v})" for k, v in self.broken.items())
        return UnknownConnector(message, name=name, known=known)


def load_registry(environ: Mapping[str, str] | None = None) -> Registry:
    """Discover plugins and let each register what it brings.

    A plugin that cannot be imported is left out and named in `Registry.broken`, so that it cannot take others down.

    Raises:
        DuplicateConnector: If two plugins claim one name.
        ProtocolMismatch: If a plugin speaks another protocol.
        PluginError: If a plugin has no usable `kvconnect_register`.
    """
    environ = os.environ if environ is None else environ
    named = [part.strip() for part in environ.get("KVCONNECT_PLUGINS", "").split(",") if part.strip()]
    blocked = {part[3:] for part in named if part.startswith("no:")}
    registry = Registry()
    registry.blocked = frozenset(blocked)
    manager = pluggy.PluginManager("kvconnect")
    manager.add_hookspecs(RegistrationHooks)
    versions: dict[str, tuple[str, str]] = {}
    for name, owner, version, load in [*_installed(), *_named(named)]:
        if name in blocked or owner in blocked or name in versions:
            continue
        try:
            plugin = load()
        except Exception as error:  # whatever a plugin's import raises
            registry.broken[name] = f"{type(error).__name__}: {error}"
            logger.warning("kvconnect plugin %r of %s cannot be imported: %s", name, owner, error)
            continue
        try:
            manager.register(plugin, name=name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {name!r} of {owner}: {error}") from error
        if not manager.get_hookcallers(plugin):
            registry.broken[name] = "it has no kvconnect_register with @kvconnect.hookimpl"
            logger.warning("kvconnect plugin %r of %s registers nothing: %s", name, owner, registry.broken[name])
        versions[name] = (owner, version)
    for impl in manager.hook.kvconnect_register.get_hookimpls():
        owner, version = versions[impl.plugin_name]
        try:
            impl.function(registry=Registrar(registry, owner, version))
        except PluginError:  # a conflict that only the user can settle
            raise
        except Exception as error:
            registry.broken[impl.plugin_name] = f"{type(error).__name__}: {error}"
            logger.warning("kvconnect plugin %r of %s cannot register: %s", impl.plugin_name, owner, error)
    return registry


def _installed() -> list[tuple[str, str, str, Any]]:
    found = []
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        owner = point.dist.name if point.dist is not None else point.value
        version = point.dist.version if point.dist is not None else ""
        found.append((point.name, owner, version, point.load))
    return found


def _named(modules: Sequence[str]) -> list[tuple[str, str, str, Any]]:
    wanted = [module for module in modules if not module.startswith("no:")]
    return [(m, m, "", lambda module=m: importlib.import_module(module)) for m in wanted]


def _tier(spec: ConnectorSpec, store: type[BlockStore]) -> Tier:
    shared = set(option_names(TierOptions))
    clash = shared & set(option_names(store.Options))
    if clash:
        raise PluginError(f"store {spec.name!r} has options that every tier has already: {', '.join(sorted(clash))}")
    own = {key: value for key, value in spec.options.items() if key not in shared}
    use = {key: value for key, value in spec.options.items() if key in shared}
    return Tier(
        name=spec.name,
        store_class=store,
        options=convert_options(spec.name, own, store.Options, also_known=shared),
        use=convert_options(spec.name, use, TierOptions),
    )
