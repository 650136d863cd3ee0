"""The second process of `RestartTests` and `FaultTests`: saves or loads prompts that both processes know.

    echo '{"action": "save", ...}' | python -m kvconnect.testing.child

Prints ``done`` after each prompt and a JSON object at the end. Nobody calls it by hand. Actions:

- ``save`` and ``load``;
- ``full-disk`` saves while no file may grow: writes fail;
- ``cut-new`` and ``cut-grown`` save until the kernel kills the process in the middle of a write: half way in a file
  as long as the longest one, or half a block behind the end of that one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from kvconnect.errors import KVConnectError
from kvconnect.testing.faults import child_prompt
from kvconnect.testing.harness import StepEngine
from kvconnect.testing.target import Target

__all__ = ["main"]

_HALF_A_BLOCK = 300  # bytes, of a frame of more than 700


def main(task: dict[str, Any]) -> int:
    """Run a task; return the exit status."""
    try:
        target = Target(task["connector"], Path(task["folder"]), patience_s=task["patience_s"])
    except KVConnectError as error:
        print(f"cannot be imported: {error}", file=sys.stderr)
        return 3
    target.model = task["model"]
    first, last = 0, task["prompts"] * task["times"]
    while first + task["prompts"] < last and (other := os.fork()):  # all but the last time, in children
        os.waitpid(other, 0)
        first += task["prompts"]
    loaded = 0
    with StepEngine(target) as engine:
        _limit_files(target, task["action"])
        for number in range(first, first + task["prompts"]):
            tokens = child_prompt(task["seed"], number)
            if task["action"] == "load":
                loaded += engine.load(tokens)
            else:
                engine.save(tokens)
            print("done", flush=True)
    print(json.dumps({"loaded": loaded}), flush=True)
    return 0


def _limit_files(target: Target, action: str) -> None:
    """Let no file grow beyond what the action says."""
    if action not in ("full-disk", "cut-new", "cut-grown"):
        return
    largest = max(path.stat().st_size for path in target.folder.rglob("*") if path.is_file())
    limit = {"full-disk": min(largest, 64), "cut-new": largest // 2, "cut-grown": largest + _HALF_A_BLOCK}[action]
    sys.dont_write_bytecode = True  # what is imported late is none of the connector's files
    # a write past the limit is an error, as on a full disk, or the end
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN if action == "full-disk" else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
