"""Two processes, one KV cache: run this twice and the second run loads what the first one computed.

    $ python persistent_cache.py /tmp/kv
    $ python persistent_cache.py /tmp/kv

With ``--once`` it runs the first process for you as well, so that one command shows both.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from kvconnect import LLM, SamplingParams

DOCUMENT = (
    "An engine keeps the keys and values of every token it has seen in a paged cache. They are lost when a page is "
    "evicted and when the process ends, and no other process can use them. A connector saves them under names that "
    "depend on every token before, and loads them wherever the same prefix comes up again. "
)
QUESTIONS = ["What is lost when a process ends?", "What does a connector do?", "Who else can use the cache?"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the cache is kept")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: an embedded tiny Llama)")
    parser.add_argument("--once", action="store_true", help="run a first process before this one")
    options = parser.parse_args()
    if options.once:
        model = ["--model", options.model] if options.model else []
        subprocess.run([sys.executable, __file__, options.folder, *model], check=True)
    loaded = 0
    with LLM(
        options.model, connector=["host://?capacity=1GiB", f"disk://{Path(options.folder).absolute()}?capacity=10GiB"]
    ) as llm:
        for question in QUESTIONS:
            (output,) = llm.generate([DOCUMENT * 4 + question], SamplingParams(max_tokens=8))
            print(
                f"{question:35} computed {output.computed_tokens:5}  reused {output.reused_tokens:5}  "
                f"loaded {output.loaded_tokens:5}  first token after {output.ttft_s * 1000:6.1f} ms  {output.token_ids}"
            )
            loaded += output.loaded_tokens
    print(f"this process loaded {loaded} tokens that another one had computed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
