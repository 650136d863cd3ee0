"""One vLLM engine in a process of its own: reads a job as JSON, writes what came out as JSON.

    python -m tests.vllm.run_llm JOB RESULT

A job has ``folder``, ``connector`` (None for none), ``options`` of ``LLM``, and ``rounds``, each a list of prompts;
before each round vLLM forgets its own prefix cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Run the job."""
    from vllm import LLM, SamplingParams

    from tests.vllm.engines import transfer_config

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=job["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        block_size=32,
        skip_tokenizer_init=True,
        kv_transfer_config=job["connector"] and transfer_config(job["connector"]),
        **job["options"],
    )
    params = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=False)
    rounds = []
    for prompts in job["rounds"]:
        assert llm.reset_prefix_cache()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        rounds.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(rounds))


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main()
