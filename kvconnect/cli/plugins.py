"""``kvconnect plugins``: what is registered, by whom, and what it can do. Loads no torch."""

from __future__ import annotations

import json
from typing import Any

from kvconnect.errors import PluginError
from kvconnect.options import option_names
from kvconnect.protocol import Connector
from kvconnect.registry import Registered, Registry, load_registry
from kvconnect.store import TierOptions

__all__ = ["run_plugins"]


def run_plugins(*, as_json: bool) -> int:
    """Print the registered names; return 0."""
    registry = load_registry()
    rows = [_describe(registry, entry) for entry in registry.entries]
    if as_json:
        wrappers = {half: list(targets) for half, targets in registry.wrappers.items()}
        print(json.dumps({"connectors": rows, "wrappers": wrappers, "broken": registry.broken}, indent=2))
        return 0
    from rich.console import Console  # late: JSON output needs no rich
    from rich.table import Table

    table = Table()
    for title in ("name", "kind", "owner", "version", "capabilities", "options"):
        table.add_column(title, overflow="fold")
    for row in rows:
        can = [_capability(name, value) for name, value in row["capabilities"].items() if value]
        table.add_row(row["name"], row["kind"], row["owner"], row["version"], ", ".join(can), ", ".join(row["options"]))
    console = Console()
    console.print(table)
    console.print(f"every store also takes {', '.join(option_names(TierOptions))}", highlight=False)
    for row in rows:
        if row["kind"] == "broken":
            console.print(f"{row['name']} cannot be used: {row['error']}", style="red", markup=False)
    for name, why in registry.broken.items():
        console.print(f"plugin {name} cannot be loaded: {why}", style="red", markup=False)
    return 0


def _capability(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name
    return f"{name}={'+'.join(value) if isinstance(value, tuple) else value}"


def _describe(registry: Registry, entry: Registered) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "schemes": list(entry.schemes),
        "owner": entry.owner,
        "version": entry.version,
        "target": entry.target,
    }
    try:
        loaded = registry.load(entry.name)
    except PluginError as error:
        return {**row, "kind": "broken", "capabilities": {}, "options": [], "error": str(error)}
    return {
        **row,
        "kind": "connector" if issubclass(loaded, Connector) else "store",
        "capabilities": {name: getattr(loaded.capabilities, name) for name in loaded.capabilities.__struct_fields__},
        "options": list(option_names(loaded.Options)),
    }
