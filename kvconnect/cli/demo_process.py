"""One process of the demo: reads a job as JSON from standard input, prints one JSON line a prompt."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from kvconnect.engine import LLM, SamplingParams
from kvconnect.engine.tiny import tiny_model
from kvconnect.errors import ConfigError, KVConnectError

__all__ = ["main"]


def main() -> int:
    """Run the job; return 0, or 1 after an error that was printed."""
    job = json.load(sys.stdin)
    # libraries that print to standard output must not get between the lines
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        for event in _reference(job) if job["phase"] == "reference" else _generate(job):
            print(json.dumps(event), file=lines, flush=True)
    except KVConnectError as error:
        print(json.dumps({"error": str(error)}), file=lines, flush=True)
        return 1
    return 0


def _generate(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with LLM(job["model"], job["connector"], block_size=job["block_size"], kv_cache_bytes=job["kv_cache_bytes"]) as llm:
        llm.generate([[1]], SamplingParams(max_tokens=1, cache="none"))  # threads and buffers are made once
        params = SamplingParams(max_tokens=job["max_tokens"], ignore_eos=True)
        for prompt in job["prompts"]:
            (output,) = llm.generate([prompt], params)
            yield {
                "token_ids": output.token_ids,
                "prompt_tokens": output.prompt_tokens,
                "computed_tokens": output.computed_tokens,
                "reused_tokens": output.reused_tokens,
                "loaded_tokens": output.loaded_tokens,
                "ttft_s": output.ttft_s,
                "failures": _failures(llm.get_stats()),
            }


def _reference(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Complete the prompts with transformers alone: no page, no plan, no connector of ours."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from kvconnect.engine.model import load_tokenizer

    if job["model"] is None:
        model: Any = tiny_model()
        tokenizer = load_tokenizer(None, model.config)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
        tokenizer = load_tokenizer(job["model"], model.config)
    model.eval()
    # plain greedy decoding, whatever the checkpoint's own settings are (penalties, sampling, end of sequence)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    if tokenizer is None:
        raise ConfigError(f"{job['model']} has no tokenizer, and its vocabulary is too small for bytes")
    for prompt in job["prompts"]:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["max_tokens"],
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(output.logits)[:, 0].float().topk(2).values
        yield {
            "token_ids": output.sequences[0, ids.shape[1] :].tolist(),
            "gaps": (best[:, 0] - best[:, 1]).tolist(),
        }


def _failures(stats: dict[str, Any]) -> dict[str, int]:
    """Collect what was counted as failed: hooks that raised, stores that did not answer, blocks that did not verify."""
    counted: dict[str, int] = {}
    leader = stats["leader"]
    sources = [leader["hooks"]["failures"]]
    sources.append({name: leader.get(name) for name in ("lookup_failures", "promote_failures", "demote_failures")})
    for worker in stats["workers"]:
        sources += [worker["hooks"]["failures"], worker.get("failures")]
    for source in sources:  # a connector of somebody else's may count otherwise, or not at all
        for kind, count in source.items() if isinstance(source, dict) else ():
            if isinstance(count, int) and count:
                counted[kind] = counted.get(kind, 0) + count
    return counted


if __name__ == "__main__":
    sys.exit(main())
