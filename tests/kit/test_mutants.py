"""Every mutant is caught by the test named for it, with a message that leads to the mistake; what it was made from is right.

The cases are the installed kit's own, see `kvconnect.testing.mutants`.
"""

from __future__ import annotations

from kvconnect.testing.mutants import cases

globals().update({name: kind for name, kind in vars(cases).items() if name.startswith("Test")})
