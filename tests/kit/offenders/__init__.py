"""Known offenders: our own models of connectors that others ship, made from descriptions, and the kit's word on each.

`python -m tests.kit.offenders.report docs/known-offenders.md` writes the page about them.
"""
