"""``kvconnect demo``: a cold process saves its KV cache, a warm one loads it, a third checks both with `generate()`."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kvconnect.errors import ConfigError, KVConnectError
from kvconnect.registry import load_registry

__all__ = ["DemoOptions", "Verdict", "compare_tokens", "read_prompts", "run_demo"]

_COUNTS = ("prompt_tokens", "computed_tokens", "reused_tokens", "loaded_tokens")

# A reference whose two best logits are closer than this does not say which token is right.
_TIE = 1e-4


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run; see ``kvconnect demo --help``."""

    model: str | None = None
    prompts: str | None = None
    connector: tuple[str, ...] = ()
    block_size: int = 16
    max_tokens: int = 16
    kv_cache_bytes: str = "1GiB"


class Verdict(NamedTuple):
    """How one output compares: equal, and if not, whether the reference's own tie excuses it."""

    equal: bool
    excused: bool


def run_demo(options: DemoOptions, *, as_json: bool) -> int:
    """Run the demo; return 0 if outputs are equal and the warm process loaded something, 1 if not.

    Raises:
        ConfigError: If the prompts or the connector cannot be used.
        KVConnectError: If a process failed, with what it said.
    """
    prompts = read_prompts(options.prompts)
    if options.connector or os.environ.get("KVCONNECT_CONNECTOR"):
        load_registry().resolve(list(options.connector) or None)  # a wrong name or option is said before anything runs
    with tempfile.TemporaryDirectory(prefix="kvconnect-demo-") as folder:
        given = list(options.connector) or os.environ.get("KVCONNECT_CONNECTOR", "").split()
        connector = given or [f"disk://{folder}/kv?capacity=20GiB"]
        result = _run_processes(options, prompts, connector)
    if not given:
        result["connector"] = ["disk:// in a temporary folder"]
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(result)
    return 0 if result["outputs_equal"] and result["reference_equal"] and result["warm"]["loaded_tokens"] else 1


def read_prompts(path: str | None) -> list[str]:
    """Read prompts: JSON lines with ``input``, or text with one prompt a paragraph; the shipped ones without a path.

    Raises:
        ConfigError: If the file cannot be read or holds no prompt.
    """
    file = Path(path) if path else Path(__file__).with_name("prompts.txt")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {file}: {error}") from error
    if file.suffix in (".jsonl", ".ndjson") or text.lstrip().startswith("{"):
        prompts = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    prompts.append(msgspec.json.decode(line, type=dict[str, Any])["input"])
                except (msgspec.MsgspecError, KeyError) as error:
                    raise ConfigError(f"{file}, line {number}: expected a JSON object with 'input': {error}") from error
    else:
        prompts = [" ".join(paragraph.split("\n")).strip() for paragraph in text.split("\n\n")]
    prompts = [prompt for prompt in prompts if isinstance(prompt, str) and prompt.strip()]
    if not prompts:
        raise ConfigError(f"{file} holds no prompt")
    return prompts


def compare_tokens(
    mine: Sequence[int], other: Sequence[int], reference: Sequence[int], gaps: Sequence[float]
) -> Verdict:
    """Compare two greedy outputs.

    A difference is excused where it begins, if both agree with the reference up to there and the reference's two best
    logits at that step are closer than 1e-4; what follows is another continuation and cannot be compared.

    Args:
        mine: One output.
        other: The other.
        reference: What `model.generate()` gave.
        gaps: For each of its steps, its best logit less its second best.
    """
    if list(mine) == list(other):
        return Verdict(True, False)
    first = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    known = first < len(gaps) and list(mine[:first]) == list(reference[:first])
    tied = known and gaps[first] < _TIE
    return Verdict(False, tied)


def _run_processes(options: DemoOptions, prompts: list[str], connector: list[str]) -> dict[str, Any]:
    job = {
        "model": options.model,
        "prompts": prompts,
        "connector": connector,
        "block_size": options.block_size,
        "max_tokens": options.max_tokens,
        "kv_cache_bytes": options.kv_cache_bytes,
    }
    results: dict[str, list[dict[str, Any]]] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"))
    with Progress(*columns, console=console, transient=True) as progress:
        for phase in ("cold", "warm", "reference"):
            task = progress.add_task(f"{phase} process", total=len(prompts))
            results[phase] = []
            for event in _events({**job, "phase": phase}):
                results[phase].append(event)
                progress.advance(task)
    return _summarize(results, options, connector)


def _events(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run one process and yield what it says of each prompt.

    Raises:
        KVConnectError: If it fails; its own message, or the end of what it printed.
    """
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "kvconnect.cli.demo_process"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # it died first; its exit status says so below
                    process.stdin.write(json.dumps(job).encode())
                    process.stdin.close()
                error = ""
                for line in process.stdout:
                    event = json.loads(line)
                    if "error" in event:
                        error = event["error"]
                    else:
                        yield event
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            printed = said.read().decode("utf-8", "replace").strip()
            raise KVConnectError(
                error or f"the {job['phase']} process ended with {process.returncode}: {printed[-2000:]}"
            )


def _summarize(results: dict[str, list[dict[str, Any]]], options: DemoOptions, connector: list[str]) -> dict[str, Any]:
    cold, warm, reference = (results[phase] for phase in ("cold", "warm", "reference"))
    between = []
    against = []
    for a, b, ref in zip(cold, warm, reference, strict=True):
        tokens, gaps = ref["token_ids"], ref["gaps"]
        between.append(compare_tokens(a["token_ids"], b["token_ids"], tokens, gaps))
        against += [compare_tokens(each["token_ids"], tokens, tokens, gaps) for each in (a, b)]
    size = options.block_size
    full = sum(entry["prompt_tokens"] // size for entry in warm)
    found = sum((entry["loaded_tokens"] + entry["reused_tokens"]) // size for entry in warm)
    # a URL's query and credentials may hold secrets; the name is enough for a report
    shown = [url.split(":")[0] + "://" for url in connector]
    return {
        "cold": _totals(cold),
        "warm": _totals(warm),
        "outputs_equal": all(verdict.equal or verdict.excused for verdict in between),
        "reference_equal": all(verdict.equal or verdict.excused for verdict in against),
        "excused": sum(verdict.excused for verdict in (*between, *against)),
        "prompts": len(cold),
        "block_size": size,
        "full_blocks": full,
        "warm_blocks_loaded_or_reused": found,
        "connector": shown,
        "model": options.model or "embedded tiny Llama",
        "failures": warm[-1]["failures"],
    }


def _totals(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(entry[name] for entry in entries) for name in _COUNTS}
    totals["ttft_s"] = round(statistics.median(entry["ttft_s"] for entry in entries), 6)
    return totals


def _print_table(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{result['prompts']} prompts, {result['model']}, {' + '.join(result['connector'])}", title_justify="left"
    )
    for name in ("process", "prompt tokens", "computed", "reused", "loaded", "median TTFT"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for phase in ("cold", "warm"):
        row = result[phase]
        table.add_row(phase, *(f"{row[name]:,}" for name in _COUNTS), f"{row['ttft_s'] * 1000:.1f} ms")
    console.print(table)
    equal = {True: "equal", False: "DIFFERENT"}
    console.print(
        f"outputs: cold and warm {equal[result['outputs_equal']]}, against model.generate() "
        f"{equal[result['reference_equal']]}, ties excused: {result['excused']}",
        highlight=False,
    )
    blocks, full = result["warm_blocks_loaded_or_reused"], result["full_blocks"]
    console.print(f"the warm process computed {full - blocks} of the prompts' {full} full blocks", highlight=False)
    for kind, count in result["failures"].items():
        console.print(f"failures counted in the warm process: {kind}: {count}", style="yellow")
    if result["cold"]["loaded_tokens"]:
        console.print("the cache was not empty: the cold process loaded from it too", style="yellow")
    if not full:
        console.print(
            f"no prompt fills a block of {result['block_size']} tokens: there is nothing to save", style="red"
        )
    elif not result["warm"]["loaded_tokens"]:
        why = "see the failures above" if result["failures"] else "does this connector survive its process?"
        console.print(f"the warm process loaded nothing: {why}", style="red")
