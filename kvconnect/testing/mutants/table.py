"""Every mutant of this package, in the order of their modules."""

from __future__ import annotations

import importlib

from kvconnect.testing.mutants.base import MUTANTS

__all__ = ["MUTANTS"]

for _name in (
    "keys",
    "offers",
    "loads",
    "saves",
    "life",
    "claims",
    "suspension",
    "engines",
    "stores",
    "holds",
    "halves",
    "imports_torch",
    "faults",
):
    importlib.import_module(f"kvconnect.testing.mutants.{_name}")  # each registers its own
