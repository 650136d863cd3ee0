"""Frames: what was sealed opens, and nothing else does."""

import os
import random

import pytest

from kvconnect.errors import FrameCorrupt
from kvconnect.protocol import BlockKey
from kvconnect.store import HEADER_BYTES, compress_frame, decompress_payload, open_frame, seal_frame

KEY = BlockKey(bytes(range(72)))
PRINT = b"f" * 32
PAYLOAD = (b"kv cache " * 200)[:1500]


def sealed(payload: bytes = PAYLOAD) -> memoryview:
    slot = memoryview(bytearray(4096))
    slot[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return seal_frame(slot, len(payload), key=KEY, fingerprint=PRINT, order="lrthd")


def opened(frame: memoryview, key: BlockKey = KEY, fingerprint: bytes = PRINT, size: int = len(PAYLOAD)) -> bytes:
    header = open_frame(frame, key=key, fingerprint=fingerprint, payload_bytes=size)
    assert header.order == "lrthd"
    return decompress_payload(frame, header) if header.codec else bytes(frame[HEADER_BYTES:])


def test_payload_comes_back_plain_and_packed() -> None:
    frame = sealed()
    packed = compress_frame(frame, 1)
    assert len(packed) < len(frame)
    assert opened(frame) == opened(packed) == PAYLOAD


def test_payload_that_does_not_shrink_stays_plain() -> None:
    frame = sealed(os.urandom(1500))
    assert compress_frame(frame, 1) is frame


@pytest.mark.parametrize("packed", [False, True])
def test_any_flipped_bit_is_found(packed: bool) -> None:
    frame = bytearray(compress_frame(sealed(), 1) if packed else sealed())
    rng = random.Random(11)
    bits = range(HEADER_BYTES * 8)  # every bit of the header, and some of the payload
    for bit in [*bits, *(rng.randrange(HEADER_BYTES * 8, len(frame) * 8) for _ in range(500))]:
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameCorrupt):
            opened(memoryview(frame))
        frame[bit // 8] ^= 1 << bit % 8
    assert opened(memoryview(frame)) == PAYLOAD


@pytest.mark.parametrize("packed", [False, True])
def test_any_truncation_or_addition_is_found(packed: bool) -> None:
    frame = bytes(compress_frame(sealed(), 1) if packed else sealed())
    for length in range(len(frame)):
        with pytest.raises(FrameCorrupt):
            opened(memoryview(frame)[:length])
    with pytest.raises(FrameCorrupt):
        opened(memoryview(frame + b"\0"))


def test_other_key_layout_or_size_is_refused_with_the_reason() -> None:
    with pytest.raises(FrameCorrupt, match="another block"):
        opened(sealed(), key=BlockKey(KEY[:-1] + b"\xff"))
    with pytest.raises(FrameCorrupt, match="another cache layout"):
        opened(sealed(), fingerprint=b"g" * 32)
    with pytest.raises(FrameCorrupt, match="claims"):
        opened(sealed(), size=len(PAYLOAD) + 1)


def test_golden_frame() -> None:
    """The format is what its docstring says, byte by byte; the checksums come from the xxhash package itself."""
    import struct

    import xxhash

    body = b"KVFRAME\0" + struct.pack("<HBBIQQ", 1, 0, 0, 256, 1500, 1500) + KEY + PRINT
    body += b"lrthd".ljust(48, b"\0") + struct.pack("<Q", xxhash.xxh3_64_intdigest(PAYLOAD)) + b"\0" * 56
    assert bytes(sealed()) == body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + PAYLOAD
