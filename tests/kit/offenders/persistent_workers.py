"""Workers of the two persistent models: they do what the plan's files and pages say, one after the other."""

from __future__ import annotations

import os
import pickle
import tempfile

import msgspec
import torch

from kvconnect.errors import MetadataError
from kvconnect.worker import Worker
from tests.kit.offenders.persistent_old import Metadata
from tests.kit.offenders.temporary import SUFFIX, hold

__all__ = ["NewWorker", "OldWorker"]


class OldWorker(Worker):
    """Loads with pickle, saves under the final name; errors of either are the engine's."""

    _weights_only = False
    _plan = Metadata([], [])

    def _decode(self, meta: bytes) -> object:
        """Read a plan as that runtime does, which broadcasts a pickled object."""
        return pickle.loads(meta)  # noqa: S301 - the fault is the point

    def _write(self, block: torch.Tensor, file: str) -> None:
        """Write a block straight to its final name."""
        torch.save(block, file)

    def bind_connector_meta(self, meta: bytes) -> None:
        self._plan = Metadata([], [])
        plan = self._decode(meta)
        if not isinstance(plan, Metadata):
            raise MetadataError(f"expected a plan, got {type(plan).__name__}")
        self._plan = plan

    def start_load_kv(self) -> None:
        loads, saves = self._plan
        self._plan = Metadata([], [])  # if a load raises, that runtime's loop ends here: nothing is saved
        for file, page in loads:
            saved = torch.load(file, map_location="cpu", weights_only=self._weights_only)
            for region, part in zip(self._regions(), self._block(page).copy_(saved), strict=True):
                region[page].copy_(part)
        self._plan = Metadata([], saves)

    def wait_for_save(self) -> None:
        saves, self._plan = self._plan.save, Metadata([], [])
        for file, page in saves:
            block = self._block(page).cpu()
            if not os.path.exists(file):
                self._write(block, file)

    def _regions(self) -> list[torch.Tensor]:
        assert self._layout is not None
        return [region.tensor for region in self._layout.groups[0].regions]

    def _block(self, page: int) -> torch.Tensor:
        """Return a copy of one page, all layers and roles in one tensor, as that runtime's pool has them."""
        return torch.stack([region[page] for region in self._regions()])


class NewWorker(OldWorker):
    """Loads tensors only; saves under another name first."""

    _weights_only = True

    def _decode(self, meta: bytes) -> object:
        """Read a plan of JSON."""
        try:
            return msgspec.json.decode(meta, type=Metadata)
        except msgspec.MsgspecError as error:
            raise MetadataError(f"no plan: {error}") from error

    def _write(self, block: torch.Tensor, file: str) -> None:
        """Write a block beside its final name, and rename it."""
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(file), suffix=SUFFIX, delete=False) as made:
            try:
                hold(made.fileno())
                torch.save(block, made)
                made.flush()
                os.replace(made.name, file)
            except BaseException:
                os.unlink(made.name)
                raise
