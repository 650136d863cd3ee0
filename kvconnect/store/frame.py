"""The frame: a block as it rests in a slot or a store. A header that names what it is, then the payload.

The header has 256 bytes, integers little-endian:

    offset  size  field
         0     8  magic "KVFRAME" and a zero byte
         8     2  version, 1
        10     1  codec: 0 none, 1 zstd
        11     1  flags, 0
        12     4  header bytes, 256
        16     8  payload bytes as stored
        24     8  payload bytes when unpacked
        32    72  block key
       104    32  layout fingerprint
       136    48  payload order, ASCII, zero-padded
       184     8  XXH3-64 of the payload as stored
       192    56  zero
       248     8  XXH3-64 of the bytes before

A reader MUST refuse a frame whose magic, version, lengths, checksums, zero bytes, key or fingerprint are not what it
expects, and MUST NOT look at the payload before that. Checksums find faults, not forgers. XXH3-64 (xxHash 0.8) was the
fastest at hand: 48 GB/s on a cached 2 MiB block against 24 for CRC-32C and 26 for memcpy (ADR 0002).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash
import zstandard

from kvconnect.errors import FrameCorrupt
from kvconnect.protocol.keys import BlockKey

__all__ = ["HEADER_BYTES", "FrameHeader", "compress_frame", "decompress_payload", "open_frame", "seal_frame"]

HEADER_BYTES = 256
CODEC_NONE = 0
CODEC_ZSTD = 1

_MAGIC = b"KVFRAME\0"
_VERSION = 1
_FIELDS = struct.Struct("<8sHBBIQQ72s32s48sQ56s")
_CHECKSUM = struct.Struct("<Q")
_ZEROS = b"\0" * 56


class FrameHeader(NamedTuple):
    """What an opened frame says of its payload."""

    codec: int
    stored_bytes: int
    payload_bytes: int
    order: str


def seal_frame(slot: memoryview, payload_bytes: int, *, key: BlockKey, fingerprint: bytes, order: str) -> memoryview:
    """Write the header for the payload that lies in `slot` behind it.

    Args:
        slot: Writable; at least ``HEADER_BYTES + payload_bytes`` long.
        payload_bytes: Length of the payload.
        key: The block's key, shard included.
        fingerprint: `KVCacheLayout.fingerprint` of the block's group.
        order: `KVCacheLayout.payload_order`.

    Returns:
        The part of `slot` that is the frame.
    """
    end = HEADER_BYTES + payload_bytes
    checksum = xxhash.xxh3_64_intdigest(slot[HEADER_BYTES:end])
    _write_header(slot, CODEC_NONE, payload_bytes, payload_bytes, key, fingerprint, order.encode("ascii"), checksum)
    return slot[:end]


def compress_frame(frame: memoryview, level: int) -> memoryview:
    """Return a copy of a sealed frame with a zstd payload, or `frame` itself where that would not be shorter."""
    header = _FIELDS.unpack_from(frame)
    payload = frame[HEADER_BYTES:]
    packed = zstandard.ZstdCompressor(level=level).compress(payload)
    if len(packed) >= len(payload):
        return frame
    out = memoryview(bytearray(HEADER_BYTES + len(packed)))
    out[HEADER_BYTES:] = packed
    _, _, _, _, _, _, raw, key, fingerprint, order, _, _ = header
    _write_header(out, CODEC_ZSTD, len(packed), raw, key, fingerprint, order, xxhash.xxh3_64_intdigest(packed))
    return out


def open_frame(frame: memoryview, *, key: BlockKey, fingerprint: bytes, payload_bytes: int) -> FrameHeader:
    """Check a frame before its payload is used.

    Args:
        frame: Exactly the bytes that the store returned.
        key: The key that was asked for.
        fingerprint: The reader's.
        payload_bytes: What the reader's layout needs, unpacked.

    Raises:
        FrameCorrupt: Says what does not fit; the frame is a miss.
    """
    if len(frame) < HEADER_BYTES:
        raise FrameCorrupt(f"frame of {len(frame)} bytes is shorter than its header")
    (expected,) = _CHECKSUM.unpack_from(frame, HEADER_BYTES - _CHECKSUM.size)
    fields = _FIELDS.unpack_from(frame)
    magic, version, codec, flags, header, stored, raw, named, print_, order, checksum, zeros = fields
    if magic != _MAGIC:
        raise FrameCorrupt("not a frame: wrong magic")
    if version != _VERSION or header != HEADER_BYTES:
        raise FrameCorrupt(f"frame version {version} with a header of {header} bytes is not known")
    if xxhash.xxh3_64_intdigest(frame[: HEADER_BYTES - _CHECKSUM.size]) != expected:
        raise FrameCorrupt("header checksum differs")
    if flags or zeros != _ZEROS or codec not in (CODEC_NONE, CODEC_ZSTD):
        raise FrameCorrupt(f"frame with flags {flags} and codec {codec} is not known")
    if named != key:
        raise FrameCorrupt("frame holds another block than its key says")
    if print_ != fingerprint:
        raise FrameCorrupt("frame was written for another cache layout")
    if raw != payload_bytes or stored != len(frame) - HEADER_BYTES or (codec == CODEC_NONE and stored != raw):
        raise FrameCorrupt(f"frame of {len(frame)} bytes claims {stored} stored and {raw} unpacked payload bytes")
    if xxhash.xxh3_64_intdigest(frame[HEADER_BYTES:]) != checksum:
        raise FrameCorrupt("payload checksum differs")
    return FrameHeader(codec, stored, raw, order.rstrip(b"\0").decode("ascii", "replace"))


def decompress_payload(frame: memoryview, header: FrameHeader) -> bytes:
    """Return the unpacked payload of an opened zstd frame.

    Raises:
        FrameCorrupt: If it does not unpack to the length that the header names.
    """
    packed = frame[HEADER_BYTES : HEADER_BYTES + header.stored_bytes]
    try:
        if zstandard.get_frame_parameters(packed).content_size != header.payload_bytes:  # never unpack a bomb
            raise FrameCorrupt("zstd payload unpacks to another length than the header says")
        payload = zstandard.ZstdDecompressor().decompress(packed, max_output_size=header.payload_bytes)
    except zstandard.ZstdError as error:
        raise FrameCorrupt(f"zstd payload does not unpack: {error}") from error
    if len(payload) != header.payload_bytes:
        raise FrameCorrupt("zstd payload unpacks to another length than the header says")
    return payload


def _write_header(
    out: memoryview,
    codec: int,
    stored: int,
    raw: int,
    key: bytes,
    fingerprint: bytes,
    order: bytes,
    checksum: int,
) -> None:
    _FIELDS.pack_into(
        out, 0, _MAGIC, _VERSION, codec, 0, HEADER_BYTES, stored, raw, key, fingerprint, order, checksum, _ZEROS
    )
    end = HEADER_BYTES - _CHECKSUM.size
    _CHECKSUM.pack_into(out, end, xxhash.xxh3_64_intdigest(out[:end]))
