"""Time inside the connector's hooks, on an empty cache, as a share of the engine's steps.

    python benchmarks/hook_time.py

Every prompt is new, so everything is saved and nothing is loaded: what a connector costs when it does not help. One
figure is of the tiny model's own steps; the other pads each forward pass to 200 ms, as a large model's would take.
"""

import random
import tempfile
import time
from typing import Any

from kvconnect import LLM, SamplingParams
from kvconnect.engine.runner import ModelRunner

PADDED_S = 0.2


def measure(prompts: list[list[int]], padded: bool) -> tuple[int, float, float]:
    """Return the steps taken, their seconds, and the seconds inside hooks."""
    original = ModelRunner.forward

    def forward(self: ModelRunner, batch: Any, sampled: Any) -> Any:
        started = time.perf_counter()
        logits = original(self, batch, sampled)
        time.sleep(max(0.0, PADDED_S - (time.perf_counter() - started)))
        return logits

    ModelRunner.forward = forward if padded else original  # type: ignore[method-assign]  # a model that takes its time
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            LLM(connector=["host://?capacity=512MiB", f"disk://{folder}/kv"], max_batch_tokens=128) as llm,
        ):
            llm.generate([[1]], SamplingParams(max_tokens=1, cache="none"))
            before = _seconds(llm)
            steps, started = 0, time.perf_counter()
            for prompt in prompts:
                llm.add_request(prompt, SamplingParams(max_tokens=8))
            while llm._core.scheduler.has_requests:
                llm.step()
                steps += 1
            return steps, time.perf_counter() - started, _seconds(llm) - before
    finally:
        ModelRunner.forward = original  # type: ignore[method-assign]


def _seconds(llm: LLM) -> float:
    stats = llm.get_stats()
    halves = [stats["leader"], *stats["workers"]]
    return float(sum(half["hooks"]["seconds"] for half in halves))


def main() -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(500)] for _ in range(12)]
    print(f"{'model':24} {'steps':>5} {'a step':>9} {'in hooks':>9} {'share':>7}")
    for name, padded in (("tiny", False), ("padded to 200 ms a step", True)):
        steps, total, hooks = measure(prompts, padded)
        print(f"{name:24} {steps:5} {total / steps * 1e3:6.1f} ms {hooks / steps * 1e3:6.2f} ms {hooks / total:7.2%}")


if __name__ == "__main__":
    main()
