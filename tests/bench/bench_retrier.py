"""The Retrier: a first try that succeeds, beside an empty wrapper of the same form."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from meshkit.retrier import Retrier, RetryBudget, RetryPolicy
from tests.bench.harness import Compare, Measure, Round


async def work(number: int, *, flag: bool = False) -> int:
    return number


class Wrapper:
    """An empty wrapper with a `call` and a decorator, as thin as Python has it."""

    async def call(self, fn: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any) -> Any:
        return await fn(*args, **kwargs)

    def __call__(self, fn: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            return await fn(*args, **kwargs)

        return wrapped


def by_call(guard: Any) -> Round:
    async def round_(n: int) -> None:
        for number in range(n):
            await guard.call(work, number, flag=True)

    return round_


def decorated(guard: Any) -> Round:
    guarded = guard(work)

    async def round_(n: int) -> None:
        for number in range(n):
            await guarded(number, flag=True)

    return round_


async def under_asyncio_timeout(n: int) -> None:
    for number in range(n):
        async with asyncio.timeout(30.0):
            await work(number, flag=True)


def by_loop(retrier: Retrier) -> Round:
    async def round_(n: int) -> None:
        for number in range(n):
            async for attempt in retrier.attempts():
                with attempt:
                    await work(number, flag=True)

    return round_


async def plain_loop(n: int) -> None:
    for number in range(n):
        for attempt in range(4):
            try:
                await work(number, flag=True)
                break
            except OSError:
                if attempt == 3:
                    raise
                await asyncio.sleep(2.0**attempt)


def failing(number: int) -> Callable[[], Awaitable[int]]:
    """Return a function that fails at first, and then succeeds."""
    failed = False

    async def fn() -> int:
        nonlocal failed
        if not failed:
            failed = True
            raise OSError
        return number

    return fn


async def plain_retry(n: int) -> None:
    for number in range(n):
        fn = failing(number)
        for attempt in range(4):
            try:
                await fn()
                break
            except OSError:
                if attempt == 3:
                    raise
                await asyncio.sleep(0)


async def retried(n: int) -> None:
    retrier = Retrier(RetryPolicy(base_delay=0, max_delay=0), on=OSError)
    for number in range(n):
        await retrier.call(failing(number))


def measures() -> list[Measure]:
    retrier = Retrier(RetryPolicy(), on=OSError)
    budgeted = Retrier(RetryPolicy(), on=OSError, budget=RetryBudget())
    limited = Retrier(RetryPolicy(timeout=30.0), on=OSError)
    return [
        Compare("retrier.call, first try succeeds", by_call(Wrapper()), by_call(retrier), 100_000, goal=1.25),
        Compare("@retrier, first try succeeds", decorated(Wrapper()), decorated(retrier), 100_000, goal=1.25),
        Compare("retrier.call with a budget / empty wrapper", by_call(Wrapper()), by_call(budgeted), 20_000),
        Compare("retrier.attempts() / a loop by hand", plain_loop, by_loop(retrier), 20_000),
        Compare("retrier.call, timeout set / asyncio.timeout", under_asyncio_timeout, by_call(limited), 10_000),
        Compare("one failure and one retry / a loop by hand", plain_retry, retried, 10_000),
    ]
