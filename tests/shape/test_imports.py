"""Who may import whom: the table of ARCHITECTURE.md, walked over every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part may import of ours, beside itself. `errors`, `log` and `options` import nothing but errors, `eviction`
# only the protocol.
COMMON = {"errors", "eviction", "log", "options"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "eviction": {"protocol"},
    "log": set(),
    "options": {"errors"},
    "protocol": {"errors"},
    "store": {"protocol", *COMMON},
    "leader": {"store", "protocol", *COMMON},
    "worker": {"store", "protocol", *COMMON},
    "registry": {"protocol", "store", *COMMON},
    "hooks": {"protocol", *COMMON},
    "driver": {"registry", "protocol", "hooks", *COMMON},
    "engine": {"driver", "protocol", *COMMON},
    "testing": {
        *{"engine", "driver", "hooks", "registry", "protocol", "store", "leader", "worker", "kvconnect_host"},
        *COMMON,
    },
    "cli": {"testing", "engine", "driver", "registry", "protocol", "store", "kvconnect_pytest", *COMMON},
    "kvconnect_host": {"leader", "worker", "store", "protocol", *COMMON},
    "kvconnect_disk": {"store", "protocol", *COMMON},
    "kvconnect_s3": {"store", "protocol", *COMMON},
    "kvconnect_pytest": set(),
    "kvconnect_vllm": {"driver", "registry", "protocol", *COMMON},
}
# `kvconnect/__init__.py` names the public parts, and imports torch and the engine only when they are asked for.
FACADE = {"options", "protocol", "store", "engine", "leader", "worker"}

# Who may import torch, and who transformers.
TORCH = {"worker", "engine", "cli", "testing", "kvconnect_vllm"}


def sources() -> list[Path]:
    return sorted(path for top in ("kvconnect", "connectors", "plugins") for path in (ROOT / top).rglob("*.py"))


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] in ("kvconnect", "connectors", "plugins") else parts[0]


def imports(path: Path) -> Iterator[str]:
    """Yield every module named by an import statement, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def ours(module: str) -> str | None:
    """Return the part that a module belongs to, None for foreign ones, ``""`` for the package itself."""
    parts = module.split(".")
    if parts[0] == "kvconnect":
        return parts[1] if len(parts) > 1 else ""
    return parts[0] if parts[0].startswith("kvconnect_") else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    part = part_of(path)
    allowed = FACADE if part == "__init__" else ALLOWED[part] | {part}
    for module in imports(path):
        target = ours(module)
        assert target is None or target in allowed, f"{part} imports {module}"
        if module.split(".")[0] in ("torch", "transformers"):
            assert part in TORCH, f"{part} imports {module}"


def test_table_of_the_architecture_page_is_this_one() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 and cells[0].strip("`") in ALLOWED:
            rows[cells[0].strip("`")] = {name.strip("` ") for name in cells[1].split(",")} - {"nothing", "torch", ""}
    assert rows == {part: targets - COMMON for part, targets in ALLOWED.items() if part not in COMMON}


def test_every_part_is_in_the_table() -> None:
    assert {part_of(path) for path in sources()} - {"__init__"} == set(ALLOWED)
