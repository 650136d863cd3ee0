"""The disk store: whole files or none, one folder for many processes, a bound that is kept, a folder of its own."""

import multiprocessing
import os
import random
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvconnect_disk import DiskOptions, DiskStore

from kvconnect.errors import ConfigError
from kvconnect.options import ByteSize
from kvconnect.protocol import BlockKey
from kvconnect.store import StoreContext

CONTEXT = StoreContext(name="disk", timeout_s=5.0)


def key(number: int) -> BlockKey:
    return BlockKey(random.Random(number).randbytes(72))


def frame(number: int, size: int = 5000) -> memoryview:
    return memoryview(random.Random(-number - 1).randbytes(size))


def open_store(path: Path, **options: Any) -> DiskStore:
    return DiskStore(DiskOptions(path=os.fspath(path), **options), CONTEXT)


def read(store: DiskStore, number: int, size: int = 8192) -> bytes | None:
    buffer = memoryview(bytearray(size))
    (length,) = store.read([key(number)], [buffer])
    return None if length is None else bytes(buffer[:length])


def used(path: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in (path / "blocks").rglob("*") if p.is_file())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def store(path: Path) -> Iterator[DiskStore]:
    opened = open_store(path)
    yield opened
    opened.close()


def test_blocks_survive_closing_and_are_seen_by_others(store: DiskStore, path: Path) -> None:
    numbers = range(10)
    assert list(store.write([key(n) for n in numbers], [frame(n, 100 * n) for n in numbers])) == [True] * 10
    other = open_store(path)
    store.close()
    assert list(other.contains([key(n) for n in range(12)])) == [True] * 10 + [False] * 2
    assert [read(other, n) for n in numbers] == [bytes(frame(n, 100 * n)) for n in numbers]
    assert sorted(other.scan()) == sorted(key(n) for n in numbers)
    other.close()
    other.close()


def test_frame_longer_than_its_buffer_is_a_miss(store: DiskStore) -> None:
    store.write([key(1)], [frame(1)])
    assert read(store, 1, size=4999) is None
    assert read(store, 1, size=5000) == bytes(frame(1))


def test_replacing_and_removing(store: DiskStore) -> None:
    store.write([key(1)], [frame(1)])
    store.write([key(1)], [frame(2, 777)])
    assert read(store, 1) == bytes(frame(2, 777))
    store.remove([key(1), key(2)])
    assert list(store.contains([key(1)])) == [False]


def test_folder_and_files_are_private(store: DiskStore, path: Path) -> None:
    store.write([key(1)], [frame(1)])
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [path, *path.rglob("*")]}
    assert {mode for p, mode in modes.items() if p.is_dir()} == {0o700}
    assert {mode for p, mode in modes.items() if p.is_file()} == {0o600}


def test_capacity_is_kept_and_the_least_recently_read_goes_first(path: Path) -> None:
    store = open_store(path, capacity=ByteSize(40 * 8192))
    for n in range(39):
        assert list(store.write([key(n)], [frame(n)])) == [True]
        os.utime(path / "blocks" / f"{key(n)[32]:02x}" / key(n).hex(), ns=(n, n))
    assert read(store, 0) is not None  # touched: the most recently used now
    for n in range(39, 60):
        assert list(store.write([key(n)], [frame(n)])) == [True]
        assert used(path) <= 40 * 8192
    assert read(store, 0) is not None
    assert list(store.contains([key(1), key(2)])) == [False, False]
    assert list(store.write([key(99)], [frame(99, 400_000)])) == [False]
    store.close()


def test_smaller_capacity_is_kept_from_the_start(path: Path) -> None:
    store = open_store(path)
    store.write([key(n) for n in range(20)], [frame(n) for n in range(20)])
    store.close()
    store = open_store(path, capacity=ByteSize(5 * 8192))
    assert 0 < used(path) <= 5 * 8192
    store.close()


def _fill(path: Path, seed: int, capacity: int) -> None:
    store = open_store(path, capacity=ByteSize(capacity))
    for n in range(seed * 1000, seed * 1000 + 150):
        store.write([key(n)], [frame(n)])
    store.close()


def test_two_processes_keep_one_bound_together(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    capacity = 50 * 8192
    processes = [context.Process(target=_fill, args=(path, seed, capacity)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert used(path) <= capacity
    survivor = open_store(path)
    for found in survivor.scan():
        assert bytes(found) in {key(n) for seed in (1, 2) for n in range(seed * 1000, seed * 1000 + 150)}
    survivor.close()


def test_threads_share_one_store(store: DiskStore) -> None:
    def work(start: int) -> None:
        for n in range(start, start + 50):
            assert list(store.write([key(n)], [frame(n)])) == [True]
            assert read(store, n) == bytes(frame(n))

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 25, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(read(store, n) == bytes(frame(n)) for n in (*range(75), *range(100, 150)))


def test_litter_of_the_dead_goes_and_that_of_the_living_stays(path: Path) -> None:
    living = open_store(path)
    dead = path / "tmp" / "0123456789abcdef"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "7").write_bytes(b"half a block")
    newcomer = open_store(path)
    assert not dead.exists()
    assert len(list((path / "tmp").iterdir())) == 2
    assert list(living.write([key(1)], [frame(1)])) == [True]
    living.close()
    newcomer.close()
    assert list((path / "tmp").iterdir()) == []


def _book(path: Path, ready: Any) -> None:
    store = open_store(path)
    with store._folder.locked():
        store._folder.book(1 << 20)
    ready.set()
    threading.Event().wait()


def test_room_booked_by_a_killed_process_is_free_again_while_others_live(path: Path) -> None:
    capacity = ByteSize(2 << 20)
    living = open_store(path, capacity=capacity)
    living.write([key(1)], [frame(1)])
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        ready = context.Event()
        process = context.Process(target=_book, args=(path, ready))
        process.start()
        assert ready.wait(30)
        process.kill()
        process.join()
    assert list(living.write([key(2)], [frame(2, 1 << 20)])) == [True]
    assert list(living.contains([key(1), key(2)])) == [True, True]
    with living._folder.locked():
        assert living._folder.on_their_way == 0
    living.close()


def test_too_much_on_its_way_declines_instead_of_evicting_everything(path: Path) -> None:
    store = open_store(path, capacity=ByteSize(1 << 20))
    store.write([key(1)], [frame(1)])
    with store._folder.locked():
        store._folder.book(1 << 20)
    assert list(store.write([key(2)], [frame(2)])) == [False]
    assert list(store.contains([key(1)])) == [True]
    store.close()


def _open_and_close(path: Path) -> None:
    for _ in range(150):
        open_store(path).close()


def test_processes_come_and_go_without_hurting_one_another(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_open_and_close, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize(
    "marker",
    [
        '{"format":"kvconnect-disk","version":2}',
        '{"format":"other","version":1}',
        "{torn",
        '{"format":"kvconnect-disk"}',
    ],
)
def test_unknown_format_is_refused_and_nothing_is_touched(path: Path, marker: str) -> None:
    store = open_store(path)
    store.write([key(1)], [frame(1)])
    store.close()
    (path / "kvconnect-disk.json").write_text(marker)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="nothing was touched"):
        open_store(path)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before


def test_folder_with_other_files_is_refused(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="folder of its own"):
        open_store(path)
    assert (path / "thesis.tex").read_text() == "years of work"


def test_folder_whose_making_was_interrupted_is_made_anew(path: Path) -> None:
    path.mkdir()
    (path / "lock").touch()
    (path / ".marker").write_text("{")
    store = open_store(path)
    assert list(store.write([key(1)], [frame(1)])) == [True]
    store.close()


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="disk store cannot use"):
        open_store(tmp_path / "file")


def test_name_taken_by_a_folder_is_declined_and_misses_alone(store: DiskStore, path: Path) -> None:
    (path / "blocks" / f"{key(1)[32]:02x}" / key(1).hex()).mkdir()
    assert list(store.write([key(1), key(2)], [frame(1), frame(2)])) == [False, True]
    assert list(store.contains([key(1), key(2)])) == [False, True]
    assert read(store, 1) is None
    store.remove([key(1)])
    assert read(store, 2) == bytes(frame(2))


def test_full_medium_declines_and_recovers(tmp_path: Path) -> None:
    """A quota of the process on file size stands in for a full medium: the write fails half-way in the same call."""
    store = open_store(tmp_path / "kv")
    store._write_file = _no_space  # type: ignore[method-assign]  # no small file system can be mounted everywhere
    assert list(store.write([key(1)], [frame(1)])) == [False]
    del store._write_file
    assert list(store.contains([key(1)])) == [False]
    assert list(store.write([key(1)], [frame(1)])) == [True]
    with store._folder.locked():
        assert (store._folder.published, store._folder.on_their_way) == (used(tmp_path / "kv"), 0)
    store.close()


def _no_space(path: str, frame: memoryview) -> None:
    Path(path).write_bytes(frame[:100])
    raise OSError(28, "No space left on device")


def test_synchronous_store_writes_the_same(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv", sync=True)
    assert list(store.write([key(1)], [frame(1)])) == [True]
    assert read(store, 1) == bytes(frame(1))
    store.close()
