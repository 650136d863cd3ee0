"""Every mutant is caught by the test named for it, with a message that leads to the mistake; the right ones pass.

Those whose tests start processes are left to `make test-kits`, which runs all of them: they take most of its time.
"""

from __future__ import annotations

from kvconnect.testing.mutants import cases

SECONDS_EACH = ("RestartTests", "test_full_disk_is_survived", "test_class_is_loaded_without_torch")

globals().update(
    {
        name: kind
        for name, kind in vars(cases).items()
        if name.startswith("Test") and not any(each in kind.about["rule"] for each in SECONDS_EACH)
    }
)
