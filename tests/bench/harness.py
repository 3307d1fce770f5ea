"""The benchmark harness: ours beside the bare primitive that it cannot beat, interleaved in one run.

A benchmark module is `tests/bench/bench_<utility>.py` with a function `measures()` that returns a list of
`Compare` and `Fact`. A round is a function that does the operation `n` times (plain or async); the loop is written
inside it, so that nothing but the operation is measured. What is measured is the processor time of the thread: on a
shared machine the clock on the wall mostly tells what others do.

`python -m tests.bench [name ...] [--quick]` runs them.
"""

import asyncio
import gc
import inspect
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Round = Callable[[int], None] | Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Compare:
    """A comparison of two rounds; `goal` is the greatest ratio ours / bare that is aimed at."""

    name: str
    bare: Round
    ours: Round
    n: int
    goal: float | None = None
    rounds: int = 9

    def run(self, quick: bool) -> "Row":
        """Run both rounds alternately and return the median of the ratios of neighbours."""
        n, rounds = (max(1, self.n // 1000), 1) if quick else (self.n, self.rounds)
        pairs = asyncio.run(self._pairs(n, rounds))
        ratios = [ours / bare for bare, ours in pairs]
        ratio = statistics.median(ratios)
        bare, ours = (statistics.median(column) / n * 1e9 for column in zip(*pairs, strict=True))
        return Row(
            self.name,
            f"{ratio:.2f} x  ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{ours:,.0f} ns against {bare:,.0f} ns",
            f"<= {self.goal:g} x" if self.goal else "",
            None if self.goal is None else ratio <= self.goal,
        )

    async def _pairs(self, n: int, rounds: int) -> list[tuple[float, float]]:
        await _timed(self.bare, max(1, n // 10))  # warm-up: caches, specialisation
        await _timed(self.ours, max(1, n // 10))
        pairs = []
        for number in range(rounds):
            if number % 2:  # who goes first alternates: what drifts during a pair falls on both
                ours = await _timed(self.ours, n)
                pairs.append((await _timed(self.bare, n), ours))
            else:
                bare = await _timed(self.bare, n)
                pairs.append((bare, await _timed(self.ours, n)))
        return pairs


async def _timed(work: Round, n: int) -> float:
    gc.collect()
    start = time.thread_time()
    result = work(n)
    if inspect.isawaitable(result):
        await result
    return time.thread_time() - start


@dataclass(frozen=True)
class Fact:
    """A figure of its own: `measure(n)` returns it. `goal` is the greatest value that is aimed at."""

    name: str
    measure: Callable[[int], float]
    n: int
    unit: str
    goal: float | None = None
    rounds: int = 5

    def run(self, quick: bool) -> "Row":
        """Return the median of several measurements."""
        n, rounds = (max(1, self.n // 1000), 1) if quick else (self.n, self.rounds)
        values = []
        for _ in range(rounds):
            gc.collect()
            values.append(self.measure(n))
        value = statistics.median(values)
        return Row(
            self.name,
            f"{value:,.4g} {self.unit}  ({min(values):,.4g}-{max(values):,.4g})",
            f"n = {n:,}",
            f"<= {self.goal:g} {self.unit}" if self.goal else "",
            None if self.goal is None else value <= self.goal,
        )


Measure = Compare | Fact


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    figure: str
    detail: str
    goal: str
    met: bool | None


def slowest(operation: Callable[[int], object], n: int) -> float:
    """Return the milliseconds of the slowest of `operation(0)` ... `operation(n - 1)`.

    The garbage collector stays on: its pauses are what keyed state costs.
    """
    worst = 0.0
    clock = time.thread_time
    for i in range(n):
        start = clock()
        operation(i)
        worst = max(worst, clock() - start)
    return worst * 1000


def bytes_each(fill: Callable[[int], object], n: int) -> float:
    """Return the bytes allocated per item by `fill(n)`, whose result is kept alive while they are counted.

    Build keys that should not count before calling this.
    """
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = fill(n)
        after, _ = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return (after - before) / n
