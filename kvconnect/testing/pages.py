"""Writes what is generated in our pages: the README's table of connectors, and the lists of promises and mutants.

python -m kvconnect.testing.pages README.md docs/conformance.md docs/conformance/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvconnect.testing.report import connector_table, mutant_list, promise_list, replace_between

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Rewrite both pages from the reports; return 0."""
    readme, promises, *reports = map(Path, arguments)
    loaded = [json.loads(path.read_text("utf-8")) for path in reports]
    replace_between(readme, "connectors", connector_table(loaded))
    replace_between(promises, "promises", promise_list())
    replace_between(promises, "mutants", mutant_list())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
