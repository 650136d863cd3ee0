"""Makes frames that nobody who computed the KV ever wrote; knows the format from its description alone.

Written from the table at the top of `kvconnect/store/frame.py`, and shares no code with it.
"""

from __future__ import annotations

import struct
from typing import Final

import xxhash

__all__ = ["KEY", "is_frame", "negated", "renamed", "truncated", "with_checksums"]

_HEADER: Final = 256
_KEY_AT: Final = 32
_KEY_BYTES: Final = 72
_PAYLOAD_SUM_AT: Final = 184
_HEADER_SUM_AT: Final = 248

KEY: Final = slice(_KEY_AT, _KEY_AT + _KEY_BYTES)  # where a frame names its block


def is_frame(value: bytes) -> bool:
    """Say whether bytes look like a frame."""
    return len(value) >= _HEADER and value.startswith(b"KVFRAME\0")


def with_checksums(frame: bytes) -> bytes:
    """Return the frame with both checksums as its bytes ask for, as anybody can compute them."""
    made = bytearray(frame)
    struct.pack_into("<Q", made, _PAYLOAD_SUM_AT, xxhash.xxh3_64_intdigest(made[_HEADER:]))
    struct.pack_into("<Q", made, _HEADER_SUM_AT, xxhash.xxh3_64_intdigest(made[:_HEADER_SUM_AT]))
    return bytes(made)


def truncated(frame: bytes, keep: int) -> bytes:
    """Return the frame's first bytes."""
    return frame[:keep]


def renamed(frame: bytes, key: bytes) -> bytes:
    """Return another block's payload under `key`, with right checksums."""
    return with_checksums(frame[:_KEY_AT] + key + frame[_KEY_AT + _KEY_BYTES :])


def negated(frame: bytes) -> bytes:
    """Return the frame with the sign of every float32 of its payload changed, and right checksums.

    Numbers, unlike flipped bits, that may be infinite or none: nothing but the checksums could tell.
    """
    made = bytearray(frame)
    made[_HEADER + 3 :: 4] = bytes(byte ^ 0x80 for byte in made[_HEADER + 3 :: 4])
    return with_checksums(bytes(made))
