"""A device cache too small for two prompts, with and without host memory behind it.

    $ python host_offloading.py
    $ python host_offloading.py --enable-offloading

The prompts A, B, A, B are run one after the other. Each fills the whole device cache, so what A computed is gone when A
comes again: without offloading it is computed again, with it it comes back from host memory.
"""

import argparse
import json
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from kvconnect import LLM, ByteSize, KVCacheConfig, SamplingParams
from kvconnect.engine.tiny import tiny_model

TEXTS = {
    "A": (
        "Returning to the same long conversation is what most users of a chat do all day. Everything that was said "
        "before is sent again with each question, and everything has to be read again by the model, unless somebody "
        "has kept its keys and values. The device keeps them as long as nobody else needs the room. After that they "
        "have to lie somewhere else, or the work was done for nothing and will be done once more."
    ),
    "B": (
        "Seven ships left the harbour before dawn, three of them with timber, two with salt, and two with nothing but "
        "letters. The pilot counted masts until the fog closed behind the last one. In the evening only six lanterns "
        "were seen from the tower, and the keeper wrote the number into his book, thought for a while, and put a "
        "question mark next to it in red ink, which he had been saving for exactly such a night."
    ),
}
ORDER = "ABAB"
BLOCK_SIZE = 16
DEVICE_TOKENS = 256
PROMPT_TOKENS = 152  # at most; nine full blocks and a half


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--enable-offloading", "--enable_offloading", action="store_true", help="use host memory")
    parser.add_argument("--host-cache-bytes", metavar="SIZE", help="how much (default: 1GiB, or half of what is free)")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: an embedded tiny Llama)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.pop("KVCONNECT_CONNECTOR", None)  # nothing but host memory may answer here
    host_bytes = (options.host_cache_bytes or default_host_bytes()) if options.enable_offloading else 0

    config = KVCacheConfig(max_tokens=DEVICE_TOKENS, block_size=BLOCK_SIZE, host_cache_bytes=host_bytes)
    with LLM(options.model, kv_cache_config=config, max_num_seqs=1) as llm:
        prompts = tokenize(llm)
        # a prompt and its answer fill the device to the last page: one that is shorter would leave some of the other
        num_generated = DEVICE_TOKENS - len(prompts["A"])
        params = SamplingParams(max_tokens=num_generated, ignore_eos=True)
        outputs = [llm.generate([prompts[name]], params)[0] for name in ORDER]
        hit_rate = llm.get_stats()["cache_hit_rate"]

    expected = generate(options.model, prompts, num_generated)
    result: dict[str, Any] = {
        "requests": [
            {
                "prompt": name,
                "reused_blocks": output.blocks.reused + output.blocks.loaded,
                "missed_blocks": output.blocks.missed,
                "allocated_blocks": output.blocks.allocated,
            }
            for name, output in zip(ORDER, outputs, strict=True)
        ],
        "cache_hit_rate": hit_rate,
        "outputs_equal": all(output.token_ids == expected[name] for name, output in zip(ORDER, outputs, strict=True)),
    }
    if options.json:
        print(json.dumps(result))
    else:
        show(result, len(prompts["A"]), num_generated, host_bytes)
    return 0 if result["outputs_equal"] else 1


def default_host_bytes() -> int:
    """Return 1 GiB, or half of the memory that is free if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(1 << 30, free // 2)


def tokenize(llm: LLM) -> dict[str, list[int]]:
    """Return the prompts as token ids, equally many of each."""
    if llm.tokenizer is None:
        raise SystemExit("this checkpoint has no tokenizer, and its vocabulary is too small for bytes")
    prompts = {name: llm.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in TEXTS.items()}
    length = min(PROMPT_TOKENS, *map(len, prompts.values()))
    return {name: tokens[:length] for name, tokens in prompts.items()}


def generate(folder: str | None, prompts: dict[str, list[int]], num_tokens: int) -> dict[str, list[int]]:
    """Return what transformers alone continues each prompt with."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if folder else tiny_model()
    model.eval()
    # not the checkpoint's own: without an end-of-sequence token it goes on, as the engine does with ignore_eos
    greedy = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    model.generation_config = GenerationConfig.from_dict(greedy)
    outputs = {}
    for name, tokens in prompts.items():
        ids = torch.tensor([tokens])
        outputs[name] = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(tokens) :].tolist()
    return outputs


def show(result: dict[str, Any], num_prompt: int, num_generated: int, host_bytes: int | str) -> None:
    behind = f"{ByteSize(host_bytes)} of host memory behind it" if host_bytes else "nothing behind it"
    print(f"a device cache of {DEVICE_TOKENS} tokens in blocks of {BLOCK_SIZE}, and {behind}")
    print(f"each prompt has {num_prompt} tokens and generates {num_generated}: together they fill the device\n")
    for request in result["requests"]:
        print(
            f"prompt {request['prompt']}  reused blocks: {request['reused_blocks']:3}  "
            f"missed: {request['missed_blocks']:3}  allocated: {request['allocated_blocks']:3}"
        )
    print(f"\ncache hit rate: {result['cache_hit_rate']:.2f}")
    again = result["requests"][2]
    if again["reused_blocks"]:
        missed = f"; {again['missed_blocks']} did not fit there and were computed" if again["missed_blocks"] else ""
        print(
            "B took every page of the device. What A had computed was in host memory by then: the second A loaded "
            f"{again['reused_blocks']} blocks from there{missed}."
        )
    else:
        print(
            "B took every page of the device, and nothing kept the blocks of A: the second A found none of them and "
            f"computed all {again['missed_blocks']} again."
        )
    print(f"outputs {'equal' if result['outputs_equal'] else 'DIFFER FROM'} those of model.generate()")


if __name__ == "__main__":
    sys.exit(main())
