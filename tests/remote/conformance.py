"""Runs all kits on a store, as its users do, over a server that the caller has started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["run_kits"]


def run_kits(target: str, options: dict[str, Any], report: Path, env: Mapping[str, str] | None = None) -> Counter[str]:
    """Run all kits in a process of their own; return how many promises were kept, and how many not shown or declared.

    Args:
        target: The store's name.
        options: Its options. They stand on a command line: no secrets.
        report: Where the report is written.
        env: Added to the environment: credentials.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvconnect.cli.main", "conformance", target, "--no-env-skips"),
            *("--options", json.dumps(options), "--json", str(report)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return Counter(json.loads(report.read_text("utf-8"))["summary"])
