"""Mutants: stores, connectors and engines that are right but for one small mistake, as real authors make them.

They prove the kits: a rule that catches none proves nothing. `kvconnect conformance --self-test` runs them.
"""

import importlib

from kvconnect.testing.mutants.base import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant"]

for _name in ("keys", "offers", "loads", "saves", "life", "engines", "stores", "halves", "imports_torch", "faults"):
    importlib.import_module(f"kvconnect.testing.mutants.{_name}")  # each registers its own
