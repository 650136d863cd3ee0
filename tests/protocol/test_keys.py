"""Keys: the prefix law, and that every process and machine gives the same bytes."""

import itertools
import json
import random
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.errors import ConfigError, UnsupportedError
from kvconnect.protocol import BlockChain, MediaSpan, Namespace, block_key, split_key

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "keys.json").read_text())
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def chain(tokens: Any, size: int = 4, **kwargs: Any) -> list[bytes]:
    made = BlockChain(size, **kwargs)
    made.extend(tokens)
    return list(made.hashes)


@pytest.mark.parametrize("case", VECTORS["chains"], ids=lambda case: "-".join(sorted(set(case) - {"hashes"})))
def test_chain_equals_golden_vector(case: dict[str, Any]) -> None:
    media = [MediaSpan(bytes.fromhex(digest), start, length) for digest, start, length in case.get("media", [])]
    hashes = chain(
        VECTORS["tokens"],
        case["block_size"],
        salt=case.get("salt"),
        adapter=bytes.fromhex(case["adapter"]) if "adapter" in case else None,
        media=media,
        secret=bytes.fromhex(case.get("secret", "")),
        epoch=bytes.fromhex(case.get("epoch", "")),
    )
    assert [value.hex() for value in hashes] == case["hashes"]


@pytest.mark.parametrize("case", VECTORS["namespaces"], ids=str)
def test_namespace_equals_golden_vector(case: dict[str, Any]) -> None:
    fields = {name: value for name, value in case.items() if name not in ("digest", "block_size")}
    assert Namespace(**fields).digest(case["block_size"]).hex() == case["digest"]


def test_key_equals_golden_vector_and_splits_again() -> None:
    key = block_key(b"n" * 32, b"h" * 32, 1, 0xDEADBEEF)
    assert key.hex() == VECTORS["key"]
    assert split_key(key) == (b"n" * 32, b"h" * 32, 1, 0xDEADBEEF)


def test_other_process_gives_the_same_hashes() -> None:
    program = (
        "from kvconnect.protocol import BlockChain; c = BlockChain(16, salt='s'); c.extend(list(range(64)));"
        "print([h.hex() for h in c.hashes])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("0", "1", "random")
    }
    assert printed == {str([value.hex() for value in chain(list(range(64)), 16, salt="s")])}


@given(TOKENS, st.lists(st.integers(0, 80), max_size=5))
def test_extending_in_pieces_equals_extending_at_once(tokens: list[int], cuts: list[int]) -> None:
    pieces = BlockChain(4)
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    for start, end in itertools.pairwise(edges):
        piece = tokens[start:end]
        pieces.extend(array("I", piece) if start % 2 else piece)
    assert pieces.hashes == chain(tokens)
    assert pieces.num_tokens == len(tokens)


@given(TOKENS.filter(lambda tokens: len(tokens) >= 4), st.data())
def test_changing_one_token_changes_its_block_and_all_behind_it(tokens: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(tokens) // 4 * 4 - 1))
    changed = [*tokens[:position], tokens[position] ^ 1, *tokens[position + 1 :]]
    before, after = chain(tokens), chain(changed)
    block = position // 4
    assert before[:block] == after[:block]
    assert all(a != b for a, b in zip(before[block:], after[block:], strict=True))


def test_equal_block_after_other_prefix_has_another_hash() -> None:
    assert chain([1, 2, 3, 4, 9, 9, 9, 9])[1] != chain([5, 6, 7, 8, 9, 9, 9, 9])[1]


def test_salt_adapter_secret_epoch_and_media_keep_chains_apart() -> None:
    tokens = list(range(8))
    variants = [
        chain(tokens),
        chain(tokens, salt=""),
        chain(tokens, salt="a"),
        chain(tokens, adapter=b"a"),
        chain(tokens, adapter=b"b"),
        chain(tokens, salt="a", adapter=b"a"),
        chain(tokens, secret=b"a"),
        chain(tokens, epoch=b"a"),
        chain(tokens, media=[MediaSpan(b"a", 0, 8)]),
        chain(tokens, media=[MediaSpan(b"b", 0, 8)]),
        chain(tokens, media=[MediaSpan(b"a", 1, 7)]),
    ]
    for block in range(2):
        assert len({hashes[block] for hashes in variants}) == len(variants)


def test_media_changes_only_blocks_from_the_first_it_touches() -> None:
    plain, image = chain(list(range(12))), chain(list(range(12)), media=[MediaSpan(b"i", 5, 2)])
    assert plain[0] == image[0]
    assert plain[1] != image[1]
    assert plain[2] != image[2]  # through the parent


@pytest.mark.parametrize("change", ["model", "kv_dtype", "rope", "quantization", "kv_scales", "weights_version"])
def test_every_namespace_field_counts(change: str) -> None:
    fields = {"model": "id:m", "kv_dtype": "float32"}
    base = Namespace(**fields)
    assert base.digest(16) != Namespace(**{**fields, change: "other"}).digest(16)
    assert base.digest(16) != base.digest(32)


def test_fields_cannot_run_into_one_another() -> None:
    one = Namespace(model="id:m", kv_dtype="float32", quantization="ab", rope="c")
    other = Namespace(model="id:m", kv_dtype="float32", quantization="a", rope="bc")
    assert one.digest(16) != other.digest(16)


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1.5], ["a"], [None]])
def test_token_that_no_key_can_hold_is_refused(tokens: list[Any]) -> None:
    with pytest.raises(UnsupportedError, match="token ids"):
        BlockChain(4).extend(tokens)


def test_model_without_identity_has_no_namespace() -> None:
    with pytest.raises(ConfigError, match="model_id"):
        Namespace(model="", kv_dtype="float32").digest(16)


def test_no_two_of_many_random_blocks_collide() -> None:
    rng = random.Random(7)
    seen = set()
    for _ in range(2000):
        seen.update(chain([rng.randrange(3) for _ in range(24)], 4))
    prefixes: set[tuple[int, ...]] = set()
    rng = random.Random(7)
    for _ in range(2000):
        tokens = [rng.randrange(3) for _ in range(24)]
        prefixes.update(tuple(tokens[: 4 * (i + 1)]) for i in range(6))
    assert len(seen) == len(prefixes)
