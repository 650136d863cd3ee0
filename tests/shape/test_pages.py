"""Documents that name tests name tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cache-manager.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text("utf-8"))
ROWS = [int(row) for row in re.findall(r"^\| (\d+) \|", PAGE.read_text("utf-8"), re.MULTILINE)]


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_named_test_is_there(path: str, name: str) -> None:
    module = ast.parse((ROOT / path).read_text("utf-8"))
    assert name in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}


def test_every_row_is_there() -> None:
    assert [row for row in ROWS if row <= 45 or row == 47] == [*range(22, 46), 47]


def test_every_row_names_a_test() -> None:
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if re.match(r"\| \d+ \|", line)]
    assert all("::test_" in line for line in lines)
