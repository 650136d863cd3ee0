"""The order in which blocks go, against a list that is searched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvconnect.eviction import EvictionQueue

DEFAULT = 35


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def chain(length: int, *, follows_parents: bool = True, clock: Clock | None = None) -> EvictionQueue[int]:
    """Return a queue with present blocks 0, 1, 2, ... of one sequence, none offered."""
    queue: EvictionQueue[int] = EvictionQueue(follows_parents=follows_parents, clock=clock or Clock())
    for key in range(length):
        queue.enter(key, key - 1 if key else None)
    return queue


def order(queue: EvictionQueue[int]) -> list[int]:
    """Evict everything that is offered."""
    went = []
    while (key := queue.pop()) is not None:
        queue.leave(key)
        went.append(key)
    return went


def test_least_recently_offered_goes_first() -> None:
    queue: EvictionQueue[int] = EvictionQueue()
    for key in (1, 2, 3):
        queue.enter(key, None)
        queue.offer(key, DEFAULT)
    queue.withdraw(1)
    queue.offer(1, DEFAULT)
    assert order(queue) == [2, 3, 1]


def test_lower_priority_goes_first_whatever_its_age() -> None:
    queue: EvictionQueue[int] = EvictionQueue()
    for key, priority in ((1, 80), (2, 35), (3, 10), (4, 35)):
        queue.enter(key, None)
        queue.offer(key, priority)
    assert order(queue) == [3, 2, 4, 1]


def test_child_goes_before_its_parent_whatever_their_ages_and_priorities() -> None:
    queue = chain(3)
    for key, priority in ((0, 0), (1, 10), (2, 100)):
        queue.offer(key, priority)
    assert order(queue) == [2, 1, 0]


def test_parent_whose_last_child_left_keeps_its_age() -> None:
    queue = chain(2)
    queue.enter(9, None)
    queue.offer(0, DEFAULT)
    queue.offer(9, DEFAULT)
    queue.leave(1)
    assert order(queue) == [0, 9]


def test_child_that_came_after_its_parent_was_offered_protects_it() -> None:
    queue = chain(1)
    queue.offer(0, DEFAULT)
    queue.enter(9, None)
    queue.offer(9, 100)
    queue.enter(1, 0)
    assert order(queue) == [9, 0]


def test_child_may_be_there_before_its_parent() -> None:
    queue: EvictionQueue[int] = EvictionQueue()
    for key, parent in ((1, 0), (0, None), (9, None)):
        queue.enter(key, parent)
    queue.offer(0, DEFAULT)
    queue.offer(9, DEFAULT)
    assert order(queue) == [9, 0]


def test_where_nothing_depends_on_parents_age_alone_counts() -> None:
    queue = chain(3, follows_parents=False)
    for key in (0, 1, 2):
        queue.offer(key, DEFAULT)
    assert order(queue) == [0, 1, 2]


@pytest.mark.parametrize(("priority", "before", "after"), [(80, [9, 1], [1, 9]), (10, [1, 9], [9, 1])])
@pytest.mark.parametrize("passed", [False, True])
def test_priority_reverts_down_and_up_and_age_stays(
    priority: int, before: list[int], after: list[int], passed: bool
) -> None:
    clock = Clock()
    queue: EvictionQueue[int] = EvictionQueue(clock=clock)
    for key in (1, 9) if priority > DEFAULT else (9, 1):
        queue.enter(key, None)
        queue.offer(key, priority if key == 1 else DEFAULT, clock.now + 5 if key == 1 else math.inf)
    clock.now += 5 if passed else 4.9
    assert order(queue) == (after if passed else before)


def test_victim_is_present_and_protects_its_parent_until_it_leaves() -> None:
    queue = chain(2)
    queue.enter(9, None)
    for key in (1, 0, 9):
        queue.offer(key, DEFAULT)
    assert queue.pop() == 1
    assert 1 not in queue
    assert 1 in queue.present
    assert queue.pop() == 9
    queue.leave(1)
    assert queue.pop() == 0
    assert queue.pop() is None


def test_memory_is_bounded_by_what_is_present() -> None:
    clock = Clock()
    queue = chain(4, clock=clock)
    for _ in range(2000):
        for key in range(4):
            queue.offer(key, 80, clock.now + 1e6)
            queue.withdraw(key)
    assert len(queue._heap) + len(queue._reverting) < 300


@dataclass
class Block:
    parent: int | None
    offered: bool = False
    priority: int = 0
    until: float = math.inf
    age: int = 0


class QueueMachine(RuleBasedStateMachine):
    follows_parents = True

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue: EvictionQueue[int] = EvictionQueue(follows_parents=self.follows_parents, clock=self.clock)
        self.blocks: dict[int, Block] = {}
        self.age = 0

    def expected(self) -> int | None:
        """Search for the victim."""

        def rank(key: int) -> tuple[bool, int, int]:
            block = self.blocks[key]
            has_children = self.follows_parents and any(other.parent == key for other in self.blocks.values())
            return has_children, block.priority if self.clock.now < block.until else DEFAULT, block.age

        return min((key for key, block in self.blocks.items() if block.offered), key=rank, default=None)

    @rule(key=st.integers(0, 9), parent=st.none() | st.integers(0, 9))
    def enter(self, key: int, parent: int | None) -> None:
        if key not in self.blocks and key != parent:
            self.blocks[key] = Block(parent)
            self.queue.enter(key, parent)

    @precondition(lambda self: self.blocks)
    @rule(
        data=st.data(),
        priority=st.sampled_from([0, 10, 35, 36, 100]),
        wait=st.sampled_from([math.inf, math.inf, -1.0, 0.0, 1.0, 3.0]),
    )
    def offer(self, data: st.DataObject, priority: int, wait: float) -> None:
        key = data.draw(st.sampled_from(sorted(self.blocks)))
        self.age += 1
        block = self.blocks[key]
        block.offered, block.priority, block.until, block.age = True, priority, self.clock.now + wait, self.age
        self.queue.offer(key, priority, block.until)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.blocks)))
        self.blocks[key].offered = False
        self.queue.withdraw(key)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.blocks)))
        del self.blocks[key]
        self.queue.leave(key)

    @rule(leaves=st.booleans())
    def pop(self, leaves: bool) -> None:
        expected = self.expected()
        assert self.queue.pop() == expected
        if expected is not None:
            self.blocks[expected].offered = False
            if leaves:
                self.leave_key(expected)

    def leave_key(self, key: int) -> None:
        del self.blocks[key]
        self.queue.leave(key)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def agrees(self) -> None:
        self.queue.check_integrity()
        assert self.queue.present == set(self.blocks)
        offered = {key for key, block in self.blocks.items() if block.offered}
        assert len(self.queue) == len(offered)
        assert all((key in self.queue) == (key in offered) for key in range(10))

    def teardown(self) -> None:
        while (expected := self.expected()) is not None:
            assert self.queue.pop() == expected
            self.leave_key(expected)
        assert self.queue.pop() is None


class WindowMachine(QueueMachine):
    follows_parents = False


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
WindowMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestQueue = QueueMachine.TestCase
TestWindow = WindowMachine.TestCase
