"""One of two workers is frozen (SIGSTOP) under load: a breaker per peer bounds what fails; then nothing fails."""

import asyncio
import functools
import signal
import time
from collections import Counter
from collections.abc import Callable

import anyio

from meshkit import (
    Bulkhead,
    CallTimeout,
    CircuitBreaker,
    FailureRate,
    Guard,
    OutcomeUnknown,
    PeerLost,
    PerKey,
    Refused,
    Runtime,
    Unreachable,
    stack,
)
from tests.reliability.nodes import DO, PATIENCE, Process, address, meet, node, process
from tests.reliability.report import Report

THRESHOLD = 5


def one_at_a_time(reset_timeout: float, slow: float) -> Guard:
    """Return what guards the calls of one worker, of which there is one at a time."""
    return CircuitBreaker(
        failure_threshold=THRESHOLD, reset_timeout=reset_timeout, trips_on=(OutcomeUnknown, Unreachable)
    )


def many_at_once(reset_timeout: float, slow: float) -> Guard:
    """Return what guards the calls of one worker, of which there are many at the same time.

    No more than `THRESHOLD` are under way, and when these are slow, the breaker trips before they time out; or others
    would take their places, and time out in turn. What waited for a place finds the breaker open, and goes elsewhere.
    """
    rate = FailureRate(threshold=1.0, calls=THRESHOLD, minimum_calls=THRESHOLD, slow_call=slow)
    breaker = CircuitBreaker(
        failure_threshold=rate, reset_timeout=reset_timeout, trips_on=(OutcomeUnknown, Unreachable)
    )
    return stack(Bulkhead(THRESHOLD, max_queue=100), breaker)


class Load:
    """Calls of two workers in turn; one that refuses, or whose guard does, is passed over."""

    def __init__(self, rt: Runtime, workers: list[Process], guard: Callable[[], Guard], timeout: float) -> None:
        self.rt, self.workers, self.timeout = rt, workers, timeout
        self.guards: PerKey[str, Guard] = PerKey(lambda _: guard())
        self.served: Counter[str] = Counter()
        self.failures: list[tuple[float, Exception]] = []  # and when that was

    async def ask(self, number: int) -> None:
        """Make one call."""
        for turn in range(2):
            worker = self.workers[(number + turn) % 2]
            try:
                await self.guards[worker.node].call(self.rt.call, DO, number, to=worker.node, timeout=self.timeout)
            except Refused:
                continue
            self.served[worker.name] += 1
            return
        raise Unreachable(node="any worker")

    async def run(self, calls: int, *, at_once: int) -> None:
        """Make so many calls, so many of them at the same time."""
        numbers = iter(range(calls))

        async def caller() -> None:
            for number in numbers:
                try:
                    await self.ask(number)
                except Exception as error:  # noqa: BLE001 - all of them are counted
                    self.failures.append((time.monotonic(), error))
                await asyncio.sleep(0.01 * at_once)

        await asyncio.gather(*(caller() for _ in range(at_once)))


async def scenario(report: Report) -> None:
    calls, timeout, heartbeat = (80, 0.8, 0.3) if report.quick else (1_000, 1.0, 2.0)
    silent = 3.5 * heartbeat  # seconds after which the runtime itself does not ask any more
    async with (
        node("caller", "127.0.0.1:0", heartbeat=heartbeat) as rt,
        process("worker0", "127.0.0.1:0", join=[address(rt)], heartbeat=heartbeat) as steady,
        process("worker1", "127.0.0.1:0", join=[address(rt)], heartbeat=heartbeat) as victim,
    ):
        await meet(rt, "worker0", "worker1")
        for at_once, guard in ((1, one_at_a_time), (8, many_at_once))[report.quick :]:
            guarded = functools.partial(guard, reset_timeout=silent + timeout, slow=timeout / 2)
            load = Load(rt, [steady, victim], guarded, timeout)
            loading = asyncio.create_task(load.run(calls, at_once=at_once))
            with anyio.fail_after(PATIENCE):
                while load.served["worker1"] < calls // 20:
                    await asyncio.sleep(0.01)
            await victim.freeze()
            frozen_at = time.monotonic()
            await loading
            failed = len(load.failures)
            report.promise(
                f"{calls:,} calls, {at_once} at a time: {failed} failed, where the breaker trips at {THRESHOLD}",
                failed <= THRESHOLD,
            )
            report.promise(
                "each of them because there was no answer",
                all(isinstance(error, CallTimeout | PeerLost) for _, error in load.failures),
            )
            last = max((when for when, _ in load.failures), default=frozen_at) - frozen_at
            report.within("after it was frozen, the last call failed", [last], silent + timeout)
            before = load.served["worker1"]
            victim.signal(signal.SIGCONT)
            thawed_at = time.monotonic()
            await meet(rt, "worker1")
            with anyio.fail_after(PATIENCE):
                while load.served["worker1"] == before:
                    await load.run(2, at_once=1)
            again = time.monotonic() - thawed_at  # when it is heard, and the breaker lets a call through
            report.within("when it was let go, it was asked again after", [again], heartbeat + silent + 2 * timeout)
            report.promise("nothing failed after that", len(load.failures) == failed)
