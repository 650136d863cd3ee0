"""Whatever happens to stored files, a warm process answers with the same tokens and counts what it could not use."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvconnect import LLM, SamplingParams
from tests.conftest import Reference, make_model

PROMPT = list(range(1, 67))
BLOCKS = 8  # full blocks of eight tokens that a warm run can load
PARAMS = SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A folder that a cold process filled, a plain tier and a packed one."""
    root = tmp_path_factory.mktemp("pristine")
    for codec in ("none", "zstd"):
        run(model, root / codec, codec)
    return root


@pytest.fixture
def expected(references: dict[str, Reference]) -> list[int]:
    return references["llama"](PROMPT, 4)


@pytest.fixture(params=["none", "zstd"])
def folder(request: pytest.FixtureRequest, pristine: Path, tmp_path: Path) -> tuple[Path, str]:
    shutil.copytree(pristine / request.param, tmp_path / "kv")
    return tmp_path / "kv", request.param


def run(model: Any, path: Path, codec: str) -> tuple[list[int], int, int]:
    """Run one engine on the folder; return its tokens, what it loaded, and how many misses it counted."""
    connector = ["host://?capacity=1MiB", f"disk://{path}?codec={codec}&capacity=64MiB"]
    with LLM(model, connector, block_size=8, kv_cache_bytes="4MiB") as llm:
        (output,) = llm.generate([PROMPT], PARAMS)
        llm.close()
        stats = llm.get_stats()["leader"]
    assert stats["arena"]["claimed"] == stats["arena"]["quarantined"] == 0
    return output.token_ids, output.loaded_tokens, stats["promote_failures"] + stats["lookup_misses"]


def files(path: Path) -> list[Path]:
    return sorted(p for p in (path / "blocks").rglob("*") if p.is_file())


def test_untouched_files_are_all_loaded(folder: tuple[Path, str], model: Any, expected: list[int]) -> None:
    assert len(files(folder[0])) == BLOCKS
    assert run(model, *folder) == (expected, BLOCKS * 8, 0)


@pytest.mark.parametrize("part", range(4))
def test_one_flipped_bit_anywhere_is_a_counted_miss(
    folder: tuple[Path, str], model: Any, expected: list[int], part: int
) -> None:
    """50 random places for each part and codec: 200 a codec. The block is computed and saved again, whole."""
    rng = random.Random(1000 + part)
    path = folder[0]
    before = {file: file.read_bytes() for file in files(path)}
    for _ in range(50):
        file = rng.choice(list(before))
        data = bytearray(before[file])
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        tokens, loaded, misses = run(model, *folder)
        assert tokens == expected, (file, bit)
        assert loaded < BLOCKS * 8, (file, bit)
        assert misses > 0, (file, bit)
        assert {file: file.read_bytes() for file in files(path)} == before, "the bad block was not replaced"


def truncate(file: Path, others: list[Path]) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, others: list[Path]) -> None:
    os.truncate(file, 0)


def lengthen(file: Path, others: list[Path]) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0" * 7)


def foreign(file: Path, others: list[Path]) -> None:
    shutil.copyfile(others[0], file)


def directory(file: Path, others: list[Path]) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").touch()


def gone(file: Path, others: list[Path]) -> None:
    file.unlink()


def loop(file: Path, others: list[Path]) -> None:
    """A link to itself: opening it fails with ELOOP, for root too."""
    file.unlink()
    file.symlink_to(file)


def unreadable(file: Path, others: list[Path]) -> None:
    """A file whose open succeeds and whose read fails, for root too: the kernel answers EIO."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("damage", [truncate, empty, lengthen, foreign, directory, gone, loop, unreadable])
def test_damaged_file_is_a_counted_miss(folder: tuple[Path, str], model: Any, expected: list[int], damage: Any) -> None:
    for number in (0, BLOCKS // 2, BLOCKS - 1):
        found = files(folder[0])
        damage(found[number], [file for file in found if file != found[number]])
        tokens, loaded, misses = run(model, *folder)
        assert tokens == expected
        assert loaded < BLOCKS * 8
        assert misses > 0
        if damage is directory:
            break  # it keeps its name, so that block is never stored again; the rest of the test would see it twice
        assert len(files(folder[0])) == BLOCKS


def test_every_file_damaged_at_once(folder: tuple[Path, str], model: Any, expected: list[int]) -> None:
    rng = random.Random(5)
    for file in files(folder[0]):
        file.write_bytes(rng.randbytes(rng.randrange(5000)))
    assert run(model, *folder)[:2] == (expected, 0)
    assert run(model, *folder)[:2] == (expected, BLOCKS * 8)
