"""Bytes under keys: what a `BlockStore` promises. Needs no tensors and no engine."""

from __future__ import annotations

import contextlib
import mmap
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvconnect.errors import ConfigError
from kvconnect.options import convert_options
from kvconnect.protocol.keys import KEY_BYTES, BlockKey
from kvconnect.store import BlockStore, StoreCapabilities
from kvconnect.testing.kit import Kit
from kvconnect.testing.promise import must, must_equal, must_refuse, needs, not_shown
from kvconnect.testing.target import Target

__all__ = ["StoreTests"]

_CAPACITY = 1 << 20  # of a store whose limit is looked at
_LARGE = 40_000  # bytes of a frame there


def make_keys(rng: random.Random, count: int) -> list[BlockKey]:
    """Return keys that nobody else has."""
    return [BlockKey(rng.randbytes(KEY_BYTES)) for _ in range(count)]


def read_one(store: BlockStore, key: BlockKey, size: int) -> bytes | None:
    """Read one key into a fresh buffer of `size` bytes; None for a miss."""
    memory = bytearray(b"\xa5" * size)
    (length,) = store.read([key], [memoryview(memory)])
    if length is None:
        return None
    must(
        isinstance(length, int) and 0 <= length <= size,
        expected=f"the number of bytes filled, at most {size}, or None",
        got=length,
    )
    return bytes(memory[:length])


def write_all(store: BlockStore, keys: Sequence[BlockKey], frames: Sequence[bytes]) -> None:
    """Write frames that a store with room has no reason to decline."""
    taken = store.write(keys, [memoryview(frame) for frame in frames])
    must(
        list(taken) == [True] * len(keys),
        expected="write to keep every frame: the store is new and has room",
        got=list(taken),
    )


class StoreTests(Kit):
    """The promises of `kvconnect.BlockStore`."""

    @pytest.fixture
    def store(self, target: Target) -> Iterator[BlockStore]:
        """One open instance of the store under test."""
        if target.store is None:
            not_shown(f"{target.name} has no store of its own")
        opened = target.open_store()
        yield opened
        opened.close()

    @pytest.fixture
    def capabilities(self, target: Target, store: BlockStore) -> StoreCapabilities:
        """What the store declares."""
        return target.store_capabilities

    def test_read_gives_back_what_was_written(self, store: BlockStore, rng: random.Random) -> None:
        """A frame comes back byte for byte, whatever its length."""
        lengths = [1, 255, 256, 4095, 4096, 4097, 70_001, 1 << 20]
        keys = make_keys(rng, len(lengths))
        frames = [rng.randbytes(length) for length in lengths]
        write_all(store, keys, frames)
        for key, frame in zip(keys, frames, strict=True):
            for room in (len(frame), len(frame) + 1000):
                found = read_one(store, key, room)
                must(
                    found == frame,
                    expected=f"the {len(frame)} bytes that were written, in a buffer of {room}",
                    got="a miss" if found is None else _difference(found, frame),
                )

    def test_absent_key_is_a_miss(self, store: BlockStore, rng: random.Random) -> None:
        """A key that was never written is None to `read` and False to `contains`."""
        (key,) = make_keys(rng, 1)
        must_equal("read of an absent key", read_one(store, key, 64), None)
        must_equal("contains of an absent key", [bool(there) for there in store.contains([key])], [False])

    def test_results_are_parallel_to_the_keys(self, store: BlockStore, rng: random.Random) -> None:
        """Answers stand in the order of the keys, one each, with misses among them and keys that come twice."""
        keys = make_keys(rng, 8)
        frames = [rng.randbytes(100 + number) for number in range(8)]
        write_all(store, keys[::2], frames[::2])
        asked = [7, 0, 3, 4, 2, 1, 6, 5, 0, 0, 7]
        answers = list(store.contains([keys[i] for i in asked]))
        must_equal("contains", [bool(answer) for answer in answers], [i % 2 == 0 for i in asked])
        buffers = [bytearray(200) for _ in asked]
        lengths = list(store.read([keys[i] for i in asked], [memoryview(buffer) for buffer in buffers]))
        must_equal("read", lengths, [len(frames[i]) if i % 2 == 0 else None for i in asked])
        for i, buffer, length in zip(asked, buffers, lengths, strict=True):
            if length is not None:
                must(
                    bytes(buffer[:length]) == frames[i],
                    expected="each buffer to hold its own key's frame",
                    got="another key's, or none",
                )

    def test_each_frame_is_told_of_when_it_is_there(self, store: BlockStore, rng: random.Random) -> None:
        """`read_each` tells of every key once, on the caller's thread, and by then the buffer is what it will be."""
        keys = make_keys(rng, 8)
        frames = [rng.randbytes(rng.choice((1, 100, 5000, 300_000))) for _ in keys]
        write_all(store, keys[::2], frames[::2])
        asked = [7, 0, 3, 4, 2, 1, 6, 5, 0, 0, 7]
        buffers = [bytearray(b"\xa5" * 300_000) for _ in asked]
        told: list[tuple[int, int | None, bytes, int]] = []

        def arrived(index: int, length: int | None) -> None:
            told.append((index, length, bytes(buffers[index][: length or 0]), threading.get_ident()))

        store.read_each([keys[i] for i in asked], [memoryview(buffer) for buffer in buffers], arrived)
        must(
            sorted(index for index, *_ in told) == list(range(len(asked))),
            expected=f"read_each to tell of each index from 0 to {len(asked) - 1} once, misses too",
            got=sorted(index for index, *_ in told),
        )
        for index, length, then, thread in told:
            number = asked[index]
            frame = None if number % 2 else frames[number]
            must_equal(f"what read_each tells of index {index}", length, None if frame is None else len(frame))
            must(thread == threading.get_ident(), expected="to be told on the caller's thread", got="another thread")
            if frame is not None:
                must(
                    then == frame,
                    expected="the buffer to hold its frame when read_each tells of it",
                    got=_difference(then, frame),
                )
                must(
                    buffers[index][: len(frame)] == frame,
                    expected="the buffer to be left alone once read_each has told of it",
                    got="bytes written later",
                )
        store.read_each([], [], arrived)
        must_equal("what read_each tells of no keys", len(told), len(asked))

    def test_what_the_told_raises_ends_the_call(self, store: BlockStore, rng: random.Random) -> None:
        """What `arrived` raises comes out of `read_each`, and the store is as good afterwards."""
        keys = make_keys(rng, 4)
        frames = [rng.randbytes(20_000) for _ in keys]
        write_all(store, keys, frames)

        class Told(Exception):
            pass

        def arrived(index: int, length: int | None) -> None:
            raise Told

        for _ in range(3):
            try:
                store.read_each(keys, [memoryview(bytearray(20_000)) for _ in keys], arrived)
            except Told:
                continue
            must(False, expected="read_each to raise what arrived raised", got="no error")
        for key, frame in zip(keys, frames, strict=True):
            must(read_one(store, key, 20_000) == frame, expected="the frame afterwards", got="a miss, or other bytes")

    def test_subclass_that_changes_read_is_not_passed_by(self, target: Target, rng: random.Random) -> None:
        """A class derived from the store may define `read` on top of the store's: `read_each` then goes through it."""
        if target.store is None:
            not_shown(f"{target.name} has no store of its own")

        def lose(kind: type[BlockStore]) -> type[BlockStore]:
            def read(self: BlockStore, keys: Sequence[BlockKey], buffers: Sequence[memoryview]) -> list[int | None]:
                found = zip(keys, kind.read(self, keys, buffers), strict=True)
                return [None if key == lost else length for key, length in found]

            return type(kind.__name__, (kind,), {"read": read})

        keys = make_keys(rng, 2)
        lost = keys[0]
        losing = target.with_store(lose).open_store()
        try:
            write_all(losing, keys, [b"lost", b"other"])
            told: dict[int, int | None] = {}
            try:
                losing.read_each(keys, [memoryview(bytearray(5)) for _ in keys], told.__setitem__)
            except RecursionError:
                must(
                    False,
                    expected="read of the store not to call a read_each that a class derived from it has",
                    got="an endless recursion",
                    hint="call your own: YourStore.read_each(self, ...)",
                )
            must_equal("what read_each tells of a lost key and of another", told, {0: None, 1: 5})
        finally:
            losing.close()

    def test_frames_may_be_made_when_they_are_taken(self, store: BlockStore, rng: random.Random) -> None:
        """`write` takes any sequence: a frame may be made when it is asked for by its index, and is the same later."""
        keys = make_keys(rng, 6)
        frames = [rng.randbytes(rng.randrange(1, 50_000)) for _ in keys]

        class Made(Sequence[memoryview]):
            def __len__(self) -> int:
                return len(frames)

            def __getitem__(self, index: Any) -> Any:
                if isinstance(index, slice):
                    return [memoryview(frame) for frame in frames[index]]
                return memoryview(frames[index])

        must_equal("write of frames that are made when taken", list(store.write(keys, Made())), [True] * len(keys))
        for key, frame in zip(keys, frames, strict=True):
            must(read_one(store, key, len(frame)) == frame, expected="the frame that was made", got="other bytes")

    def test_empty_lists_are_fine(self, store: BlockStore) -> None:
        """No keys is an answer of no results, from every call."""
        calls: dict[str, Callable[[], Any]] = {
            "contains([])": lambda: store.contains([]),
            "read([], [])": lambda: store.read([], []),
            "write([], [])": lambda: store.write([], []),
        }
        for what, call in calls.items():
            answer = call()
            must(isinstance(answer, Iterable) and not list(answer), expected=f"{what} to return []", got=answer)
        store.remove([])

    def test_frame_longer_than_its_buffer_is_a_miss(self, store: BlockStore, rng: random.Random) -> None:
        """A buffer that is too small gets None, and memory behind it is not touched."""
        (key,) = make_keys(rng, 1)
        write_all(store, [key], [rng.randbytes(5000)])
        memory = bytearray(b"\x5a" * 8192)
        (length,) = store.read([key], [memoryview(memory)[:4999]])
        must_equal("read of 5000 bytes into 4999", length, None)
        must(
            memory[4999:] == b"\x5a" * (8192 - 4999),
            expected="bytes behind the buffer to stay as they were",
            got="others",
        )

    def test_memory_is_the_callers_again_when_a_call_returns(self, store: BlockStore, rng: random.Random) -> None:
        """A store keeps copies: frames may be overwritten after `write`, buffers after `read`."""
        (key, other) = make_keys(rng, 2)
        frame = bytearray(rng.randbytes(3000))
        kept = bytes(frame)
        must_equal("write", list(store.write([key], [memoryview(frame)])), [True])
        frame[:] = b"\x11" * len(frame)
        must(
            read_one(store, key, 3000) == kept,
            expected="the bytes as they were when write was called",
            got="others: the store kept the caller's memory instead of a copy",
        )
        buffer = bytearray(3000)
        store.read([key], [memoryview(buffer)])
        buffer[:] = b"\x22" * len(buffer)
        write_all(store, [other], [b"x" * 10])
        must(read_one(store, key, 3000) == kept, expected="the frame, whatever was done to a buffer", got="others")
        must(set(buffer) == {0x22}, expected="a buffer to be left alone after read", got="bytes written later")

    def test_memory_that_was_attached_and_other_memory_are_alike(self, store: BlockStore, rng: random.Random) -> None:
        """After `attach`, frames and buffers lie in that memory or anywhere else, in one call, and are as good."""
        slot = 3 * mmap.PAGESIZE
        arena = memoryview(mmap.mmap(-1, 8 * slot))
        store.attach(arena)
        keys = make_keys(rng, 8)
        frames = [rng.randbytes(rng.randrange(1, slot)) for _ in keys]
        given = []
        for number, frame in enumerate(frames):
            home = arena[number * slot :] if number % 2 else memoryview(bytearray(slot))
            home[: len(frame)] = frame
            given.append(home[: len(frame)])
        must_equal("write", list(store.write(keys, given)), [True] * 8)
        arena[:] = b"\xa5" * len(arena)
        for first_inside in (0, 1):  # what was written from one place is read into the other, and into the same
            buffers = [
                arena[n * slot : (n + 1) * slot] if n % 2 == first_inside else memoryview(bytearray(b"\xa5" * slot))
                for n in range(8)
            ]
            must_equal("read", list(store.read(keys, buffers)), [len(frame) for frame in frames])
            for number, (frame, buffer) in enumerate(zip(frames, buffers, strict=True)):
                where = "in the attached memory" if number % 2 == first_inside else "outside of it"
                must(
                    buffer[: len(frame)] == frame,
                    expected=f"the frame in a buffer {where}",
                    got="other bytes",
                    hint="attach is no promise that other memory does not come",
                )
                must(
                    set(buffer[len(frame) :]) <= {0xA5},
                    expected=f"the buffer {where} to be as it was behind the frame",
                    got="bytes of the store",
                )
                buffer[:] = b"\xa5" * slot

    def test_frames_and_keys_are_not_changed(self, store: BlockStore, rng: random.Random) -> None:
        """`write` reads what it is given, and nothing more."""
        keys = make_keys(rng, 2)
        frames = [bytearray(rng.randbytes(500)) for _ in keys]
        before = [bytes(frame) for frame in frames]
        list_before = list(keys)
        store.write(keys, [memoryview(frame) for frame in frames])
        must([bytes(frame) for frame in frames] == before, expected="frames as they were given", got="changed ones")
        must_equal("the list of keys", keys, list_before)

    def test_keys_are_any_bytes_and_never_mixed_up(self, store: BlockStore, rng: random.Random) -> None:
        """Keys that differ in a single bit, or hold zeros, slashes or quotes, name different frames."""
        base = rng.randbytes(KEY_BYTES)
        keys = {base}
        for place in (0, 1, 31, 32, 63, 64, 67, 68, KEY_BYTES - 1):
            for bit in (0x01, 0x80):
                keys.add(base[:place] + bytes([base[place] ^ bit]) + base[place + 1 :])
        stem = base[: KEY_BYTES - 8]
        keys |= {stem + tail for tail in (b"\0" * 8, b"../../..", b"'; DROP ", b"%s%n\r\n\t\x7f", b"\xff" * 8)}
        listed = [BlockKey(key) for key in sorted(keys)]
        frames = [b"frame %d" % number for number in range(len(listed))]
        write_all(store, listed, frames)
        for key, frame in zip(listed, frames, strict=True):
            found = read_one(store, key, 64)
            must(found == frame, expected=f"{frame!r} under key {key[-12:]!r}", got=found)

    def test_writing_a_present_key_leaves_one_whole_frame(self, store: BlockStore, rng: random.Random) -> None:
        """Writing a key again replaces the frame or does nothing; what is read is one of the two, whole."""
        (key,) = make_keys(rng, 1)
        old, new = rng.randbytes(4000), rng.randbytes(2500)
        write_all(store, [key], [old])
        store.write([key], [memoryview(new)])
        must(
            read_one(store, key, 5000) in (old, new),
            expected="the old frame or the new one",
            got="a mixture, or a miss",
        )

    def test_removed_key_is_a_miss(self, store: BlockStore, rng: random.Random) -> None:
        """`remove` forgets keys, absent ones without complaint, and lets them be written again."""
        keys = make_keys(rng, 3)
        write_all(store, keys[:2], [b"one", b"two"])
        store.remove([keys[0], keys[2], keys[0]])
        must_equal("contains after remove", [bool(x) for x in store.contains(keys)], [False, True, False])
        must_equal("read after remove", read_one(store, keys[0], 64), None)
        must_equal("read of its neighbour", read_one(store, keys[1], 64), b"two")
        write_all(store, keys[:1], [b"again"])
        must_equal("read of what was written again", read_one(store, keys[0], 64), b"again")

    def test_closing_twice_is_fine(self, store: BlockStore) -> None:
        """`close` may be called again."""
        store.close()
        store.close()

    def test_another_instance_reads_what_was_confirmed(
        self, target: Target, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Shared: what `write` answered True for, every other instance reads at once."""
        needs(capabilities.shared, "shared")
        keys = make_keys(rng, 3)
        other = target.open_store()
        try:
            frames = [rng.randbytes(2000) for _ in keys]
            write_all(store, keys, frames)
            found = [read_one(other, key, 2000) for key in keys]
            must(
                found == frames,
                expected="another instance, opened before, to read what was confirmed",
                got=f"{sum(each is None for each in found)} misses of {len(keys)}, "
                f"{sum(each not in (None, frame) for each, frame in zip(found, frames, strict=True))} wrong frames",
            )
            other.remove(keys[:1])
            must_equal("contains after the other instance removed it", bool(store.contains(keys[:1])[0]), False)
        finally:
            other.close()

    def test_what_was_confirmed_is_there_after_closing(
        self, target: Target, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Durable: what `write` answered True for is there when the store is opened again."""
        needs(capabilities.durable, "durable")
        keys = make_keys(rng, 3)
        frames = [rng.randbytes(2000) for _ in keys]
        write_all(store, keys, frames)
        store.close()
        again = target.open_store()
        try:
            found = [read_one(again, key, 2000) for key in keys]
            must(found == frames, expected="every frame, after close and a new instance", got=_count(found))
        finally:
            again.close()

    def test_readers_see_whole_frames_while_others_write(
        self, target: Target, capabilities: StoreCapabilities, rng: random.Random, quick: bool
    ) -> None:
        """While instances write the same keys, a reader gets a whole frame or a miss, never a torn one."""
        needs(capabilities.shared, "shared")
        (key,) = make_keys(rng, 1)
        stop = time.monotonic() + (0.5 if quick else 2.0)
        torn: list[bytes] = []

        def write(letter: int) -> None:
            store = target.open_store()
            try:
                size = 20_000 + 7_000 * letter
                while time.monotonic() < stop:
                    with contextlib.suppress(Exception):  # a batch that missed, by the contract
                        store.write([key], [memoryview(bytes([65 + letter]) * size)])
                        store.remove([key])
            finally:
                store.close()

        def read() -> None:
            store = target.open_store()
            try:
                while time.monotonic() < stop:
                    found = read_one(store, key, 64_000)
                    whole = found is None or (len(set(found)) == 1 and len(found) == 20_000 + 7_000 * (found[0] - 65))
                    if not whole:
                        torn.append(found or b"")
            finally:
                store.close()

        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(write, 0), pool.submit(write, 1), pool.submit(read), pool.submit(read)]:
                future.result()
        must(
            not torn,
            expected="one writer's whole frame, or a miss",
            got=f"{len(torn)} torn frames; the first has {len(torn[0]) if torn else 0} bytes",
            hint="publish a frame in one step: write it under another name and rename, or in one transaction",
        )

    def test_declared_concurrency_holds(
        self, target: Target, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """As many threads as declared may call one instance at once."""
        needs(capabilities.concurrency > 1, "concurrency")
        barrier = threading.Barrier(capabilities.concurrency)

        def work(seed: int) -> None:
            mine = random.Random(seed)
            barrier.wait()
            for _ in range(15):
                keys = make_keys(mine, 4)
                frames = [mine.randbytes(3000) for _ in keys]
                write_all(store, keys, frames)
                found = [read_one(store, key, 3000) for key in keys]
                must(found == frames, expected="each thread to read what it wrote", got=_count(found))
                store.remove(keys)

        with ThreadPoolExecutor(capabilities.concurrency) as pool:
            seeds = [rng.getrandbits(32) for _ in range(capabilities.concurrency)]
            for future in [pool.submit(work, seed) for seed in seeds]:
                future.result()

    def test_scan_names_every_key_once(
        self, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Scans: `scan` yields each key that is there, once, and no removed one."""
        needs(capabilities.scans, "scans")
        keys = make_keys(rng, 12)
        write_all(store, keys, [b"x" * 100] * 12)
        store.remove(keys[:3])
        found = [bytes(key) for key in store.scan()]
        must_equal("keys that scan yields twice", len(found) - len(set(found)), 0)
        must_equal("written keys that scan lacks", len(set(keys[3:]) - set(found)), 0)
        must_equal("removed keys that scan yields", len(set(keys[:3]) & set(found)), 0)

    def test_undeclared_scan_is_refused(self, store: BlockStore, capabilities: StoreCapabilities) -> None:
        """Without `scans`, `scan` raises UnsupportedError instead of naming nothing."""
        needs(not capabilities.scans, "(scans is declared)")
        must_refuse("scan", lambda: list(store.scan()))

    def test_hold_says_which_keys_it_keeps(
        self, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Holds: `hold` and `held` answer for each key; an absent one is not held; releasing twice is fine."""
        needs(capabilities.holds, "holds")
        keys = make_keys(rng, 4)
        write_all(store, keys[1::2], [b"one", b"three"])
        must_equal("held before anything is held", _answers(store.held(keys)), [False] * 4)
        asked = [*keys, keys[1]]
        there = [False, True, False, True, True]
        must_equal("hold of absent and present keys", _answers(store.hold(asked, 60.0)), there)
        must_equal("held of the same keys", _answers(store.held(asked)), there)
        must_equal("read of a held key", read_one(store, keys[1], 64), b"one")
        store.release([*keys[:2], keys[0]])
        store.release(keys[:2])
        must_equal("held after the second key was released", _answers(store.held(keys)), [False] * 3 + [True])
        store.release(keys)
        must_equal("hold([])", list(store.hold([], 60.0)), [])
        must_equal("held([])", list(store.held([])), [])

    def test_hold_is_seen_by_others_and_is_ones_own(
        self, target: Target, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Holds, shared: another instance sees a hold, and `release` ends nobody's but one's own."""
        needs(capabilities.holds, "holds")
        needs(capabilities.shared, "shared")
        keys = make_keys(rng, 3)
        write_all(store, keys, [b"frame"] * 3)
        other = target.open_store()
        try:
            store.hold(keys[:2], 60.0)
            must_equal("held, asked of another instance", _answers(other.held(keys)), [True, True, False])
            other.hold(keys[1:], 60.0)
            other.release(keys)
            must_equal("held after another instance released all", _answers(store.held(keys)), [True, True, False])
            store.release(keys)
            must_equal("held after both have released", _answers(other.held(keys)), [False] * 3)
        finally:
            other.close()

    def test_hold_ends_after_its_time(
        self, store: BlockStore, capabilities: StoreCapabilities, patience_s: float, rng: random.Random
    ) -> None:
        """Holds: a hold ends `ttl_s` seconds after the key was last held, not before."""
        needs(capabilities.holds, "holds")
        keys = make_keys(rng, 2)
        write_all(store, keys, [b"brief", b"renewed"])
        before = time.monotonic()
        store.hold(keys, 1.0)
        store.hold(keys[1:], 60.0)
        while True:
            brief, renewed = _answers(store.held(keys))
            seconds = time.monotonic() - before  # since a moment before the hold began
            if not brief or seconds > 1.0 + patience_s:
                break
            time.sleep(0.05)
        must(
            brief or seconds >= 0.9,  # two clocks may differ a little
            expected="a hold to be in force for its 1 s",
            got=f"none after {seconds:.2f} s",
        )
        must_equal("held after the hold's 1 s", brief, False, hint="ttl_s: a process that dies releases nothing")
        must_equal("held of a key that was held again for 60 s", renewed, True, hint="the last hold's time counts")
        store.release(keys)

    def test_held_keys_stay(
        self, target: Target, store: BlockStore, capabilities: StoreCapabilities, tmp_path: Path, rng: random.Random
    ) -> None:
        """Holds: what `hold` confirmed is there however much is written, by this instance or another."""
        needs(capabilities.holds, "holds")
        if not _has_capacity(target):
            not_shown(f"{target.name} has no option named capacity")
        with _small(target, tmp_path) as full:
            held, *others = make_keys(rng, 64)
            frame = rng.randbytes(_LARGE)
            write_all(full, [held], [frame])
            must_equal("hold of a present key", _answers(full.hold([held], 60.0)), [True])
            for who in ("this instance", "another instance") if capabilities.shared else ("this instance",):
                with contextlib.nullcontext(full) if who == "this instance" else _small(target, tmp_path) as writer:
                    for key in others:
                        writer.write([key], [memoryview(rng.randbytes(_LARGE))])
                must(
                    read_one(full, held, _LARGE) == frame,
                    expected=f"a held key to be there although {who} has filled the store",
                    got="a miss, or other bytes",
                    hint="hold must keep a key from eviction",
                )
            full.release([held])

    def test_removed_key_is_not_held(
        self, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Holds: `remove` forgets a held key and ends its hold; the key can be written and held again."""
        needs(capabilities.holds, "holds")
        keys = make_keys(rng, 2)
        write_all(store, keys, [b"one", b"two"])
        store.hold(keys, 60.0)
        store.remove(keys[:1])
        must_equal("contains after a held key was removed", _answers(store.contains(keys)), [False, True])
        must_equal("held after a held key was removed", _answers(store.held(keys)), [False, True])
        must_equal("hold of the removed key", _answers(store.hold(keys, 60.0)), [False, True])
        write_all(store, keys[:1], [b"again"])
        must_equal("held of a key that was written again", _answers(store.held(keys)), [False, True])
        must_equal("hold of a key that was written again", _answers(store.hold(keys, 60.0)), [True, True])
        store.release(keys)

    def test_undeclared_hold_is_refused(
        self, store: BlockStore, capabilities: StoreCapabilities, rng: random.Random
    ) -> None:
        """Without `holds`, `hold`, `release` and `held` raise UnsupportedError."""
        needs(not capabilities.holds, "(holds is declared)")
        must_refuse("hold", lambda: store.hold(make_keys(rng, 1), 1.0))
        must_refuse("release", lambda: store.release(make_keys(rng, 1)))
        must_refuse("held", lambda: store.held(make_keys(rng, 1)))

    def test_resize_evicts_what_does_not_fit(
        self, target: Target, capabilities: StoreCapabilities, tmp_path: Path, rng: random.Random
    ) -> None:
        """Resizes: a smaller store keeps no more than it may, at once and from then on, and all that is held."""
        needs(capabilities.resizes, "resizes")
        with _medium(target, tmp_path, rng) as (store, keys, frames):
            held = keys[:2] if capabilities.holds else []
            if held:
                store.hold(held, 60.0)
            must_equal("resize of 1 MiB to 256 KiB", store.resize(_CAPACITY // 4), True)
            self._must_be_within(store, keys, _CAPACITY // 4, "when it has become smaller")
            for key in (more := make_keys(rng, 20)):
                store.write([key], [memoryview(rng.randbytes(_LARGE))])
            self._must_be_within(store, [*keys, *more], _CAPACITY // 4, "when more is written")
            found = [read_one(store, key, _LARGE) for key in held]
            must(found == frames[: len(held)], expected="a smaller store to keep what is held", got=_count(found))
            must_equal("resize to 1 MiB again", store.resize(_CAPACITY), True)
            write_all(store, more, [rng.randbytes(_LARGE) for _ in more])
            kept = sum(_answers(store.contains(more)))
            must_equal("frames kept of 20, which fit again", kept, 20)
            if held:
                store.release(held)

    def test_resize_below_what_is_held_is_refused(
        self, target: Target, capabilities: StoreCapabilities, tmp_path: Path, rng: random.Random
    ) -> None:
        """Resizes, holds: `resize` to less than what is held is False, and changes nothing."""
        needs(capabilities.resizes, "resizes")
        needs(capabilities.holds, "holds")
        with _medium(target, tmp_path, rng) as (store, keys, frames):
            store.hold(keys[:8], 60.0)
            must_equal("resize of 1 MiB to 256 KiB with 320,000 bytes held", store.resize(_CAPACITY // 4), False)
            found = [read_one(store, key, _LARGE) for key in keys]
            must(found == frames, expected="a refused resize to evict nothing", got=_count(found))
            (more,) = make_keys(rng, 1)
            taken = _answers(store.write([more], [memoryview(rng.randbytes(_LARGE))]))
            kept = sum(_answers(store.contains(keys)))
            must(
                taken == [True] and kept == len(keys),
                expected="a refused resize to leave the capacity as it was: one more frame fits",
                got=f"write answered {taken}, and {kept} of {len(keys)} frames are left",
            )
            store.release(keys[:8])

    def test_resize_is_for_everybody(
        self, target: Target, capabilities: StoreCapabilities, tmp_path: Path, rng: random.Random
    ) -> None:
        """Resizes, shared: the new capacity is every instance's, those opened before and after."""
        needs(capabilities.resizes, "resizes")
        needs(capabilities.shared, "shared")
        written: list[BlockKey] = []

        def fill(writer: BlockStore, opened: str) -> None:
            written.extend(more := make_keys(rng, 20))
            for key in more:
                writer.write([key], [memoryview(rng.randbytes(_LARGE))])
            self._must_be_within(writer, written, _CAPACITY // 4, f"when an instance that was opened {opened} writes")

        with _medium(target, tmp_path, rng) as (store, keys, _), _small(target, tmp_path) as before:
            written.extend(keys)
            must_equal("resize of 1 MiB to 256 KiB", store.resize(_CAPACITY // 4), True)
            fill(before, "before")
            with _small(target, tmp_path) as after:
                fill(after, "after")
            store.resize(_CAPACITY)

    def test_resize_ends_with_its_last_user(
        self, target: Target, store: BlockStore, capabilities: StoreCapabilities, tmp_path: Path, rng: random.Random
    ) -> None:
        """Resizes: once nobody uses the medium any more, what is configured applies again."""
        needs(capabilities.resizes, "resizes")
        store.close()
        with _medium(target, tmp_path, rng) as (small, keys, _):
            must_equal("resize of 1 MiB to 256 KiB", small.resize(_CAPACITY // 4), True)
        with _small(target, tmp_path) as again:
            write_all(again, keys, [rng.randbytes(_LARGE) for _ in keys])
            kept = sum(_answers(again.contains(keys)))
            must_equal("frames kept of 20 by a new instance with capacity=1MiB", kept, 20)

    def test_undeclared_resize_is_refused(self, store: BlockStore, capabilities: StoreCapabilities) -> None:
        """Without `resizes`, `resize` raises UnsupportedError."""
        needs(not capabilities.resizes, "(resizes is declared)")
        must_refuse("resize", lambda: store.resize(1 << 40))

    @staticmethod
    def _must_be_within(store: BlockStore, keys: Sequence[BlockKey], limit: int, when: str) -> None:
        kept = sum(read_one(store, key, _LARGE) is not None for key in keys)
        must(
            0 < kept * _LARGE <= limit,
            expected=f"some frames, and at most {limit} bytes of them, {when}",
            got=f"{kept} frames of 40,000 bytes",
        )

    def test_capacity_is_kept(self, target: Target, tmp_path: Path, rng: random.Random) -> None:
        """With an option `capacity`, no more than that is kept, and the newest frames still find room."""
        if target.store is None:
            not_shown(f"{target.name} has no store of its own")
        if not _has_capacity(target):
            not_shown(f"{target.name} has no option named capacity")
        with _small(target, tmp_path) as store:
            keys = make_keys(rng, 64)
            for key in keys:
                store.write([key], [memoryview(rng.randbytes(_LARGE))])
            kept = [read_one(store, key, _LARGE) is not None for key in keys]
            must(
                sum(kept) * _LARGE <= _CAPACITY,
                expected="at most 1 MiB of frames under capacity=1MiB",
                got=f"{sum(kept)} frames of 40,000 bytes",
                hint="evict or decline when the store is full",
            )
            must(any(kept), expected="some frames to be kept under capacity=1MiB", got="none of 64")

    def test_unknown_option_is_refused(self, target: Target) -> None:
        """Options are frozen, and one that is not known is an error that names it."""
        if target.store is None:
            not_shown(f"{target.name} has no store of its own")
        options = target.store.store_class.Options
        said = "no error"
        try:
            convert_options(target.name, {**target.specs[-1].options, "no_such_option": 1}, options)
        except ConfigError as error:
            said = str(error)
        must("no_such_option" in said, expected="an error that names the option no_such_option", got=said)
        config = options.__struct_config__
        must(
            config.frozen and config.forbid_unknown_fields,
            expected=f"{options.__name__} to be frozen and to refuse unknown fields",
            got=f"frozen={config.frozen}, forbid_unknown_fields={config.forbid_unknown_fields}",
            hint="class MyOptions(kvconnect.Options, frozen=True)",
        )


def _has_capacity(target: Target) -> bool:
    return target.store is not None and "capacity" in target.store.store_class.Options.__struct_fields__


@contextlib.contextmanager
def _small(target: Target, folder: Path) -> Iterator[BlockStore]:
    """Open an instance of the store with little room."""
    store = Target((target.kind, {**target.specs[-1].options, "capacity": _CAPACITY}), folder).open_store()
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _medium(
    target: Target, folder: Path, rng: random.Random
) -> Iterator[tuple[BlockStore, list[BlockKey], list[bytes]]]:
    """Open an instance whose medium has room for 1 MiB and keeps 20 frames."""
    if not _has_capacity(target):
        not_shown(f"{target.name} has no option named capacity")
    with _small(target, folder) as store:
        keys, frames = make_keys(rng, 20), [rng.randbytes(_LARGE) for _ in range(20)]
        write_all(store, keys, frames)
        yield store, keys, frames


def _answers(found: Sequence[bool]) -> list[bool]:
    return [bool(each) for each in found]


def _difference(found: bytes, frame: bytes) -> str:
    if len(found) != len(frame):
        return f"{len(found)} bytes"
    first = next((i for i in range(len(frame)) if found[i] != frame[i]), len(frame))
    return f"other bytes from byte {first} on"


def _count(found: Sequence[bytes | None]) -> str:
    return f"{sum(each is None for each in found)} misses of {len(found)}, or other bytes"
