import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import anyio
import pytest

from meshkit.batch import BatchCollector, BatchDone, BatchStats
from meshkit.errors import BatchFull, Closed
from meshkit.events import Event


class Sink:
    """A flush that remembers what it was given and when, and takes `seconds` for it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[Any]] = []
        self.times: list[float] = []
        self.running = self.most_running = 0

    async def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items.copy())
        self.times.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        return [f"done {item}" for item in items]

    @property
    def items(self) -> list[Any]:
        return [item for batch in self.batches for item in batch]


class Told:
    """An on_error that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], Exception]] = []

    def __call__(self, items: list[Any], error: Exception) -> None:
        self.calls.append((items, error))

    @property
    def items(self) -> list[Any]:
        return [item for items, _ in self.calls for item in items]


# --- when a batch is due


async def test_a_full_batch_is_flushed_at_once() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=3, max_wait=60) as collector:
        for item in range(7):
            await collector.add(item)
        await asyncio.sleep(1)
        assert sink.batches == [[0, 1, 2], [3, 4, 5]]
        assert sink.times == [0.0, 0.0]


async def test_max_wait_counts_from_the_first_item_of_each_batch() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=3, max_wait=10) as collector:
        await collector.add("a")
        await asyncio.sleep(9)
        await collector.add("b")
        await asyncio.sleep(2)
        assert (sink.batches, sink.times) == ([["a", "b"]], [10.0])
        await collector.add("c")
        await asyncio.sleep(20)
        assert (sink.batches[1:], sink.times[1:]) == ([["c"]], [21.0])


async def test_a_timer_set_for_a_batch_that_filled_up_does_not_flush_the_next_one_early() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=2, max_wait=10) as collector:
        for item in "ab":
            await collector.add(item)
        await asyncio.sleep(5)
        await collector.add("c")
        await asyncio.sleep(20)
        assert (sink.batches, sink.times) == ([["a", "b"], ["c"]], [0.0, 15.0])


async def test_without_a_wait_what_is_added_in_one_pass_of_the_loop_is_one_batch() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=100, max_wait=0) as collector:
        results = await asyncio.gather(*(collector.submit(item) for item in range(50)))
        assert results == [f"done {item}" for item in range(50)]
        assert sink.batches == [list(range(50))]
        assert await collector.submit(50) == "done 50"
        assert sink.times == [0.0, 0.0]


async def test_a_plain_function_can_be_the_flush() -> None:
    batches: list[list[int]] = []
    async with BatchCollector(batches.append, max_size=2, max_wait=1) as collector:
        for item in range(3):
            await collector.add(item)
    assert batches == [[0, 1], [2]]


async def test_a_batch_that_is_due_while_another_is_flushed_goes_on_filling_up() -> None:
    sink = Sink(seconds=100)
    async with BatchCollector(sink, max_size=5, max_wait=1, max_pending=50) as collector:
        await collector.add(0)
        await asyncio.sleep(2)  # the first one is under way
        await collector.add(1)
        await asyncio.sleep(10)  # due long ago
        await collector.add(2)
        await asyncio.sleep(100)
        assert (sink.batches, sink.times) == ([[0], [1, 2]], [1.0, 101.0])
        await collector.stop()


async def test_batches_start_in_order_and_at_most_concurrency_run_at_once() -> None:
    sink = Sink(seconds=10)
    async with BatchCollector(sink, max_size=2, max_wait=1, concurrency=3, stop_timeout=1000) as collector:
        for item in range(20):
            await collector.add(item)
    assert sink.items == list(range(20))
    assert sink.most_running == 3
    assert sink.times == [0.0] * 3 + [10.0] * 3 + [20.0] * 3 + [30.0]


async def test_an_empty_collector_flushes_nothing() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=2, max_wait=1) as collector:
        await collector.flush()
        await asyncio.sleep(100)
    assert sink.batches == []
    assert asyncio.get_running_loop().time() == 100.0


# --- the bound


async def test_whoever_adds_to_a_full_collector_waits_and_is_served_in_order() -> None:
    sink = Sink(seconds=10)
    async with BatchCollector(sink, max_size=2, max_wait=1, max_pending=4, stop_timeout=100) as collector:
        tasks = [asyncio.create_task(collector.add(item)) for item in range(9)]
        await asyncio.sleep(1)
        assert [task.done() for task in tasks] == [True] * 4 + [False] * 5
        assert collector.stats() == BatchStats(pending=4, in_flight=2, waiting=5, flushed=0, failed=0, batches=0)
        assert not collector.try_add("x")
        await asyncio.sleep(10)
        assert [task.done() for task in tasks] == [True] * 6 + [False] * 3
    assert sink.items == [0, 1, 2, 3, 4, 5]  # who waited when it was stopped was refused
    for task in tasks[6:]:
        with pytest.raises(Closed):
            await task


async def test_nobody_passes_those_who_wait_when_there_is_room_again() -> None:
    sink = Sink(seconds=1)
    order: list[str] = []

    async def add(name: str) -> None:
        await collector.add(name)
        order.append(name)

    async with BatchCollector(sink, max_size=2, max_wait=1, max_pending=2, stop_timeout=100) as collector:
        waiting = [asyncio.create_task(add(name)) for name in "abcd"]
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        newcomers: list[asyncio.Task[None]] = []

        def barge() -> None:
            # Room has come, and those who wait have not run yet.
            assert collector.stats().pending == 0
            assert not collector.try_add("barged")
            newcomers.append(asyncio.create_task(add("e")))

        def look() -> None:
            if collector.stats().pending:
                loop.call_soon(look)
            else:
                barge()

        loop.call_at(1.0, look)
        await asyncio.sleep(0.5)
        await asyncio.sleep(10)
        assert order == list("abcde")
        await asyncio.gather(*waiting, *newcomers)
    assert sink.items == list("abcde")


async def test_whoever_was_just_served_does_not_pass_those_who_still_wait() -> None:
    sink = Sink()
    tried: list[bool] = []

    async def add(item: str) -> None:
        await collector.add(item)
        tried.append(collector.try_add(f"another of {item}"))

    async with BatchCollector(sink, max_size=5, max_wait=1, max_pending=5) as collector:
        for item in range(5):
            await collector.add(item)
        await asyncio.gather(*(add(item) for item in "abc"))
    assert tried == [False, False, True]
    assert sink.items[5:] == ["a", "b", "c", "another of c"]


async def test_ten_thousand_waiters_on_a_small_collector_are_all_served_in_order() -> None:
    sink = Sink(seconds=0.001)
    async with BatchCollector(sink, max_size=100, max_wait=1, stop_timeout=1000) as collector:
        await asyncio.gather(*map(collector.add, range(10_000)))
        await collector.flush()
        assert sink.items == list(range(10_000))
        assert max(map(len, sink.batches)) == 100
        assert collector.stats() == BatchStats(0, 0, 0, flushed=10_000, failed=0, batches=100)


async def test_cancelled_waiters_leave_nothing_behind() -> None:
    release = asyncio.Event()

    async def flush(items: list[int]) -> None:
        await release.wait()

    async with BatchCollector(flush, max_size=1, max_wait=1, max_pending=1) as collector:
        await collector.add(0)
        for item in range(1000):
            with anyio.move_on_after(0.01):
                await collector.add(item)
        assert collector.stats().waiting == 0
        release.set()
    assert collector.stats().flushed == 1


async def test_the_deadline_around_an_add_ends_its_wait() -> None:
    async with BatchCollector(Sink(seconds=10), max_size=1, max_wait=1, max_pending=1, stop_timeout=100) as collector:
        await collector.add(0)
        with pytest.raises(TimeoutError), anyio.fail_after(3):
            await collector.add(1)
        assert asyncio.get_running_loop().time() == 3.0
    assert collector.stats().flushed == 1


# --- flushing on demand


async def test_flush_waits_for_what_was_accepted_before_it_and_for_nothing_else() -> None:
    sink = Sink(seconds=10)
    async with BatchCollector(sink, max_size=2, max_wait=1000, max_pending=50, stop_timeout=1000) as collector:
        for item in range(5):
            await collector.add(item)

        async def add_more() -> None:
            for item in range(100, 120):
                await collector.add(item)

        task = asyncio.create_task(add_more())
        await collector.flush()
        assert asyncio.get_running_loop().time() == 30.0
        assert sink.items[:5] == list(range(5))
        assert len(sink.items) < 25
        await task


async def test_flush_with_nothing_to_do_does_not_suspend() -> None:
    async with BatchCollector(Sink(), max_size=2, max_wait=1) as collector:
        with pytest.raises(StopIteration):
            collector.flush().send(None)


async def test_many_can_wait_for_a_flush() -> None:
    sink = Sink(seconds=3)
    async with BatchCollector(sink, max_size=10, max_wait=1000) as collector:
        await collector.add(1)
        await asyncio.gather(*(collector.flush() for _ in range(1000)))
        assert (sink.batches, sink.times) == ([[1]], [0.0])


async def test_a_flush_that_waits_is_not_held_up_by_a_batch_that_fails() -> None:
    told = Told()

    async def flush(items: list[int]) -> None:
        raise ConnectionError

    async with BatchCollector(flush, max_size=10, max_wait=1000, on_error=told) as collector:
        await collector.add(1)
        await collector.flush()
        assert told.items == [1]


async def test_flush_waits_for_older_batches_though_newer_ones_have_ended() -> None:
    async def flush(items: list[float]) -> None:
        await asyncio.sleep(items[0])

    async with BatchCollector(flush, max_size=1, max_wait=1, concurrency=2, stop_timeout=100) as collector:
        await collector.add(30.0)
        await collector.add(1.0)
        await collector.flush()
        assert asyncio.get_running_loop().time() == 30.0


# --- events, arguments, repr


async def test_an_observer_hears_of_every_batch_after_the_state_is_consistent() -> None:
    heard: list[Event] = []

    def observer(event: Event) -> None:
        heard.append(event)
        assert collector.stats().in_flight == 0

    async def flush(items: list[int]) -> list[int | Exception]:
        await asyncio.sleep(2)
        if items == [4, 5]:
            raise ConnectionError("away")
        return [KeyError(item) if item == 1 else item for item in items]

    async with BatchCollector(
        flush, max_size=2, max_wait=1, on_error=Told(), observer=observer, name="orders"
    ) as collector:
        for item in (0, 1, 2, 3, 4, 5):
            await collector.add(item)
            await collector.flush() if item % 2 else None
    done = [event for event in heard if isinstance(event, BatchDone)]
    assert [(e.name, e.size, e.failed, e.duration, type(e.error)) for e in done] == [
        ("orders", 2, 1, 2.0, KeyError),
        ("orders", 2, 0, 2.0, type(None)),
        ("orders", 2, 2, 2.0, ConnectionError),
    ]


async def yields(items: list[Any]) -> AsyncIterator[Any]:
    yield items


def yields_plainly(items: list[Any]) -> Iterator[Any]:
    yield items


def collect(**arguments: Any) -> BatchCollector[Any, Any]:
    defaults: dict[str, Any] = {"flush": print, "max_size": 10, "max_wait": 1.0}
    return BatchCollector(**(defaults | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_size": 0}, ValueError, "max_size must be at least 1, not 0"),
        ({"max_size": 1.5}, TypeError, "max_size must be a whole number, not 1.5"),
        ({"max_wait": -1}, ValueError, "max_wait must be finite and zero or more seconds, not -1"),
        ({"max_wait": float("nan")}, ValueError, "max_wait must be finite"),
        ({"max_wait": "1"}, TypeError, "max_wait must be a number of seconds"),
        ({"max_pending": 0}, ValueError, "max_pending must be at least 1, not 0"),
        ({"max_pending": 9}, ValueError, r"max_pending must be at least max_size \(10\), not 9"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1, not 0"),
        ({"stop_timeout": float("inf")}, ValueError, "stop_timeout must be finite"),
        ({"flush": None}, TypeError, "flush must be a function of a list of items, not None"),
        ({"flush": yields_plainly}, TypeError, "flush must not yield"),
        ({"flush": yields}, TypeError, "flush must not yield"),
        ({"on_error": Sink().__call__}, TypeError, "on_error must be a plain function"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        collect(**arguments)


def test_it_can_be_constructed_without_a_loop_and_says_what_it_is() -> None:
    collector = collect(name="orders", concurrency=2)
    assert repr(collector) == (
        "BatchCollector('orders', max_size=10, max_wait=1.0, max_pending=200, concurrency=2, new, pending=0)"
    )
    assert collector.stats() == BatchStats(0, 0, 0, 0, 0, 0)


async def test_before_it_is_opened_adding_says_what_to_do() -> None:
    collector = collect(name="orders")
    for attempt in (collector.add, collector.submit):
        with pytest.raises(RuntimeError, match="orders is not open yet: add to it inside `async with`"):
            await cast("Callable[[int], Awaitable[Any]]", attempt)(1)
    for attempt_now in (collector.try_add, collector.submit_nowait):
        with pytest.raises(RuntimeError, match="not open yet"):
            attempt_now(1)
    await collector.flush()
    await collector.stop()


def test_batch_full_prints_and_pickles() -> None:
    error = BatchFull(name="orders", max_pending=100)
    assert str(error) == "orders: 100 items are waiting to be flushed; flushing is slower than adding"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
