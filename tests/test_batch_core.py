"""The core of batching against the naive one: a list of what was accepted, looked through from the front."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit.batch import Batch, Taken


@dataclass
class Held:
    item: int
    at: float
    ticket: str | None
    hurried: bool = False


class NaiveBatches(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 5), wait=st.sampled_from([0.0, 1.0, 2.5]), more=st.integers(0, 9))
    def begin(self, size: int, wait: float, more: int) -> None:
        self.size, self.wait, self.limit = size, wait, size + more
        self.core: Batch[int, str] = Batch(max_size=size, max_wait=wait, max_pending=self.limit)
        self.now = 0.0
        self.next_item = 0
        self.waiting: list[Held] = []
        self.flying: list[tuple[Taken[int, str], list[Held]]] = []

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(ticket=st.sampled_from([None, "alice", "bob"]))
    def add(self, ticket: str | None) -> None:
        room = self.held() < self.limit
        assert self.core.add(self.next_item, self.now, ticket) is room
        if room:
            self.accept(ticket)

    @precondition(lambda self: len(self.core.items) < self.core.quick)
    @rule(ticket=st.sampled_from([None, "carol"]))
    def add_quickly(self, ticket: str | None) -> None:
        assert self.held() < self.limit
        if ticket is not None:
            self.core.tickets[len(self.core.items)] = ticket
        self.core.items.append(self.next_item)
        self.accept(ticket)
        assert len(self.waiting) % self.size, "the item that fills a batch has to pass by add()"

    @rule()
    def hurry(self) -> None:
        last = self.core.hurry()
        assert (self.core.oldest > last) is (self.held() == 0)
        for held in self.waiting:
            held.hurried = True

    @rule()
    def take(self) -> None:
        taken = self.core.take(self.now)
        if self.due_at() > self.now:
            assert taken is None
            return
        expected, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        assert taken is not None
        assert taken.items == [held.item for held in expected]
        assert taken.tickets == {i: held.ticket for i, held in enumerate(expected) if held.ticket is not None}
        self.flying.append((taken, expected))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        taken, _ = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.core.settle(taken)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "core"):
            return
        assert self.core.pending == self.held() <= self.limit
        assert self.core.due_at == self.due_at()
        numbers = [taken.number for taken, _ in self.flying]
        assert numbers == sorted(numbers)
        if numbers:
            assert self.core.oldest == numbers[0]

    def accept(self, ticket: str | None) -> None:
        self.waiting.append(Held(self.next_item, self.now, ticket))
        self.next_item += 1

    def held(self) -> int:
        return len(self.waiting) + sum(len(held) for _, held in self.flying)

    def due_at(self) -> float:
        if not self.waiting:
            return math.inf
        if len(self.waiting) >= self.size or self.waiting[0].hurried:
            return -math.inf
        return self.waiting[0].at + self.wait


TestCore = NaiveBatches.TestCase
TestCore.settings = settings(max_examples=40, stateful_step_count=40)


def test_a_batch_is_due_max_wait_after_its_first_item_not_its_last() -> None:
    core: Batch[str, None] = Batch(max_size=3, max_wait=10.0, max_pending=9)
    assert core.due_at == math.inf
    core.add("a", 100.0)
    core.add("b", 109.0)
    assert core.due_at == 110.0
    assert core.take(109.9) is None
    taken = core.take(110.0)
    assert taken is not None
    assert taken.items == ["a", "b"]


def test_what_is_in_flight_takes_up_room_until_it_is_settled() -> None:
    core: Batch[int, None] = Batch(max_size=2, max_wait=1.0, max_pending=2)
    assert [core.add(i, 0.0) for i in range(3)] == [True, True, False]
    taken = core.take(0.0)
    assert taken is not None
    assert not core.add(3, 0.0)
    core.settle(taken)
    assert core.add(3, 0.0)


def test_settling_twice_is_an_error() -> None:
    core: Batch[int, None] = Batch(max_size=1, max_wait=1.0, max_pending=1)
    core.add(1, 0.0)
    taken = core.take(0.0)
    assert taken is not None
    core.settle(taken)
    with pytest.raises(ValueError, match="not in list"):
        core.settle(taken)
