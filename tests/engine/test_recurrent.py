"""Models whose layers keep a recurrent state are refused by name, before memory is taken; others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from kvconnect import LLM
from kvconnect.errors import UnsupportedError
from kvconnect.protocol import check_prefix_law

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

# transformers says of these itself that their cache is no KV cache alone: `_is_stateful`
STATEFUL = (
    "Bamba",
    "FalconH1",
    "FalconMamba",
    "GraniteMoeHybrid",
    "Jamba",
    "Mamba",
    "Mamba2",
    "NemotronH",
    "OlmoHybrid",
    "Qwen3Next",
    "RecurrentGemma",
    "Rwkv",
    "Zamba",
    "Zamba2",
    "xLSTM",
)
ATTENTION_ALONE = ("Cohere2", "Gemma2", "GPTNeoX", "GptOss", "Llama", "Mixtral", "Olmo3", "Phi3", "Qwen2", "Qwen3Moe")


def config_of(family: str, **changes: Any) -> Any:
    return getattr(tf, f"{family}Config")(**changes)


@pytest.mark.parametrize("family", STATEFUL)
def test_what_transformers_calls_stateful_is_refused(family: str) -> None:
    assert getattr(tf, f"{family}ForCausalLM")._is_stateful
    with pytest.raises(UnsupportedError, match=r"layers .* keep a recurrent state"):
        check_prefix_law(config_of(family).to_dict())


@pytest.mark.parametrize("family", ATTENTION_ALONE)
def test_attention_alone_is_not(family: str) -> None:
    assert not getattr(tf, f"{family}ForCausalLM")._is_stateful
    check_prefix_law(config_of(family).to_dict())


def test_layers_are_named() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    config = config_of("Qwen3Next", num_hidden_layers=8, layer_types=kinds * 2)
    with pytest.raises(UnsupportedError, match=r"layers 0-2, 4-6 \(linear_attention\) keep"):
        check_prefix_law(config.to_dict())
    with pytest.raises(UnsupportedError, match=r"layers 0-1, 3-4 \(recurrent\) keep"):
        check_prefix_law(config_of("RecurrentGemma", num_hidden_layers=5).to_dict())
    with pytest.raises(UnsupportedError, match="mamba_d_state=16"):
        check_prefix_law({"model_type": "of-tomorrow", "mamba_d_state": 16})
    with pytest.raises(UnsupportedError, match=r"ssm_cfg=\{\}"):  # as the mamba_ssm library writes it
        check_prefix_law({"d_model": 768, "ssm_cfg": {}})


def test_a_short_convolution_is_a_state_too() -> None:
    kinds = ["conv", "full_attention"]
    with pytest.raises(UnsupportedError, match=r"layers 0 \(conv\)"):
        check_prefix_law(config_of("Lfm2", num_hidden_layers=2, layer_types=kinds).to_dict())


def test_a_member_of_a_hybrid_family_with_attention_alone_is_served() -> None:
    kinds = ["full_attention"] * 2
    check_prefix_law(config_of("Lfm2", num_hidden_layers=2, layer_types=kinds).to_dict())
    check_prefix_law(config_of("GraniteMoeHybrid", num_hidden_layers=2, layer_types=kinds).to_dict())


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    extras: dict[str, dict[str, Any]] = {
        "Mamba": {"state_size": 4},
        "Jamba": {"mamba_d_state": 4, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
        "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
        "RecurrentGemma": {"lru_width": 32, "num_key_value_heads": 1},
    }
    return getattr(tf, f"{family}ForCausalLM")(config_of(family, **{**SHAPE, **extras[family]}))


@pytest.mark.parametrize("family", ["Mamba", "Jamba", "Lfm2", "RecurrentGemma"])
@pytest.mark.parametrize("connector", [None, "host://"])
def test_the_engine_refuses_before_it_takes_pages(
    family: str, connector: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PagedCache", "open_connector"):
        monkeypatch.setattr(f"kvconnect.engine.llm.{name}", lambda *_, **__: pytest.fail("something was allocated"))
    with pytest.raises(UnsupportedError, match="recurrent state"):
        LLM(tiny(family), connector)


def test_a_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config_of("Jamba", **SHAPE).save_pretrained(tmp_path)  # and nothing else: reading weights would be another error
    with pytest.raises(UnsupportedError, match="recurrent state"):
        LLM(tmp_path)
