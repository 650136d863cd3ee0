"""Frames: what was sealed opens, and nothing else does."""

import os
import random
import struct

import blake3
import pytest
import xxhash

from kvconnect.errors import ConfigError, FrameCorrupt
from kvconnect.protocol import BlockKey
from kvconnect.store import HEADER_BYTES, FrameTagger, compress_frame, decompress_payload, open_frame, seal_frame

KEY = BlockKey(bytes(range(72)))
PRINT = b"f" * 32
PAYLOAD = (b"kv cache " * 200)[:1500]
SECRET = b"a secret of the deployment"
TAGGER = FrameTagger(SECRET)
MODES = pytest.mark.parametrize("tagger", [None, TAGGER], ids=["plain", "keyed"])


def sealed(payload: bytes = PAYLOAD, tagger: FrameTagger | None = None) -> memoryview:
    slot = memoryview(bytearray(4096))
    slot[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return seal_frame(slot, len(payload), key=KEY, fingerprint=PRINT, order="lrthd", tagger=tagger)


def opened(
    frame: memoryview,
    key: BlockKey = KEY,
    fingerprint: bytes = PRINT,
    size: int = len(PAYLOAD),
    tagger: FrameTagger | None = None,
) -> bytes:
    header = open_frame(frame, key=key, fingerprint=fingerprint, payload_bytes=size, tagger=tagger)
    assert header.order == "lrthd"
    return decompress_payload(frame, header) if header.codec else bytes(frame[HEADER_BYTES:])


@MODES
def test_payload_comes_back_plain_and_packed(tagger: FrameTagger | None) -> None:
    frame = sealed(tagger=tagger)
    packed = compress_frame(frame, 1, tagger)
    assert len(packed) < len(frame)
    assert opened(frame, tagger=tagger) == opened(packed, tagger=tagger) == PAYLOAD


def test_payload_that_does_not_shrink_stays_plain() -> None:
    frame = sealed(os.urandom(1500))
    assert compress_frame(frame, 1) is frame


@MODES
@pytest.mark.parametrize("packed", [False, True])
def test_any_flipped_bit_is_found(packed: bool, tagger: FrameTagger | None) -> None:
    whole = sealed(tagger=tagger)
    frame = bytearray(compress_frame(whole, 1, tagger) if packed else whole)
    rng = random.Random(11)
    bits = range(HEADER_BYTES * 8)  # every bit of the header, and some of the payload
    for bit in [*bits, *(rng.randrange(HEADER_BYTES * 8, len(frame) * 8) for _ in range(500))]:
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameCorrupt):
            opened(memoryview(frame), tagger=tagger)
        frame[bit // 8] ^= 1 << bit % 8
    assert opened(memoryview(frame), tagger=tagger) == PAYLOAD


@MODES
@pytest.mark.parametrize("packed", [False, True])
def test_any_truncation_or_addition_is_found(packed: bool, tagger: FrameTagger | None) -> None:
    whole = sealed(tagger=tagger)
    frame = bytes(compress_frame(whole, 1, tagger) if packed else whole)
    for length in range(len(frame)):
        with pytest.raises(FrameCorrupt):
            opened(memoryview(frame)[:length], tagger=tagger)
    with pytest.raises(FrameCorrupt):
        opened(memoryview(frame + b"\0"), tagger=tagger)


def with_checksums(frame: bytearray) -> memoryview:
    """Give a changed frame the checksums that it should have: anybody can."""
    keyed = frame[11] & 1
    struct.pack_into("<Q", frame, 184, 0 if keyed else xxhash.xxh3_64_intdigest(bytes(frame[256:])))
    struct.pack_into("<Q", frame, 248, xxhash.xxh3_64_intdigest(bytes(frame[:248])))
    return memoryview(frame)


def test_forged_payload_is_taken_without_a_secret_and_refused_with_one() -> None:
    forged = bytearray(sealed())
    forged[300] ^= 1
    assert opened(with_checksums(forged)) != PAYLOAD  # why stores without keyed frames have to be trusted
    forged = bytearray(sealed(tagger=TAGGER))
    forged[300] ^= 1
    with pytest.raises(FrameCorrupt, match="tag differs"):
        opened(with_checksums(forged), tagger=TAGGER)


def test_other_blocks_frame_under_this_name_is_refused_although_its_tag_is_right() -> None:
    moved = bytearray(sealed(tagger=TAGGER))
    moved[32:104] = other = bytes(reversed(KEY))
    with pytest.raises(FrameCorrupt, match="tag differs"):
        opened(with_checksums(moved), key=BlockKey(other), tagger=TAGGER)


def test_frames_of_another_secret_of_none_and_for_none_are_refused() -> None:
    with pytest.raises(FrameCorrupt, match="tag differs"):
        opened(sealed(tagger=TAGGER), tagger=FrameTagger(b"the secret of others"))
    with pytest.raises(FrameCorrupt, match="no tag"):
        opened(sealed(), tagger=TAGGER)
    with pytest.raises(FrameCorrupt, match="keyed"):
        opened(sealed(tagger=TAGGER))
    stripped = bytearray(sealed(tagger=TAGGER))
    stripped[11] = 0
    stripped[192:224] = bytes(32)
    with pytest.raises(FrameCorrupt, match="no tag"):
        opened(with_checksums(stripped), tagger=TAGGER)


def test_short_secret_is_refused_and_no_secret_shows() -> None:
    with pytest.raises(ConfigError, match="16") as caught:
        FrameTagger(b"hunter2")
    assert "hunter2" not in str(caught.value)
    assert SECRET.decode() not in repr(TAGGER)


def test_other_key_layout_or_size_is_refused_with_the_reason() -> None:
    with pytest.raises(FrameCorrupt, match="another block"):
        opened(sealed(), key=BlockKey(KEY[:-1] + b"\xff"))
    with pytest.raises(FrameCorrupt, match="another cache layout"):
        opened(sealed(), fingerprint=b"g" * 32)
    with pytest.raises(FrameCorrupt, match="claims"):
        opened(sealed(), size=len(PAYLOAD) + 1)


def golden(flags: int, checksum: int, tag: bytes) -> bytes:
    body = b"KVFRAME\0" + struct.pack("<HBBIQQ", 1, 0, flags, 256, 1500, 1500) + KEY + PRINT
    body += b"lrthd".ljust(48, b"\0") + struct.pack("<Q", checksum) + tag + bytes(24)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + PAYLOAD


def test_golden_frame() -> None:
    """The format is what its docstring says, byte by byte; the checksums come from the xxhash package itself."""
    assert bytes(sealed()) == golden(0, xxhash.xxh3_64_intdigest(PAYLOAD), bytes(32))


def test_golden_keyed_frame() -> None:
    """The tag is of the blake3 package itself, over the header's first 192 bytes and the payload in one piece."""
    key = blake3.blake3(SECRET, derive_key_context="kvconnect 2026-11-22 frame tag v1").digest()
    tag = blake3.blake3(golden(1, 0, b"")[:192] + PAYLOAD, key=key).digest()
    assert bytes(sealed(tagger=TAGGER)) == golden(1, 0, tag)
