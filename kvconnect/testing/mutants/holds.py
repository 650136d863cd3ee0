"""Stores that hold and resize, right but for one mistake."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvconnect.protocol import BlockKey
from kvconnect.store import StoreCapabilities
from kvconnect.testing.mutants.base import mutant
from kvconnect.testing.mutants.stores import CappedFolderStore, FolderStore
from kvconnect.testing.store import StoreTests

__all__ = ["HoldingFolderStore", "ResizingFolderStore"]


# The leader holds on one thread while a worker evicts on another: a key must not go between the look and the record.
_EVICTION = threading.RLock()


class HoldingFolderStore(CappedFolderStore):
    """Keeps what is held when it makes room: a file for each hold, whose mtime is when it ends, beside its folder."""

    capabilities = StoreCapabilities(durable=True, shared=True, holds=True)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.holds = self.beside("holds")
        self.own = self.holds / uuid.uuid4().hex
        self.own.mkdir(parents=True)

    def beside(self, what: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{what}")

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        with _EVICTION:
            there = self.contains(keys)
            for key, found in zip(keys, there, strict=True):
                if found:
                    self.put(self.own / key.hex(), time.time() + ttl_s)
            return there

    def make_room(self, size: int) -> bool:
        with _EVICTION:
            return super().make_room(size)

    def put(self, record: Path, end: float) -> None:
        record.touch()
        os.utime(record, (end, end))

    def release(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            (self.own / key.hex()).unlink(missing_ok=True)

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return [any(self.in_force(record) for record in self.records(key.hex())) for key in keys]

    def records(self, name: str) -> list[Path]:
        return list(self.holds.glob(f"*/{name}"))

    def in_force(self, record: Path) -> bool:
        return record.stat().st_mtime > time.time()

    def may_go(self, path: Path) -> bool:
        return not any(self.in_force(record) for record in self.records(path.name))

    def remove(self, keys: Sequence[BlockKey]) -> None:
        super().remove(keys)
        for key in keys:
            for record in self.records(key.hex()):
                record.unlink()


class ResizingFolderStore(HoldingFolderStore):
    """Takes another capacity from a file beside its folder, which the first to open the folder removes."""

    capabilities = StoreCapabilities(durable=True, shared=True, holds=True, resizes=True)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.limit = self.beside("limit")
        self.users = os.open(self.beside("users"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.begin()
        fcntl.flock(self.users, fcntl.LOCK_SH)

    def begin(self) -> None:
        """Nobody else is there."""
        self.limit.unlink(missing_ok=True)

    def make_room(self, size: int) -> bool:
        if self.limit.exists():
            self.capacity = int(self.limit.read_text())
        return super().make_room(size)

    def resize(self, num_bytes: int) -> bool:
        if self.fits(num_bytes):
            self.limit.write_text(str(num_bytes))
            return self.make_room(0)
        return False

    def fits(self, num_bytes: int) -> bool:
        return sum(path.stat().st_size for path in self.files() if not self.may_go(path)) <= num_bytes

    def close(self) -> None:
        if self.users >= 0:
            os.close(self.users)
        self.users = -1


# -- holds -----------------------------------------------------------------------------------------------------------


@mutant(StoreTests.test_hold_says_which_keys_it_keeps, "hold of absent and present keys")
class HoldsWhatIsNotThere(HoldingFolderStore):
    """Says that it holds keys which it does not have."""

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        super().hold(keys, ttl_s)
        return [True] * len(keys)


@mutant(StoreTests.test_hold_says_which_keys_it_keeps, "held of the same keys to be .*; got")
class AnswersForTheHeld(HoldingFolderStore):
    """Answers for the keys that are held, and leaves out the others."""

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        there = super().held(keys)
        return there if not any(there) else [True for each in there if each]


@mutant(StoreTests.test_hold_says_which_keys_it_keeps, "after the second key was released.*; got .*True, False, True")
class NeverReleases(HoldingFolderStore):
    """Leaves the end of a hold to its time."""

    def release(self, keys: Sequence[BlockKey]) -> None:
        pass


@mutant(StoreTests.test_hold_says_which_keys_it_keeps, "after the second key was released.*; got .*False, False, False")
class ReleasesAll(HoldingFolderStore):
    """Ends every hold of its own, whatever the keys are."""

    def release(self, keys: Sequence[BlockKey]) -> None:
        for record in self.own.iterdir():
            record.unlink()


@mutant(StoreTests.test_hold_is_seen_by_others_and_is_ones_own, "held, asked of another instance")
class HoldsInItsMemory(HoldingFolderStore):
    """Knows its own holds only."""

    def records(self, name: str) -> list[Path]:
        return list(self.own.glob(name))


@mutant(StoreTests.test_hold_is_seen_by_others_and_is_ones_own, "after another instance released all")
class ReleasesForOthers(HoldingFolderStore):
    """Ends everybody's hold of a key that one of them releases."""

    def release(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            for record in self.records(key.hex()):
                record.unlink()


@mutant(StoreTests.test_hold_ends_after_its_time, "a process that dies releases nothing")
class HoldsForEver(HoldingFolderStore):
    """Waits for a release."""

    def in_force(self, record: Path) -> bool:
        return True


@mutant(StoreTests.test_hold_ends_after_its_time, "the last hold's time counts")
class HoldsFromTheFirstTime(HoldingFolderStore):
    """Does not begin a hold's time anew."""

    def put(self, record: Path, end: float) -> None:
        if not record.exists():
            super().put(record, end)


@mutant(StoreTests.test_hold_ends_after_its_time, "to be in force for its 1 s")
class HoldsForMilliseconds(HoldingFolderStore):
    """Takes seconds for milliseconds."""

    def put(self, record: Path, end: float) -> None:
        super().put(record, time.time() + (end - time.time()) / 1000)


@mutant(StoreTests.test_held_keys_stay, "although this instance has filled.*hold must keep a key from eviction")
class EvictsWhatIsHeld(HoldingFolderStore):
    """Says that it holds, and evicts all the same."""

    def may_go(self, path: Path) -> bool:
        return True


@mutant(StoreTests.test_held_keys_stay, "although another instance has filled.*hold must keep a key from eviction")
class EvictsWhatOthersHold(HoldingFolderStore):
    """Looks at its own holds when it makes room."""

    def may_go(self, path: Path) -> bool:
        return not (self.own / path.name).exists()


@mutant(StoreTests.test_removed_key_is_not_held, "contains after a held key was removed")
class KeepsWhatIsHeld(HoldingFolderStore):
    """Does not remove what is held."""

    def remove(self, keys: Sequence[BlockKey]) -> None:
        super().remove([key for key in keys if self.may_go(self.name(key))])


@mutant(StoreTests.test_removed_key_is_not_held, "held after a held key was removed")
class HoldsWhatIsGone(HoldingFolderStore):
    """Goes on to hold a key that was removed."""

    def remove(self, keys: Sequence[BlockKey]) -> None:
        FolderStore.remove(self, keys)


@mutant(StoreTests.test_removed_key_is_not_held, "held of a key that was written again")
class HoldsWhatComesBack(HoldingFolderStore):
    """Holds a key again that was held when it was removed, and is written again."""

    def remove(self, keys: Sequence[BlockKey]) -> None:
        FolderStore.remove(self, keys)

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return [held and there for held, there in zip(super().held(keys), self.contains(keys), strict=True)]


@mutant(StoreTests.test_undeclared_hold_is_refused, "hold to raise UnsupportedError")
class HoldsNothing(FolderStore):
    """Says that it holds, which it does not declare."""

    def hold(self, keys: Sequence[BlockKey], ttl_s: float) -> Sequence[bool]:
        return [True] * len(keys)


@mutant(StoreTests.test_undeclared_hold_is_refused, "release to raise UnsupportedError")
class ReleasesNothing(FolderStore):
    """Lets go of what it has never held."""

    def release(self, keys: Sequence[BlockKey]) -> None:
        pass


@mutant(StoreTests.test_undeclared_hold_is_refused, "held to raise UnsupportedError")
class KnowsOfNoHold(FolderStore):
    """Says that nothing is held, which it cannot know."""

    def held(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return [False] * len(keys)


# -- resize ----------------------------------------------------------------------------------------------------------


@mutant(
    StoreTests.test_resize_evicts_what_does_not_fit, "262144 bytes of them, when it has become smaller; got 20 frames"
)
class ShrinksLater(ResizingFolderStore):
    """Leaves what does not fit to the next write."""

    def resize(self, num_bytes: int) -> bool:
        self.limit.write_text(str(num_bytes))
        return self.fits(num_bytes)


@mutant(StoreTests.test_resize_evicts_what_does_not_fit, "when more is written; got")
class ShrinksOnce(ResizingFolderStore):
    """Evicts what does not fit, and forgets the new capacity."""

    def resize(self, num_bytes: int) -> bool:
        before, self.capacity = self.capacity, num_bytes
        self.make_room(0)
        self.capacity = before
        return True


@mutant(StoreTests.test_resize_evicts_what_does_not_fit, "a smaller store to keep what is held")
class DropsWhatIsHeldToShrink(ResizingFolderStore):
    """Evicts the oldest when it becomes smaller, held or not."""

    def resize(self, num_bytes: int) -> bool:
        shutil.rmtree(self.holds)
        self.own.mkdir(parents=True)
        return super().resize(num_bytes)


@mutant(StoreTests.test_resize_evicts_what_does_not_fit, "frames kept of 20, which fit again")
class NeverGrows(ResizingFolderStore):
    """Becomes smaller, and never larger again."""

    def resize(self, num_bytes: int) -> bool:
        return super().resize(min(num_bytes, int(self.limit.read_text()) if self.limit.exists() else num_bytes))


@mutant(StoreTests.test_resize_below_what_is_held_is_refused, "320,000 bytes held to be False; got True")
class AlwaysResizes(ResizingFolderStore):
    """Says that it has become smaller than what is held."""

    def fits(self, num_bytes: int) -> bool:
        return True

    def resize(self, num_bytes: int) -> bool:
        super().resize(num_bytes)
        return True


@mutant(StoreTests.test_resize_below_what_is_held_is_refused, "a refused resize to evict nothing")
class EvictsBeforeItRefuses(ResizingFolderStore):
    """Evicts what may go, and finds then that the rest is too much."""

    def fits(self, num_bytes: int) -> bool:
        before, self.capacity = self.capacity, num_bytes
        self.make_room(0)
        self.capacity = before
        return super().fits(num_bytes)


@mutant(StoreTests.test_resize_below_what_is_held_is_refused, "leave the capacity as it was")
class ShrinksAllTheSame(ResizingFolderStore):
    """Takes the new capacity for later writes, and says that it does not."""

    def resize(self, num_bytes: int) -> bool:
        return super().resize(num_bytes) or not self.limit.write_text(str(num_bytes))


@mutant(StoreTests.test_resize_is_for_everybody, "when an instance that was opened before writes")
class ResizesItself(ResizingFolderStore):
    """Keeps the new capacity in its memory."""

    def resize(self, num_bytes: int) -> bool:
        if not self.fits(num_bytes):
            return False
        self.capacity = num_bytes
        return self.make_room(0)


@mutant(StoreTests.test_resize_is_for_everybody, "when an instance that was opened after writes")
class BringsItsOwnCapacity(ResizingFolderStore):
    """Ends a resize when another instance is opened."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.begin()


@mutant(StoreTests.test_resize_ends_with_its_last_user, "by a new instance with capacity=1MiB to be 20")
class RemembersItsSize(ResizingFolderStore):
    """Goes on with the capacity that somebody gave it long ago."""

    def begin(self) -> None:
        pass


@mutant(StoreTests.test_undeclared_resize_is_refused, "resize to raise UnsupportedError")
class ResizesNothing(FolderStore):
    """Says that it has another capacity, and has none."""

    def resize(self, num_bytes: int) -> bool:
        return True
