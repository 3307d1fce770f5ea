"""What submitters get: results, one per item, or errors."""

import asyncio
from collections import deque
from typing import Any
from unittest.mock import Mock

import pytest

from meshkit.batch import BatchCollector
from meshkit.errors import BatchFull, OutcomeUnknown
from tests.test_batch import Sink, Told


async def test_submit_returns_this_items_result() -> None:
    async with BatchCollector(Sink(), max_size=3, max_wait=1) as collector:
        results = await asyncio.gather(*(collector.submit(item) for item in "abcd"))
    assert results == ["done a", "done b", "done c", "done d"]


async def test_submit_nowait_returns_a_future_and_starts_no_task() -> None:
    sink = Sink(seconds=5)
    async with BatchCollector(sink, max_size=3, max_wait=1, max_pending=5) as collector:
        futures = [collector.submit_nowait(item) for item in range(5)]
        with pytest.raises(BatchFull, match="5 items are waiting to be flushed") as caught:
            collector.submit_nowait(5)
        assert caught.value.executed == "no"
        await asyncio.sleep(6)
        assert [future.done() for future in futures] == [True] * 3 + [False] * 2
        futures.append(collector.submit_nowait(5))
        await collector.flush()
        assert [await future for future in futures] == [f"done {item}" for item in range(6)]


async def test_added_and_submitted_items_share_batches() -> None:
    sink = Sink()
    async with BatchCollector(sink, max_size=4, max_wait=1) as collector:
        await collector.add("a")
        first = collector.submit_nowait("b")
        assert collector.try_add("c")
        assert await collector.submit("d") == "done d"
        assert await first == "done b"
        assert sink.batches == [["a", "b", "c", "d"]]


async def test_none_and_false_are_results_like_any_other() -> None:
    async def flush(items: list[int]) -> list[Any]:
        return [None, False, 0]

    async with BatchCollector(flush, max_size=3, max_wait=1) as collector:
        assert await asyncio.gather(*(collector.submit(i) for i in range(3))) == [None, False, 0]


async def test_whatever_flush_raises_goes_to_every_submitter_of_that_batch() -> None:
    told = Told()

    async def flush(items: list[int]) -> list[int]:
        if 0 in items:
            raise ConnectionError("the database is away")
        return items

    async with BatchCollector(flush, max_size=3, max_wait=1, on_error=told) as collector:
        results = await asyncio.gather(*(collector.submit(i) for i in range(6)), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionError] * 3 + [int] * 3
    assert told.calls == []  # every failure is handled once
    assert (collector.stats().failed, collector.stats().flushed) == (3, 3)


async def test_a_result_that_is_an_exception_is_raised_to_that_submitter_only() -> None:
    told = Told()

    async def flush(items: list[int]) -> list[int | Exception]:
        return [ValueError(f"not {item}") if item % 2 else item for item in items]

    async with BatchCollector(flush, max_size=6, max_wait=1, on_error=told) as collector:
        submitted = [collector.submit_nowait(i) for i in range(4)]
        await collector.add(4)
        await collector.add(5)  # nobody waits for this one
        results = await asyncio.gather(*submitted, return_exceptions=True)
    assert [str(result) for result in results] == ["0", "not 1", "2", "not 3"]
    assert [(items, str(error)) for items, error in told.calls] == [([5], "not 5")]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1], "flush returned 1 results for 2 items"),
        ([1, 2, 3], "flush returned 3 results for 2 items"),
        (None, "flush returned a NoneType for 2 items"),
        (7, "flush returned a int for 2 items"),
        ({"a": 1, "b": 2}, "flush returned a dict for 2 items"),
        ({1, 2}, "flush returned a set for 2 items"),
        ("ab", "flush returned a str for 2 items"),
    ],
)
async def test_anything_but_one_result_per_item_is_an_error_to_every_submitter(returned: Any, words: str) -> None:
    told = Told()

    async def flush(items: list[str]) -> Any:
        return returned

    async with BatchCollector(flush, max_size=2, max_wait=1, on_error=told, name="orders") as collector:
        results = await asyncio.gather(collector.submit("a"), collector.submit("b"), return_exceptions=True)
        for result in results:
            assert isinstance(result, RuntimeError)
            assert str(result) == f"orders: {words}; it must return a list of one result for each"
        await collector.add("c")
        await collector.add("d")  # who only adds asks for no result: flush may return what it likes
    assert told.calls == []


async def test_results_may_be_any_collection_that_has_an_order() -> None:
    def flush(items: list[int]) -> deque[int]:
        return deque(items)

    async with BatchCollector(flush, max_size=2, max_wait=1) as collector:
        assert await asyncio.gather(*map(collector.submit, [1, 2])) == [1, 2]


async def test_a_result_that_only_claims_to_be_an_exception_is_a_result() -> None:
    claims = Mock(spec=ValueError)
    assert isinstance(claims, ValueError)

    async def flush(items: list[int]) -> list[Any]:
        return [KeyError(), claims]

    async with BatchCollector(flush, max_size=2, max_wait=1) as collector:
        results = await asyncio.gather(collector.submit(0), collector.submit(1), return_exceptions=True)
    assert type(results[0]) is KeyError
    assert results[1] is claims


async def test_what_cannot_be_raised_in_a_submitter_is_an_unknown_outcome() -> None:
    async def flush(items: list[str]) -> list[Any]:
        return [asyncio.CancelledError(), StopIteration(1), GeneratorExit()]

    async with BatchCollector(flush, max_size=3, max_wait=1, name="orders") as collector:
        results = await asyncio.gather(*(collector.submit(i) for i in "abc"), return_exceptions=True)
    for result, kind in zip(results, [asyncio.CancelledError, StopIteration, GeneratorExit], strict=True):
        assert isinstance(result, OutcomeUnknown)
        assert isinstance(result.__cause__, kind)
        assert result.__notes__ == [f"flush of orders ended with {kind.__name__}"]
