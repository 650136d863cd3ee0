"""What lies in the log and in checkpoints, as bytes: which keys lie where in which pack. Trusts nothing it reads.

    entry        [version, id, packs, removed, lost]   one object log/<20 digits>
    checkpoint   [version, number, packs]              the map after entry `number`
    packs, lost  [[name, keys, spans], ...]            keys: 72 bytes each; spans: offset and length, 4 bytes each

MessagePack; integers in `spans` are little-endian; version is 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import msgspec

from kvconnect.errors import MetadataError
from kvconnect.protocol import BlockKey
from kvconnect.protocol.keys import KEY_BYTES

__all__ = ["ID_BYTES", "MAX_PACK_BYTES", "Checkpoint", "Entry", "Packed", "Place", "decode", "pack_of", "places_of"]

ID_BYTES = 16
MAX_PACK_BYTES = 1 << 30
_VERSION = 1
_SPAN = struct.Struct("<II")


RecordT = TypeVar("RecordT", "Entry", "Checkpoint")


class Place(NamedTuple):
    """Where a frame lies: a pack's name, and bytes ``[offset, offset + length)`` of it."""

    pack: bytes
    offset: int
    length: int


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """Frames of one pack: `keys` and `spans` are as long as each other; see above."""

    name: bytes
    keys: bytes
    spans: bytes


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One change of the map. `id` tells whose entry it is.

    Keys of `lost` go if they still lie there, those of `removed` wherever they lie; then those of `packs` come.
    """

    version: int
    id: bytes
    packs: tuple[Packed, ...]
    removed: bytes
    lost: tuple[Packed, ...]

    @classmethod
    def of(
        cls,
        entry_id: bytes,
        packs: Iterable[Packed] = (),
        removed: Iterable[BlockKey] = (),
        lost: Iterable[tuple[BlockKey, Place]] = (),
    ) -> Entry:
        """Make an entry."""
        return cls(_VERSION, entry_id, tuple(packs), b"".join(removed), _by_pack(lost))

    def removed_keys(self) -> Iterator[BlockKey]:
        """Yield the keys to remove."""
        return _keys(self.removed)


class Checkpoint(msgspec.Struct, frozen=True, array_like=True):
    """The whole map after entry `number`, oldest keys first."""

    version: int
    number: int
    packs: tuple[Packed, ...]

    @classmethod
    def of(cls, number: int, places: Iterable[tuple[BlockKey, Place]]) -> Checkpoint:
        """Make a checkpoint; keys of one pack that stand together are written together."""
        return cls(_VERSION, number, _by_pack(places))


def pack_of(name: bytes, keys: Sequence[BlockKey], spans: Iterable[tuple[int, int]]) -> Packed:
    """Describe a pack: for each key its offset and its length."""
    return Packed(name, b"".join(keys), b"".join(_SPAN.pack(*span) for span in spans))


def places_of(packs: Iterable[Packed]) -> Iterator[tuple[BlockKey, Place]]:
    """Yield what `packs` hold."""
    for packed in packs:
        for key, (offset, length) in zip(_keys(packed.keys), _SPAN.iter_unpack(packed.spans), strict=True):
            yield key, Place(packed.name, offset, length)


def decode(data: bytes | memoryview, kind: type[RecordT]) -> RecordT:
    """Read an entry or a checkpoint.

    Raises:
        MetadataError: If it is not one, of an unknown version, or names what cannot be.
    """
    try:
        record = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MetadataError(f"not a record: {error}") from error
    if record.version != _VERSION:
        raise MetadataError(f"record of version {record.version}")
    for packed in record.packs:
        _check(packed)
    if isinstance(record, Entry):
        for packed in record.lost:
            _check(packed)
        if len(record.id) != ID_BYTES or len(record.removed) % KEY_BYTES:
            raise MetadataError("entry with an id or keys of another length")
    return record


def _by_pack(places: Iterable[tuple[BlockKey, Place]]) -> tuple[Packed, ...]:
    packs = []
    for name, group in groupby(places, key=lambda item: item[1].pack):
        listed = list(group)
        packs.append(pack_of(name, [key for key, _ in listed], [(place[1], place[2]) for _, place in listed]))
    return tuple(packs)


def _check(packed: Packed) -> None:
    count, rest = divmod(len(packed.keys), KEY_BYTES)
    if len(packed.name) != ID_BYTES or rest or len(packed.spans) != count * _SPAN.size:
        raise MetadataError("pack with a name, keys or spans of another length")
    if any(offset + length > MAX_PACK_BYTES for offset, length in _SPAN.iter_unpack(packed.spans)):
        raise MetadataError("span beyond what a pack can hold")


def _keys(joined: bytes) -> Iterator[BlockKey]:
    return (BlockKey(joined[i : i + KEY_BYTES]) for i in range(0, len(joined), KEY_BYTES))
