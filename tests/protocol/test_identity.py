"""Model identity is content; models that break the prefix law are refused by name."""

import json
import os
from pathlib import Path

import pytest

from kvconnect.errors import ConfigError, UnsupportedError
from kvconnect.protocol import check_prefix_law, checkpoint_digest, model_identity, rope_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-5, "transformers_version": "5.0"}))
    (made / "model.safetensors").write_bytes(b"weights")
    return made


def test_digest_follows_content_not_path(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = checkpoint_digest(folder, cache=cache)
    moved = folder.rename(tmp_path / "elsewhere")
    assert checkpoint_digest(moved, cache=cache) == before
    (moved / "model.safetensors").write_bytes(b"weightz")
    assert checkpoint_digest(moved, cache=cache) != before


def test_configuration_counts_but_not_who_saved_it(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = checkpoint_digest(folder, cache=cache)
    (folder / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-5, "transformers_version": "6.0"}))
    assert checkpoint_digest(folder, cache=cache) == before
    (folder / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-6}))
    assert checkpoint_digest(folder, cache=cache) != before


def test_remembered_digest_is_used_and_a_torn_memory_is_not_fatal(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = checkpoint_digest(folder, cache=cache)
    known = json.loads(cache.read_text())
    assert len(known) == 1
    cache.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    assert checkpoint_digest(folder, cache=cache) != before  # it believed the memory: the file was not read again
    cache.write_text("{torn")
    assert checkpoint_digest(folder, cache=cache) == before


def test_changed_file_of_same_size_is_digested_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = checkpoint_digest(folder, cache=cache)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(1, 1))
    assert checkpoint_digest(folder, cache=cache) != before


def test_explicit_id_wins_and_nothing_is_refused(folder: Path) -> None:
    assert model_identity(folder, model_id="org/model@abc") == "id:org/model@abc"
    with pytest.raises(ConfigError, match="model_id="):
        model_identity()
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        model_identity(folder.parent)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_rope_that_depends_on_total_length_is_refused_by_name(kind: str, nested: bool) -> None:
    settings = {"rope_type": kind}
    with pytest.raises(UnsupportedError, match=kind):
        check_prefix_law({"rope_parameters": {"full_attention": settings} if nested else settings})


def test_bidirectional_attention_is_refused_and_static_rope_is_not() -> None:
    with pytest.raises(UnsupportedError, match="bidirectional"):
        check_prefix_law({"use_bidirectional_attention": True})
    check_prefix_law({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    check_prefix_law({})


def test_rope_settings_are_canonical() -> None:
    one = rope_settings({"rope_theta": 1e4, "rope_scaling": {"a": 1, "b": 2}})
    assert one == rope_settings({"rope_scaling": {"b": 2, "a": 1}, "rope_theta": 1e4, "hidden_size": 5})
    assert one != rope_settings({"rope_theta": 5e5, "rope_scaling": {"a": 1, "b": 2}})
    assert rope_settings({}) == ""
