"""Where each key lies, as far as one instance knows; bounded. Knows no requests."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from kvconnect.protocol import BlockKey
from kvconnect_s3.records import Checkpoint, Entry, Place, places_of

__all__ = ["Catalog"]


class Catalog:
    """Keys and their places, the oldest first; about 300 bytes of memory a key."""

    def __init__(self, limit: int) -> None:
        """Know nothing, and never more than `limit` keys."""
        self._limit = limit
        self._places: dict[BlockKey, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: BlockKey) -> Place | None:
        """Return a key's place, None if it has none."""
        return self._places.get(key)

    def items(self) -> list[tuple[BlockKey, Place]]:
        """Return a copy, the oldest first."""
        return list(self._places.items())

    def apply(self, entry: Entry) -> None:
        """Take over what an entry of the log says."""
        for key, place in places_of(entry.lost):
            self.forget(key, place)
        for key in entry.removed_keys():
            self._places.pop(key, None)
        self._insert(places_of(entry.packs))

    def reset(self, checkpoint: Checkpoint | None) -> None:
        """Forget everything, and know what a checkpoint says."""
        self._places = {}
        if checkpoint is not None:
            self._insert(places_of(checkpoint.packs))

    def forget(self, key: BlockKey, place: Place) -> None:
        """Drop a key whose frame is not at `place`, unless it lies elsewhere by now."""
        if self._places.get(key) == place:
            del self._places[key]

    def _insert(self, items: Iterable[tuple[BlockKey, Place]]) -> None:
        for key, place in items:
            self._places.pop(key, None)  # what is written again is new
            self._places[key] = place
        for key in list(islice(self._places, max(0, len(self._places) - self._limit))):
            del self._places[key]
