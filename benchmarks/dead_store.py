"""With the store dead and its breaker open: time inside the connector's hooks, as a share of the time to first token.

    python benchmarks/dead_store.py [--tokens 2000] [--prompts 20]

Starts a Redis server of its own, kills it with SIGKILL, lets requests find out, then measures new prompts one by one:
median time to first token, and the median of the seconds inside hooks until then. The host tier goes on saving: that is
in it. For comparison the same with the server alive, and without any connector. With two models, float32 and random: a
Llama of 8 layers and 512 hidden, as in `vllm_ttft.py` (16 KiB of KV a token), and the embedded tiny one (6 KiB), whose
forward pass costs so little that copying its KV is a percent of it.
"""

import argparse
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from kvconnect import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--port", type=int, default=28_371)
    options = parser.parse_args()
    print(f"{'model':10} {'store':14} {'first token after':>17} {'in hooks':>10} {'share':>7}")
    for name in ("8 layers", "tiny"):
        measure(name, options)


def measure(model: str, options: argparse.Namespace) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(options.tokens)] for _ in range(3 * options.prompts + 5)]
    rounds = iter(prompts)
    with tempfile.TemporaryDirectory() as folder:
        server = _start(options.port, Path(folder))
        store = f"redis://127.0.0.1:{options.port}?timeout_s=1"
        with LLM(_model(model), connector=["host://?capacity=1GiB", store]) as llm, LLM(_model(model)) as bare:
            llm.warm_up()
            bare.warm_up()
            alive = [_first_token(llm, next(rounds)) for _ in range(options.prompts)]
            server.kill()
            server.wait()
            while llm.get_stats()["leader"]["breakers"] != {"redis": "open"}:
                _first_token(llm, next(rounds))
            dead, without = [], []
            for _ in range(options.prompts):  # interleaved: what disturbs one disturbs the other
                prompt = next(rounds)
                dead.append(_first_token(llm, prompt))
                without.append(_first_token(bare, prompt))
            assert llm.get_stats()["leader"]["breakers"] == {"redis": "open"}
    for name, rows in (("alive", alive), ("dead", dead), ("no connector", without)):
        ttft, hooks = (statistics.median(column) for column in zip(*rows, strict=True))
        share = statistics.median(inside / total for total, inside in rows)
        print(f"{model:10} {name:14} {ttft * 1e3:14.1f} ms {hooks * 1e3:7.2f} ms {share:7.2%}")


def _model(name: str) -> Any:
    """Make a random Llama, the same each time; None is the embedded one."""
    if name == "tiny":
        return None
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    sizes |= {"vocab_size": 256, "max_position_embeddings": 8192}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, dtype="float32"))


def _start(port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(1)
    return process


def _first_token(llm: LLM, prompt: list[int]) -> tuple[float, float]:
    """Return the seconds until the first token, and how many of them were spent inside hooks."""
    before = _inside(llm)
    started = time.perf_counter()
    for _ in llm.stream(prompt, SamplingParams(max_tokens=1)):
        break
    return time.perf_counter() - started, _inside(llm) - before


def _inside(llm: LLM) -> float:
    stats = llm.get_stats()
    return float(sum(half["hooks"]["seconds"] for half in [stats.get("leader"), *stats.get("workers", [])] if half))


if __name__ == "__main__":
    main()
