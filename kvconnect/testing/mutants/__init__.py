"""Mutants: stores, connectors and engines that are right but for one small mistake, as real authors make them.

They prove the kits: a rule that catches none proves nothing. `kvconnect conformance --self-test` runs them. `base.py`
says what a mutant is, `table.py` has all of them, `cases.py` makes tests of them. Nothing is imported here: tests start
processes that need only one.
"""

__all__: list[str] = []
