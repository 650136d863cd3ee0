"""Makes frames that nobody who computed the KV ever wrote; knows the format from its description alone.

Written from the table at the top of `kvconnect/store/frame.py`, and shares no code with it. The forger here knows
everything but the deployment's secret.
"""

from __future__ import annotations

import struct
from typing import Final

import xxhash
from blake3 import blake3

__all__ = ["is_frame", "key_of", "keyed", "negated", "payload_of", "plain", "renamed"]

_HEADER: Final = 256
_FLAGS_AT: Final = 11
_KEY: Final = slice(32, 104)
_PAYLOAD_SUM: Final = slice(184, 192)
_TAG: Final = slice(192, 224)
_HEADER_SUM: Final = slice(248, 256)
_KEYED: Final = 1
_CONTEXT: Final = "kvconnect 2026-11-22 frame tag v1"


def is_frame(value: bytes) -> bool:
    """Say whether bytes look like a frame."""
    return len(value) >= _HEADER and value.startswith(b"KVFRAME\0")


def key_of(frame: bytes) -> bytes:
    """Return the name of the block that the frame says it holds."""
    return frame[_KEY]


def payload_of(frame: bytes) -> bytes:
    """Return what lies behind the header."""
    return frame[_HEADER:]


def plain(frame: bytes) -> bytes:
    """Return the frame without a tag, with the checksums that anybody can compute."""
    made = bytearray(frame)
    made[_FLAGS_AT] = 0
    made[_PAYLOAD_SUM] = _sum(made[_HEADER:])
    made[_TAG] = bytes(32)
    made[_HEADER_SUM] = _sum(made[: _HEADER_SUM.start])
    return bytes(made)


def keyed(frame: bytes, secret: bytes | None) -> bytes:
    """Return the frame as a keyed one, under the tag that `secret` makes; with the tag that it had if None."""
    made = bytearray(frame)
    made[_FLAGS_AT] = _KEYED
    made[_PAYLOAD_SUM] = bytes(8)
    if secret is not None:
        key = blake3(secret, derive_key_context=_CONTEXT).digest()
        made[_TAG] = blake3(bytes(made[: _TAG.start] + made[_HEADER:]), key=key).digest()
    made[_HEADER_SUM] = _sum(made[: _HEADER_SUM.start])
    return bytes(made)


def renamed(frame: bytes, key: bytes) -> bytes:
    """Return the frame with another block's name in it; its checksums or tag are still to be made."""
    return frame[: _KEY.start] + key + frame[_KEY.stop :]


def negated(frame: bytes) -> bytes:
    """Return the frame with the sign of every float32 of its payload changed; checksums or tag are still to be made.

    Unlike flipped bits these are numbers, never infinite, so that nothing but checksums and tags could tell.
    """
    made = bytearray(frame)
    made[_HEADER + 3 :: 4] = bytes(byte ^ 0x80 for byte in made[_HEADER + 3 :: 4])
    return bytes(made)


def _sum(data: bytes | bytearray) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data)))
