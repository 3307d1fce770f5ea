"""The end of a BatchCollector: what is flushed, what is told, who is refused, and that it ends."""

import asyncio
from typing import Any

import pytest

from meshkit.batch import BatchCollector, BatchStats
from meshkit.errors import Closed
from meshkit.testing import run
from tests.test_batch import Sink, Told


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
    assert (sink.items, len(errors)) == (["a"], 1)
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


async def slow_to_end(items: list[int]) -> None:
    """Run for a thousand seconds, and when cancelled for as many more as the first item says."""
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        await asyncio.sleep(items[0])
        raise


async def test_after_the_deadline_no_batch_begins_although_somebody_calls_flush() -> None:
    told = Told()
    async with BatchCollector(
        slow_to_end, max_size=1, max_wait=1, concurrency=2, stop_timeout=5, on_error=told
    ) as collector:
        for item in (0, 10, 20):
            await collector.add(item)
        stopping = asyncio.create_task(collector.stop())
        await asyncio.sleep(6)  # the first has ended, the second is still ending
        await collector.flush()
        await stopping
    assert asyncio.get_running_loop().time() == 15.0
    assert [(items, error.executed) for items, error in told.calls if isinstance(error, Closed)] == [
        ([0], "maybe"),
        ([10], "maybe"),
        ([20], "no"),
    ]


async def test_after_the_deadline_no_batch_begins_although_it_falls_due() -> None:
    told = Told()
    async with BatchCollector(
        slow_to_end, max_size=2, max_wait=8, concurrency=2, stop_timeout=5, on_error=told
    ) as collector:
        for item in (0, 0, 10, 10, 20):
            await collector.add(item)
    assert asyncio.get_running_loop().time() == 15.0
    assert [items for items, _ in told.calls] == [[0, 0], [10, 10], [20]]


async def test_what_flush_adds_while_stopping_does_not_wait() -> None:
    times: dict[str, float] = {}

    async def flush(items: list[str]) -> None:
        times[items[0]] = asyncio.get_running_loop().time()
        if items == ["first"]:
            await asyncio.sleep(2)
            await collector.add("second")
            await asyncio.sleep(50)

    async with BatchCollector(flush, max_size=9, max_wait=100, concurrency=2, stop_timeout=90) as collector:
        await collector.add("first")
        await asyncio.sleep(1)
    assert times == {"first": 1.0, "second": 3.0}


async def test_whoever_waits_for_the_end_returns_although_it_is_opened_again_at_once() -> None:
    collector = BatchCollector(Sink(seconds=1000), max_size=9, max_wait=50, stop_timeout=1, on_error=Told())
    async with collector:
        await collector.add(1)
        waiting = [asyncio.create_task(verb()) for verb in (collector.flush, collector.stop) for _ in range(9)]
        await asyncio.sleep(0)
    async with collector:
        await asyncio.sleep(1)
        assert all(task.done() for task in waiting)


async def test_on_error_may_open_it_again_and_the_rest_of_the_last_time_is_told() -> None:
    told = Told()

    def on_error(items: list[int], error: Exception) -> None:
        told(items, error)
        if items == [1]:
            with pytest.raises(StopIteration):  # as a task that begins at once does
                collector.__aenter__().send(None)

    collector = BatchCollector(Sink(seconds=1000), max_size=1, max_wait=1, stop_timeout=5, on_error=on_error)
    async with collector:
        for item in range(4):
            await collector.add(item)
    assert told.items == [0, 1, 2, 3]
    await collector.stop()
    assert collector.stats() == BatchStats(0, 0, 0, flushed=0, failed=4, batches=4)


@pytest.mark.parametrize("callback", ["on_error", "observer"])
def test_a_callback_that_raises_a_cancellation_keeps_nobody_from_being_told(callback: str) -> None:
    told = Told()
    contexts: list[dict[str, Any]] = []

    def on_error(items: list[int], error: Exception) -> None:
        told(items, error)
        if callback == "on_error":
            raise asyncio.CancelledError

    def observer(event: object) -> None:
        if callback == "observer":
            raise asyncio.CancelledError

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
        async with BatchCollector(
            Sink(seconds=1000), max_size=1, max_wait=1, stop_timeout=5, on_error=on_error, observer=observer
        ) as collector:
            for item in range(3):
                await collector.add(item)
        assert asyncio.get_running_loop().time() == 5.0
        await asyncio.sleep(1)

    run(main)
    assert told.items == [0, 1, 2]
    assert [type(context["exception"]) for context in contexts] == [asyncio.CancelledError]


def test_an_exit_out_of_on_error_comes_out_and_the_rest_is_told() -> None:
    told = Told()

    async def flush(items: list[int]) -> list[Exception]:
        return [KeyError(item) for item in items]

    def on_error(items: list[int], error: Exception) -> None:
        told(items, error)
        raise SystemExit(3)

    async def main() -> None:
        async with BatchCollector(flush, max_size=3, max_wait=1, on_error=on_error) as collector:
            for item in range(3):
                await collector.add(item)
            await asyncio.sleep(1)

    with pytest.raises(SystemExit):
        run(main)
    assert told.items == [0, 1, 2]
