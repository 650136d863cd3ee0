"""What is registered, what is refused at start and why, and what a request's key depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kvconnect_vllm
import pytest
import torch
from kvconnect_vllm.config import read_setup
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvconnect.errors import ConfigError, KVConnectError, UnsupportedError
from tests.vllm.models import save_llama

SPEC: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


def transfer(**changes: Any) -> KVTransferConfig:
    return KVTransferConfig(
        **{
            "kv_connector": "KVConnect",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connector": "host://?capacity=1MiB"},
            **changes,
        }
    )


def config(folder: Path, transfer_config: KVTransferConfig | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": 32,
        "skip_tokenizer_init": True,
        **options,
    }
    return EngineArgs(
        model=str(folder), kv_transfer_config=transfer_config or transfer(), **settings
    ).create_engine_config()


def cache(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"model.layers.{i}.self_attn.attn"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


FULL = FullAttentionSpec(**SPEC)


def test_plugin_registers_in_every_process_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, kvconnect_vllm; assert 'torch' not in sys.modules and 'vllm' not in sys.modules;"
        "kvconnect_vllm.register(); kvconnect_vllm.register();"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as F;"
        "assert 'kvconnect_vllm.connector' not in sys.modules;"
        "assert F.get_connector_class_by_name('KVConnect') is kvconnect_vllm.KVConnect"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    from importlib.metadata import entry_points

    (point,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "kvconnect"]
    assert point.load() is kvconnect_vllm.register
    assert kvconnect_vllm.KVConnect.__name__ == "KVConnect"


def test_registering_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("another vLLM")

    monkeypatch.setattr(KVConnectorFactory, "register_connector", broken)
    kvconnect_vllm.register()
    assert "kv_connector_module_path" in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_load_failure_policy": "fail"}, 'set kv_load_failure_policy="recompute"'),
        ({"kv_role": "kv_producer"}, 'kv_role="kv_both"'),
        ({"kv_connector_extra_config": {"conector": "host://"}}, "did you mean 'connector'"),
        ({"kv_connector_extra_config": {}}, "no connector given"),
        ({"kv_connector_extra_config": {"connector": "hots://"}}, "did you mean 'host'"),
        ({"kv_connector_extra_config": {"connector": "host://?capacity=lots"}}, "capacity"),
    ],
)
def test_configuration_that_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(KVConnectError, match=says):
        read_setup(config(folder, transfer(**changes)), cache(FULL))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}}, "dynamic"),
        ({"load_format": "dummy"}, "give model_id"),
    ],
)
def test_engines_that_are_refused(folder: Path, options: dict[str, Any], says: str) -> None:
    parallel = options.pop("pipeline_parallel_size", 1)
    made = config(folder, **options)
    made.parallel_config.pipeline_parallel_size = parallel
    with pytest.raises(KVConnectError, match=says):
        read_setup(made, cache(FULL))


def test_drafts_of_another_model_are_refused(folder: Path) -> None:
    made = config(folder)
    made.speculative_config = type("Speculative", (), {"method": "eagle"})()
    with pytest.raises(UnsupportedError, match="draft model"):
        read_setup(made, cache(FULL))


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ([MambaSpec(block_size=32, shapes=((1,),), dtypes=(torch.float32,))], "MambaSpec"),
        ([MLAAttentionSpec(**{**SPEC, "num_kv_heads": 1})], "MLAAttentionSpec"),
        ([FULL, SlidingWindowSpec(**{**SPEC, "block_size": 64}, sliding_window=64)], "disable_hybrid_kv_cache_manager"),
    ],
)
def test_caches_that_are_refused(folder: Path, specs: list[Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        read_setup(config(folder), cache(*specs))


def test_engine_does_not_start_where_a_failed_load_would_end_a_request(folder: Path) -> None:
    from tests.vllm.engines import open_engine

    with (
        pytest.raises(UnsupportedError, match="recompute"),
        open_engine(folder, kv_transfer_config=transfer(kv_load_failure_policy="fail")),
    ):
        pass


def test_module_path_works_where_plugins_are_off(folder: Path) -> None:
    found = KVConnectorFactory.get_connector_class(transfer(kv_connector_module_path="kvconnect_vllm"))
    assert found is kvconnect_vllm.KVConnect


def test_what_the_keys_depend_on(folder: Path, tmp_path: Path) -> None:
    def digest(path: Path, transfer_config: KVTransferConfig | None = None, **options: Any) -> bytes:
        return read_setup(config(path, transfer_config, **options), cache(FULL)).namespace.digest(32)

    other = save_llama(tmp_path / "other", seed=1)
    same = save_llama(tmp_path / "same")
    named = transfer(kv_connector_extra_config={"connector": "host://?capacity=1MiB", "model_id": "m@1"})
    renamed = transfer(kv_connector_extra_config={"connector": "host://?capacity=1MiB", "model_id": "m@2"})
    plain = digest(folder)
    assert digest(same) == plain
    assert digest(folder, max_model_len=256) == plain
    different = [
        digest(other),
        digest(folder, named),
        digest(folder, renamed),
        digest(folder, dtype="bfloat16"),
        digest(folder, kv_cache_dtype="fp8"),
        digest(folder, dtype="bfloat16", kv_cache_dtype="fp8"),
        digest(folder, hf_overrides={"rms_norm_eps": 1e-3}),
        digest(folder, hf_overrides={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ]
    assert len({plain, *different}) == 1 + len(different)


def test_a_model_of_the_hub_is_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(folder)
    made.model_config.model = "somebody/model"
    with pytest.raises(ConfigError, match="give model_id"):
        read_setup(made, cache(FULL))
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--somebody--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert read_setup(made, cache(FULL)).namespace.model == f"id:somebody/model@{'a' * 40}"
