"""The core of the circuit breaker, held against a model that keeps everything and counts it anew each time."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit._generations import Generation, Lease
from meshkit.circuit_breaker import Circuit, FailureRate, State

RATES = [
    FailureRate(threshold=0.5, window=10.0, minimum_calls=2),
    FailureRate(threshold=1.0, window=7.3, minimum_calls=3),
    FailureRate(threshold=0.3, calls=10, minimum_calls=10),
    FailureRate(threshold=0.5, calls=4, minimum_calls=1),
    FailureRate(threshold=0.5, window=10.0, minimum_calls=2, slow_call=3.0),
    FailureRate(threshold=0.5, calls=3, minimum_calls=2, slow_call=12.0),
]


@dataclass
class Call:
    """A call that was admitted."""

    generation: int
    start: float
    waited_for: bool = True  # not counted as slow, not expired


@dataclass
class Model:
    """What the documentation says, in the most naive way: all outcomes are kept, all calls are looked at."""

    threshold: int | FailureRate
    reset_timeout: float
    longest: float
    probes: int
    state: State = State.CLOSED
    isolated: bool = False
    generation: int = 0
    until: float = 0.0
    length: float = 0.0
    opened: int = 0
    outcomes: list[tuple[float, bool]] = field(default_factory=list)  # of this generation
    calls: list[Call] = field(default_factory=list)

    @property
    def slow_call(self) -> float:
        slow = self.threshold.slow_call if isinstance(self.threshold, FailureRate) else None
        return math.inf if slow is None else slow

    def recent(self, now: float) -> list[bool]:
        failed = [outcome for _, outcome in self.outcomes]
        if isinstance(self.threshold, int):
            row = next((n for n, outcome in enumerate(reversed(failed)) if not outcome), len(failed))
            return [True] * row
        if self.threshold.calls is not None:
            return failed[-self.threshold.calls :]
        assert self.threshold.window is not None
        width = self.threshold.window / 10
        return [outcome for time, outcome in self.outcomes if time // width > now // width - 10]

    def turn(self, state: State) -> None:
        self.state = state
        self.generation += 1
        self.outcomes = []

    def open(self, now: float) -> None:
        again = self.state is State.HALF_OPEN
        self.length = min(2 * self.length, self.longest) if again else self.reset_timeout
        self.until = now + self.length
        self.opened += 1
        self.turn(State.OPEN)

    def count(self, now: float, failed: bool) -> None:
        self.outcomes.append((now, failed))
        if self.state is State.HALF_OPEN:
            if failed:
                self.open(now)
            elif len(self.outcomes) >= self.probes:
                self.turn(State.CLOSED)
            return
        recent = self.recent(now)
        if isinstance(self.threshold, int):
            if len(recent) >= self.threshold:
                self.open(now)
        elif len(recent) >= self.threshold.minimum_calls and sum(recent) / len(recent) >= self.threshold.threshold:
            self.open(now)

    def in_flight(self) -> list[Call]:
        return [call for call in self.calls if call.generation == self.generation]

    def look(self, now: float) -> None:
        for call in self.in_flight():
            if call.generation != self.generation or not call.waited_for:
                continue
            if now >= call.start + self.slow_call:
                call.waited_for = False
                self.count(now, True)
            elif self.state is State.HALF_OPEN and now >= call.start + self.reset_timeout:
                call.waited_for = False

    def admit(self, now: float) -> Call | None:
        self.look(now)
        if self.isolated or (self.state is State.OPEN and now < self.until):
            return None
        if self.state is State.OPEN:
            self.turn(State.HALF_OPEN)
        under_way = sum(call.waited_for for call in self.in_flight())
        if self.state is State.HALF_OPEN and under_way + len(self.outcomes) >= self.probes:
            return None
        call = Call(self.generation, now)
        self.calls.append(call)
        return call

    def end(self, call: Call, failed: bool | None, now: float) -> None:
        self.calls.remove(call)
        if call.generation != self.generation:
            return
        if self.state is State.CLOSED and not call.waited_for:
            return
        slow = now >= call.start + self.slow_call
        if slow or failed is not None:
            self.count(now, bool(slow or failed))

    def seen(self, now: float) -> State:
        over = self.state is State.OPEN and not self.isolated and now >= self.until
        return State.HALF_OPEN if over else self.state


class CircuitMachine(RuleBasedStateMachine):
    """Drives both with the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.leases: dict[int, Lease] = {}
        self.models: dict[int, Call] = {}
        self.number = 0

    @initialize(
        threshold=st.one_of(st.integers(1, 3), st.sampled_from(RATES)),
        reset=st.sampled_from([1.0, 5.0]),
        growth=st.sampled_from([None, 1, 3]),
        probes=st.integers(1, 3),
    )
    def start(self, threshold: int | FailureRate, reset: float, growth: int | None, probes: int) -> None:
        longest = None if growth is None else reset * growth
        self.circuit = Circuit(threshold, reset_timeout=reset, max_reset_timeout=longest, half_open_max=probes)
        self.model = Model(threshold, reset, longest or reset, probes)

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.5, 5.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def admit(self) -> None:
        self.number += 1
        expected = self.model.admit(self.now)
        lease = self.circuit.admit(self.now)
        assert (lease is None) == (expected is None)
        if lease is not None and expected is not None:
            self.leases[self.number] = lease
            self.models[self.number] = expected

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), failed=st.sampled_from([True, True, False, False, None]))
    def end(self, data: st.DataObject, failed: bool | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases.pop(number)
        if failed is not False or not lease.calm:
            self.circuit.end(lease, failed, self.now)
        self.model.end(self.models.pop(number), failed, self.now)

    @rule(failed=st.sampled_from([True, False, None]))
    def end_what_was_never_admitted(self, failed: bool | None) -> None:
        self.circuit.end(self.circuit.generation, failed, self.now)
        if self.model.state is State.CLOSED and failed is not None:
            self.model.count(self.now, failed)

    @precondition(lambda self: self.model.state is State.CLOSED)
    @rule()
    def break_down_and_wait(self) -> None:
        """The way to half-open, which chance seldom finds."""
        for _ in range(20):
            if self.model.state is State.CLOSED:
                self.end_what_was_never_admitted(failed=True)
        self.now = max(self.now, self.model.until)

    @rule()
    def isolate(self) -> None:
        self.circuit.isolate()
        self.model.isolated = True
        self.model.turn(State.OPEN)

    @rule()
    def reset(self) -> None:
        self.circuit.reset()
        self.model.isolated = False
        self.model.turn(State.CLOSED)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "circuit"):
            return
        circuit, model, now = self.circuit, self.model, self.now
        before = snapshot(circuit)
        assert circuit.state(now) is model.seen(now)
        assert circuit.opened == model.opened
        if model.state is State.CLOSED:
            recent = model.recent(now)
            assert circuit.generation.remembered(now) == (len(recent), sum(recent))
            assert circuit.retry_after(now) == 0.0
            assert circuit.generation.calm is (not recent and isinstance(model.threshold, int))
        if model.isolated:
            assert circuit.retry_after(now) is None
        elif model.state is State.OPEN:
            assert circuit.retry_after(now) == max(0.0, model.until - now)
        assert not (circuit.idle(now) and model.isolated)
        if model.state is State.CLOSED and not sum(model.recent(now)):
            assert circuit.idle(now)
        assert snapshot(circuit) == before, "a query changed something"

    @invariant()
    def retry_after_is_sufficient(self) -> None:
        if not hasattr(self, "circuit") or self.model.state is not State.HALF_OPEN:
            return
        under_way = [call for call in self.model.in_flight() if call.waited_for]
        assert self.circuit.probes == len(under_way)
        wait = self.circuit.retry_after(self.now)
        assert wait is not None
        if len(under_way) + len(self.model.outcomes) < self.model.probes:
            assert wait == 0.0
        else:
            assert wait == pytest.approx(max(0.0, under_way[0].start + self.model.reset_timeout - self.now))


def snapshot(circuit: Circuit) -> Any:
    generation: Generation = circuit.generation
    slots = {name: repr(getattr(generation, name)) for kind in type(generation).__mro__[:-1] for name in kind.__slots__}  # type: ignore[attr-defined]
    return {
        **vars(circuit),
        "generation": id(generation),
        "free": circuit.free is None,
    }, slots


TestCircuit = CircuitMachine.TestCase
TestCircuit.settings = settings(max_examples=60, stateful_step_count=50)
