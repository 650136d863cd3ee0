"""Asks a vLLM server one long question and prints how long the first token took.

$ python client.py http://127.0.0.1:8000
"""

import argparse
import re
import sys
import time
import urllib.request
from typing import NamedTuple

from openai import OpenAI
from prompt import make_prompt


class Answer(NamedTuple):
    """What the server said, and what it took."""

    text: str
    prompt_tokens: int
    loaded_tokens: int
    ttft_s: float

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} prompt tokens, {self.loaded_tokens} loaded, "
            f"first token after {self.ttft_s * 1000:.0f} ms"
        )


def ask(url: str, prompt: str) -> Answer:
    """Stream one answer.

    Args:
        url: Where the server is, without ``/v1``.
        prompt: The whole prompt.
    """
    loaded_before = loaded_tokens(url)
    text, prompt_tokens, ttft_s = "", 0, 0.0
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        start = time.perf_counter()
        for chunk in client.completions.create(
            model=model,
            prompt=prompt,
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if chunk.choices:
                ttft_s = ttft_s or time.perf_counter() - start
                text += chunk.choices[0].text
            if chunk.usage:
                prompt_tokens = chunk.usage.prompt_tokens
    return Answer(text, prompt_tokens, loaded_tokens(url) - loaded_before, ttft_s)


def loaded_tokens(url: str) -> int:
    """Return how many tokens the server has loaded through its connector since it started."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        metrics = response.read().decode()
    found = re.findall(r"^vllm:external_prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    return int(sum(map(float, found)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--rules", type=int, default=80, help="length of the prompt, about 24 tokens each")
    options = parser.parse_args()
    print(ask(options.url, make_prompt(options.rules)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
