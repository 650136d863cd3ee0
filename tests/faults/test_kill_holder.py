"""kill -9 while blocks are held: they stay until their time is over, for every process, and then nothing is left."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from kvconnect.options import ByteSize
from tests.store.test_disk import frame, key, open_store, read

BLOCK = 8192  # what a frame takes
CAPACITY = ByteSize(20 * BLOCK)
HELD = range(5)
TTL_S = 3.0
KILLS = 8


def hold(path: Path, ready: Any) -> None:
    store = open_store(path, capacity=CAPACITY)
    store.write([key(n) for n in HELD], [frame(n) for n in HELD])
    assert all(store.hold([key(n) for n in HELD], TTL_S))
    ready.send(time.monotonic())
    signal.pause()


def hold_and_let_go(path: Path, seed: int, ready: Any) -> None:
    """Write, hold, release, remove and resize without end."""
    store = open_store(path, capacity=CAPACITY)
    rng = random.Random(seed)
    ready.send(0.0)
    while True:
        numbers = rng.sample(range(30), 4)
        store.write([key(n) for n in numbers], [frame(n) for n in numbers])
        store.hold([key(n) for n in numbers[:2]], rng.choice([0.01, 0.3]))
        store.release([key(numbers[0])])
        store.remove([key(numbers[3])])
        if rng.random() < 0.3:
            store.resize(rng.randrange(10, 20) * BLOCK)


def start(target: Any, *args: Any) -> tuple[Any, float]:
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=target, args=(*args, other))
    process.start()
    other.close()
    assert mine.poll(60)
    return process, mine.recv()


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_blocks_held_by_a_killed_process_stay_until_their_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    process, began = start(hold, path)
    held = [key(n) for n in HELD]
    watcher = open_store(path, capacity=CAPACITY)
    assert list(watcher.held(held)) == [True] * 5
    kill(process)
    assert list(watcher.held(held)) == [False] * 5, "the dead hold for nobody who lives"
    watcher.close()
    store = open_store(path, capacity=CAPACITY)
    kept, number = True, 100
    while kept:
        kept = all(read(store, n) == bytes(frame(n)) for n in HELD)
        ended = time.monotonic() - began
        store.write([key(number)], [frame(number)])
        number += 1
        assert ended < TTL_S + 30, "what a dead process held stays for ever"
    assert number > 140, "there was no pressure"
    assert ended > TTL_S - 0.1, f"a held block went after {ended:.1f} s of {TTL_S}"
    store.write([key(n) for n in range(5, 40)], [frame(n) for n in range(5, 40)])
    assert not any(store.contains(held))
    assert list((path / "holds").iterdir()) == []
    store.close()


def test_killed_again_and_again_while_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    rng = random.Random(5)
    for seed in range(KILLS):
        process, _ = start(hold_and_let_go, path, seed)
        time.sleep(rng.random() * 0.2)
        kill(process)
        store = open_store(path, capacity=CAPACITY)
        blocks = list(store.scan())
        known = {key(n): n for n in range(30)}
        assert [read(store, known[block]) for block in blocks] == [bytes(frame(known[block])) for block in blocks]
        assert list(store.held(blocks)) == [False] * len(blocks)
        assert len(list((path / "holds").iterdir())) <= 2, "holders that are long dead are still there"
        store.close()
    time.sleep(0.3)  # the longest hold's time
    store = open_store(path, capacity=CAPACITY)
    assert list((path / "holds").iterdir()) == []
    numbers = range(100, 119)
    assert list(store.write([key(n) for n in numbers], [frame(n) for n in numbers])) == [True] * 19
    store.close()
    assert list((path / "tmp").iterdir()) == []
