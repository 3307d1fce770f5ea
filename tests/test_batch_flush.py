"""What BatchCollector does where flush fails, comes back to it, or does something unusual."""

import asyncio
import contextvars
import gc
import itertools
import sys
import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest

from meshkit.batch import BatchCollector
from meshkit.errors import BatchFull, OutcomeUnknown
from meshkit.events import Event
from meshkit.testing import run
from tests.test_batch import Sink, Told

# --- failures


async def test_a_failing_flush_is_told_once_and_the_collector_goes_on() -> None:
    told = Told()
    sink = Sink()

    async def flush(items: list[int]) -> None:
        if items[0] < 4:
            raise ConnectionError("away")
        await sink(items)

    async with BatchCollector(flush, max_size=2, max_wait=1, on_error=told) as collector:
        for item in range(8):
            await collector.add(item)
    assert [items for items, _ in told.calls] == [[0, 1], [2, 3]]
    assert all(isinstance(error, ConnectionError) for _, error in told.calls)
    assert sink.batches == [[4, 5], [6, 7]]


async def test_items_that_fail_with_different_errors_are_told_one_by_one() -> None:
    told = Told()
    same = KeyError("same")

    async def flush(items: list[int]) -> list[Exception | None]:
        return [KeyError(0), KeyError(1), same, same, None, same]

    async with BatchCollector(flush, max_size=6, max_wait=1, on_error=told) as collector:
        for item in range(6):
            await collector.add(item)
    assert [items for items, _ in told.calls] == [[0], [1], [2, 3, 5]]


async def test_a_flush_that_empties_its_list_and_raises_is_told_with_all_items() -> None:
    told = Told()

    async def flush(items: list[int]) -> None:
        items.clear()
        raise ConnectionError

    async with BatchCollector(flush, max_size=3, max_wait=1, on_error=told) as collector:
        for item in range(3):
            await collector.add(item)
    assert told.items == [0, 1, 2]


def caught(loop: asyncio.AbstractEventLoop) -> list[dict[str, Any]]:
    contexts: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    return contexts


async def test_without_on_error_failures_go_to_the_loops_exception_handler() -> None:
    contexts = caught(asyncio.get_running_loop())

    async def flush(items: list[int]) -> None:
        raise ConnectionError("away")

    async with BatchCollector(flush, max_size=3, max_wait=1, name="orders") as collector:
        for item in range(3):
            await collector.add(item)
    assert [context["message"] for context in contexts] == ["meshkit: orders: 3 items were not flushed"]
    assert isinstance(contexts[0]["exception"], ConnectionError)


async def test_a_raising_on_error_neither_hides_the_error_nor_stops_the_collector() -> None:
    contexts = caught(asyncio.get_running_loop())

    async def flush(items: list[int]) -> None:
        raise ConnectionError("away")

    def on_error(items: list[int], error: Exception) -> None:
        raise KeyError("my own bug")

    async with BatchCollector(flush, max_size=1, max_wait=1, on_error=on_error, name="orders") as collector:
        await collector.add(1)
        await collector.flush()
        await collector.add(2)
    assert [type(context["exception"]) for context in contexts] == [KeyError, ConnectionError] * 2
    assert collector.stats().failed == 2


async def test_on_error_may_add_again() -> None:
    sink = Sink()
    failures = itertools.count()

    async def flush(items: list[int]) -> None:
        if next(failures) < 2:
            raise ConnectionError
        await sink(items)

    def again(items: list[int], error: Exception) -> None:
        assert all(collector.try_add(item) for item in items)

    async with BatchCollector(flush, max_size=3, max_wait=1, on_error=again) as collector:
        for item in range(3):
            await collector.add(item)
        await asyncio.sleep(10)
        assert sink.batches == [[0, 1, 2]]


async def test_a_flush_that_is_cancelled_from_inside_is_an_unknown_outcome_and_the_collector_goes_on() -> None:
    told = Told()

    async def flush(items: list[str]) -> list[str]:
        if "a" in items:
            gone = asyncio.get_running_loop().create_future()
            gone.cancel()
            await gone
        return items

    async with BatchCollector(flush, max_size=2, max_wait=1, on_error=told) as collector:
        await collector.add("a")
        with pytest.raises(OutcomeUnknown) as raised:
            await collector.submit("b")
        assert raised.value.executed == "maybe"
        assert isinstance(raised.value.__cause__, asyncio.CancelledError)
        assert told.items == ["a"]
        await collector.add("c")
        assert await collector.submit("d") == "d"


async def test_a_flush_task_that_somebody_cancels_before_it_begins_is_told() -> None:
    told = Told()
    sink = Sink()
    async with BatchCollector(sink, max_size=1, max_wait=1, on_error=told, name="orders") as collector:
        await collector.add("a")
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "meshkit:orders:flush"]
        task.cancel()
        await collector.add("b")
    assert (told.items, sink.items) == (["a"], ["b"])


def test_an_interrupt_in_a_flush_comes_out_and_the_batch_is_told() -> None:
    told = Told()

    def flush(items: list[str]) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told) as collector:
            await collector.add("a")
            await asyncio.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run(main)
    assert [(items, type(error)) for items, error in told.calls] == [(["a"], OutcomeUnknown)]


async def test_results_that_cannot_be_read_are_a_failure_like_any_other() -> None:
    class Lazy(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise ConnectionError("the cursor is closed")

    async def flush(items: list[int]) -> Lazy:
        return Lazy(items)

    async with BatchCollector(flush, max_size=2, max_wait=1) as collector:
        for _ in range(2):
            results = await asyncio.gather(collector.submit(1), collector.submit(2), return_exceptions=True)
            assert [type(result) for result in results] == [ConnectionError] * 2


async def test_a_group_of_errors_is_told_as_it_is_unless_it_holds_a_cancellation() -> None:
    told = Told()

    async def flush(items: list[Any]) -> None:
        raise BaseExceptionGroup("both", items)

    async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told) as collector:
        await collector.add(ValueError())
        await collector.add(asyncio.CancelledError())
    assert [type(error) for _, error in told.calls] == [ExceptionGroup, OutcomeUnknown]


# --- inside flush


async def test_adding_from_inside_flush_is_legal() -> None:
    batches: list[list[int]] = []

    async def flush(items: list[int]) -> None:
        batches.append(items)
        for item in items:
            if item:
                await collector.add(item - 1)

    async with BatchCollector(flush, max_size=2, max_wait=100) as collector:
        await collector.add(3)
        await collector.add(2)
    assert batches == [[3, 2], [2, 1], [1, 0], [0]]  # what is added while stopping is flushed as well, and at once
    assert asyncio.get_running_loop().time() == 0.0


async def test_adding_from_inside_flush_to_a_full_collector_is_refused_instead_of_waiting_forever() -> None:
    refused: list[BatchFull] = []

    async def flush(items: list[int]) -> None:
        assert not collector.try_add(7)

        async def child() -> None:
            with pytest.raises(BatchFull) as raised:
                await collector.add(8)
            refused.append(raised.value)

        await child()
        await asyncio.create_task(child())  # also in a task that flush has started

    async with BatchCollector(flush, max_size=2, max_wait=1, max_pending=2, name="orders") as collector:
        await collector.add(0)
        await collector.add(1)
        await collector.flush()
        assert [(e.name, e.max_pending) for e in refused] == [("orders", 2)] * 2
        assert collector.stats().flushed == 2


async def test_adding_from_inside_flush_does_not_wait_behind_those_who_wait_for_that_flush() -> None:
    inside: dict[str, contextvars.Context] = {}
    tried: list[tuple[bool, bool]] = []
    seconds = {"a": 1.0, "b": 2.0}

    async def flush(items: list[str]) -> None:
        inside[items[0]] = contextvars.copy_context()
        await asyncio.sleep(seconds.get(items[0], 0))

    def observer(event: Event) -> None:
        if not tried:  # a has ended, c is woken but has not run, and b is being flushed
            tried.append((collector.try_add("outside"), inside["b"].run(collector.try_add, "inside")))

    async with BatchCollector(
        flush, max_size=1, max_wait=1, max_pending=2, concurrency=2, observer=observer
    ) as collector:
        adders = [asyncio.create_task(collector.add(item)) for item in "abcd"]
        await asyncio.gather(*adders)
        await collector.flush()
    assert tried == [(False, True)]
    assert list(inside) == ["a", "b", "inside", "c", "d"]  # c, which found its place taken, kept its turn


async def test_leaving_from_inside_flush_is_refused() -> None:
    errors: list[str] = []

    async def flush(items: list[int]) -> None:
        with pytest.raises(RuntimeError) as raised:
            await collector.__aexit__()
        errors.append(str(raised.value))

    async with BatchCollector(flush, max_size=1, max_wait=1, name="orders") as collector:
        await collector.add(0)
    assert errors == ["orders: stop() inside flush would wait for itself; use add() there"]
    assert collector.stats().flushed == 1


@pytest.mark.parametrize("verb", ["submit", "flush", "stop"])
async def test_what_would_wait_for_its_own_flush_is_refused(verb: str) -> None:
    errors: list[str] = []

    async def flush(items: list[int]) -> list[int]:
        with pytest.raises(RuntimeError) as raised:
            await (collector.submit(1) if verb == "submit" else getattr(collector, verb)())
        errors.append(str(raised.value))
        return items

    async with BatchCollector(flush, max_size=1, max_wait=1, name="orders") as collector:
        await collector.add(0)
    assert errors == [f"orders: {verb}() inside flush would wait for itself; use add() there"]


async def test_a_task_that_outlives_the_flush_that_started_it_is_outside() -> None:
    tasks: list[asyncio.Task[str]] = []

    async def flush(items: list[str]) -> list[str]:
        if items == ["first"]:
            tasks.append(asyncio.create_task(later()))
        return items

    async def later() -> str:
        await asyncio.sleep(1)
        for _ in range(5):
            await collector.add("filler")
        return await collector.submit("later")

    async with BatchCollector(flush, max_size=1, max_wait=1, max_pending=1) as collector:
        await collector.add("first")
        await asyncio.sleep(5)
        assert await tasks[0] == "later"


async def test_a_collector_that_was_opened_inside_a_flush_is_inside_it() -> None:
    outer_refused: list[str] = []

    async def inner_flush(items: list[int]) -> None:
        with pytest.raises(RuntimeError, match="outer"):
            await outer.flush()
        outer_refused.append("yes")

    async def outer_flush(items: list[int]) -> list[int]:
        async with BatchCollector(inner_flush, max_size=1, max_wait=1, name="inner") as inner:
            await inner.add(1)
            await inner.flush()  # legal: this is inside of outer's flush, not of inner's
        return items

    async with BatchCollector(outer_flush, max_size=1, max_wait=1, name="outer") as outer:
        assert await outer.submit(0) == 0
    assert outer_refused == ["yes"]


# --- context, tasks, memory


async def test_flush_sees_the_context_of_whoever_opened_the_collector() -> None:
    user = contextvars.ContextVar("user", default="nobody")
    seen: list[str] = []

    async def flush(items: list[int]) -> None:
        seen.append(user.get())
        user.set("flush")

    async def add(name: str) -> None:
        user.set(name)
        await collector.add(1)

    user.set("opener")
    async with BatchCollector(flush, max_size=1, max_wait=1) as collector:
        await asyncio.gather(add("alice"), add("bob"))
        await collector.flush()
    assert seen == ["opener", "opener"]


async def test_items_are_not_kept_alive_by_tasks_that_flush_has_started() -> None:
    class Thing:
        pass

    forever = asyncio.Event()
    tasks: list[asyncio.Task[bool]] = []

    async def flush(items: list[Thing]) -> None:
        tasks.append(asyncio.create_task(forever.wait()))

    async with BatchCollector(flush, max_size=1, max_wait=1) as collector:
        thing = Thing()
        alive = weakref.ref(thing)
        await collector.add(thing)
        del thing
        await collector.flush()
        gc.collect()
        assert alive() is None
    forever.set()
    await asyncio.gather(*tasks)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_it_keeps_its_promises_with_eager_tasks() -> None:
    sink = Sink()
    collector: BatchCollector[int, Any]

    async def flush(items: list[int]) -> list[str]:
        for item in items:
            if item > 0:
                collector.try_add(-item)
        return cast("list[str]", await sink(items))

    async def main() -> None:
        nonlocal collector
        loop = asyncio.get_running_loop()
        loop.set_task_factory(cast("Any", asyncio).eager_task_factory)
        async with BatchCollector(flush, max_size=2, max_wait=1, max_pending=50) as collector:
            for item in range(1, 11):
                await collector.add(item)
            assert await collector.submit(11) == "done 11"
            await collector.flush()
        assert sorted(item for item in sink.items if item > 0) == list(range(1, 12))
        assert sorted(-item for item in sink.items if item < 0) == list(range(1, 12))
        assert sink.most_running == 1

    run(main)


def begins_at_once(loop: asyncio.AbstractEventLoop, coroutine: Any, **_: Any) -> Any:
    """Make no task of what raises before its first await: what eager tasks do, on Python 3.11 too."""
    coroutine.send(None)
    raise AssertionError


def test_an_exit_out_of_an_eager_flush_comes_out_and_the_batch_is_told() -> None:
    told = Told()

    def flush(items: list[str]) -> None:
        if items == ["a"]:
            raise SystemExit(3)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told) as collector:
            loop.set_task_factory(begins_at_once)
            with pytest.raises(SystemExit):
                await collector.add("a")
            loop.set_task_factory(None)
            await collector.add("b")
        assert (collector.stats().flushed, collector.stats().failed) == (1, 1)

    run(main)
    assert [(items, type(error)) for items, error in told.calls] == [(["a"], OutcomeUnknown)]


def test_an_exit_out_of_the_next_eager_flush_does_not_keep_the_last_batch_from_being_told() -> None:
    told = Told()

    async def flush(items: list[str]) -> None:
        loop = asyncio.get_running_loop()
        if items == ["b"]:
            loop.set_task_factory(None)
            raise SystemExit(3)
        await asyncio.sleep(1)
        loop.set_task_factory(begins_at_once)
        raise ConnectionError

    async def main() -> None:
        async with BatchCollector(flush, max_size=1, max_wait=1, on_error=told) as collector:
            await collector.add("a")
            await collector.add("b")
            await asyncio.sleep(5)

    with pytest.raises(SystemExit):
        run(main)
    assert told.items == ["a", "b"]
