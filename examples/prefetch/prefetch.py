"""A conversation is suspended in the middle of an answer, sinks to disk, and is prefetched before it goes on.

    $ python prefetch.py

While it is suspended, other requests need the device and host memory, and its blocks end on disk. Whoever knows that it
will go on soon has them brought to host memory while the others still run; `resume` then has the short way only.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from kvconnect import LLM, CacheLevel, KVCacheConfig, SamplingParams
from kvconnect.engine.tiny import tiny_model

TEXT = (
    "The two of them had been talking since noon, about the harbour, about the price of salt, about a letter that came "
    "too late and another that should never have been opened. Every word that was said so far matters for the next "
    "one, so the model has to keep the keys and values of all of it. Then the telephone rings, and nobody knows for "
    "how long. "
)
BLOCK_SIZE = 16
PROMPT_TOKENS = 480  # of the conversation
ANSWER_TOKENS = 96
OTHER_TOKENS = 448  # of each prompt that runs meanwhile
TIMEOUT_S = 60.0
NO_ROOM = "host memory has no room for the conversation; give it more with --host-cache-bytes"


class Stage:
    """One engine; on it the conversation, and others that come and go."""

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams) -> None:
        self.llm = llm
        self.moments: list[dict[str, Any]] = []
        self.token_ids: list[int] | None = None  # of the conversation, once it has ended
        self.num_others = 0
        self.other = ""
        self.request_id = llm.add_request(prompt, params)
        self.conversation = llm.sequence(self.request_id)

    def step(self) -> int:
        """Run one step; return how many tokens the conversation got."""
        count = 0
        for output in self.llm.step():
            count += output.request_id == self.request_id
            if output.finished is not None and output.request_id == self.request_id:
                self.token_ids = output.finished.token_ids
            elif output.finished is not None:
                self.other = ""
        return count

    def add_other(self, max_tokens: int) -> None:
        """Let another request run; each has a prompt of its own."""
        self.num_others += 1
        prompt = [(self.num_others + index * (7 + self.num_others)) % 251 for index in range(OTHER_TOKENS)]
        self.other = self.llm.add_request(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))

    def step_until(self, done: Callable[[], bool]) -> None:
        """Step until `done`, with another request running all the time."""
        deadline = time.monotonic() + TIMEOUT_S
        while not done():
            if time.monotonic() > deadline:
                raise SystemExit(f"gave up after {TIMEOUT_S:.0f} s; the blocks are at {self.blocks()}")
            if not self.other:
                self.add_other(max_tokens=4)
            self.step()

    def blocks(self) -> dict[str, int]:
        return self.conversation.blocks_by_level()

    def note(self, when: str) -> None:
        self.moments.append({"when": when, "blocks": self.blocks()})

    def round(self, *, with_prefetch: bool, notes: bool) -> float:
        """Suspend the conversation, let it sink to disk and come back; return the seconds from resume to its token."""
        while not self.step():
            pass
        self.conversation.wait()  # what is on its way to disk needs its room in host memory until it is there
        if notes:
            self.note("running")
        if not self.conversation.suspend():
            raise SystemExit(NO_ROOM)
        if notes:
            self.note("suspended")
        self.step_until(lambda: not (self.blocks()["device"] or self.blocks()["host"]))
        self.llm.abort(self.other)
        self.add_other(max_tokens=128)  # it generates until the conversation is back
        self.step_until(lambda: self.llm.sequence(self.other).status == "running")
        self.conversation.wait()
        if notes:
            self.note("others have run")
        if with_prefetch:
            if not self.conversation.prefetch(CacheLevel.HOST):
                raise SystemExit(NO_ROOM)
            self.step_until(lambda: not self.blocks()["disk"])
            if notes:
                self.note("prefetched")
        begin = time.perf_counter()
        if not self.conversation.resume():
            raise SystemExit("the device has no room for the conversation")
        while not self.step():
            pass
        seconds = time.perf_counter() - begin
        if notes:
            self.note("resumed")
        self.llm.abort(self.other)
        self.other = ""
        return seconds

    def finish(self) -> list[int]:
        while self.token_ids is None:
            self.step()
        return self.token_ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: an embedded tiny Llama)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is measured, 1 to 20")
    parser.add_argument(
        "--host-cache-bytes", metavar="SIZE", help="default: room for the conversation and half as much"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="keep the blocks there (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not 1 <= options.rounds <= 20:  # each takes tokens of the answer
        parser.error("--rounds must lie in [1, 20]")
    os.environ.pop("KVCONNECT_CONNECTOR", None)  # the tiers are the example's own
    with tempfile.TemporaryDirectory(prefix="kvconnect-prefetch-") as folder:
        result = run(options, options.cache_dir or folder)
    print(json.dumps(result)) if options.json else show(result)
    return 0 if result["outputs_equal"] else 1


def run(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    host_bytes = options.host_cache_bytes or host_bytes_for(options.model)
    connector: list[str | dict[str, Any]] = [
        f"host://?capacity={host_bytes}",
        {"name": "disk", "path": str(Path(folder).absolute())},
    ]
    # the conversation and one other fit the device; the next others push out what is not in use
    device = KVCacheConfig(max_tokens=PROMPT_TOKENS + ANSWER_TOKENS + OTHER_TOKENS + 128, block_size=BLOCK_SIZE)
    params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with LLM(options.model, kv_cache_config=device) as llm:
        prompt = prompt_tokens(llm)
        expected = llm.generate([prompt], params)[0].token_ids  # undisturbed, and without a connector
    with LLM(options.model, connector=connector, kv_cache_config=device) as llm:
        stage = Stage(llm, prompt, params)
        stage.round(with_prefetch=True, notes=True)  # the first one, which also pays for first times
        for _ in range(options.rounds):
            for with_prefetch in (False, True):
                seconds[with_prefetch].append(stage.round(with_prefetch=with_prefetch, notes=False))
        token_ids = stage.finish()
    return {
        "moments": stage.moments,
        "resume_s": {
            "with_prefetch": statistics.median(seconds[True]),
            "without_prefetch": statistics.median(seconds[False]),
        },
        "outputs_equal": token_ids == expected,
    }


def host_bytes_for(folder: str | None) -> int:
    """Return bytes of host memory for one and a half conversations, by the model's float32 KV."""
    config: Any = AutoConfig.from_pretrained(folder) if folder else tiny_model().config
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block_bytes = (
        BLOCK_SIZE * config.num_hidden_layers * 2 * heads * head_dim * 4 + 8192
    )  # and a header, in whole pages
    return int((PROMPT_TOKENS + ANSWER_TOKENS) // BLOCK_SIZE * 3 // 2 * block_bytes)


def prompt_tokens(llm: LLM) -> list[int]:
    if llm.tokenizer is None:
        raise SystemExit("this checkpoint has no tokenizer, and its vocabulary is too small for bytes")
    tokens: list[int] = llm.tokenizer(TEXT * 8, add_special_tokens=False)["input_ids"]
    return tokens[:PROMPT_TOKENS]


def show(result: dict[str, Any]) -> None:
    print("where the conversation's blocks are\n")
    print(f"{'':18}" + "".join(f"{name:>8}" for name in result["moments"][0]["blocks"]))
    for moment in result["moments"]:
        print(f"{moment['when']:18}" + "".join(f"{count:8}" for count in moment["blocks"].values()))
    times = {name: seconds * 1000 for name, seconds in result["resume_s"].items()}
    print(f"\nfrom resume to the next token: {times['with_prefetch']:.1f} ms with prefetch", end="")
    print(f", {times['without_prefetch']:.1f} ms without")
    print(f"output {'equal to' if result['outputs_equal'] else 'DIFFERS FROM'} that of an undisturbed run")


if __name__ == "__main__":
    sys.exit(main())
