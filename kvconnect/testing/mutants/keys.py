"""Mutants whose keys leave something out, or are too short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvconnect.leader import OffloadLeader
from kvconnect.protocol import BlockChain
from kvconnect.testing.keys import KeyPartitionTests
from kvconnect.testing.mutants.base import Right, leader, mutant, worker
from kvconnect.testing.mutants.stores import FolderStore
from kvconnect.worker import OffloadWorker

__all__: list[str] = []

_REQUESTS = KeyPartitionTests.test_requests_that_differ_share_nothing
_ENGINES = KeyPartitionTests.test_engines_that_differ_share_nothing


def _chain(rehash: Any) -> type[OffloadLeader]:
    """Return a leader whose block hashes are made by ``rehash(tokens, block_size, number, right)``."""

    class Chain(BlockChain):
        __slots__ = ("seen",)

        def extend(self, tokens: Sequence[int]) -> None:
            self.seen = [*getattr(self, "seen", []), *tokens]
            super().extend(tokens)
            right = list(self.hashes)
            for number in range(len(right)):
                self.hashes[number] = rehash(self.seen, self.block_size, number, right[number])

    def _new_chain(self: Any, request: Any) -> Any:
        chain = Chain(
            self._block_size, salt=request.cache_salt, adapter=request.adapter, media=request.media, epoch=self._epoch
        )
        chain.extend(request.tokens)
        return chain

    return leader(_new_chain=_new_chain)


def _blind(**changes: Any) -> type[OffloadLeader]:
    """Return a leader that sees requests with these fields changed."""

    def _new_chain(self: Any, request: Any) -> Any:
        return OffloadLeader._new_chain(self, msgspec.structs.replace(request, **changes))

    return leader(_new_chain=_new_chain)


def _alone(tokens: Sequence[int], size: int, number: int, _: bytes) -> bytes:
    block = BlockChain(size)
    block.extend(tokens[number * size : (number + 1) * size])
    return block.hashes[0]


@mutant(KeyPartitionTests.test_blocks_of_two_prompts_do_not_join, "chain the parent's hash")
@mutant(KeyPartitionTests.test_block_after_another_prefix_is_another_block, "chain the parent's hash")
@mutant(KeyPartitionTests.test_same_block_elsewhere_is_another_block, "it is position|tokens loaded")
class ForgetsTheParent(Right):
    """Hashes one block's tokens, not its prefix."""

    leader = _chain(_alone)


@mutant(
    KeyPartitionTests.test_block_after_another_prefix_is_another_block,
    "that knows only its neighbours",
    parameters={"place": "a token far before"},
)
class HashesTheBlockBefore(Right):
    """Hashes a block with the one before it, and nothing further back."""

    leader = _chain(
        lambda tokens, size, number, _: (
            _alone(tokens[max(0, number - 1) * size :], 2 * size, 0, _) if number else _alone(tokens, size, 0, _)
        )
    )


@mutant(_REQUESTS, "another cache salt", parameters={"name": "cache salt"})
@mutant(_REQUESTS, "another cache salt or none", parameters={"name": "cache salt or none"})
class IgnoresTheSalt(Right):
    """Leaves the cache salt out of the key."""

    leader = _blind(cache_salt=None)


@mutant(_REQUESTS, "another adapter", parameters={"name": "adapter"})
@mutant(_REQUESTS, "another adapter or none", parameters={"name": "adapter or none"})
class IgnoresTheAdapter(Right):
    """Leaves the adapter out of the key."""

    leader = _blind(adapter=None)


@mutant(_REQUESTS, "another media", parameters={"name": "media"})
@mutant(_REQUESTS, "another place of the media", parameters={"name": "place of the media"})
class IgnoresTheMedia(Right):
    """Keys placeholder tokens like any others."""

    leader = _blind(media=())


@mutant(_REQUESTS, "salt that spells", parameters={"name": "salt that spells the adapter"})
class JoinsSaltAndAdapter(Right):
    """Puts salt and adapter into the key as one string, without a length."""

    def _new_chain(self: Any, request: Any) -> Any:
        joined = (request.cache_salt or "").encode() + (request.adapter or b"")
        chain = BlockChain(self._block_size, salt=joined.decode("latin-1"), media=request.media, epoch=self._epoch)
        chain.extend(request.tokens)
        return chain

    leader = leader(_new_chain=_new_chain)


@mutant(KeyPartitionTests.test_request_that_no_key_covers_is_not_cached, "uncacheable")
class CachesTheUncacheable(Right):
    """Caches a request although something in it is covered by no key."""

    def on_new_request(self: Any, request: Any) -> None:
        OffloadLeader.on_new_request(self, msgspec.structs.replace(request, uncacheable=""))

    leader = leader(on_new_request=on_new_request)


def _same_namespace(**changes: Any) -> Any:
    """Return `make_leader` and `make_worker` that see a namespace with these fields changed."""

    def blind(context: Any) -> Any:
        return msgspec.structs.replace(context, namespace=msgspec.structs.replace(context.namespace, **changes))

    return (
        lambda self, options, context: Right.make_leader(self, options, blind(context)),
        lambda self, options, context: Right.make_worker(self, options, blind(context)),
    )


@mutant(_ENGINES, "another model", over=[FolderStore], parameters={"name": "model"})
class IgnoresTheModel(Right):
    """Leaves the model out of the key: "use a separate directory"."""

    make_leader, make_worker = _same_namespace(model="id:any")


@mutant(_ENGINES, "another KV dtype", over=[FolderStore], parameters={"name": "KV dtype"})
class IgnoresTheDtype(Right):
    """Leaves the KV's dtype out of the key."""

    make_leader, make_worker = _same_namespace(kv_dtype="float32")


def _set_digest(self: Any, per_rank: Any) -> None:
    OffloadLeader.set_handshake_metadata(self, per_rank)
    self._namespace = self._context.namespace.digest(1)


def _set_worker_digest(self: Any, layout: Any) -> None:
    OffloadWorker.register_kv_caches(self, layout)
    self._namespace = self._context.namespace.digest(1)
    self._fingerprints = [b"\0" * len(each) for each in self._fingerprints]
    self._shards = [0 for _ in self._shards]


@mutant(_ENGINES, "heads of another width", over=[FolderStore], parameters={"name": "heads of another width"})
class IgnoresTheLayout(Right):
    """Leaves the shape of the cache out of key and frame, and loads what is there into what it has."""

    leader = leader(set_handshake_metadata=_set_digest)
    worker = worker(register_kv_caches=_set_worker_digest)


@mutant(KeyPartitionTests.test_ranks_do_not_read_each_others_shards, "each rank needs its own key", over=[FolderStore])
class OneKeyForAllRanks(Right):
    """Every rank writes its heads under the same key; the first one wins."""

    def register_kv_caches(self: Any, layout: Any) -> None:
        OffloadWorker.register_kv_caches(self, layout)
        self._shards = [0 for _ in self._shards]

    worker = worker(register_kv_caches=register_kv_caches)


@mutant(KeyPartitionTests.test_keys_are_wide, "bytes of a key that differ", over=[FolderStore])
class TruncatesTheHash(Right):
    """Keeps 64 bits of the hash, which collide by chance in a large store."""

    leader = _chain(lambda tokens, size, number, right: right[:8] + b"\0" * (len(right) - 8))


@mutant(KeyPartitionTests.test_keys_are_wide, "bytes of a key that differ", over=[FolderStore])
class UsesPythonsHash(Right):
    """Names a prefix by Python's `hash`: 64 bits, and no protection from whoever looks for collisions."""

    leader = _chain(
        lambda tokens, size, number, right: (
            hash(tuple(tokens[: (number + 1) * size])).to_bytes(8, "big", signed=True).rjust(len(right), b"\0")
        )
    )
