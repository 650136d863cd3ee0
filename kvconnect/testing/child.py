"""The second process of `RestartTests` and `FaultTests`: saves or loads prompts that both processes know.

    python -m kvconnect.testing.child '{"action": "save", ...}'

Prints ``begin`` when the connector is open and a JSON object at the end. Nobody calls it by hand.
"""

from __future__ import annotations

import json
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


def main(task: dict[str, Any]) -> int:
    """Run a task; return the exit status."""
    try:
        target = Target(task["connector"], Path(task["folder"]))
    except KVConnectError as error:
        print(f"cannot be imported: {error}", file=sys.stderr)
        return 3
    target.model = task["model"]
    loaded = 0
    with StepEngine(target) as engine:
        if task["action"] == "full-disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an error, as on a full disk
            largest = max(path.stat().st_size for path in target.folder.rglob("*") if path.is_file())
            resource.setrlimit(resource.RLIMIT_FSIZE, (min(largest, 64), resource.RLIM_INFINITY))
        print("begin", flush=True)
        for number in range(task["prompts"]):
            tokens = child_prompt(task["seed"], number)
            if task["action"] == "load":
                loaded += engine.load(tokens)
            else:
                engine.save(tokens)
    print(json.dumps({"loaded": loaded}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
