"""The core of CallRegistry against a naive model: a dict of deadlines, and the history of how calls ended."""

import math

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meshkit.call_registry import PendingCalls

IDS = [f"call {number}" for number in range(4)]
# Small steps, so that deadlines and their buckets collide, and large ones that skip many buckets.
STEPS = st.sampled_from([0.0, 0.0625, 0.125, 0.2, 0.25, 0.3, 0.5, 1.0, 7.7, 3600.0])


class PendingCallsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.number = 0
        self.deadlines: dict[str, float] = {}
        self.slots: dict[str, int] = {}
        self.replied: dict[str, bool] = {}  # how the last call with an id ended

    @initialize(max_pending=st.integers(1, 4), start=STEPS)
    def start(self, max_pending: int, start: float) -> None:
        self.now = start
        self.max_pending = max_pending
        self.pending: PendingCalls[int] = PendingCalls(max_pending)
        self.pending.SPARE = 1  # so that empty buckets must go all the time

    def end(self, call_id: str, replied: bool) -> int:
        del self.deadlines[call_id]
        self.replied[call_id] = replied
        return self.slots.pop(call_id)

    @rule(call_id=st.sampled_from(IDS), timeout=STEPS)
    def add(self, call_id: str, timeout: float) -> None:
        self.number += 1
        if call_id in self.deadlines:
            with pytest.raises(ValueError, match="is pending already"):
                self.pending.add(call_id, self.number, self.now + timeout)
            return
        wake_at = self.pending.add(call_id, self.number, self.now + timeout)
        if len(self.deadlines) == self.max_pending:
            assert wake_at == math.inf
            return
        assert wake_at <= self.now + timeout
        self.deadlines[call_id] = self.now + timeout
        self.slots[call_id] = self.number

    @rule(call_id=st.sampled_from(IDS), replied=st.booleans())
    def take(self, call_id: str, replied: bool) -> None:
        expected = self.end(call_id, replied) if call_id in self.deadlines else None
        assert self.pending.take(call_id, replied) == expected

    @rule(step=STEPS)
    def expire(self, step: float) -> None:
        self.now += step
        self.expire_now()

    @rule()
    def expire_when_it_says(self) -> None:
        wake_at = self.pending.wake_at()
        if wake_at < math.inf:
            self.now = max(self.now, wake_at)
            self.expire_now()

    @rule()
    def expire_all(self) -> None:
        assert self.pending.expire(math.inf) == self.expected(math.inf)

    def expire_now(self) -> None:
        assert self.pending.expire(self.now) == self.expected(self.now)
        assert self.pending.wake_at() > self.now, "it would wake again and again for nothing"

    def expected(self, until: float) -> list[int]:
        # Calls with the same deadline come in the order of their ids.
        due = sorted((deadline, call_id) for call_id, deadline in self.deadlines.items() if deadline <= until)
        return [self.end(call_id, replied=False) for _, call_id in due]

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "pending"):
            return
        assert {call_id: slot for call_id, (slot, _) in self.pending.calls.items()} == self.slots
        assert self.pending.wake_at() <= min(self.deadlines.values(), default=math.inf)
        for call_id in [*IDS, "never called"]:
            if call_id not in self.deadlines:
                expected = {None: "unknown", True: "duplicate", False: "late"}[self.replied.get(call_id)]
                assert self.pending.why_ignored(call_id) == expected

    @invariant()
    def nothing_is_left_of_calls_that_have_ended(self) -> None:
        if not hasattr(self, "pending"):
            return
        if not self.deadlines:
            assert self.pending.wake_at() == math.inf
        in_buckets = sum(len(bucket) for bucket in self.pending._buckets.values())
        assert in_buckets <= len(self.deadlines)
        assert set(self.pending._beginnings) == set(self.pending._buckets)
        assert len(self.pending._beginnings) == len(self.pending._buckets)


TestPendingCalls = PendingCallsMachine.TestCase
TestPendingCalls.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_deadline_of_an_earlier_call_with_the_same_id_means_nothing() -> None:
    pending: PendingCalls[str] = PendingCalls(10)
    pending.add("other", "other", 3600.0)
    pending.add("again", "first", 0.1)
    pending.expire(0.0)  # its bucket has begun, its deadline has not come
    pending.take("again", replied=True)
    pending.add("again", "second", 60.0)
    assert pending.expire(0.1) == []
    assert pending.expire(60.0) == ["second"]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_nobody_is_expired_early_and_everybody_at_the_next_wake_after_the_deadline(timeouts: list[float]) -> None:
    pending: PendingCalls[float] = PendingCalls(100)
    for number, timeout in enumerate(timeouts):
        pending.add(str(number), timeout, timeout)
    expired: list[float] = []
    wakes = 0
    while (now := pending.wake_at()) < math.inf:
        wakes += 1
        due = pending.expire(now)
        assert all(deadline == now for deadline in due), "exactly then, neither earlier nor later"
        expired += due
    assert expired == sorted(timeouts)
    assert wakes <= 2 * len(timeouts)


def test_calls_that_ended_are_remembered_but_not_for_ever() -> None:
    pending: PendingCalls[None] = PendingCalls(1)
    many = 3 * pending.REMEMBERED
    for number in range(many):
        pending.add(str(number), None, 1.0)
        pending.take(str(number), replied=number % 2 == 0)
    for number in range(many - pending.REMEMBERED, many):
        assert pending.why_ignored(str(number)) == ("late" if number % 2 else "duplicate")
    assert pending.why_ignored("0") == "unknown"
    remembered = sum(pending.why_ignored(str(number)) != "unknown" for number in range(many))
    assert remembered <= 2 * pending.REMEMBERED + 1


def test_a_hundred_thousand_answered_calls_leave_nothing_while_one_is_pending() -> None:
    pending: PendingCalls[None] = PendingCalls(10)
    pending.add("the one", None, 3600.0)
    for number in range(100_000):
        now = number / 1000
        pending.add(str(number), None, now + 30.0)
        pending.expire(now)
        pending.take(str(number), replied=True)
    assert sum(map(len, pending._buckets.values())) + len(pending._soon) == 1
    assert len(pending._beginnings) == len(pending._buckets) <= 30 / pending.GRAIN + 3


def test_answered_calls_with_all_kinds_of_timeouts_leave_no_buckets_while_one_is_pending() -> None:
    pending: PendingCalls[None] = PendingCalls(10)
    pending.add("the one", None, 0.5)
    for number in range(1000):
        pending.add(str(number), None, 1.0 + number * pending.GRAIN)
        pending.take(str(number), replied=True)
    assert len(pending._beginnings) == len(pending._buckets) <= pending.SPARE + 2
    assert pending.expire(0.5) == [None]
