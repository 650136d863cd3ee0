"""A module that a plugin registers, with torch at its top."""

from __future__ import annotations

from typing import Any

import torch
from kvconnect_host import HostConnector

from kvconnect.testing.leader import LeaderTests
from kvconnect.testing.mutants.base import mutant

__all__: list[str] = []


# made from the registered connector: all of `kvconnect.testing` imports torch, and so does `Right`
@mutant(LeaderTests.test_class_is_loaded_without_torch, "torch among the modules.*where it is used")
class ImportsTorch(HostConnector):
    """Imports torch at the top of the module that is registered."""

    def make_worker(self, options: Any, context: Any) -> Any:
        torch.set_num_threads(torch.get_num_threads())
        return super().make_worker(options, context)
