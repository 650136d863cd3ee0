"""The store's own test: bytes in, the same bytes out, also for another instance, and the way through an engine."""

import os

import pytest
from kvconnect_sqlite import SQLiteOptions, SQLiteStore

from kvconnect import LLM, SamplingParams, StoreContext
from kvconnect.registry import load_registry

CONTEXT = StoreContext(name="sqlite", timeout_s=5.0)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "kv.sqlite")


@pytest.fixture
def store(path):
    store = SQLiteStore(SQLiteOptions(path=path), CONTEXT)
    yield store
    store.close()


def test_entry_point_registers_the_store():
    assert load_registry().load("sqlite") is SQLiteStore


def test_another_instance_reads_what_was_written(store, path):
    keys = [os.urandom(72) for _ in range(3)]
    frames = [memoryview(os.urandom(1000 + i)) for i in range(3)]
    assert store.write(keys, frames) == [True] * 3
    other = SQLiteStore(SQLiteOptions(path=path), CONTEXT)
    buffers = [memoryview(bytearray(2000)) for _ in keys]
    assert other.contains([*keys, os.urandom(72)]) == [True, True, True, False]
    assert other.read(keys, buffers) == [1000, 1001, 1002]
    assert [bytes(buffer[:length]) for buffer, length in zip(buffers, (1000, 1001, 1002), strict=True)] == [
        bytes(frame) for frame in frames
    ]
    other.close()


def test_absent_removed_and_oversized_blocks_miss(store):
    key, absent = os.urandom(72), os.urandom(72)
    store.write([key], [memoryview(b"x" * 100)])
    assert store.read([absent, key], [memoryview(bytearray(200)), memoryview(bytearray(99))]) == [None, None]
    store.remove([key, absent])
    assert store.contains([key]) == [False]


def test_second_engine_loads_what_the_first_computed(path):
    prompt = list(range(1, 101))
    params = SamplingParams(max_tokens=4)
    with LLM(connector=f"sqlite://{path}") as cold:
        (first,) = cold.generate([prompt], params)
    with LLM(connector=f"sqlite://{path}") as warm:
        (second,) = warm.generate([prompt], params)
    assert (first.loaded_tokens, second.loaded_tokens) == (0, 96)
    assert first.token_ids == second.token_ids
