"""A device too small for two prompts, and A, B, A, B: what comes back from host memory, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvconnect import LLM, KVCacheConfig, SamplingParams
from kvconnect.engine.pool import NO_PAGE
from tests.conftest import FAMILIES, Reference, make_model
from tests.engine.test_generate import check_pages

SIZE = 8
PROMPTS = {"A": list(range(1, 95)), "B": list(range(120, 214))}


def pages_of(llm: LLM, prompt: list[int]) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Return a copy of each full block's K and V in every layer, by (layer group, block), as far as it has a page."""
    cache = llm._core.cache
    hashes = llm._new_request(prompt, SamplingParams(max_tokens=1)).chain.hashes
    return {
        (group, number): [
            pages[page].clone() for layer in cache.layers if layer.group == group for pages in (layer.key, layer.value)
        ]
        for group, pool in enumerate(cache.pools)
        for number, block_hash in enumerate(hashes)
        if (page := pool.find(block_hash)) != NO_PAGE
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offloading", [False, True])
def test_what_left_the_device_comes_back_with_a_host_tier_only(
    references: dict[str, Reference], family: str, offloading: bool
) -> None:
    config = KVCacheConfig(max_tokens=13 * SIZE, block_size=SIZE, host_cache_bytes="1MiB" if offloading else 0)
    params = SamplingParams(max_tokens=10, ignore_eos=True)  # thirteen pages: all there are
    outputs: list[Any] = []
    seen: dict[str, dict[tuple[int, int], list[torch.Tensor]]] = {}
    with LLM(make_model(family), kv_cache_config=config) as llm:
        for name in "ABAB":
            (output,) = llm.generate([PROMPTS[name]], params)
            outputs.append(output)
            assert output.token_ids == references[family](PROMPTS[name], 10)
            now = pages_of(llm, PROMPTS[name])
            if family in ("llama", "qwen3"):  # where only a window is loaded, pages out of it may stay
                assert not any(pages_of(llm, PROMPTS[other]) for other in PROMPTS if other != name)
                assert len(now) == 11
            if name in seen and offloading:
                both = now.keys() & seen[name].keys()
                assert {group for group, _ in both} == set(range(len(llm._core.cache.pools)))
                for place in both:
                    assert all(map(torch.equal, now[place], seen[name][place]))
            seen[name] = now
        groups = len(llm._core.cache.pools)
        blocks = 11 * groups  # of ninety-four tokens, one of which is computed
        check_pages(llm)
        rate = llm.get_stats()["cache_hit_rate"]
    found = [output.blocks.reused + output.blocks.loaded for output in outputs]
    missed = [output.blocks.missed for output in outputs]
    assert found == ([0, 0, blocks, blocks] if offloading else [0, 0, 0, 0])
    assert missed == ([blocks, blocks, 0, 0] if offloading else [blocks] * 4)
    assert rate == (0.5 if offloading else 0.0)
