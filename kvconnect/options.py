"""Turns URLs, mappings, TOML and environment variables into typed options. Knows no connector.

Every way in gives the same mapping, and one msgspec conversion checks it: unknown options are refused with the
known ones named, sizes read ``8GiB``, secrets hide themselves.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kvconnect.errors import ConfigError

__all__ = [
    "ByteSize",
    "ConnectorConfig",
    "ConnectorSpec",
    "Options",
    "Secret",
    "convert_options",
    "is_connector_name",
    "option_names",
    "parse_specs",
    "specs_from_environment",
    "specs_from_toml",
    "with_environment",
]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGTP")},
    **{f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGTP")},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")
_NAME = re.compile(r"[a-z][a-z0-9_+.-]*\Z")


class ByteSize(int):
    """A number of bytes, read from ``8GiB``, ``500MB`` or a plain integer."""

    def __new__(cls, value: int | str) -> ByteSize:
        """Parse ``value``.

        Raises:
            ConfigError: If it is neither a non-negative number nor a number with a known unit.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ConfigError(f"a size cannot be negative: {value}")
            return super().__new__(cls, value)
        match = _SIZE.match(value) if isinstance(value, str) else None
        units = {name.lower(): factor for name, factor in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise ConfigError(f"{value!r} is not a size; write for example 512MiB, 8GiB or 1000000")
        return super().__new__(cls, int(float(match[1]) * units[match[2].lower()]))

    def __str__(self) -> str:
        """Give the size in the largest binary unit that keeps it readable."""
        size = float(self)
        for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
            if size < 1024 or unit == "TiB":
                return f"{size:.0f}{unit}" if size == int(size) else f"{size:.1f}{unit}"
            size /= 1024
        raise AssertionError("unreachable: TiB always returns")

    __repr__ = __str__


class Secret(str):
    """A string that does not show itself in ``repr`` or in logs of structs that hold it."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Hide the value."""
        return "Secret('***')" if self else "Secret('')"


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every ``Options`` class: frozen, keyword-only, unknown fields refused."""


OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


class ConnectorSpec(msgspec.Struct, frozen=True):
    """One entry of ``connector=``: a registered name or scheme and its unconverted options."""

    name: str
    options: dict[str, Any]

    def __repr__(self) -> str:
        """Show the name and the option names only: values may be secrets that no class has typed yet."""
        return f"ConnectorSpec({self.name!r}, options={sorted(self.options)})"


ConnectorConfig = str | Mapping[str, Any] | ConnectorSpec | Sequence[str | Mapping[str, Any] | ConnectorSpec] | None
"""What ``connector=`` takes."""


def option_names(options: type[msgspec.Struct]) -> tuple[str, ...]:
    """Return the option names of ``options``, sorted."""
    return tuple(sorted(field.encode_name for field in msgspec.structs.fields(options)))


def convert_options(
    owner: str, mapping: Mapping[str, Any], options: type[OptionsT], also_known: Iterable[str] = ()
) -> OptionsT:
    """Convert ``mapping`` to ``options``.

    Args:
        owner: The connector's name, for messages.
        mapping: Option names to values; strings are converted (``"8GiB"``, ``"true"``, ``"3"``).
        options: The Struct to make.
        also_known: Option names that exist but were split off before, for messages.

    Raises:
        ConfigError: If an option is unknown, missing or of the wrong type; it names the option and the known ones.
    """
    known = tuple(sorted({*option_names(options), *also_known}))
    for name in mapping:
        if name not in option_names(options):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if name in ("host", "port", "user", "password") and "path" in known:
                hint = f"what stands behind // is a host: write {owner}:///folder (absolute) or {owner}:folder; "
            listed = ", ".join(known) or "none"
            raise ConfigError(f"unknown option {name!r} for {owner!r}; {hint}known: {listed}")
    try:
        return msgspec.convert(dict(mapping), options, strict=False, dec_hook=_decode_special)
    except msgspec.ValidationError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
        way = f"; write {owner}:///folder" if "missing required field `path`" in str(cause) else ""
        raise ConfigError(f"bad option for {owner!r}: {cause}{way}; known: {', '.join(known) or 'none'}") from error


def parse_specs(connector: ConnectorConfig) -> list[ConnectorSpec]:
    """Parse what ``connector=`` takes: nothing, one URL, mapping or `ConnectorSpec`, or a list of them.

    A mapping holds ``name`` and the options: ``{"name": "disk", "path": "/var/cache/kv"}``.

    Raises:
        ConfigError: If an entry is neither, or its name or an option cannot be read.
    """
    if connector is None:
        return []
    entries: Iterable[str | Mapping[str, Any] | ConnectorSpec]
    entries = [connector] if isinstance(connector, (str, Mapping, ConnectorSpec)) else connector
    return [_parse_entry(entry) for entry in entries]


def specs_from_toml(path: str | os.PathLike[str]) -> list[ConnectorSpec]:
    """Read the ``connector`` entry of a TOML file: URLs, or tables such as ``[[connector]]`` with a ``name``.

    Raises:
        ConfigError: If the file cannot be read or holds no ``connector``.
    """
    try:
        data = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {os.fspath(path)!r} as TOML: {error}") from error
    if "connector" not in data:
        raise ConfigError(f"{os.fspath(path)!r} has no 'connector' entry")
    return parse_specs(data["connector"])


def specs_from_environment(environ: Mapping[str, str] | None = None) -> list[ConnectorSpec]:
    """Read ``KVCONNECT_CONNECTOR``: URLs separated by white space."""
    environ = os.environ if environ is None else environ
    specs = parse_specs(environ.get("KVCONNECT_CONNECTOR", "").split())
    return [with_environment(spec, environ) for spec in specs]


def with_environment(spec: ConnectorSpec, environ: Mapping[str, str] | None = None) -> ConnectorSpec:
    """Add options from ``KVCONNECT_<NAME>_<OPTION>`` that the entry does not say itself.

    ``KVCONNECT_DISK_CAPACITY=8GiB`` sets ``capacity`` for every ``disk`` entry without one.
    """
    environ = os.environ if environ is None else environ
    prefix = "KVCONNECT_" + re.sub(r"[^A-Z0-9]", "_", spec.name.upper()) + "_"
    found = {key[len(prefix) :].lower(): value for key, value in environ.items() if key.startswith(prefix)}
    return ConnectorSpec(spec.name, {**found, **spec.options})


def _parse_entry(entry: str | Mapping[str, Any] | ConnectorSpec) -> ConnectorSpec:
    if isinstance(entry, ConnectorSpec):
        return entry
    if isinstance(entry, str):
        return _parse_url(entry)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"a connector is a URL or a mapping with a 'name', not {type(entry).__name__}")
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"a connector mapping needs a 'name'; it has: {', '.join(map(str, options)) or 'nothing'}")
    return ConnectorSpec(_checked_name(name), options)


def _parse_url(url: str) -> ConnectorSpec:
    """Split ``name://user:password@host:port/path?option=value``; a bare ``name`` is allowed."""
    if ":" not in url:
        return ConnectorSpec(_checked_name(url), {})
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its message quotes the URL, and that may hold a password
        name = url.split(":", 1)[0]
        raise ConfigError(
            f"the connector URL that begins with {name!r} cannot be read; percent-encode '/', '?' and '#' in passwords"
        ) from None
    name = _checked_name(parts.scheme or url.split(":", 1)[0])
    options: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key in options:
            raise ConfigError(f"option {key!r} stands twice in the URL of {name!r}")
        options[key] = value
    located = {
        "path": unquote(parts.path),
        "host": parts.hostname or "",
        "port": port,
        "user": unquote(parts.username or ""),
        "password": Secret(unquote(parts.password or "")),
    }
    for key, part in located.items():
        if part not in ("", None):
            if key in options:
                raise ConfigError(f"option {key!r} stands twice in the URL of {name!r}")
            options[key] = part
    return ConnectorSpec(name, options)


def is_connector_name(name: str) -> bool:
    """Say whether `name` can be written as a connector's name or URL scheme."""
    return _NAME.match(name) is not None


def _checked_name(name: str) -> str:
    if not is_connector_name(name):
        raise ConfigError(f"{name!r} is not a connector name; names are lower case, such as 'disk'")
    return name


def _decode_special(kind: type, value: object) -> object:
    if kind is ByteSize:
        if not isinstance(value, (int, str)):
            raise ConfigError(f"{value!r} is not a size; write for example 512MiB, 8GiB or 1000000")
        return ByteSize(value)
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise NotImplementedError(f"cannot convert {type(value).__name__} to {kind.__name__}")
