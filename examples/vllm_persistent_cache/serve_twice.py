"""Starts a vLLM server, asks, stops it, starts it again and asks again: the cache survives the restart.

$ python serve_twice.py /tmp/kvconnect-serve

Options that it does not know go to the server.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from client import ask
from prompt import make_prompt
from small_model import make_model

START_S = 600.0
STOP_S = 60.0
FLUSH_S = 30  # with 0, which is the default, vLLM kills its engine at once, with what is on its way to the disk


@contextmanager
def running_server(model: str, store: Path, port: int, arguments: Sequence[str]) -> Iterator[str]:
    """Run a server until the block is left.

    Yields:
        Its address.

    Raises:
        RuntimeError: If it does not start.
    """
    transfer = {
        "kv_connector": "KVConnect",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connector": ["host://?capacity=1GiB", f"disk://{store}?capacity=10GiB"]},
    }
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
            *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
            *("--shutdown-timeout", str(FLUSH_S), "--kv-transfer-config", json.dumps(transfer), *arguments),
        ]
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError("the server did not start; its log says why")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the cache is kept, and the model if none is given")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: a small random Llama)")
    parser.add_argument("--dtype", default="float32", help="in which answers can be compared (default: float32)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rules", type=int, default=80, help="length of the prompt, about 24 tokens each")
    options, arguments = parser.parse_known_args()
    folder = options.folder.absolute()
    model = options.model or make_model(folder / "model")
    answers = []
    for name in ("first", "restarted"):
        with running_server(model, folder / "kv", options.port, ["--dtype", options.dtype, *arguments]) as url:
            ask(url, "warm up")
            answer = ask(url, make_prompt(options.rules))
            print(f"{name:9} server: {answer}", flush=True)
            answers.append(answer)
    equal = answers[0].text == answers[1].text
    print(f"answers: {'equal' if equal else 'DIFFERENT'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
