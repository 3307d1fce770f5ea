"""The Timeout, beside the scopes of asyncio and anyio."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from meshkit.timeout import Timeout
from tests.bench.harness import Compare, Measure

TIMEOUT = Timeout(30.0)


async def work(number: int) -> int:
    return number


async def asyncio_timeout(n: int) -> None:
    for number in range(n):
        async with asyncio.timeout(30.0):
            await work(number)


async def anyio_fail_after(n: int) -> None:
    for number in range(n):
        with anyio.fail_after(30.0):
            await work(number)


async def by_call(n: int) -> None:
    for number in range(n):
        await TIMEOUT.call(work, number)


async def by_block(n: int) -> None:
    for number in range(n):
        async with TIMEOUT:
            await work(number)


def measures() -> list[Measure]:
    rounds: list[tuple[str, Callable[[int], Coroutine[Any, Any, None]], Callable[[int], Coroutine[Any, Any, None]]]]
    rounds = [
        ("timeout.call / asyncio.timeout", asyncio_timeout, by_call),
        ("timeout.call / anyio.fail_after", anyio_fail_after, by_call),
        ("async with timeout / asyncio.timeout", asyncio_timeout, by_block),
    ]
    return [Compare(name, bare, ours, 10_000) for name, bare, ours in rounds]
