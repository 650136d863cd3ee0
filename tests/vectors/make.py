"""Writes the golden vectors from the formats' definitions: hashlib, struct and msgpack bytes by hand, nothing of ours.

Run it only when a format changes, and then change the format's version: python tests/vectors/make.py
"""

import hashlib
import json
import struct
from pathlib import Path

HERE = Path(__file__).parent


def framed(fields):
    return b"".join(
        struct.pack("<I", len(name)) + name.encode() + struct.pack("<I", len(value)) + value for name, value in fields
    )


def blake(data, person, key=b"", size=32):
    return hashlib.blake2b(data, digest_size=size, person=person.encode(), key=key).digest()


def chain(tokens, size, salt=None, adapter=None, media=(), secret=b"", epoch=b""):
    root = [("salt", salt.encode())] if salt is not None else []
    root += [("adapter", adapter)] if adapter is not None else []
    root += [("epoch", epoch)] if epoch else []
    parent = blake(framed(root), "kvconnect-root-1", secret)
    hashes = []
    for start in range(0, len(tokens) // size * size, size):
        body = parent + struct.pack(f"<{size}I", *tokens[start : start + size])
        behind = b"".join(
            struct.pack("<I", len(digest)) + digest + struct.pack("<q", at - start)
            for digest, at, length in media
            if at < start + size and at + length > start
        )
        parent = blake(body + behind, "kvconnect-media1" if behind else "kvconnect-block1", secret)
        hashes.append(parent.hex())
    return hashes


def namespace(**fields):
    names = ["kv_dtype", "kv_scales", "model", "quantization", "rope", "weights_version"]
    size = fields.pop("block_size")
    values = [*((name, fields.get(name, "").encode()) for name in names), ("block_size", str(size).encode())]
    return blake(framed(values), "kvconnect-space1").hex()


def main():
    tokens = [*range(100, 140), 2**32 - 1, 0, 7, 8, 9, 10, 11, 12]
    media = [(b"\x01" * 32, 5, 6), (b"\x02" * 16, 14, 20)]
    cases = [
        {"block_size": 16},
        {"block_size": 8},
        {"block_size": 16, "salt": "tenant-a"},
        {"block_size": 16, "salt": ""},
        {"block_size": 16, "adapter": "ab" * 32},
        {"block_size": 16, "secret": "73" * 32},
        {"block_size": 16, "epoch": "65" * 16},
        {"block_size": 16, "media": [[d.hex(), at, length] for d, at, length in media]},
    ]
    chains = []
    for case in cases:
        hashes = chain(
            tokens,
            case["block_size"],
            salt=case.get("salt"),
            adapter=bytes.fromhex(case["adapter"]) if "adapter" in case else None,
            media=media if "media" in case else (),
            secret=bytes.fromhex(case.get("secret", "")),
            epoch=bytes.fromhex(case.get("epoch", "")),
        )
        chains.append({**case, "hashes": hashes})
    spaces = [
        {"model": "id:m", "kv_dtype": "float32", "block_size": 16},
        {"model": "id:m", "kv_dtype": "bfloat16", "block_size": 16},
        {"model": "id:m", "kv_dtype": "float32", "block_size": 32},
        {"model": "id:m", "kv_dtype": "float32", "rope": '{"rope_theta": 10000.0}', "block_size": 16},
        {
            "model": "id:m",
            "kv_dtype": "float32",
            "quantization": "awq",
            "kv_scales": "s",
            "weights_version": "2",
            "block_size": 16,
        },
    ]
    key = struct.pack(">32s32sII", b"n" * 32, b"h" * 32, 1, 0xDEADBEEF)
    out = {
        "tokens": tokens,
        "chains": chains,
        "namespaces": [{**space, "digest": namespace(**space)} for space in spaces],
        "key": key.hex(),
    }
    (HERE / "keys.json").write_text(json.dumps(out, indent=1) + "\n")

    moves = b"".join(
        [b"\x92", b"\xc4\x40" + b"a" * 32 + b"b" * 32, b"\xc4\x28" + struct.pack("<10i", 0, 1, 3, 4, 5, 6, 0, 0, 7, 8)]
    )
    none = b"\x92\xc4\x00\xc4\x00"
    plan = b"KVP\x01" + b"\x9c" + b"\x2a" + b"\x91\xa2r1" + moves + none * 5 + b"\x90" * 3 + b"\xc4\x00"
    ints = b"\xc4\x04" + struct.pack("<i", 5)
    report = b"KVR\x01" + b"\x9d" + b"\x2a\x01" + b"\x91\x93\xa2r1\x00" + ints + ints + b"\xc4\x00" * 6 + b"\xa3bad"
    report += b"\xc4\x0c" + struct.pack("<3i", 0, 32, 1500) + b"\xcd" + struct.pack(">H", 2500)
    handshake = b"KVH\x01" + b"\x96\x00\xcd\x04\x00" + b"\x91\x95\x10\x00\x02\xcd\x20\x00\xce\xde\xad\xbe\xef"
    handshake += b"\x00\x00\x01"
    (HERE / "messages.json").write_text(
        json.dumps({"plan": plan.hex(), "report": report.hex(), "handshake": handshake.hex()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
