"""Host memory, a disk and a Redis in one list, under the reference engine: what each brings, and who shares what."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from kvconnect.engine import RequestOutput
from tests.conftest import Reference
from tests.remote.faults.redis_server import RedisServer

PROMPT = [random.Random(5).randrange(300) for _ in range(165)]  # ten blocks of 16, and some
BLOCKS = 10
SECRET = "a secret that both engines have"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A server's URL."""
    with RedisServer(tmp_path) as server:
        yield f"redis://127.0.0.1:{server.port}"


def client(url: str) -> Any:
    """Return somebody else's client, to look at what is there."""
    import redis

    return redis.Redis.from_url(url)


def run(model: Any, connector: Sequence[str], salt: str | None = None) -> RequestOutput:
    """Run the prompt in an engine of its own, which has nothing in memory."""
    with LLM(model, connector=list(connector), block_size=16, model_id="tiers") as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=4, cache_salt=salt))
    return output


def files(folder: Path) -> int:
    return sum(path.is_file() for path in (folder / "blocks").rglob("*"))


@pytest.fixture
def oracle(references: dict[str, Reference]) -> list[int]:
    """What transformers alone says."""
    return references["llama"](PROMPT, 4)


def test_block_goes_to_every_tier_and_a_hit_in_the_last_goes_up(
    llama: Any, redis: str, tmp_path: Path, oracle: list[int]
) -> None:
    tiers = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv", redis]
    first = run(llama, tiers)
    assert (first.loaded_tokens, list(first.token_ids)) == (0, oracle)
    assert files(tmp_path / "kv") == BLOCKS
    assert client(redis).dbsize() == BLOCKS
    shutil.rmtree(tmp_path / "kv")
    second = run(llama, tiers)  # another machine, with a disk that is empty
    assert (second.loaded_tokens, list(second.token_ids)) == (BLOCKS * 16, oracle)
    assert files(tmp_path / "kv") == BLOCKS
    client(redis).flushall()
    third = run(llama, tiers)
    assert (third.loaded_tokens, list(third.token_ids)) == (BLOCKS * 16, oracle)


def test_second_hit_tier_gets_what_two_engines_have_asked_for(
    llama: Any, redis: str, tmp_path: Path, oracle: list[int]
) -> None:
    tiers = ["host://?capacity=64MiB", f"disk://{tmp_path}/kv?write=second_hit", redis]
    run(llama, tiers)
    assert files(tmp_path / "kv") == 0
    with LLM(llama, connector=tiers, block_size=16, model_id="tiers") as llm:
        for _ in range(2):  # what came up from Redis is seen for the first time; then it is used again
            (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=4))
            assert list(output.token_ids) == oracle
    assert files(tmp_path / "kv") == BLOCKS


def test_engines_that_share_a_secret_share_blocks_and_others_do_not(llama: Any, redis: str, oracle: list[int]) -> None:
    keyed = [f"host://?capacity=64MiB&frame_secret={SECRET}", redis]
    for connector, loaded in (
        (keyed, 0),
        (keyed, BLOCKS * 16),
        ([keyed[0] + "!", redis + "?mode=r"], 0),
        (["host://?capacity=64MiB", redis + "?mode=r"], 0),
    ):
        output = run(llama, connector)
        assert (output.loaded_tokens, list(output.token_ids)) == (loaded, oracle)


def test_salt_prefix_and_key_secret_keep_deployments_and_tenants_apart(
    llama: Any, redis: str, oracle: list[int]
) -> None:
    host = "host://?capacity=64MiB"
    assert run(llama, [host, redis], "one").loaded_tokens == 0
    assert run(llama, [host, redis], "one").loaded_tokens == BLOCKS * 16
    for connector, salt in (
        ([host, redis], "two"),
        ([host, redis], None),
        ([host, redis + "?prefix=other:"], "one"),
        ([host + "&key_secret=ours", redis], "one"),
    ):
        output = run(llama, connector, salt)
        assert (output.loaded_tokens, list(output.token_ids)) == (0, oracle)


def test_read_only_tier_is_not_written(llama: Any, redis: str) -> None:
    run(llama, ["host://?capacity=64MiB", redis + "?mode=r"])
    assert client(redis).dbsize() == 0
