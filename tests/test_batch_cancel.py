"""BatchCollector, cancelled at every await: nothing is lost, nothing is told or flushed twice."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest

from meshkit.batch import BatchCollector
from meshkit.testing import VirtualTimeLoop, cancellation_points, run
from tests.test_batch import Sink, Told


def everywhere(scenario: Callable[[Callable[[Any], Coroutine[Any, Any, bool]]], Coroutine[Any, Any, None]]) -> None:
    """Run `scenario(cancel)` for every point at which what it gives to `cancel` can be cancelled."""
    count = 0
    for point in cancellation_points():
        run(lambda point=point: scenario(point.cancel))  # type: ignore[misc]  # mypy cannot infer a default's type
        count += 1
    assert count > 3, "the scenario never waited: nothing was cancelled"


def test_a_cancelled_adder_adds_nothing_and_everybody_elses_item_arrives_once() -> None:
    async def scenario(cancel: Any) -> None:
        sink = Sink(seconds=1)
        async with BatchCollector(sink, max_size=2, max_wait=1, max_pending=2, stop_timeout=100) as collector:
            await collector.add("a")
            await collector.add("b")
            before = asyncio.create_task(collector.add("c"))
            await asyncio.sleep(0)
            after: list[asyncio.Task[None]] = []
            asyncio.get_running_loop().call_soon(lambda: after.append(asyncio.create_task(collector.add("e"))))
            cancelled = await cancel(collector.add("d"))
            await before
            await after[0]
            await collector.flush()
            assert collector.stats().waiting == 0
            assert sink.items == (["a", "b", "c", "e"] if cancelled else ["a", "b", "c", "d", "e"])

    everywhere(scenario)


def test_a_cancelled_submitter_loses_nobody_elses_result_and_its_accepted_item_is_flushed() -> None:
    async def scenario(cancel: Any) -> None:
        sink = Sink(seconds=1)
        async with BatchCollector(sink, max_size=3, max_wait=1, max_pending=3, stop_timeout=100) as collector:
            first = [asyncio.create_task(collector.submit(item)) for item in "abc"]
            await asyncio.sleep(0)
            later: list[asyncio.Task[str]] = []
            asyncio.get_running_loop().call_soon(lambda: later.append(asyncio.create_task(collector.submit("e"))))
            cancelled = await cancel(collector.submit("d"))
            assert await asyncio.gather(*first, *later) == ["done a", "done b", "done c", "done e"]
            assert sink.items in (["a", "b", "c", "d", "e"], ["a", "b", "c", "e"])
            if not cancelled:
                assert "d" in sink.items
            stats = collector.stats()
            assert (stats.flushed, stats.failed, stats.pending) == (len(sink.items), 0, 0)

    everywhere(scenario)


def test_the_failure_of_an_item_is_told_once_whenever_its_submitter_is_cancelled() -> None:
    async def scenario(cancel: Any) -> None:
        told = Told()

        async def flush(items: list[str]) -> list[str]:
            await asyncio.sleep(1)
            raise ConnectionError

        heard = False

        async def submit() -> None:
            nonlocal heard
            try:
                await collector.submit("a")
            except ConnectionError:
                heard = True

        async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told) as collector:
            await cancel(submit())
            await collector.flush()
        assert heard is not (told.items == ["a"])
        assert collector.stats().failed == 1

    everywhere(scenario)


def test_a_cancelled_flush_or_stop_call_changes_nothing_for_others() -> None:
    for verb in ("flush", "stop"):

        async def scenario(cancel: Any, verb: str = verb) -> None:
            sink = Sink(seconds=1)
            async with BatchCollector(sink, max_size=2, max_wait=100) as collector:
                for item in range(3):
                    await collector.add(item)
                other = asyncio.create_task(collector.flush())
                await cancel(getattr(collector, verb)())
                await other
                assert sink.items == [0, 1, 2]
                await getattr(collector, verb)()

        everywhere(scenario)


def test_however_the_body_and_the_exit_are_cancelled_each_item_is_flushed_or_told() -> None:
    async def scenario(cancel: Any) -> None:
        told = Told()
        started: list[int] = []
        ended: list[int] = []

        async def flush(items: list[int]) -> None:
            started.extend(items)
            await asyncio.sleep(3)
            ended.extend(items)

        accepted: list[int] = []

        async def body() -> None:
            async with BatchCollector(
                flush, max_size=2, max_wait=1, max_pending=4, on_error=told, stop_timeout=100
            ) as collector:
                for item in range(7):
                    await collector.add(item)
                    accepted.append(item)

        cancelled = await cancel(body())
        assert sorted(ended + told.items) == accepted
        assert ended == started[: len(ended)]
        assert told.items == sorted(told.items)
        assert cancelled or ended == list(range(7))
        assert len(asyncio.all_tasks()) == 1

    everywhere(scenario)


def test_a_flush_that_is_cancelled_at_any_await_is_told_once_and_the_collector_goes_on() -> None:
    async def scenario(cancel: Any) -> None:
        told = Told()
        done: list[int] = []

        async def flush(items: list[int]) -> None:
            if items != [0]:
                done.extend(items)
            elif await cancel(work(items)):
                raise asyncio.CancelledError

        async def work(items: list[int]) -> None:
            for _ in range(3):
                await asyncio.sleep(1)
            done.extend(items)

        async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told, stop_timeout=50) as collector:
            for item in range(3):
                await collector.add(item)
        assert sorted(done + told.items) == [0, 1, 2]

    everywhere(scenario)


async def test_a_scope_that_is_cancelled_around_it_waits_for_the_drain() -> None:
    sink = Sink(seconds=2)
    with anyio.move_on_after(1) as scope:
        async with BatchCollector(sink, max_size=2, max_wait=100) as collector:
            for item in range(3):
                await collector.add(item)
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert sink.batches == [[0, 1], [2]]
    assert asyncio.get_running_loop().time() == 4.0


async def test_a_second_cancellation_ends_the_drain_at_once() -> None:
    told = Told()
    sink = Sink(seconds=1000)

    async def main() -> None:
        async with BatchCollector(sink, max_size=2, max_wait=100, on_error=told, stop_timeout=500) as collector:
            for item in range(3):
                await collector.add(item)
            await asyncio.sleep(10_000)

    task = asyncio.create_task(main())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(1)
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert asyncio.get_running_loop().time() == 2.0
    assert [items for items, _ in told.calls] == [[0, 1], [2]]


async def test_a_task_group_may_be_cancelled_with_adders_and_collector_in_it() -> None:
    told = Told()
    sink = Sink(seconds=1)
    accepted: list[int] = []

    async def add(collector: BatchCollector[int, Any], start: int) -> None:
        for item in range(start, start + 100):
            await collector.add(item)
            accepted.append(item)

    with anyio.move_on_after(4.5):
        async with (
            BatchCollector(sink, max_size=3, max_wait=1, max_pending=6, on_error=told) as collector,
            anyio.create_task_group() as group,
        ):
            for start in range(0, 1000, 100):
                group.start_soon(add, collector, start)
    assert sorted(sink.items + told.items) == sorted(accepted)
    assert told.items == []


def test_when_the_whole_program_is_interrupted_what_was_accepted_is_flushed() -> None:
    sink = Sink(seconds=1)

    async def main() -> None:
        async with BatchCollector(sink, max_size=2, max_wait=100) as collector:
            for item in range(3):
                await collector.add(item)
            asyncio.get_running_loop().call_later(5, interrupt)
            await asyncio.sleep(1000)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())
    assert sink.items == [0, 1, 2]
