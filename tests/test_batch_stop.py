"""The end of a BatchCollector, and cancellation at every await: nothing is lost, nothing is told or flushed twice."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest

from meshkit.batch import BatchCollector
from meshkit.errors import Closed
from meshkit.testing import VirtualTimeLoop, cancellation_points, run
from tests.test_batch import Sink, Told

# --- stopping


async def test_leaving_flushes_what_is_left() -> None:
    sink = Sink(seconds=1)
    async with BatchCollector(sink, max_size=2, max_wait=100) as collector:
        for item in range(5):
            await collector.add(item)
    assert sink.batches == [[0, 1], [2, 3], [4]]
    assert asyncio.get_running_loop().time() == 3.0


async def test_leaving_by_an_error_flushes_what_is_left_and_passes_the_error_on() -> None:
    sink = Sink(seconds=1)
    with pytest.raises(KeyError, match="mine"):
        async with BatchCollector(sink, max_size=2, max_wait=100) as collector:
            await collector.add(1)
            raise KeyError("mine")
    assert sink.batches == [[1]]


async def test_after_the_deadline_what_runs_is_cancelled_and_what_is_left_is_told() -> None:
    told = Told()
    sink = Sink(seconds=100)
    async with BatchCollector(sink, max_size=2, max_wait=1, on_error=told, stop_timeout=7, name="orders") as collector:
        for item in range(5):
            await collector.add(item)
        submitted = collector.submit_nowait(5)
        await asyncio.sleep(10)
    assert asyncio.get_running_loop().time() == 17.0
    assert [items for items, _ in told.calls] == [[0, 1], [2, 3], [4]]
    assert all(isinstance(error, Closed) and error.name == "orders" for _, error in told.calls)
    assert [error.executed for _, error in told.calls if isinstance(error, Closed)] == ["maybe", "no", "no"]
    error = submitted.exception()
    assert isinstance(error, Closed)
    assert error.executed == "no"
    assert (collector.stats().failed, collector.stats().pending) == (6, 0)


async def test_with_no_time_to_stop_in_it_cuts_at_once() -> None:
    told = Told()
    sink = Sink()
    async with BatchCollector(sink, max_size=9, max_wait=1, on_error=told, stop_timeout=0) as collector:
        await collector.add(1)
    assert (sink.items, told.items) == ([], [1])


async def test_a_flush_that_ends_well_though_it_is_cancelled_counts_as_flushed() -> None:
    told = Told()

    async def flush(items: list[int]) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            await asyncio.sleep(5)  # cleans up, and is waited for: no task is left behind

    async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told, stop_timeout=1) as collector:
        await collector.add(1)
    assert asyncio.get_running_loop().time() == 6.0
    assert (told.items, collector.stats().flushed) == ([], 1)


async def test_stop_refuses_new_items_and_those_who_wait() -> None:
    sink = Sink(seconds=2)
    async with BatchCollector(sink, max_size=1, max_wait=1, max_pending=1, name="orders") as collector:
        await collector.add("a")
        waiting = [asyncio.create_task(verb) for verb in (collector.add("b"), collector.submit("c"))]
        await asyncio.sleep(1)
        stopping = asyncio.create_task(collector.stop())
        await asyncio.sleep(0.5)
        for task in waiting:
            assert isinstance(task.exception(), Closed), "it should not have to wait for the end"
        for attempt in (collector.add("d"), collector.submit("e")):
            with pytest.raises(Closed, match="orders is closed"):
                await attempt
        for attempt_now in (collector.try_add, collector.submit_nowait):
            with pytest.raises(Closed):
                attempt_now("f")
        await stopping
        assert asyncio.get_running_loop().time() == 2.0
    assert sink.items == ["a"]


async def test_a_batch_that_is_half_full_when_the_collector_is_stopped_takes_no_more() -> None:
    sink = Sink(seconds=2)
    async with BatchCollector(sink, max_size=3, max_wait=100) as collector:
        for item in range(4):
            await collector.add(item)
        stopping = asyncio.create_task(collector.stop())
        await asyncio.sleep(1)
        with pytest.raises(Closed):
            collector.try_add(4)
        with pytest.raises(Closed):
            await collector.add(5)
        with pytest.raises(Closed):
            await collector.submit(6)
        await stopping
    assert sink.batches == [[0, 1, 2], [3]]


async def test_an_adder_that_was_woken_when_the_collector_is_stopped_adds_nothing() -> None:
    sink = Sink()
    errors: list[BaseException] = []

    async def add() -> None:
        try:
            await collector.add("b")
        except Closed as error:
            errors.append(error)

    def stop_now(event: object) -> None:  # there is room, the adder is woken and has not run
        if not stopping:
            stopping.append(asyncio.get_running_loop().create_task(collector.stop()))

    stopping: list[asyncio.Task[None]] = []
    async with BatchCollector(sink, max_size=1, max_wait=1, max_pending=1, observer=stop_now) as collector:
        await collector.add("a")
        await asyncio.create_task(add())
        await stopping[0]
    assert (sink.items, len(errors)) in [(["a"], 1), (["a", "b"], 0)]
    assert collector.stats().pending == 0


async def test_everybody_may_stop_it_and_as_often_as_they_like() -> None:
    sink = Sink(seconds=2)
    async with BatchCollector(sink, max_size=1, max_wait=1) as collector:
        await collector.add(1)
        await asyncio.gather(*(collector.stop() for _ in range(100)))
        assert sink.items == [1]
        await collector.stop()
        await collector.flush()
        with pytest.raises(Closed):
            await collector.add(2)


async def test_a_flush_of_somebody_else_returns_when_the_collector_is_cut() -> None:
    told = Told()
    async with BatchCollector(Sink(100), max_size=9, max_wait=50, on_error=told, stop_timeout=1) as collector:
        await collector.add(1)
        flushing = asyncio.create_task(collector.flush())
        await asyncio.sleep(0)
    await flushing
    assert told.items == [1]


async def test_it_can_be_entered_in_one_task_and_left_in_another() -> None:
    sink = Sink(seconds=1)
    collector = BatchCollector(sink, max_size=9, max_wait=1)
    await asyncio.create_task(collector.__aenter__())
    await collector.add(1)
    await asyncio.create_task(collector.__aexit__(None, None, None))
    assert sink.items == [1]


def test_it_can_be_used_again_later_on_another_loop_too() -> None:
    sink = Sink()
    collector = BatchCollector(sink, max_size=2, max_wait=1)

    async def main() -> None:
        for item in range(2):
            async with collector:
                await collector.add(item)
            with pytest.raises(Closed):
                collector.try_add(9)

    run(main)
    run(main)
    assert sink.batches == [[0], [1]] * 2
    assert collector.stats().flushed == 4


async def test_entering_it_twice_says_when_it_can_be_entered() -> None:
    async with BatchCollector(Sink(), max_size=2, max_wait=1, name="orders") as collector:
        with pytest.raises(RuntimeError, match="orders is open already: it can be entered again after"):
            await collector.__aenter__()


async def test_one_collector_may_feed_another() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=4, max_wait=1) as second:

        async def forward(items: list[int]) -> None:
            for item in items:
                await second.add(item)

        async with BatchCollector(forward, max_size=3, max_wait=1) as first:
            for item in range(10):
                await first.add(item)
    assert sink.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# --- cancellation


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
