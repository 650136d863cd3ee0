"""The disk store's holds and shared limit: who is kept from eviction, for how long, and what stays on the medium."""

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvconnect.options import ByteSize
from tests.store.test_disk import frame, key, open_store, read, used

BLOCK = 8192  # what a frame of these tests takes
CAPACITY = ByteSize(40 * BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def write(store: object, *numbers: int) -> list[bool]:
    return list(store.write([key(n) for n in numbers], [frame(n) for n in numbers]))  # type: ignore[attr-defined]


def records(path: Path) -> set[str]:
    return {p.name for p in (path / "holds").rglob("*") if p.is_file() and p.name != "lock"}


def holders(path: Path) -> list[Path]:
    return list((path / "holds").iterdir())


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_no_instance_evicts_what_another_holds(path: Path) -> None:
    """The held ones are the oldest; a smaller instance, opened later, writes ten times what fits."""
    holder = open_store(path, capacity=CAPACITY)
    write(holder, *range(20))
    for n in range(20):
        os.utime(path / "blocks" / f"{key(n)[32]:02x}" / key(n).hex(), ns=(n, n))
    assert list(holder.hold([key(n) for n in range(5)], 60.0)) == [True] * 5
    other = open_store(path, capacity=ByteSize(10 * BLOCK))
    assert used(path) == 10 * BLOCK
    assert all(write(other, *range(100, 200)))
    assert list(other.contains([key(n) for n in range(20)])) == [True] * 5 + [False] * 15
    assert used(path) <= 10 * BLOCK
    assert [read(other, n) for n in range(5)] == [bytes(frame(n)) for n in range(5)]
    holder.close()
    other.close()


def test_opening_with_less_room_than_is_held_keeps_what_is_held(path: Path) -> None:
    store = open_store(path)
    write(store, *range(8))
    store.hold([key(n) for n in range(4)], 60.0)
    store.close()
    small = open_store(path, capacity=ByteSize(2 * BLOCK))
    assert sorted(small.scan()) == sorted(key(n) for n in range(4))
    small.close()


def test_write_that_only_fits_by_evicting_what_is_held_is_declined_and_evicts_nothing(path: Path) -> None:
    store = open_store(path, capacity=CAPACITY)
    write(store, *range(39))
    store.hold([key(n) for n in range(36)], 60.0)
    assert list(store.write([key(99)], [frame(99, 5 * BLOCK)])) == [False]
    assert list(store.contains([key(n) for n in range(39)])) == [True] * 39
    assert write(store, *range(100, 120)) == [True] * 20  # what is not held makes room for small ones
    assert list(store.contains([key(n) for n in range(36)])) == [True] * 36
    assert used(path) <= CAPACITY
    store.close()


def test_little_that_is_not_held_is_used(path: Path) -> None:
    store = open_store(path, capacity=CAPACITY)
    write(store, *range(38))
    store.hold([key(n) for n in range(38)], 60.0)
    assert all(write(store, *range(100, 120)))
    assert list(store.contains([key(n) for n in range(38)])) == [True] * 38
    assert used(path) <= CAPACITY
    store.close()


def test_release_and_remove_make_room_at_once(path: Path) -> None:
    store = open_store(path, capacity=ByteSize(20 * BLOCK))
    numbers = range(20)
    write(store, *numbers)
    store.hold([key(n) for n in numbers], 60.0)
    assert write(store, 100, 101) == [False, False]
    store.release([key(0), key(1)])
    assert write(store, 100) == [True]
    store.hold([key(n) for n in (*numbers, 100)], 60.0)
    assert write(store, 101, 102) == [True, False]
    store.remove([key(5), key(6), key(101)])
    assert write(store, 102, 103, 104, 105) == [True] * 4  # into the room, then in place of one another
    assert not any(store.contains([key(0), key(1), key(5), key(6)]))
    store.close()


def test_holds_end_by_time_and_leave_nothing(path: Path) -> None:
    store = open_store(path, capacity=CAPACITY)
    write(store, *range(36))
    store.hold([key(n) for n in range(36)], 0.5)
    assert records(path) == {key(n).hex() for n in range(36)}
    other = open_store(path, capacity=CAPACITY)
    assert list(other.write([key(50)], [frame(50, 10 * BLOCK)])) == [False]
    store.close()
    until(lambda: list(other.write([key(50)], [frame(50, 10 * BLOCK)])) == [True])
    assert holders(path) == []
    other.close()


def test_holding_again_moves_the_end_of_ones_own_record(path: Path) -> None:
    store = open_store(path)
    write(store, 1)
    for ttl_s in (60.0, 600.0, 6.0):
        before = time.time()
        store.hold([key(1)], ttl_s)
        (record,) = (p for p in (path / "holds").rglob(key(1).hex()))
        assert before + ttl_s - 0.01 <= record.stat().st_mtime <= time.time() + ttl_s + 0.01
    store.hold([key(1)], float("inf"))
    assert record.stat().st_mtime > time.time() + 86400
    store.hold([key(1)], -5.0)
    assert list(store.held([key(1)])) == [False]
    store.close()


def test_hold_survives_closing_and_is_of_nobody_who_lives(path: Path) -> None:
    store = open_store(path)
    write(store, 1, 2, 3)
    store.hold([key(1), key(2)], 60.0)
    assert list(store.held([key(1), key(2), key(3)])) == [True, True, False]
    store.close()
    again = open_store(path, capacity=ByteSize(4 * BLOCK))
    assert list(again.held([key(1), key(2)])) == [False, False]
    write(again, *range(10, 20))
    assert list(again.contains([key(1), key(2), key(3)])) == [True, True, False]
    assert list(again.hold([key(1)], 60.0)) == [True]  # taken up
    assert list(again.held([key(1), key(2)])) == [True, False]
    again.remove([key(2)])
    assert list(again.contains([key(2)])) == [False]
    assert records(path) == {key(1).hex()}
    again.close()


def test_closing_without_holds_leaves_no_folder(path: Path) -> None:
    quiet, released = open_store(path), open_store(path)
    write(released, 1)
    assert holders(path) == [], "a folder comes with the first hold"
    assert list(released.hold([key(2)], 60.0)) == [False]
    assert holders(path) == []
    released.hold([key(1)], 60.0)
    released.release([key(1), key(2)])
    quiet.close()
    released.close()
    assert holders(path) == []


def test_litter_of_dead_holders_goes_at_the_next_start_and_that_of_the_living_stays(path: Path) -> None:
    living = open_store(path)
    write(living, 1)
    living.hold([key(1)], 0.0)
    dead = path / "holds" / "0123456789abcdef"
    dead.mkdir(mode=0o700)
    (dead / key(1).hex()).touch()
    half = path / "holds" / "fedcba9876543210"  # it died before it had a lock
    half.mkdir(mode=0o700)
    open_store(path).close()
    assert not dead.exists()
    assert not half.exists()
    assert len(holders(path)) == 1
    assert records(path) == set()
    living.hold([key(1)], 60.0)
    assert records(path) == {key(1).hex()}
    living.close()


def test_folder_of_an_older_version_is_fine(path: Path) -> None:
    """No folder for holds, and no third field."""
    store = open_store(path)
    write(store, 1)
    store.close()
    (path / "holds").rmdir()
    os.truncate(path / "usage", 16)
    store = open_store(path)
    assert list(store.held([key(1)])) == [False]
    store.remove([key(2)])
    assert list(store.hold([key(1)], 60.0)) == [True]
    assert list(store.held([key(1)])) == [True]
    store.close()


def test_folder_whose_making_was_interrupted_may_have_one_for_holds(path: Path) -> None:
    (path / "holds").mkdir(parents=True)
    open_store(path).close()


def test_holds_are_private(path: Path) -> None:
    store = open_store(path)
    write(store, 1)
    store.hold([key(1)], 60.0)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (path / "holds").rglob("*") if p.is_file()}
    assert modes == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in holders(path)} == {0o700}
    store.close()


def test_resize_evicts_the_least_recently_used_for_both_instances(path: Path) -> None:
    one, two = open_store(path, capacity=CAPACITY), open_store(path, capacity=ByteSize(30 * BLOCK))
    write(one, *range(20))
    for n in range(20):
        os.utime(path / "blocks" / f"{key(n)[32]:02x}" / key(n).hex(), ns=(n, n))
    two.hold([key(0)], 60.0)
    assert one.resize(10 * BLOCK) is True
    assert list(two.contains([key(n) for n in range(20)])) == [True] + [False] * 10 + [True] * 9
    for store in (two, one):
        assert all(write(store, *range(100, 140)))
        assert 9 * BLOCK <= used(path) <= 10 * BLOCK
    assert read(one, 0) == bytes(frame(0))
    assert two.resize(60 * BLOCK) is True  # more than either was configured with
    assert all(write(two, *range(200, 245)))
    assert sum(two.contains([key(n) for n in range(200, 245)])) == 45
    one.close()
    two.close()


def test_refused_resize_changes_nothing(path: Path) -> None:
    one, two = open_store(path, capacity=CAPACITY), open_store(path, capacity=CAPACITY)
    write(one, *range(30))
    one.hold([key(n) for n in range(12)], 60.0)
    assert two.resize(11 * BLOCK) is False
    assert sum(one.contains([key(n) for n in range(30)])) == 30
    assert all(write(two, *range(30, 38)))
    assert used(path) == 38 * BLOCK
    assert two.resize(12 * BLOCK) is True
    assert sorted(one.scan()) == sorted(key(n) for n in range(12))
    assert write(one, 50) == [False]
    assert two.resize(14 * BLOCK) is True
    assert write(one, 50, 51, 52) == [True] * 3, "it goes by the size of a moment ago"
    with pytest.raises(ValueError, match="-1 bytes"):
        one.resize(-1)
    one.close()
    two.close()


def test_resize_to_nothing_keeps_nothing(path: Path) -> None:
    store = open_store(path, capacity=CAPACITY)
    write(store, *range(5))
    assert store.resize(0) is True
    assert write(store, 9) == [False]
    assert used(path) == 0
    store.close()


def test_resize_ends_when_nobody_is_left(path: Path) -> None:
    one, two = open_store(path, capacity=CAPACITY), open_store(path, capacity=CAPACITY)
    one.resize(5 * BLOCK)
    one.close()
    one = open_store(path, capacity=CAPACITY)
    assert all(write(one, *range(20)))
    assert used(path) <= 5 * BLOCK, "two lives, and so does the limit"
    one.close()
    two.close()
    one = open_store(path, capacity=CAPACITY)
    assert all(write(one, *range(20)))
    assert used(path) == 20 * BLOCK
    one.close()


def test_frame_that_is_on_its_way_while_the_store_shrinks_keeps_the_new_limit(path: Path) -> None:
    """The resize comes while a write has its room, and its file is not published yet."""
    one, two = open_store(path, capacity=CAPACITY), open_store(path, capacity=CAPACITY)
    write(one, *range(10))
    write_file = one._write_file

    def shrink_first(path: str, block: memoryview) -> None:
        two.hold([key(0), key(1)], 60.0)
        assert two.resize(2 * BLOCK) is True
        write_file(path, block)

    one._write_file = shrink_first  # type: ignore[assignment,method-assign]  # no other way to be between two calls
    write(one, 50)
    assert used(path) == 2 * BLOCK
    assert sorted(two.scan()) == sorted([key(0), key(1)])
    with one._folder.locked():
        assert (one._folder.published, one._folder.on_their_way) == (2 * BLOCK, 0)
    one.close()
    two.close()


def test_hold_on_a_full_medium_is_declined(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that cannot be made is no hold. An error of the call stands in for a medium without inodes."""
    store = open_store(path)
    write(store, 1, 2)
    store.hold([key(1)], 60.0)
    opened = os.open

    def full(name: str, flags: int, mode: int = 0o777) -> int:
        if name.endswith(key(2).hex()) and flags & os.O_CREAT:
            raise OSError(28, "No space left on device")
        return opened(name, flags, mode)

    monkeypatch.setattr(os, "open", full)
    assert list(store.hold([key(1), key(2)], 60.0)) == [True, False]
    assert list(store.held([key(1), key(2)])) == [True, False]
    store.close()


def test_holder_whose_folder_was_removed_closes(path: Path) -> None:
    store = open_store(path)
    write(store, 1)
    store.hold([key(1)], 60.0)
    shutil.rmtree(path)
    assert list(store.held([key(1)])) == [False]
    store.release([key(1)])
    store.close()
