"""The Hedger: a call that is faster than the delay, beside the plain asyncio way to be ready to hedge it."""

import asyncio
from collections.abc import Awaitable, Callable

from meshkit.hedger import Hedger
from tests.bench.harness import Compare, Measure


async def work(number: int) -> int:
    return number


async def waits(number: int) -> int:
    await asyncio.sleep(0)
    return number


def by_hand(fn: Callable[[int], Awaitable[int]]) -> Callable[[int], Awaitable[None]]:
    async def round_(n: int) -> None:
        for number in range(n):
            tasks = [asyncio.ensure_future(fn(number))]
            done, pending = await asyncio.wait(tasks, timeout=0.05)
            if not done:
                tasks.append(asyncio.ensure_future(fn(number)))
                done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            next(iter(done)).result()

    return round_


def hedged(fn: Callable[[int], Awaitable[int]], quantile: float | None = None) -> Callable[[int], Awaitable[None]]:
    hedger = Hedger(delay=0.05, quantile=quantile)

    async def round_(n: int) -> None:
        for number in range(n):
            await hedger.call(fn, number)

    return round_


def measures() -> list[Measure]:
    return [
        Compare("hedger.call, done at once / task and wait", by_hand(work), hedged(work), 5_000),
        Compare("hedger.call, done soon / task and wait", by_hand(waits), hedged(waits), 5_000),
        Compare("  with an observed delay / a fixed one", hedged(work), hedged(work, 0.95), 5_000),
    ]
