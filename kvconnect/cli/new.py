"""``kvconnect new``: writes the skeleton of a distribution with a store that passes the conformance kits."""

from __future__ import annotations

import string
from importlib.resources import files
from pathlib import Path

from kvconnect.errors import ConfigError
from kvconnect.options import is_connector_name

__all__ = ["write_skeleton"]

_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "kvconnect_{module}.py": "store.py.txt",
    "tests/test_{module}.py": "test_store.py.txt",
}


def write_skeleton(name: str, folder: str | None = None) -> Path:
    """Write a new distribution, and say what to do with it.

    Args:
        name: What users will write: ``name://...``.
        folder: Where; ``kvconnect-NAME`` in the current one if None.

    Returns:
        The folder.

    Raises:
        ConfigError: If the name cannot be one, or the folder has something in it.
    """
    module = name.replace("-", "_")
    if not is_connector_name(name) or not module.isidentifier():
        raise ConfigError(f"{name!r} is no name for a connector; choose lower case letters, digits and '-'")
    place = Path(folder or f"kvconnect-{name}")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{str(place)!r} is there already; give another --folder")
    words = {"name": name, "module": module, "title": "".join(part.capitalize() for part in module.split("_"))}
    for target, source in _FILES.items():
        text = (files("kvconnect.cli") / "skeleton" / source).read_text("utf-8")
        path = place / target.format(module=module)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(string.Template(text).substitute(words), "utf-8")
    print(f"{place}/ has a store that passes; put your medium in its place, and run the kit again:")
    print(f"  cd {place}\n  pip install -e .\n  kvconnect conformance {name} --quick")
    return place
