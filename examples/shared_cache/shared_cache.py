"""Two engines, one Redis: the second answers from the KV cache that the first computed.

    $ python shared_cache.py redis://127.0.0.1:6379

Each engine is a process with a host tier of its own; all they share is the server. On two machines run it with
``--engine first`` on one and ``--engine second`` on the other. Any other store works too: ``s3://...``, ``disk:///...``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import uuid
from typing import Any

from kvconnect import LLM, SamplingParams

DOCUMENT = (
    "An engine keeps the keys and values of every token it has seen in a paged cache. They are lost when a page is "
    "evicted and when the process ends, and no other process can use them. A connector saves them under names that "
    "depend on every token before, and loads them wherever the same prefix comes up again. "
)
QUESTIONS = ["Who computes this first?", "Who loads it?", "What do the two share?"]
STORE_VARIABLE = (
    "SHARED_CACHE_STORE"  # how a child learns of the URL: arguments can be read by everybody on the machine
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", help="the store that both share (default: $SHARED_CACHE_STORE)")
    parser.add_argument(
        "--engine", choices=["first", "second"], help="be one of the two engines instead of starting both"
    )
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: an embedded tiny Llama)")
    parser.add_argument("--tenant", default="", help="requests of other tenants share nothing; also between two runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    store = options.store or os.environ.get(STORE_VARIABLE)
    if not store:
        parser.error("name a store, such as redis://127.0.0.1:6379")
    if options.engine:
        print(json.dumps(run_engine(store, options.model, options.tenant)))
        return 0
    tenant = options.tenant or uuid.uuid4().hex  # so that the first engine has something to compute, every time
    results = {engine: start_engine(engine, store, options.model, tenant) for engine in ("first", "second")}
    equal = [a["token_ids"] == b["token_ids"] for a, b in zip(results["first"], results["second"], strict=True)]
    if options.json:
        print(json.dumps({"engines": results, "answers_equal": all(equal)}))
    else:
        for engine, answers in results.items():
            for answer in answers:
                print(
                    f"{engine:6}  {answer['question']:26} computed {answer['computed_tokens']:5}  "
                    f"loaded {answer['loaded_tokens']:5}  first token after {answer['ttft_ms']:6.1f} ms"
                )
        print(f"the same answers: {all(equal)}")
    return 0 if all(equal) else 1


def start_engine(engine: str, store: str, model: str | None, tenant: str) -> list[dict[str, Any]]:
    """Run one engine as a process of its own and return its answers."""
    command = [sys.executable, __file__, "--engine", engine, "--tenant", tenant, *(["--model", model] if model else [])]
    done = subprocess.run(command, env={**os.environ, STORE_VARIABLE: store}, stdout=subprocess.PIPE, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def run_engine(store: str, model: str | None, tenant: str) -> list[dict[str, Any]]:
    """Answer the questions, each about a document of its own; the salt keeps tenants apart."""
    params = SamplingParams(max_tokens=8, cache_salt=tenant or None)
    answers = []
    with LLM(model, connector=["host://?capacity=1GiB", store]) as llm:
        llm.warm_up()
        for number, question in enumerate(QUESTIONS):
            (output,) = llm.generate([f"Document {number}. {DOCUMENT * 8}{question}"], params)
            answers.append(
                {
                    "question": question,
                    "computed_tokens": output.computed_tokens,
                    "loaded_tokens": output.loaded_tokens,
                    "ttft_ms": round(output.ttft_s * 1000, 1),
                    "token_ids": list(output.token_ids),
                }
            )
    return answers


if __name__ == "__main__":
    sys.exit(main())
