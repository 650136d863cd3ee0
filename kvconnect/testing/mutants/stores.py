"""Stores that are right but for one mistake, and the right ones that they are made from.

`FolderStore` is the first of those; what scans, evicts or is called by several threads derives from it. Those that hold
and resize are in `holds`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import msgspec
import numpy as np

from kvconnect.options import Options
from kvconnect.protocol import BlockKey
from kvconnect.store import BlockStore, StoreCapabilities
from kvconnect.testing.faults import FaultTests
from kvconnect.testing.mutants.base import mutant
from kvconnect.testing.restart import RestartTests
from kvconnect.testing.store import StoreTests

__all__ = [
    "CappedFolderStore",
    "FolderStore",
    "KeepingFolderStore",
    "ScanningFolderStore",
    "ThreadedFolderStore",
]


class FolderOptions(Options, frozen=True):
    """Options of `FolderStore`."""

    path: str


class FolderStore(BlockStore):
    """One file a block, published by rename; the right one, from which the others differ in one thing."""

    Options: ClassVar[type[msgspec.Struct]] = FolderOptions
    capabilities: ClassVar[StoreCapabilities] = StoreCapabilities(durable=True, shared=True)

    def __init__(self, options: Any, context: Any) -> None:
        self.folder = Path(options.path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove the temporary files of processes that have died."""
        for path in self.folder.glob(".*"):
            if not Path("/proc", path.name.lstrip(".").split("-")[0]).exists():
                path.unlink(missing_ok=True)

    def name(self, key: BlockKey) -> Path:
        return self.folder / key.hex()

    def files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if not path.name.startswith(".")]

    def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        return [self.name(key).exists() for key in keys]

    def read(self, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> Sequence[int | None]:
        return [self.read_one(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        try:
            frame = self.name(key).read_bytes()
        except FileNotFoundError:
            return None
        return fill(buffer, frame)

    def write(self, keys: Sequence[BlockKey], frames: Sequence[memoryview]) -> Sequence[bool]:
        return [self.write_one(key, frame) for key, frame in zip(keys, frames, strict=True)]

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        temporary = self.folder / f".{os.getpid()}-{threading.get_ident()}"
        temporary.write_bytes(frame)
        temporary.replace(self.name(key))
        return True

    def remove(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self.name(key).unlink(missing_ok=True)

    def close(self) -> None:
        pass


def fill(buffer: memoryview, frame: bytes | memoryview) -> int | None:
    """Return what `BlockStore.read` does for a frame that was found."""
    if len(frame) > len(buffer):
        return None
    buffer[: len(frame)] = frame
    return len(frame)


class ScanningFolderStore(FolderStore):
    """Names its keys."""

    capabilities = StoreCapabilities(durable=True, shared=True, scans=True)

    def scan(self) -> Iterator[BlockKey]:
        return (BlockKey(bytes.fromhex(path.name)) for path in self.files())


class ThreadedFolderStore(FolderStore):
    """Takes four calls at once."""

    capabilities = StoreCapabilities(durable=True, shared=True, concurrency=4)


class KeepingFolderStore(FolderStore):
    """Leaves a frame that is there as it is."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        return self.name(key).exists() or super().write_one(key, frame)


class TellingFolderStore(FolderStore):
    """Tells of each frame as soon as it has read it."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            arrived(index, self.read_one(key, buffer))


class CapacityOptions(Options, frozen=True):
    """Options of `CappedFolderStore`."""

    path: str
    capacity: int = 1 << 30


class CappedFolderStore(FolderStore):
    """Makes room by removing its oldest files."""

    Options = CapacityOptions

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.capacity: int = options.capacity

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        return self.make_room(len(frame)) and super().write_one(key, frame)

    def make_room(self, size: int) -> bool:
        """Return whether `size` more bytes fit, now that what may go has gone."""
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.files())
        used = sum(each for _, each, _ in files)
        for _, each, path in files:
            if used + size > self.capacity and self.may_go(path):
                path.unlink()
                used -= each
        return used + size <= self.capacity

    def may_go(self, path: Path) -> bool:
        return True


# -- reading ---------------------------------------------------------------------------------------------------------


@mutant(StoreTests.test_read_gives_back_what_was_written, "70001 bytes.*got 65536 bytes")
class ReadsOnce(FolderStore):
    """Takes for the whole frame what a single call to read returns."""

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        frame_bytes = super().read_one(key, buffer)
        return None if frame_bytes is None else min(frame_bytes, 1 << 16)


@mutant(StoreTests.test_absent_key_is_a_miss, "FileNotFoundError")
class RaisesWhenAbsent(FolderStore):
    """Lets the error out when a key has no file."""

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        return fill(buffer, self.name(key).read_bytes())


@mutant(StoreTests.test_absent_key_is_a_miss, "read of an absent key to be None; got b''")
class FindsNothingInsteadOfAMiss(FolderStore):
    """Answers 0 bytes where there is no frame."""

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        return super().read_one(key, buffer) or 0


@mutant(StoreTests.test_results_are_parallel_to_the_keys, "read to be|its own key's frame")
class ReadsInItsOwnOrder(FolderStore):
    """Answers in the order of the medium."""

    def read(self, keys: Any, buffers: Any) -> Any:
        return [self.read_one(key, buffer) for key, buffer in sorted(zip(keys, buffers, strict=True))]


@mutant(StoreTests.test_results_are_parallel_to_the_keys, "contains to be")
class LeavesMissesOut(FolderStore):
    """Answers for the keys that are there, and leaves out the others."""

    def contains(self, keys: Any) -> Any:
        return [True for key in keys if self.name(key).exists()]


@mutant(StoreTests.test_each_frame_is_told_of_when_it_is_there, "to hold its frame when read_each tells")
class TellsBeforeItReads(TellingFolderStore):
    """Tells of a frame when it has found it, and reads it then."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            name = self.name(key)
            arrived(index, name.stat().st_size if name.exists() else None)
            self.read_one(key, buffer)


@mutant(StoreTests.test_each_frame_is_told_of_when_it_is_there, "misses too")
class TellsOfHitsAlone(TellingFolderStore):
    """Does not tell of misses."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            length = self.read_one(key, buffer)
            if length is not None:
                arrived(index, length)


@mutant(StoreTests.test_each_frame_is_told_of_when_it_is_there, "index from 0 to 10 once")
class TellsOfAKeyAgain(TellingFolderStore):
    """Tells again of a key that was asked for twice, by the index that it had first."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        for key, buffer in zip(keys, buffers, strict=True):
            arrived(list(keys).index(key), self.read_one(key, buffer))


@mutant(StoreTests.test_each_frame_is_told_of_when_it_is_there, "on the caller's thread")
class TellsFromAThread(TellingFolderStore):
    """Tells from the thread that reads."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        if keys:
            thread = threading.Thread(target=super().read_each, args=(keys, buffers, arrived))
            thread.start()
            thread.join()


@mutant(StoreTests.test_each_frame_is_told_of_when_it_is_there, "bytes written later")
class WritesToWhatItToldOf(TellingFolderStore):
    """Clears the buffers of the keys before, once it has read the last."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        super().read_each(keys, buffers, arrived)
        for buffer in buffers[:-1]:
            buffer[:] = bytes(len(buffer))


@mutant(StoreTests.test_what_the_told_raises_ends_the_call, "raise what arrived raised.*no error")
class KeepsWhatTheToldRaises(TellingFolderStore):
    """Takes for a miss what fails while it tells."""

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            with contextlib.suppress(Exception):
                arrived(index, self.read_one(key, buffer))


@mutant(StoreTests.test_subclass_that_changes_read_is_not_passed_by, "endless recursion")
class ReadsThroughWhatItTells(TellingFolderStore):
    """Calls in `read` whichever `read_each` there is."""

    def read(self, keys: Any, buffers: Any) -> Any:
        lengths: list[int | None] = [None] * len(keys)
        self.read_each(keys, buffers, lengths.__setitem__)
        return lengths

    def read_each(self, keys: Any, buffers: Any, arrived: Any) -> None:
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            arrived(index, self.read_one(key, buffer))


@mutant(StoreTests.test_frames_may_be_made_when_they_are_taken, "no attribute 'copy'")
class WantsAList(FolderStore):
    """Takes frames for a list."""

    def write(self, keys: Any, frames: Any) -> Any:
        return super().write(keys, frames.copy())


@mutant(StoreTests.test_frame_longer_than_its_buffer_is_a_miss, "5000 bytes into 4999 to be None")
class FillsWhatFits(FolderStore):
    """Cuts a frame that is longer than its buffer."""

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        try:
            frame = self.name(key).read_bytes()
        except FileNotFoundError:
            return None
        return fill(buffer, frame[: len(buffer)])


# -- writing ---------------------------------------------------------------------------------------------------------


@mutant(StoreTests.test_empty_lists_are_fine, r"write\(\[\], \[\]\) to return \[\]; got None")
class AnswersNothing(FolderStore):
    """Forgets to say what it kept."""

    def write(self, keys: Any, frames: Any) -> Any:
        super().write(keys, frames)


@mutant(StoreTests.test_empty_lists_are_fine, "ValueError.*empty")
class NeedsAKey(FolderStore):
    """Takes the first of the keys, whether there is one or not."""

    def contains(self, keys: Any) -> Any:
        assert len(max(keys)) < 100
        return super().contains(keys)


@mutant(StoreTests.test_memory_is_the_callers_again_when_a_call_returns, "kept the caller's memory")
class KeepsTheCallersMemory(FolderStore):
    """Keeps the frames that it was given instead of copies."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.kept: dict[BlockKey, memoryview] = {}

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        self.kept[key] = frame
        return super().write_one(key, frame)

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        return fill(buffer, self.kept[key]) if key in self.kept else super().read_one(key, buffer)


@mutant(StoreTests.test_memory_that_was_attached_and_other_memory_are_alike, "the frame in a buffer outside of it")
class FillsOnlyTheArena(FolderStore):
    """What it reads goes into the attached memory, and nowhere if the buffer lies elsewhere."""

    arena = memoryview(b"")

    def attach(self, memory: memoryview) -> None:
        self.arena = memory

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        start = np.frombuffer(self.arena, np.uint8).ctypes.data
        inside = start <= np.frombuffer(buffer, np.uint8).ctypes.data < start + len(self.arena)
        return super().read_one(key, buffer if inside or not len(self.arena) else memoryview(bytearray(buffer)))


@mutant(StoreTests.test_memory_that_was_attached_and_other_memory_are_alike, "as it was behind the frame")
class FillsWholeSlots(FolderStore):
    """It reads whole slots of the arena: what lies behind a frame is overwritten."""

    arena = memoryview(b"")

    def attach(self, memory: memoryview) -> None:
        self.arena = memory

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        length = super().read_one(key, buffer)
        if length is not None and len(self.arena):
            buffer[length:] = bytes(len(buffer) - length)
        return length


@mutant(StoreTests.test_frames_and_keys_are_not_changed, "the list of keys")
class EatsTheList(FolderStore):
    """Takes the keys out of the caller's list as it goes."""

    def write(self, keys: Any, frames: Any) -> Any:
        return [self.write_one(keys.pop(0), frame) for frame in frames]


@mutant(StoreTests.test_frames_and_keys_are_not_changed, "frames as they were given; got changed ones")
class ScramblesInPlace(FolderStore):
    """Encrypts frames where they lie."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        frame[:] = bytes(byte ^ 0x5C for byte in frame)
        return super().write_one(key, frame)

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        length = super().read_one(key, buffer)
        if length is not None:
            buffer[:length] = bytes(byte ^ 0x5C for byte in buffer[:length])
        return length


@mutant(StoreTests.test_keys_are_any_bytes_and_never_mixed_up, "under key")
class ShortensKeys(FolderStore):
    """Names files by a part of the key."""

    def name(self, key: BlockKey) -> Path:
        return self.folder / key[:64].hex()


@mutant(StoreTests.test_keys_are_any_bytes_and_never_mixed_up, "ValueError|FileNotFound|under key")
class TakesKeysForText(FolderStore):
    """Names files by the key's bytes as they are."""

    def name(self, key: BlockKey) -> Path:
        return self.folder / key.decode("latin-1")


@mutant(StoreTests.test_writing_a_present_key_leaves_one_whole_frame, "the old frame or the new one")
class LeavesTheOldTail(FolderStore):
    """Writes over a file that is there without cutting it."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        file = os.open(self.name(key), os.O_RDWR | os.O_CREAT, 0o600)
        os.write(file, frame)
        os.close(file)
        return True


@mutant(StoreTests.test_removed_key_is_a_miss, "FileNotFoundError")
class RemovesWhatIsThere(FolderStore):
    """Cannot remove a key that is not there."""

    def remove(self, keys: Any) -> None:
        for key in keys:
            self.name(key).unlink()


@mutant(StoreTests.test_removed_key_is_a_miss, "read of what was written again")
class RemembersWhatIsGone(FolderStore):
    """Marks keys as removed, for ever."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.gone: set[BlockKey] = set()

    def remove(self, keys: Any) -> None:
        self.gone.update(keys)
        super().remove(keys)

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        return None if key in self.gone else super().read_one(key, buffer)


# -- life ------------------------------------------------------------------------------------------------------------


@mutant(StoreTests.test_closing_twice_is_fine, "ValueError: the store is closed")
class ClosesOnce(FolderStore):
    """Complains when it is closed again."""

    closes = 0

    def close(self) -> None:
        self.closes += 1
        if self.closes == 2:  # what tidies up behind the test may close it once more
            raise ValueError("the store is closed")


@mutant(StoreTests.test_another_instance_reads_what_was_confirmed, "another instance, opened before.*3 misses of 3")
class KnowsWhatWasThere(FolderStore):
    """Lists its files when it is opened, and knows of no others but its own; says that it is shared."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.known = {path.name for path in self.files()}

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        self.known.add(key.hex())
        return super().write_one(key, frame)

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        return super().read_one(key, buffer) if key.hex() in self.known else None


@mutant(StoreTests.test_what_was_confirmed_is_there_after_closing, "after close and a new instance; got 3 misses of 3")
class ForgetsWhenClosed(FolderStore):
    """Removes its files when it is closed; says that it is durable."""

    def close(self) -> None:
        for path in self.files():
            path.unlink()


@mutant(StoreTests.test_what_was_confirmed_is_there_after_closing, "after close and a new instance")
@mutant(RestartTests.test_another_process_finds_what_this_one_saved, "tokens that it loaded to be 120; got 0")
class DropsItsBuffer(FolderStore):
    """Gathers frames to write them later, and does not when it is closed."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.later: dict[BlockKey, bytes] = {}

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        self.later[key] = bytes(frame)
        if len(self.later) >= 64:
            for each, kept in self.later.items():
                super().write_one(each, memoryview(kept))
            self.later.clear()
        return True

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        return fill(buffer, self.later[key]) if key in self.later else super().read_one(key, buffer)


@mutant(
    StoreTests.test_unknown_option_is_refused, "to be frozen and to refuse unknown fields.*forbid_unknown_fields=False"
)
class TakesAnyOption(FolderStore):
    """Takes options that it does not know."""

    class Options(Options, frozen=True, forbid_unknown_fields=False):
        path: str


# -- together --------------------------------------------------------------------------------------------------------


@mutant(StoreTests.test_readers_see_whole_frames_while_others_write, "torn frames.*publish a frame in one step")
@mutant(FaultTests.test_full_disk_is_survived, "publish a frame in one step")
@mutant(RestartTests.test_write_that_is_cut_off_leaves_whole_blocks_or_none, "publish a frame in one step")
class PublishesBeforeItIsWhole(FolderStore):
    """Writes a frame under its own name, where others find it before it is whole."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        with open(self.name(key), "wb", buffering=0) as file:
            half = len(frame) // 2
            file.write(frame[:half])
            time.sleep(0.01)
            while half < len(frame):
                half += file.write(frame[half:])
        return True


@mutant(StoreTests.test_declared_concurrency_holds, "FileNotFoundError|each thread to read what it wrote")
class OneNameForAllThreads(ThreadedFolderStore):
    """Writes to one temporary file, whichever thread calls."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        temporary = self.folder / f".{os.getpid()}-temporary"
        temporary.write_bytes(frame)
        time.sleep(0.001)
        temporary.replace(self.name(key))
        return True


@mutant(StoreTests.test_scan_names_every_key_once, "keys that scan yields twice to be 0; got")
class ScansTwice(ScanningFolderStore):
    """Names keys of the old folder and of the new one, which is the same."""

    def scan(self) -> Iterator[BlockKey]:
        yield from super().scan()
        yield from super().scan()


@mutant(StoreTests.test_scan_names_every_key_once, "removed keys that scan yields to be 0; got 3")
class ScansWhatIsGone(ScanningFolderStore):
    """Names keys that were removed."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.written = {BlockKey(bytes.fromhex(path.name)) for path in self.files()}

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        self.written.add(key)
        return super().write_one(key, frame)

    def scan(self) -> Iterator[BlockKey]:
        yield from self.written


@mutant(StoreTests.test_scan_names_every_key_once, "written keys that scan lacks to be 0; got 9")
class ScansItsOwn(ScanningFolderStore):
    """Names the keys that were there when it was opened."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.there = list(super().scan())

    def scan(self) -> Iterator[BlockKey]:
        yield from self.there


@mutant(StoreTests.test_undeclared_scan_is_refused, "scan to raise UnsupportedError")
class ScansNothing(FolderStore):
    """Names no key instead of saying that it cannot."""

    def scan(self) -> Iterator[BlockKey]:
        return iter(())


@mutant(StoreTests.test_capacity_is_kept, "at most 1 MiB.*evict or decline")
class IgnoresItsCapacity(CappedFolderStore):
    """Takes an option `capacity`, and more bytes than that."""

    def make_room(self, size: int) -> bool:
        return True


@mutant(StoreTests.test_capacity_is_kept, "some frames to be kept")
class EvictsWhatItWrote(CappedFolderStore):
    """Makes room by removing everything, once it has written."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        written = super().write_one(key, frame)
        for path in self.files():
            path.unlink()
        return written


# -- other processes, and what they leave ------------------------------------------------------------------------------


@mutant(StoreTests.test_read_gives_back_what_was_written, "no pickle.*pickle.loads")
@mutant(FaultTests.test_nothing_is_unpickled, "no pickle.*pickle.loads")
class Unpickles(FolderStore):
    """Keeps frames as pickles."""

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        return super().write_one(key, memoryview(pickle.dumps(bytes(frame))))

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return fill(buffer, pickle.loads(self.name(key).read_bytes()))  # noqa: S301  # that is its mistake
        return None


@mutant(RestartTests.test_another_process_finds_what_this_one_saved, "tokens that it loaded to be 120; got 0")
class NamesFilesByPythonsHash(FolderStore):
    """Names files by Python's `hash`, which begins anew in each process."""

    def name(self, key: BlockKey) -> Path:
        return self.folder / f"{hash(bytes(key)):x}"


@mutant(RestartTests.test_this_process_finds_what_another_saved, "tokens loaded of what it saved to be 120; got 0")
class KeepsItInOneProcess(FolderStore):
    """Keeps frames in memory that its instances share, and says that it is durable."""

    frames: ClassVar[dict[Path, bytes]] = {}

    def contains(self, keys: Any) -> Any:
        return [self.name(key) in self.frames for key in keys]

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        frame = self.frames.get(self.name(key))
        return None if frame is None else fill(buffer, frame)

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        self.frames[self.name(key)] = bytes(frame)
        return True


@mutant(RestartTests.test_killed_process_leaves_whole_blocks_or_none, "a frame of 0 bytes|publish a frame in one step")
class LeavesItToTheBuffer(FolderStore):
    """Says that a frame is written while it lies in a buffer of the process."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.opened: list[IO[bytes]] = []

    def write_one(self, key: BlockKey, frame: memoryview) -> bool:
        if len(self.opened) >= 64:
            self.opened.pop(0).close()
        self.opened.append(open(self.name(key), "wb"))  # noqa: SIM115  # that is its mistake
        self.opened[-1].write(frame)
        return True

    def read_one(self, key: BlockKey, buffer: memoryview) -> int | None:
        for file in self.opened:
            file.flush()
        return super().read_one(key, buffer)

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()


@mutant(RestartTests.test_crashes_leave_no_litter, "files.*remove what crashed processes left")
class LeavesTemporaryFiles(FolderStore):
    """Leaves the temporary files of processes that have died where they are."""

    def clean(self) -> None:
        pass
