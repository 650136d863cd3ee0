"""Plan, report and handshake: what leader and workers write to each other. Versioned, packed, never executed.

A message is four bytes, ``b"KV"``, its kind and its version, then one msgspec array. Rows of blocks are packed
columns: a plan of 2,048 moves costs about as much as a list of 2,048 hashes. A message of another version, a torn one,
or one with columns of the wrong length is a `MetadataError`. Golden bytes: `tests/vectors/messages.json`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import msgspec

from kvconnect.errors import MetadataError

__all__ = ["Handshake", "LoadError", "Move", "PackedMoves", "Plan", "Report", "pack_ints", "unpack_ints"]

HASH_BYTES = 32
_INTS_A_MOVE = 5


class Move(NamedTuple):
    """One block's move.

    Attributes:
        block_hash: Its content name, without group and shard.
        group: Its layer group.
        slot: The arena slot.
        target: Saves and loads: the block id. Promotes and demotes: the tier. Otherwise -1.
        request: Index into the plan's `request_ids`, -1 for none.
        ordinal: Which block of the request's sequence, -1 for none.
    """

    block_hash: bytes
    group: int
    slot: int
    target: int = -1
    request: int = -1
    ordinal: int = -1


class PackedMoves(msgspec.Struct, frozen=True, array_like=True):
    """Moves by column: 32 bytes a hash, then group, slot, target, request and ordinal as little-endian int32."""

    hashes: bytes = b""
    columns: bytes = b""

    @classmethod
    def pack(cls, moves: Sequence[Move]) -> PackedMoves:
        """Pack `moves`, keeping their order."""
        if not moves:
            return _NO_MOVES
        hashes, *columns = zip(*moves, strict=True)
        return cls(b"".join(hashes), b"".join(pack_ints(column) for column in columns))

    def unpack(self) -> list[Move]:
        """Return the moves.

        Raises:
            MetadataError: If the columns have not the same length.
        """
        count, rest = divmod(len(self.hashes), HASH_BYTES)
        if rest or len(self.columns) != count * _INTS_A_MOVE * 4:
            raise MetadataError(f"moves with {len(self.hashes)} hash bytes and {len(self.columns)} column bytes")
        if not count:
            return []
        ints = unpack_ints(self.columns)
        hashes = [self.hashes[i : i + HASH_BYTES] for i in range(0, len(self.hashes), HASH_BYTES)]
        columns = (ints[i * count : (i + 1) * count] for i in range(_INTS_A_MOVE))
        return [Move(*row) for row in zip(hashes, *columns, strict=True)]

    def __len__(self) -> int:
        """Return the number of moves."""
        return len(self.hashes) // HASH_BYTES


class _Message(msgspec.Struct, frozen=True, array_like=True):
    KIND: ClassVar[bytes] = b""
    VERSION: ClassVar[int] = 1

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return b"KV" + self.KIND + bytes([self.VERSION]) + _ENCODER.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a message of this kind.

        Raises:
            MetadataError: If it is of another kind or version, torn, or not of the agreed shape.
        """
        name = cls.__name__.lower()
        if len(data) < 4 or data[:2] != b"KV":
            raise MetadataError(f"not a kvconnect {name}: {bytes(data[:4])!r}")
        if data[2:3] != cls.KIND:
            raise MetadataError(f"expected a {name}, got a message of kind {bytes(data[2:3])!r}")
        if data[3] != cls.VERSION:
            raise MetadataError(f"{name} of version {data[3]}; this kvconnect speaks version {cls.VERSION}")
        try:
            decoded: Self = _DECODERS[cls].decode(memoryview(data)[4:])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the latter through
            raise MetadataError(f"{name} cannot be decoded: {error}") from error
        return decoded


class Plan(_Message, frozen=True, array_like=True):
    """What the workers do in one step.

    Attributes:
        step: The engine step.
        request_ids: The requests that moves point to.
        saves: Page to slot, after the forward pass; not matchable until committed.
        loads: Slot to page, before the forward pass.
        promotes: Store to slot, in the background.
        demotes: Slot to store, in the background; the slots are committed.
        drops: Blocks to remove from a store (`target` is the tier).
        fails: Loads that the leader knows cannot be made; the worker reports them like its own failures.
        parked: Requests with an asynchronous load.
        ends: Those of them whose asynchronous load is complete with this plan's loads, or given up.
        saved: Requests that have ended and whose pages nothing needs once this plan's saves are made. A plan names
            each until every rank has reported a step that did; a worker says it once.
        unused: Slots, packed int32, that hold nothing and will not be used before the arena grows again: their memory
            may be given back.
    """

    KIND: ClassVar[bytes] = b"P"

    step: int
    request_ids: tuple[str, ...] = ()
    saves: PackedMoves = PackedMoves()
    loads: PackedMoves = PackedMoves()
    promotes: PackedMoves = PackedMoves()
    demotes: PackedMoves = PackedMoves()
    drops: PackedMoves = PackedMoves()
    fails: PackedMoves = PackedMoves()
    parked: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    unused: bytes = b""


class LoadError(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one request and layer group that could not be loaded: ordinals as packed int32."""

    request_id: str
    group: int
    ordinals: bytes


class Report(_Message, frozen=True, array_like=True):
    """What became of a plan on one rank, and what ended since the rank's last report. Slots are packed int32.

    Attributes:
        step: The plan's step; ``-1 - step`` if the plan never reached the worker, see `unbound`.
        rank: Who reports.
        load_errors: Loads of this step that failed.
        failed_saves: Slots of this step's saves that were not filled.
        promoted: Slots that hold a verified block now.
        not_promoted: Slots whose promotion failed: a miss.
        demoted: ``(tier, slot)`` pairs that their store took, flattened.
        not_demoted: Pairs that it declined or failed.
        quarantined: Slots that a hung store call may still touch; not to be reused.
        released: Slots whose hung call has returned.
        error: What a hook raised in this step, ``""`` for nothing; then nothing of the step is committed.
        reads: ``(tier, blocks, microseconds)`` of each store read that ended or missed its deadline, flattened.
        step_us: Microseconds from the plan to this report.
    """

    KIND: ClassVar[bytes] = b"R"

    step: int
    rank: int
    load_errors: tuple[LoadError, ...] = ()
    failed_saves: bytes = b""
    promoted: bytes = b""
    not_promoted: bytes = b""
    demoted: bytes = b""
    not_demoted: bytes = b""
    quarantined: bytes = b""
    released: bytes = b""
    error: str = ""
    reads: bytes = b""
    step_us: int = 0

    @classmethod
    def unbound(cls, step: int, rank: int, error: str) -> Report:
        """Say that a step's plan never reached the worker: nothing of it was started."""
        return cls(step=-1 - step, rank=rank, error=error)

    @property
    def unbound_step(self) -> int:
        """The step whose plan never came, if `step` is negative."""
        return -1 - self.step

    def check(self) -> None:
        """Check the packed columns, so that a report is taken whole or not at all.

        Raises:
            MetadataError: If one is not of whole integers, or of whole pairs.
        """
        for packed in (self.failed_saves, self.promoted, self.not_promoted, self.quarantined, self.released):
            unpack_ints(packed)
        for error in self.load_errors:
            unpack_ints(error.ordinals)
        for rows, width in ((self.demoted, 2), (self.not_demoted, 2), (self.reads, 3)):
            if len(unpack_ints(rows)) % width:
                raise MetadataError(f"{len(rows)} bytes of rows of {width} integers")


class GroupHandshake(msgspec.Struct, frozen=True, array_like=True):
    """One layer group as a rank registered it; `window` 0 means full attention."""

    block_size: int
    window: int
    num_layers: int
    payload_bytes: int
    shard: int


class Handshake(_Message, frozen=True, array_like=True):
    """What the leader must know of a rank's cache before it offers anything.

    Attributes:
        rank: Who speaks.
        num_slots: Slots of this rank's arena that may be used now; the leader uses the smallest.
        groups: The layer groups in the order of the block tables.
        reserved_slots: Slots that the arena can grow to; 0 if it cannot grow.
        slot_bytes: Bytes a slot; 0 if the arena cannot be resized.
        num_sharing: Ranks among which a capacity of the whole engine is divided on this machine.
    """

    KIND: ClassVar[bytes] = b"H"

    rank: int
    num_slots: int
    groups: tuple[GroupHandshake, ...]
    reserved_slots: int = 0
    slot_bytes: int = 0
    num_sharing: int = 1


def pack_ints(values: Iterable[int]) -> bytes:
    """Pack `values` as little-endian int32."""
    packed = array("i", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ints(data: bytes) -> list[int]:
    """Read what `pack_ints` wrote.

    Raises:
        MetadataError: If the length is no multiple of four.
    """
    if len(data) % 4:
        raise MetadataError(f"packed integers of {len(data)} bytes")
    values = array("i")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


_NO_MOVES = PackedMoves()
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[type, Any] = {cls: msgspec.msgpack.Decoder(cls) for cls in (Plan, Report, Handshake)}
