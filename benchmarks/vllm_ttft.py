"""Time to first token of a real vLLM on a CPU, at several prefix hit rates, with connectors of ours and of others.

    python benchmarks/vllm_ttft.py [--rounds 7] [--only host disk offload-fs] [--tokens 2000] [--json FILE]

It wants an environment with vLLM for CPUs and kvconnect (see `make test-vllm`), no network and no GPU. The model is
made here: a random Llama, float32, so wide (`initializer_range`) that wrong KV gives other tokens.

Fairness, the same for everybody:

- An engine is a process of its own and all live at once; for every hit rate of every round each is asked once, in an
  order that moves on by one each time. The first rounds are not counted: they fill page pools and arenas, which are so
  small that afterwards everybody evicts.
- A prompt and its prefix are new in every round and at every hit rate, so that nothing is hit but what was saved for
  this one measurement. vLLM's own prefix cache is reset before each.
- Before it is measured, whatever was saved has arrived: every engine steps until it has nothing to do, and a store's
  folder no longer changes.
- Who keeps blocks on disk is measured in another process than the one that saved them: its host memory never held
  them. The files are warm in the page cache for everybody, `offload-fs-direct` excepted, which is vLLM's `fs` tier as
  it comes: it passes the page cache by where the file system lets it.
- Every answer is checked: token and log-probability against the engine without a connector, and the number of tokens
  that vLLM says it did not compute against the hit rate.

LMCache is measured where it is installed, with the server process that serves CPUs (`lmcache server`, 0.5.6: its
connector inside vLLM's process refuses them) and a chunk of one block, so that its hits are everybody's.

`whole` is a prompt that was saved as a whole by an earlier request: ExampleConnector finds nothing else.

TTFT is `LLM.generate` with one token. What an engine still has to do when it has answered is in the second table; a
connector that copies after the answer delays the next request, not this one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

WARM_UP = 2
VOCABULARY = 512
HITS = {"0 %": 0.0, "50 %": 0.5, "90 %": 0.9, "whole": 1.0}
LOG_PROBABILITY_TOLERANCE = 1e-2
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound, an engine's helper threads would share the main thread's core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Peer(NamedTuple):
    """One configuration.

    Attributes:
        label: As the table says it.
        connector: vLLM's name of the connector; empty for none.
        extra: Its configuration; FOLDER, CAPACITY and PORT are filled in.
        on_disk: Whether another process saves than loads.
        whole_only: Whether it finds whole prompts only.
    """

    label: str
    connector: str = ""
    extra: Mapping[str, Any] = MappingProxyType({})
    on_disk: bool = False
    whole_only: bool = False


def _offload(spec: str, **extra: Any) -> dict[str, Any]:
    return {"spec_name": spec, "spec_module_path": "vllm_offload_cpu", "cpu_bytes_to_use": "CAPACITY", **extra}


FS_TIER = [{"type": "fs", "root_dir": "FOLDER"}]
PEERS = {
    "none": Peer("no connector"),
    "host": Peer("KVConnect `host://`", "KVConnect", {"connector": "host://?capacity=CAPACITY"}),
    "disk": Peer(
        "KVConnect `disk://`",
        "KVConnect",
        {"connector": ["host://?capacity=CAPACITY", "disk://FOLDER"]},
        on_disk=True,
    ),
    "example": Peer(
        "ExampleConnector", "ExampleConnector", {"shared_storage_path": "FOLDER"}, on_disk=True, whole_only=True
    ),
    "offload-host": Peer("OffloadingConnector, CPU", "OffloadingConnector", _offload("HostSpec")),
    "offload-fs": Peer(
        "OffloadingConnector, CPU + `fs`",
        "OffloadingConnector",
        _offload("TieringHostSpec", secondary_tiers=FS_TIER, page_cache=True),
        on_disk=True,
    ),
    "offload-fs-direct": Peer(
        "OffloadingConnector, CPU + `fs`, O_DIRECT",
        "OffloadingConnector",
        _offload("TieringHostSpec", secondary_tiers=FS_TIER),
        on_disk=True,
    ),
    "lmcache": Peer(
        "LMCache, server",
        "LMCacheMPConnector",
        {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": "PORT"},
    ),
}


class Setup(NamedTuple):
    """What one engine process is told at its start.

    Attributes:
        model: The checkpoint's folder.
        connector: As `Peer.connector`.
        extra: As `Peer.extra`, filled in.
        engine_id: Names its files in shared memory.
        tokens: Of a prompt.
        block_size: Tokens a block.
    """

    model: str
    connector: str
    extra: dict[str, Any]
    engine_id: str
    tokens: int
    block_size: int


# -- in an engine's process --------------------------------------------------------------------------------------------


class Server:
    """One engine, asked line by line."""

    def __init__(self, setup: Setup) -> None:
        """Start the engine."""
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = None
        if setup.connector:
            transfer = KVTransferConfig(
                kv_connector=setup.connector,
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                engine_id=setup.engine_id,
                kv_connector_extra_config=setup.extra,
            )
        blocks_a_prompt = -(-setup.tokens // setup.block_size) + 1
        with hidden_from_vllm() if "LMCache" in setup.connector else contextlib.nullcontext():
            self._llm = LLM(
                model=setup.model,
                dtype="float32",
                enforce_eager=True,
                max_model_len=setup.tokens + setup.block_size,
                max_num_batched_tokens=setup.tokens + setup.block_size,  # a prompt is one step
                max_num_seqs=4,
                block_size=setup.block_size,
                num_gpu_blocks_override=4 * blocks_a_prompt,  # soon every page has been used
                skip_tokenizer_init=True,
                kv_transfer_config=transfer,
            )
        self._is_ours = setup.connector == "KVConnect"
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._seconds_in_steps = 0.0
        self._num_steps = 0
        step = self._core.step_fn

        def timed() -> Any:
            started = time.perf_counter()
            try:
                return step()
            finally:
                self._seconds_in_steps += time.perf_counter() - started
                self._num_steps += 1

        self._core.step_fn = timed

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """Serve a prompt that vLLM's own cache does not know, and say what came of it."""
        from vllm import SamplingParams

        deadline = time.monotonic() + 30
        while not self._llm.reset_prefix_cache():  # pages are still being saved from
            if time.monotonic() > deadline:
                raise TimeoutError("vLLM's prefix cache stays in use")
            time.sleep(0.01)
            self._llm.llm_engine.step()
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, detokenize=False)
        hooks, steps, number = self._seconds_in_hooks(), self._seconds_in_steps, self._num_steps
        started = time.perf_counter()
        [output] = self._llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        hooks, steps = self._seconds_in_hooks() - hooks, self._seconds_in_steps - steps
        number = self._num_steps - number
        started = time.perf_counter()
        while self._core.scheduler.has_requests():  # a connector's pending work counts as one
            self._llm.llm_engine.step()
        [completion] = output.outputs
        [token] = completion.token_ids
        return {
            "token": token,
            "log_probability": completion.logprobs[0][token].logprob,
            "cached": output.num_cached_tokens,
            "seconds": seconds,
            "afterwards": time.perf_counter() - started,
            "hooks": hooks,
            "steps": steps,
            "num_steps": number,
        }

    def close(self) -> None:
        """Stop the engine."""
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()

    def _seconds_in_hooks(self) -> float:
        if not self._is_ours:
            return 0.0
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        leader = self._core.scheduler.connector.scheduler_side.leader
        worker = get_kv_transfer_group().worker_side.worker
        return float(sum(half.get_stats()["hooks"]["seconds"] for half in (leader, worker)))


@contextlib.contextmanager
def hidden_from_vllm() -> Iterator[None]:
    """Hide llvmlite's library: vLLM 0.32.0 looks into every object of every module, and ends at that one."""
    importlib.import_module("numba")  # imports what is hidden
    hidden = sys.modules.pop("llvmlite.binding.ffi")
    try:
        yield
    finally:
        sys.modules["llvmlite.binding.ffi"] = hidden


def serve(told: str) -> None:
    """Start an engine, say so, and answer each line with a line until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    server = Server(Setup(*json.loads(told)))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(server.ask(json.loads(line))), file=answers, flush=True)
    server.close()


# -- in the process that measures --------------------------------------------------------------------------------------


class Engine:
    """An engine's process, seen from here."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        """Start the process; `wait` waits for it."""
        self._name = setup.engine_id
        self._log = folder / f"{setup.engine_id}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", json.dumps(setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(folder)},
            )

    def wait(self) -> None:
        """Return when the engine serves."""
        self._read()

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """Have it serve a prompt."""
        assert self._process.stdin is not None
        print(json.dumps(prompt), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """End the process and remove what it left in shared memory."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for left in Path("/dev/shm").glob(f"vllm_*{self._name}*"):
            left.unlink(missing_ok=True)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])
            raise SystemExit(f"{self._name} ended:\n{tail}")
        return line


class LMCacheServer:
    """LMCache's process beside the engine."""

    def __init__(self, folder: Path, capacity: int, block_size: int) -> None:
        """Start the process and wait until it listens."""
        self.port, http = free_ports(2)
        command = [
            str(Path(sys.executable).parent / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--http-port", str(http), "--chunk-size", str(block_size), "--l1-size-gb", str(capacity / 2**30),
            "--eviction-policy", "LRU", "--supported-transfer-mode", "auto", "--disable-observability",
            "--disable-metrics",
        ]  # fmt: skip
        with (folder / "lmcache.log").open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT}
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.close()
                raise SystemExit("lmcache server did not start:\n" + (folder / "lmcache.log").read_text()[-4000:])
            time.sleep(0.2)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


class Running(NamedTuple):
    """One peer's engines: who saves, who is measured, and the folder between them."""

    saver: Engine
    loader: Engine
    folder: Path


def make_model(folder: Path, tokens: int) -> dict[str, int]:
    """Write a random Llama into the folder; return its sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, initializer_range=0.2, max_position_embeddings=2 * tokens, dtype="float32", **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return sizes


def start(
    stack: contextlib.ExitStack, names: list[str], folder: Path, options: argparse.Namespace, kv_bytes: int
) -> dict[str, Running]:
    """Start every peer's engines, two at a time; the stack ends them."""
    capacity = 8 * options.tokens * kv_bytes
    running: dict[str, Running] = {}
    starting: list[Engine] = []
    for name in names:
        peer, store = PEERS[name], folder / name
        store.mkdir()
        extra = json.dumps(dict(peer.extra)).replace('"CAPACITY"', str(capacity)).replace("CAPACITY", str(capacity))
        extra = extra.replace("FOLDER", str(store))
        if "PORT" in extra:
            server = LMCacheServer(folder, capacity, options.block_size)
            stack.callback(server.close)
            extra = extra.replace('"PORT"', str(server.port))
        engines = []
        for role in ("saver", "loader") if peer.on_disk else ("both",):
            setup = Setup(
                model=str(folder / "model"),
                connector=peer.connector,
                extra=json.loads(extra),
                engine_id=f"kvconnect-ttft-{os.getpid()}-{name}-{role}",
                tokens=options.tokens,
                block_size=options.block_size,
            )
            engines.append(Engine(setup, folder))
            stack.callback(engines[-1].close)
            starting.append(engines[-1])
            if len(starting) == 2:
                for engine in starting:
                    engine.wait()
                starting.clear()
        running[name] = Running(engines[0], engines[-1], store)
    for engine in starting:
        engine.wait()
    return running


def wait_for_files(folder: Path) -> None:
    """Return when a folder has not changed for a while."""
    last, same = None, 0
    while same < 3:
        now = sorted((str(path), path.stat().st_size) for path in folder.rglob("*") if path.is_file())
        same = same + 1 if now == last else 0
        last = now
        time.sleep(0.05)


def num_hit(peer: Peer, hit: str, options: argparse.Namespace) -> int:
    """Return how many tokens a measured prompt should not compute."""
    share = HITS[hit]
    if not peer.connector or (peer.whole_only and share < 1):
        return 0
    return prefix_tokens(share, options)


def prefix_tokens(share: float, options: argparse.Namespace) -> int:
    """Return a share of a prompt in whole blocks; at least one token is computed."""
    size: int = options.block_size
    return int(min(share * options.tokens, options.tokens - 1)) // size * size


def measure_round(
    running: dict[str, Running], number: int, options: argparse.Namespace
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure every peer once at every hit rate."""
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in running}
    for turn, (hit, share) in enumerate(HITS.items()):
        rng = random.Random(f"{number} {hit}")
        prompt = [rng.randrange(VOCABULARY) for _ in range(options.tokens)]
        saved = prompt if share == 1 else [*prompt[: prefix_tokens(share, options)], rng.randrange(VOCABULARY)]
        for name, one in running.items():
            if share and PEERS[name].connector:
                one.saver.ask(saved)
        for name, one in running.items():
            if PEERS[name].on_disk:
                wait_for_files(one.folder)
        names = list(running)
        shift = (number * len(HITS) + turn) % len(names)
        for name in names[shift:] + names[:shift]:
            results[name][hit] = running[name].loader.ask(prompt)
        check(results, hit, options)
    return results


def check(results: dict[str, dict[str, dict[str, Any]]], hit: str, options: argparse.Namespace) -> None:
    """Compare what came out with the engine without a connector, and what was loaded with the hit rate.

    Raises:
        SystemExit: If something differs.
    """
    right = results["none"][hit]
    for name, by_hit in results.items():
        got, wanted = by_hit[hit], num_hit(PEERS[name], hit, options)
        if got["cached"] != wanted:
            raise SystemExit(f"{name} at {hit}: {got['cached']} tokens came from its cache, not {wanted}")
        apart = abs(got["log_probability"] - right["log_probability"])
        if got["token"] != right["token"] or apart > LOG_PROBABILITY_TOLERANCE:
            raise SystemExit(f"{name} at {hit}: wrong answer {got}, not {right}")


def median_ms(rounds: list[dict[str, dict[str, dict[str, Any]]]], name: str, hit: str, what: str) -> float:
    """Return a median in milliseconds."""
    return 1e3 * float(statistics.median(each[name][hit][what] for each in rounds))


def report(rounds: list[dict[str, dict[str, dict[str, Any]]]], not_run: dict[str, str]) -> str:
    """Return the tables; with who was not measured, and why."""
    names = list(rounds[0])
    base = median_ms(rounds, "none", "0 %", "seconds")
    head = f"| | {' | '.join(HITS)} |\n|---|{'---:|' * len(HITS)}"
    lines = ["Time to first token, ms (ratio to no connector at 0 %):", "", head]
    for name in names:
        cells = []
        for hit in HITS:
            value = median_ms(rounds, name, hit, "seconds")
            misses = PEERS[name].whole_only and 0 < HITS[hit] < 1
            cells.append(f"{value:.0f} ({value / base:.2f}){' miss' if misses else ''}")
        lines.append(f"| {PEERS[name].label} | {' | '.join(cells)} |")
    lines += [f"| {PEERS[name].label} | not run: {why} |{' |' * (len(HITS) - 1)}" for name, why in not_run.items()]
    lines += ["", "From the first token until the engine has nothing to do, ms:", "", head]
    for name in names:
        cells = [f"{median_ms(rounds, name, hit, 'afterwards'):.1f}" for hit in HITS]
        lines.append(f"| {PEERS[name].label} | {' | '.join(cells)} |")
    ours = [name for name in names if PEERS[name].connector == "KVConnect"]
    if ours:
        lines += ["", "Inside kvconnect's hooks, ms of all of a request's steps (share):", "", head]
    for name in ours:
        cells = []
        for hit in HITS:
            hooks, steps = (median_ms(rounds, name, hit, what) for what in ("hooks", "steps"))
            cells.append(f"{hooks:.1f} of {steps:.0f} ({hooks / steps:.2%})")
        lines.append(f"| {PEERS[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token of vLLM on a CPU.")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after 2 that are not")
    parser.add_argument("--only", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt")
    parser.add_argument("--block-size", type=int, default=32, help="tokens a block; a multiple of 32")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made, stores and all")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    names = [name for name in PEERS if name == "none" or options.only is None or name in options.only]
    not_run = {}
    if "lmcache" in names and importlib.util.find_spec("lmcache") is None:
        names.remove("lmcache")
        not_run["lmcache"] = "not installed"
    folder = Path(tempfile.mkdtemp(prefix="kvconnect-ttft-", dir=options.folder))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        sizes = make_model(folder / "model", options.tokens)
        kv_bytes = sizes["num_hidden_layers"] * 2 * sizes["num_key_value_heads"] * sizes["head_dim"] * 4
        running = start(stack, names, folder, options, kv_bytes)
        rounds = []
        for number in range(WARM_UP + options.rounds):
            results = measure_round(running, number, options)
            print(f"round {number + 1} of {WARM_UP + options.rounds}", file=sys.stderr)
            if number >= WARM_UP:
                rounds.append(results)
    told = {"tokens": options.tokens, "block_size": options.block_size, "kv_bytes_a_token": kv_bytes, **sizes}
    print(f"{len(rounds)} rounds, {os.cpu_count()} cores, {told}\n\n{report(rounds, not_run)}")
    if options.json is not None:
        options.json.write_text(json.dumps({"setup": told, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
