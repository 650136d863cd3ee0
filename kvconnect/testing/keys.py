"""What must be equal before two blocks are the same: every difference that changes the KV keeps them apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvconnect.protocol import MediaSpan
from kvconnect.protocol.keys import BlockKey
from kvconnect.store import BlockStore
from kvconnect.testing.harness import BLOCK, StepEngine
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, needs, not_shown
from kvconnect.testing.target import Target

__all__ = ["KeyPartitionTests"]

_PROMPT = 6 * BLOCK + 1

_REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cache salt": ({"cache_salt": "tenant-a"}, {"cache_salt": "tenant-b"}),
    "cache salt or none": ({"cache_salt": "tenant-a"}, {}),
    "empty cache salt or none": ({"cache_salt": ""}, {}),
    "adapter": ({"adapter": b"\x01" * 32}, {"adapter": b"\x02" * 32}),
    "adapter or none": ({"adapter": b"\x01" * 32}, {}),
    "salt that spells the adapter": ({"cache_salt": "aa"}, {"adapter": b"aa"}),
    "media": ({"media": (MediaSpan(b"\x01" * 32, 4, 6),)}, {"media": (MediaSpan(b"\x02" * 32, 4, 6),)}),
    "media or plain tokens": ({"media": (MediaSpan(b"\x01" * 32, 1, 3),)}, {}),
    "place of the media": ({"media": (MediaSpan(b"\x01" * 32, 4, 6),)}, {"media": (MediaSpan(b"\x01" * 32, 5, 6),)}),
}

_ENGINES: dict[str, dict[str, Any]] = {
    "model": {"model": "another"},
    "KV dtype": {"kv_dtype": "float8"},
    "block size": {"block_size": 2 * BLOCK},
    "layers and heads": {"shape": "full-bf16", "kv_dtype": "float32"},
    "heads of another width": {"shape": "full-narrow"},
}


class KeyPartitionTests(Kit):
    """The prefix law, and unknown means "do not cache"."""

    @pytest.mark.parametrize("name", _REQUESTS)
    def test_requests_that_differ_share_nothing(self, target: Target, rng: random.Random, name: str) -> None:
        """The same tokens under another salt, adapter or media are other blocks; the same again are the same."""
        mine, other = _REQUESTS[name]
        for saved, asked in ((mine, other), (other, mine)):
            tokens = self.tokens(rng, _PROMPT)
            with StepEngine(target) as engine:
                engine.save(tokens, **saved)
                apart = min((span.start for fields in (saved, asked) for span in fields.get("media", ())), default=0)
                offered = engine.offer(engine.arrive(tokens, **asked)).num_tokens or 0
                must(
                    offered <= apart // BLOCK * BLOCK,
                    expected=f"nothing behind token {apart // BLOCK * BLOCK} for a request of another {name}",
                    got=f"{offered} tokens offered",
                    hint="the key leaves out what the request differs in",
                )
                must_equal(f"tokens offered for the same {name}", engine.load(tokens, **saved), _PROMPT - 1)

    @pytest.mark.parametrize("place", ["the first token", "the last token of the block before", "a token far before"])
    def test_block_after_another_prefix_is_another_block(self, target: Target, rng: random.Random, place: str) -> None:
        """A block's key depends on every token before it, not on its own tokens alone."""
        tokens = self.tokens(rng, _PROMPT)
        where = {"the first token": 0, "the last token of the block before": 3 * BLOCK - 1, "a token far before": 5}
        changed = list(tokens)
        changed[where[place]] += 1
        computed = where[place] // BLOCK + 3  # blocks of the changed prompt that are there: its own, and two behind it
        with StepEngine(target) as engine:
            engine.save(tokens)
            offered = engine.offer(engine.arrive(changed)).num_tokens or 0
            must(
                offered <= where[place] // BLOCK * BLOCK,
                expected=f"at most {where[place] // BLOCK} blocks: {place} differs",
                got=f"{offered // BLOCK} blocks",
                hint="chain the parent's hash into each block's",
            )
            engine.save(changed[: computed * BLOCK + 1])
            offered = engine.offer(engine.arrive(changed)).num_tokens or 0
            must(
                offered <= computed * BLOCK,
                expected=f"at most the {computed} blocks that were computed behind it: {place} differs",
                got=f"{offered // BLOCK} blocks",
                hint="chain the parent's hash into each block's: one that knows only its neighbours is another's",
            )
            must_equal("tokens offered for the same prompt", engine.load(tokens), _PROMPT - 1)

    def test_blocks_of_two_prompts_do_not_join(self, target: Target, rng: random.Random) -> None:
        """The beginning of one prompt and the end of another, both saved, are not a prompt that was saved."""
        one, other = self.tokens(rng, _PROMPT), self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(one)
            engine.save(other)
            for common in (1, 3):
                joined = one[: common * BLOCK] + other[common * BLOCK :]
                offered = engine.offer(engine.arrive(joined)).num_tokens or 0
                must(
                    offered <= common * BLOCK,
                    expected=f"at most the {common} blocks that the prompt shares with one that was saved",
                    got=f"{offered // BLOCK} blocks",
                    hint="chain the parent's hash into each block's: its KV depends on every token before it",
                )
                must_equal("tokens loaded, all right", engine.load(joined), common * BLOCK)

    def test_same_block_elsewhere_is_another_block(self, target: Target, rng: random.Random) -> None:
        """The same tokens at another position have another KV: a prompt that repeats a block never mixes them up."""
        block = self.tokens(rng, BLOCK)
        with StepEngine(target) as engine:
            engine.save(block * 3 + [1])
            must_equal("tokens loaded, all right", engine.load(block * 3 + [1]), 3 * BLOCK)
            engine.save([*self.tokens(rng, BLOCK), *block, 1])
            must_equal("tokens loaded, all right", engine.load(block * 2 + [2]), 2 * BLOCK)

    @pytest.mark.parametrize("name", _ENGINES)
    def test_engines_that_differ_share_nothing(self, target: Target, rng: random.Random, name: str) -> None:
        """Another model, dtype, block size or cache shape over the same medium finds nothing."""
        needs(target.capabilities.durable or target.capabilities.shared, "durable or shared")
        tokens = self.tokens(rng, 4 * _PROMPT + 1)
        with StepEngine(target) as engine:
            engine.save(tokens)
        with StepEngine(target, **_ENGINES[name]) as engine:
            must_equal(f"tokens offered to an engine of another {name}", engine.offered(tokens), 0)
        with StepEngine(target) as engine:
            must(engine.load(tokens) > 0, expected="an equal engine to be offered the blocks", got="nothing")

    def test_ranks_do_not_read_each_others_shards(self, target: Target, rng: random.Random) -> None:
        """What two ranks saved, each its heads, one rank with all heads does not take for its own."""
        needs(target.capabilities.several_ranks, "several_ranks")
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target, num_ranks=2) as engine:
            engine.save(tokens)
            must_equal("tokens loaded by two ranks, all right", engine.load(tokens), _PROMPT - 1)
        if not (target.capabilities.durable or target.capabilities.shared):
            return
        with StepEngine(target, num_ranks=2) as engine:
            found = engine.load(tokens)
            must_equal(
                "tokens loaded by two ranks of a new instance", found, _PROMPT - 1, "each rank needs its own key"
            )
        with StepEngine(target, num_ranks=1) as engine:
            must_equal("tokens offered to one rank", engine.offered(tokens), 0)

    def test_request_that_no_key_covers_is_not_cached(self, target: Target, rng: random.Random) -> None:
        """`uncacheable` requests neither load nor save, and token ids that are none are not cached."""
        tokens = self.tokens(rng, _PROMPT)
        with StepEngine(target) as engine:
            engine.save(tokens, uncacheable="embeddings of its own")
            must_equal("tokens offered of what an uncacheable request computed", engine.offered(tokens), 0)
            asked = engine.arrive(tokens, uncacheable="embeddings of its own")
            must_equal("tokens offered to an uncacheable request", engine.offer(asked).num_tokens, 0)
            odd = engine.arrive([-1] * _PROMPT)
            must_equal("tokens offered for ids that are no tokens", engine.offer(odd).num_tokens, 0)

    def test_keys_are_wide(self, target: Target, rng: random.Random, request: pytest.FixtureRequest) -> None:
        """Blocks are named by a cryptographic hash of at least 128 bits: keys as a store, or a `keys` fixture, show."""
        found = self._keys(target, rng, request)
        shortest = min(map(len, found))
        must(shortest >= 16, expected="keys of at least 16 bytes", got=f"{shortest} bytes")
        changing = sum(len({key[place] for key in found}) > 8 for place in range(shortest))
        must(
            changing >= 16,
            expected="at least 16 bytes of a key that differ from block to block",
            got=f"{changing} of {shortest}",
            hint="a hash of 64 bits collides by chance in a large store, and at will in a hostile one",
        )

    def _keys(self, target: Target, rng: random.Random, request: pytest.FixtureRequest) -> Sequence[bytes]:
        if hasattr(type(self), "keys"):
            make: Callable[[Sequence[int], dict[str, Any]], Sequence[bytes]] = request.getfixturevalue("keys")
            return [key for _ in range(8) for key in make(self.tokens(rng, 8 * BLOCK), {})]
        if not target.resolved.tiers:
            not_shown("keys cannot be seen from outside; give a fixture keys(tokens, extras) -> list of bytes")
        seen: list[bytes] = []

        def wrap(kind: type[BlockStore]) -> type[BlockStore]:
            def write(self: BlockStore, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
                seen.extend(map(bytes, keys))
                return kind.write(self, keys, frames)

            return type(kind.__name__, (kind,), {"write": write})

        with StepEngine(target.with_store(wrap)) as engine:
            for _ in range(8):
                engine.save(self.tokens(rng, 8 * BLOCK))
        must(len(seen) >= 64, expected="64 blocks to be written to the store", got=f"{len(seen)}")
        return seen
