"""Every mutant is caught by the test named for it, with a message that leads to the mistake; the right ones pass.

The same cases as `kvconnect conformance --self-test`, which `make test-kits` runs; `make unit` leaves them to that.
"""

from __future__ import annotations

from kvconnect.testing.mutants import cases

globals().update({name: kind for name, kind in vars(cases).items() if name.startswith("Test")})
