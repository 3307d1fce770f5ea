"""BatchCollector: what a list and futures cost by hand, and with everything that the collector promises."""

import asyncio
from typing import Any

from meshkit.batch import BatchCollector
from tests.bench.harness import Compare, Measure

SIZE = 1000


async def save(items: list[int]) -> None:
    pass


async def double(items: list[int]) -> list[int]:
    return [item * 2 for item in items]


async def append(n: int) -> None:
    items: list[int] = []
    for i in range(n):
        items.append(i)  # noqa: PERF402 - it stands for items that come one by one


async def append_and_flush(n: int) -> None:
    items: list[int] = []
    for i in range(n):
        items.append(i)
        if len(items) >= SIZE:
            await save(items)
            items = []
    await save(items)


class Holder:
    """The least that another object can do for each item: an awaited method that appends."""

    def __init__(self) -> None:
        self.items: list[int] = []

    async def add(self, item: int) -> None:
        self.items.append(item)


async def await_append(n: int) -> None:
    holder = Holder()
    for i in range(n):
        await holder.add(i)


async def add(n: int) -> None:
    async with BatchCollector(save, max_size=SIZE, max_wait=1.0) as collector:
        for i in range(n):
            await collector.add(i)


async def append_futures(n: int) -> None:
    loop = asyncio.get_running_loop()
    items: list[int] = []
    futures: list[asyncio.Future[int]] = []

    async def flush() -> None:
        for future, result in zip(futures, await double(items), strict=True):
            if not future.done():
                future.set_result(result)

    for i in range(n):
        future: asyncio.Future[int] = loop.create_future()
        items.append(i)
        futures.append(future)
        if len(items) >= SIZE:
            await flush()
            items, futures = [], []
    await flush()


async def submit_nowait(n: int) -> None:
    async with BatchCollector(double, max_size=SIZE, max_wait=1.0) as collector:
        for start in range(0, n, SIZE):
            for i in range(start, min(n, start + SIZE)):
                collector.submit_nowait(i)
            await collector.flush()


async def tasks_with_futures(n: int) -> None:
    loop = asyncio.get_running_loop()
    items: list[int] = []
    futures: list[asyncio.Future[int]] = []

    async def submit(item: int) -> int:
        future: asyncio.Future[int] = loop.create_future()
        items.append(item)
        futures.append(future)
        if len(items) >= SIZE:
            waiting, results = futures.copy(), await double(items)
            items.clear()
            futures.clear()
            for waiter, result in zip(waiting, results, strict=True):
                if not waiter.done():
                    waiter.set_result(result)
        return await future

    for start in range(0, n, SIZE):
        await asyncio.gather(*(submit(i) for i in range(start, start + SIZE)))


async def submit(n: int) -> None:
    async with BatchCollector(double, max_size=SIZE, max_wait=1.0) as collector:
        for start in range(0, n, SIZE):
            await asyncio.gather(*(collector.submit(i) for i in range(start, start + SIZE)))


async def one_task_each(n: int) -> None:
    for i in range(n):
        await asyncio.create_task(save([i]))


async def one_batch_each(n: int) -> None:
    async with BatchCollector(save, max_size=1, max_wait=1.0) as collector:
        for i in range(n):
            await collector.add(i)
            await collector.flush()


def measures() -> list[Measure]:
    rounds: dict[str, Any] = {"n": 100_000, "rounds": 15}
    return [
        Compare("await add / list append", append, add, **rounds, goal=4.0),
        Compare("  await a method that only appends / list append", append, await_append, **rounds),
        Compare("  await add / await a method that only appends", await_append, add, **rounds),
        Compare("  await add / append, flushed by hand at 1,000", append_and_flush, add, **rounds, goal=4.0),
        Compare("submit_nowait / append + future, by hand at 1,000", append_futures, submit_nowait, **rounds, goal=1.5),
        Compare("submit / append + future, 1,000 tasks at a time", tasks_with_futures, submit, **rounds, goal=1.5),
        Compare("add and flush() of one / create a task and await it", one_task_each, one_batch_each, n=10_000),
    ]
