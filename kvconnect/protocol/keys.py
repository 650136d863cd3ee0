"""Names blocks. Knows nothing of where they are stored.

The prefix law: a block's key depends on every token before it, so equal keys mean equal KV. A block hash is

    BLAKE2b-256(person="kvconnect-block1", key=secret, parent hash || block's tokens as little-endian u32)

and the first parent is the root, which holds the salt, the adapter's content digest and the cache epoch. A block that
media overlap is hashed under another personalisation, with each span's digest and offset behind the tokens. BLAKE2b
(RFC 7693) is in hashlib, is 256-bit and cryptographic (no token is compared again after a match), takes a secret
natively, and was the fastest of those at hand: 541 ns a 16-token block from a copied state against 781 ns for SHA-256
(`benchmarks/hash_lookup.py`). Golden vectors: `tests/vectors/keys.json`.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NewType

import msgspec

from kvconnect.errors import ConfigError, UnsupportedError

__all__ = [
    "KEY_BYTES",
    "BlockChain",
    "BlockHash",
    "BlockKey",
    "MediaSpan",
    "Namespace",
    "block_key",
    "frame_fields",
    "is_private",
    "private_hash",
    "split_key",
]

BlockKey = NewType("BlockKey", bytes)
"""namespace (32 bytes), block hash (32), layer group (u32), shard digest (u32), big-endian: 72 bytes."""

BlockHash = NewType("BlockHash", bytes)
"""32 bytes that name a block's tokens and everything before them, whatever the layer group and shard."""

KEY_BYTES = 72

_PRIVATE = b"kvconnect/priv\0\0"
_PRIVATE_HASH = struct.Struct(">16s8sII")
_KEY = struct.Struct(">32s32sII")
_LENGTH = struct.Struct("<I")
_OFFSET = struct.Struct("<q")


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal before two blocks' KV can be: the same function under every engine.

    Attributes:
        model: `model_identity(...)`: a content digest, an immutable revision, or an explicit id.
        kv_dtype: The cache's element type, such as ``"float32"``.
        rope: `rope_settings(...)` of the model's configuration.
        quantization: Load-time quantisation of the weights, ``""`` for none.
        kv_scales: Digest of fixed KV scales, ``""`` for none.
        weights_version: Set anew by live weight updates, ``""`` for the checkpoint as loaded.
    """

    model: str
    kv_dtype: str
    rope: str = ""
    quantization: str = ""
    kv_scales: str = ""
    weights_version: str = ""

    def digest(self, block_size: int) -> bytes:
        """Return the 32 bytes that open every key of blocks of `block_size` tokens.

        Raises:
            ConfigError: If the model has no identity, or the block size is not positive.
        """
        if not self.model or not self.kv_dtype:
            raise ConfigError("a namespace needs a model identity and a KV dtype; give model_id= for random weights")
        if block_size <= 0:
            raise ConfigError(f"block size must be positive, not {block_size}")
        fields = [(name, getattr(self, name).encode()) for name in sorted(self.__struct_fields__)]
        fields.append(("block_size", str(block_size).encode()))
        return hashlib.blake2b(frame_fields(fields), digest_size=32, person=b"kvconnect-space1").digest()


class MediaSpan(msgspec.Struct, frozen=True):
    """Prompt positions ``[start, start + length)`` filled by an image, audio or embeddings.

    Attributes:
        digest: Digest of the content. A caller-supplied id is no digest: do not cache such a request.
        start: First position, in tokens.
        length: Number of positions, in tokens.
    """

    digest: bytes
    start: int
    length: int


class BlockChain:
    """The hashes of one sequence's full blocks; extended as tokens become known, never hashed again.

    Attributes:
        hashes: One per full block, in order. Read it; do not change it.
        block_size: Tokens a block.
        num_tokens: Tokens given so far, those of the unfinished block included.
        root: What the first block's hash starts from: differs with salt, adapter, secret and epoch.
    """

    __slots__ = ("_media", "_pending", "_state", "block_size", "hashes", "num_tokens", "root")

    def __init__(
        self,
        block_size: int,
        *,
        salt: str | None = None,
        adapter: bytes | None = None,
        media: Sequence[MediaSpan] = (),
        secret: bytes = b"",
        epoch: bytes = b"",
    ) -> None:
        """Start a chain.

        Args:
            block_size: Tokens a block; positive.
            salt: Keeps callers apart: chains under different salts share no hash. None and ``""`` differ.
            adapter: Content digest of the adapter (LoRA) that the request runs with, None for none.
            media: Spans that are not plain tokens; may overlap block borders, not each other.
            secret: Deployment secret, at most 64 bytes: without it no hash can be computed from guessed tokens.
            epoch: Random bytes after a cache reset, so that nothing from before matches.

        Raises:
            ConfigError: If the block size is not positive or the secret is too long.
        """
        if block_size <= 0:
            raise ConfigError(f"block size must be positive, not {block_size}")
        if len(secret) > 64:
            raise ConfigError(f"a key secret has at most 64 bytes, not {len(secret)}")
        root = []
        if salt is not None:
            root.append(("salt", salt.encode()))
        if adapter is not None:
            root.append(("adapter", adapter))
        if epoch:
            root.append(("epoch", epoch))
        parent = hashlib.blake2b(frame_fields(root), digest_size=32, person=b"kvconnect-root-1", key=secret).digest()
        self.root = BlockHash(parent)
        self.block_size = block_size
        self.num_tokens = 0
        self.hashes: list[BlockHash] = []
        self._pending = array("I")
        self._media = sorted(media, key=lambda span: span.start)
        # (parent, plain hasher, media hasher): copying a prepared state is a third faster than a new one a block
        self._state = (
            parent,
            hashlib.blake2b(digest_size=32, person=b"kvconnect-block1", key=secret),
            hashlib.blake2b(digest_size=32, person=b"kvconnect-media1", key=secret),
        )

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens`; every block they fill gets its hash. Linear in their number.

        Args:
            tokens: Token ids in ``[0, 2**32)``. An ``array("I")`` is taken without conversion.

        Raises:
            UnsupportedError: If an id is out of range or no integer: such a request cannot be cached.
        """
        try:
            if isinstance(tokens, array) and tokens.typecode == "I":
                fresh = tokens
            else:
                fresh = array("I")
                fresh.fromlist(tokens if isinstance(tokens, list) else list(tokens))  # a third faster than array(...)
        except (OverflowError, TypeError) as error:
            raise UnsupportedError(f"token ids must be integers in [0, 2**32) to be cached: {error}") from error
        if self._pending:
            self._pending.extend(fresh)
            fresh = self._pending
        self.num_tokens = len(self.hashes) * self.block_size + len(fresh)
        full = len(fresh) // self.block_size
        if full:
            self._hash_blocks(fresh, full)
        self._pending = fresh[full * self.block_size :]

    def _hash_blocks(self, tokens: array[int], full: int) -> None:
        if sys.byteorder == "big":
            tokens = array("I", tokens)
            tokens.byteswap()
        width = 4 * self.block_size
        packed = memoryview(tokens).cast("B")[: full * width].tobytes()
        parent, plain, media = self._state
        add: Callable[[Any], None] = self.hashes.append  # Any: BlockHash(...) would be a call a block
        if not self._media:
            copy = plain.copy
            for (block,) in struct.iter_unpack(f"{width}s", packed):  # faster than slicing by offset
                hasher = copy()
                hasher.update(parent + block)
                parent = hasher.digest()
                add(parent)
        else:
            for offset in range(0, len(packed), width):
                behind = self._media_fields(len(self.hashes) * self.block_size)
                hasher = (media if behind else plain).copy()
                hasher.update(parent + packed[offset : offset + width] + behind)
                parent = hasher.digest()
                add(parent)
        self._state = (parent, plain, media)

    def _media_fields(self, start: int) -> bytes:
        """Return what names the media in the block ``[start, start + block_size)``; empty when there are none."""
        end = start + self.block_size
        touching = (span for span in self._media if span.start < end and span.start + span.length > start)
        return b"".join(
            _LENGTH.pack(len(span.digest)) + span.digest + _OFFSET.pack(span.start - start) for span in touching
        )


def block_key(namespace: bytes, block_hash: bytes, group: int, shard: int) -> BlockKey:
    """Put the four parts of a key together; its ``hex()`` is a valid file and object name."""
    return BlockKey(_KEY.pack(namespace, block_hash, group, shard))


def split_key(key: BlockKey) -> tuple[bytes, BlockHash, int, int]:
    """Return namespace, block hash, layer group and shard digest of `key`."""
    namespace, block_hash, group, shard = _KEY.unpack(key)
    return namespace, BlockHash(block_hash), group, shard


def private_hash(nonce: bytes, ordinal: int, num_tokens: int) -> BlockHash:
    """Name a block that only one suspended request may load: a partial one, or one that must not be shared.

    No chain makes such a name but by a 128-bit accident, so it is never matched; and a store's owner can tell what to
    remove after a crash. Layout: ``_PRIVATE`` (16 bytes), nonce (8), ordinal (u32), tokens (u32), big-endian.

    Args:
        nonce: 8 random bytes, new for each suspension.
        ordinal: Which block of the sequence.
        num_tokens: Tokens of it that are computed.
    """
    return BlockHash(_PRIVATE_HASH.pack(_PRIVATE, nonce, ordinal, num_tokens))


def is_private(block_hash: BlockHash) -> bool:
    """Say whether `private_hash` made the name."""
    return block_hash.startswith(_PRIVATE)


def frame_fields(fields: Iterable[tuple[str, bytes]]) -> bytes:
    """Tag and length-frame `fields`, so that no two different lists give the same bytes."""
    out = bytearray()
    for name, value in fields:
        tag = name.encode()
        out += _LENGTH.pack(len(tag)) + tag + _LENGTH.pack(len(value)) + value
    return bytes(out)
