"""Offline inference in two vLLM processes: the second loads what the first one computed.

$ python offline.py /tmp/kvconnect-offline
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prompt import make_prompt
from small_model import make_model


def ask(model: str, dtype: str, store: Path, prompt: str) -> dict[str, Any]:
    """Run the prompt in this process. This is all that a script of yours needs."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,  # starts sooner; the cache works with compiled models too
        disable_log_stats=False,  # for the time to first token below
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVConnect",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connector": ["host://?capacity=1GiB", f"disk://{store}?capacity=10GiB"]},
        ),
    )
    sampling = SamplingParams(temperature=0, max_tokens=16)
    llm.generate("warm up", sampling, use_tqdm=False)
    (output,) = llm.generate(prompt, sampling, use_tqdm=False)
    return {
        "token_ids": output.outputs[0].token_ids,
        "prompt_tokens": len(output.prompt_token_ids),
        "loaded_tokens": output.num_cached_tokens,  # this process has nothing of its own to reuse
        "ttft_s": output.metrics.first_token_latency,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the cache is kept, and the model if none is given")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: a small random Llama)")
    parser.add_argument("--dtype", default="float32", help="in which answers can be compared (default: float32)")
    parser.add_argument("--rules", type=int, default=80, help="length of the prompt, about 24 tokens each")
    parser.add_argument("--answer", metavar="FILE", type=Path, help="ask in this process, and write the answer there")
    options = parser.parse_args()
    folder = options.folder.absolute()
    model = options.model or make_model(folder / "model")
    if options.answer:
        answer = ask(model, options.dtype, folder / "kv", make_prompt(options.rules))
        options.answer.write_text(json.dumps(answer))
        return 0
    answers = []
    for name in ("first", "second"):
        written = folder / f"{name}.json"
        subprocess.run([sys.executable, *sys.argv, "--answer", str(written)], check=True)
        answer = json.loads(written.read_text())
        print(
            f"{name:6} process: {answer['prompt_tokens']} prompt tokens, {answer['loaded_tokens']} loaded, "
            f"first token after {answer['ttft_s'] * 1000:.0f} ms",
            flush=True,
        )
        answers.append(answer)
    equal = answers[0]["token_ids"] == answers[1]["token_ids"]
    print(f"answers: {'equal' if equal else 'DIFFERENT'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
