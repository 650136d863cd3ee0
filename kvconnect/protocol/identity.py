"""Says which model a cache belongs to, and refuses models whose KV does not obey the prefix law. Loads no weights.

Identity is content: two folders with the same bytes share a cache, and a changed weight file never does. Digests of
large files are remembered by path, size, mtime and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvconnect.errors import ConfigError, UnsupportedError
from kvconnect.protocol.keys import frame_fields
from kvconnect.protocol.recurrent import recurrent_layers

__all__ = [
    "VOLATILE_SETTINGS",
    "adapter_digest",
    "check_prefix_law",
    "checkpoint_digest",
    "model_identity",
    "rope_settings",
]

# Digests of folders in this process, by everything that would show a change: adapters are asked about once a request.
_digests: dict[tuple[str, ...], bytes] = {}

# What a forward pass depends on. Tokenizer files are left out: keys hold token ids.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

# Their frequencies depend on the whole sequence's length, so a prefix's K changes when the sequence grows.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope", "su"})

# Names of a configuration's fields that hold rotary settings, old and new forms of transformers.
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")

# Written by the library that saved the folder; they do not change the KV.
VOLATILE_SETTINGS = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
)


def model_identity(
    model: str | os.PathLike[str] | None = None, *, model_id: str | None = None, cache: Path | None = None
) -> str:
    """Return the string that names a model in every key.

    Args:
        model: A checkpoint folder; its configuration and weight files are digested.
        model_id: An explicit identity, such as a repository's commit. It wins, and is trusted.
        cache: File that remembers digests; None for the user's cache folder.

    Raises:
        ConfigError: If there is neither an id nor a folder with weights.
    """
    if model_id:
        return f"id:{model_id}"
    if model is None:
        raise ConfigError("this model has no identity: give model_id= (random weights are never told apart by name)")
    return f"content:{checkpoint_digest(model, cache=cache)}"


def checkpoint_digest(folder: str | os.PathLike[str], *, cache: Path | None = None) -> str:
    """Digest a checkpoint folder: its ``config.json`` and every weight file, by name and content.

    A file is read once and remembered under (path, size, mtime_ns, inode); the cost of the first time is one
    sequential read.

    Raises:
        ConfigError: If the folder has no configuration or no weights.
    """
    return _folder_digest(folder, "config.json", "checkpoint", b"kvconnect-model1", cache).hex()


def adapter_digest(folder: str | os.PathLike[str], *, cache: Path | None = None) -> bytes:
    """Digest an adapter (LoRA) folder: its ``adapter_config.json`` and every weight file, by name and content.

    Remembered like `checkpoint_digest`: after the first time it costs a few ``stat`` calls.

    Returns:
        32 bytes.

    Raises:
        ConfigError: If the folder has no adapter configuration or no weights.
    """
    return _folder_digest(folder, "adapter_config.json", "adapter", b"kvconnect-adapt1", cache)


def _folder_digest(
    folder: str | os.PathLike[str], config_name: str, what: str, person: bytes, cache: Path | None
) -> bytes:
    try:
        return _digest_files(Path(folder), config_name, what, person, cache)
    except OSError as error:
        raise ConfigError(f"{what} folder {os.fspath(folder)!r} cannot be read: {error}") from error


def _digest_files(root: Path, config_name: str, what: str, person: bytes, cache: Path | None) -> bytes:
    weights = sorted(p for p in root.iterdir() if p.suffix in _WEIGHT_SUFFIXES) if root.is_dir() else []
    if not weights or not (root / config_name).is_file():
        raise ConfigError(f"{os.fspath(root)!r} is no {what} folder: it needs {config_name} and weight files")
    tags = tuple(_file_tag(path) for path in (root / config_name, *weights))
    if cache is None and tags in _digests:
        return _digests[tags]
    cache = _default_cache() if cache is None else cache
    known = _read_cache(cache)
    fields, learned = [], False
    for path in weights:
        tag = _file_tag(path)
        if tag not in known:
            known[tag] = _file_digest(path)
            learned = True
        fields.append((path.name, known[tag].encode()))
    try:
        config = json.loads((root / config_name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {os.fspath(root / config_name)!r}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{os.fspath(root / config_name)!r} holds no settings")
    kept = {key: value for key, value in config.items() if key not in VOLATILE_SETTINGS}
    fields.append((config_name, json.dumps(kept, sort_keys=True).encode()))
    if learned:
        _write_cache(cache, known)
    digest = _digests[tags] = hashlib.blake2b(frame_fields(fields), digest_size=32, person=person).digest()
    return digest


def rope_settings(config: Mapping[str, Any]) -> str:
    """Return the rotary settings of a model configuration as canonical JSON, ``""`` if it has none."""
    found = {name: config[name] for name in _ROPE_FIELDS if config.get(name) is not None}
    return json.dumps(found, sort_keys=True, default=str) if found else ""


def check_prefix_law(config: Mapping[str, Any]) -> None:
    """Refuse a model whose KV of a prefix depends on what follows it, or that keeps more of a prefix than KV.

    Args:
        config: The model configuration as a mapping (``config.to_dict()`` or ``config.json``).

    Raises:
        UnsupportedError: Names the setting; such KV must not be reused under another continuation.
    """
    recurrent = recurrent_layers(config)
    if recurrent:
        raise UnsupportedError(
            f"{recurrent} keep a recurrent state: what such a layer knows of a prefix is one state and not a set of "
            "blocks, so a store of blocks cannot give back a shorter prefix than it was made from; this model is not "
            "served"
        )
    for field in ("rope_parameters", "rope_scaling"):
        for settings in _rope_dicts(config.get(field)):
            kind = settings.get("rope_type", settings.get("type"))
            if kind in _LENGTH_DEPENDENT_ROPE:
                raise UnsupportedError(
                    f"rope type {kind!r} changes with the sequence's total length, so cached prefixes would be wrong; "
                    "run this model without a connector"
                )
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise UnsupportedError("bidirectional attention: a prefix's KV depends on what follows; it cannot be cached")


def _rope_dicts(settings: object) -> list[Mapping[str, Any]]:
    """Return the settings themselves and those nested one level down (one a layer type)."""
    if not isinstance(settings, Mapping):
        return []
    return [settings, *(value for value in settings.values() if isinstance(value, Mapping))]


def _file_tag(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"


def _file_digest(path: Path) -> str:
    hasher = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(8 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "kvconnect" / "digests.json"


def _read_cache(cache: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):  # absent or torn: only speed is lost
        return {}


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    """Replace the cache file whole; a read-only home costs the speed, nothing else."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, delete=False) as file:
            file.write(msgspec.json.encode(known))
        os.replace(file.name, cache)
