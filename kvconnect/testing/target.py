"""What is under test: finds the class that a name, URL, ``module:Class`` or type means, and opens it.

A target never counts on an empty medium: kits use tokens and keys of their own. One that has a ``path`` option,
no ``host``, and none given gets a fresh folder for each test; ``{tmp}`` in options stands for that folder.
"""

from __future__ import annotations

import contextlib
import importlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvconnect.driver import LeaderDriver, WorkerDriver, open_connector
from kvconnect.engine.core import ENGINE_CAPABILITIES
from kvconnect.errors import ConfigError, PluginError
from kvconnect.options import ConnectorSpec, option_names, parse_specs
from kvconnect.protocol import Capabilities, Connector, EngineCapabilities, KVCacheLayout, Namespace
from kvconnect.registry import OFFLOAD_CONNECTOR, load_registry
from kvconnect.store import BlockStore, StoreCapabilities, Tier

__all__ = ["ENGINE", "PATIENCE_S", "Target"]

PATIENCE_S = 30.0
"""What a test takes for never, unless ``--kv-patience`` or a kit's fixture `patience_s` says otherwise."""

ENGINE = ENGINE_CAPABILITIES
"""What the kit's engine can do, unless a test takes something away."""

_ARENA = "4MiB"  # enough for the kits, and quick to take


class Target:
    """A configured connector, a new one each time it is opened; all of them over the same medium.

    Attributes:
        name: What reports call it.
        folder: Where it may write.
        model: The identity of the model that its blocks belong to: nobody else's, so that no medium need be empty.
        kind: The class under test: a `BlockStore` or a `Connector`.
        patience_s: Seconds after which a test takes "not yet" for "never".
    """

    def __init__(self, connector: Any, folder: Path, *, patience_s: float = PATIENCE_S) -> None:
        """Find out what `connector` means.

        Args:
            connector: What ``connector=`` takes; a `BlockStore` or `Connector` class, or ``"module:Class"``; such a
                class and its options as a pair; or a mapping ``{"class", "options", "as"}``: with ``"as": "host"`` a
                class of your own takes the offload connector's place, and stores may lie below it.
            folder: Replaces ``{tmp}``, and is given where a ``path`` is needed and missing.
            patience_s: See above.

        Raises:
            KVConnectError: If there is no such thing, or its options are wrong.
        """
        self.folder = folder
        self.patience_s = patience_s
        self.model = f"id:conformance-{uuid.uuid4().hex}"
        self.registry = load_registry()
        self._imported: dict[str, str] = {}  # names of classes that are not registered -> module:Class
        entries = connector if isinstance(connector, list) else [connector]
        specs = [self._spec(entry) for entry in entries]
        self.name = "+".join(spec.name for spec in specs)
        kinds = [self.registry.load(spec.name) for spec in specs]
        self.kind = kinds[-1]
        specs = [self._with_place(spec, kind) for spec, kind in zip(specs, kinds, strict=True)]
        if all(issubclass(kind, BlockStore) for kind in kinds):
            specs.insert(0, ConnectorSpec(OFFLOAD_CONNECTOR, {}))
        if specs[0].name == OFFLOAD_CONNECTOR and "capacity" not in specs[0].options:
            specs[0] = ConnectorSpec(OFFLOAD_CONNECTOR, {**specs[0].options, "capacity": _ARENA})
        self.specs = specs
        self.resolved = self.registry.resolve(specs)

    @property
    def store(self) -> Tier | None:
        """The one store under test, None if the target is a connector or a stack."""
        return self.resolved.tiers[0] if len(self.resolved.tiers) == 1 else None

    @property
    def capabilities(self) -> Capabilities:
        """What the whole promises: with stores below, a store's durability and reach are the connector's."""
        own = self.resolved.connector.capabilities
        below = [tier.store_class.capabilities for tier in self.resolved.tiers if tier.use.mode == "rw"]
        return msgspec.structs.replace(
            own,
            durable=own.durable or any(store.durable for store in below),
            shared=own.shared or any(store.shared for store in below),
        )

    @property
    def store_capabilities(self) -> StoreCapabilities:
        """Of the store under test.

        Raises:
            PluginError: If there is none.
        """
        if self.store is None:
            raise PluginError(f"{self.name!r} is not one store")
        return self.store.store_class.capabilities

    def namespace(self, kv_dtype: str = "float32") -> Namespace:
        """Return what the keys of its blocks start with."""
        return Namespace(model=self.model, kv_dtype=kv_dtype)

    def with_arena(self, capacity: int | str) -> Target:
        """Return the same target over a smaller or larger arena; itself if it brings its own halves."""
        if self.resolved.connector.__class__ is not self.registry.load(OFFLOAD_CONNECTOR):
            return self
        other = object.__new__(Target)
        other.__dict__.update(self.__dict__)
        first = self.specs[0]
        other.specs = [ConnectorSpec(first.name, {**first.options, "capacity": capacity}), *self.specs[1:]]
        other.resolved = self.registry.resolve(other.specs)
        return other

    def with_store(self, wrap: Callable[[type[BlockStore]], type[BlockStore]]) -> Target:
        """Return the same target with its stores' classes replaced, to let them misbehave."""
        other = object.__new__(Target)
        other.__dict__.update(self.__dict__)
        tiers = tuple(msgspec.structs.replace(tier, store_class=wrap(tier.store_class)) for tier in self.resolved.tiers)
        other.resolved = msgspec.structs.replace(self.resolved, tiers=tiers)
        return other

    def open(
        self,
        layouts: Sequence[KVCacheLayout],
        *,
        namespace: Namespace,
        engine: EngineCapabilities = ENGINE,
        on_failure: Callable[[str, object], None] | None = None,
    ) -> tuple[LeaderDriver, list[WorkerDriver]]:
        """Open both halves; the caller shuts them down.

        Args:
            layouts: One a rank.
            namespace: What the keys start with.
            engine: What the engine can do.
            on_failure: Told of every hook that raises or answers rubbish: its name, and what was wrong.

        Raises:
            KVConnectError: If it does not fit.
        """
        leader, workers = open_connector(
            self.resolved, layouts, namespace=namespace, engine=engine, registry=self.registry
        )
        for driver in (leader, *workers):
            driver.on_failure = on_failure
        return leader, workers

    def open_store(self) -> BlockStore:
        """Open one more instance of the store under test, on this thread."""
        assert self.store is not None, "the target is not one store"
        return self.store.open()

    def portable(self) -> list[dict[str, Any]]:
        """Return the configuration for another process: mappings, with classes as ``module:Class``."""
        return [
            {"class": self._imported[spec.name], "options": _plain(spec.options), "as": spec.name}
            if spec.name in self._imported
            else {"name": spec.name, **_plain(spec.options)}
            for spec in self.specs
        ]

    def _spec(self, entry: Any) -> ConnectorSpec:
        options: Mapping[str, Any] = {}
        name = ""
        if isinstance(entry, tuple):
            entry, options = entry
        if isinstance(entry, dict) and "class" in entry:
            entry, options, name = entry["class"], entry.get("options", {}), entry.get("as", "")
        if isinstance(entry, str) and "://" not in entry and entry.count(":") == 1 and "/" not in entry:
            module, _, attribute = entry.partition(":")
            with contextlib.suppress(ImportError):
                found = getattr(importlib.import_module(module), attribute, entry)
                entry = found if isinstance(found, type) else entry
        if isinstance(entry, type):
            if not issubclass(entry, (BlockStore, Connector)):
                raise PluginError(f"{entry.__name__} is neither a BlockStore nor a Connector")
            name = name or _short_name(entry)
            self.registry.insert_class(name, entry)
            self._imported[name] = f"{entry.__module__}:{entry.__qualname__}"
            return ConnectorSpec(name, dict(options))
        specs = parse_specs(entry)
        if len(specs) != 1:
            raise ConfigError(f"{entry!r} is not one connector or store")
        return ConnectorSpec(specs[0].name, {**specs[0].options, **options})

    def _with_place(self, spec: ConnectorSpec, kind: Any) -> ConnectorSpec:
        filled = {
            name: value.replace("{tmp}", str(self.folder)) if isinstance(value, str) else value
            for name, value in spec.options.items()
        }
        names = option_names(kind.Options)
        if "path" in names and "host" not in names and "path" not in filled:  # behind a host it is no folder
            filled["path"] = str(self.folder / "kv")
        return ConnectorSpec(spec.name, filled)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, (str, Path)) else value for name, value in options.items()}


def _short_name(kind: type) -> str:
    letters = "".join(char for char in kind.__name__.lower() if char.isalnum())
    return f"x-{letters}" if not letters[:1].isalpha() else letters
