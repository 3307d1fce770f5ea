"""Cancellation at every await: that the points are hit, that the three ways find what they are for, and their ends."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
import pytest

from meshkit.testing import CancellationPoint, cancellation_points, run

Scenario = Callable[[CancellationPoint], Coroutine[Any, Any, None]]


def drive(scenario: Scenario) -> list[CancellationPoint]:
    """Run `scenario` once for each point, and return the points."""
    points = []
    for point in cancellation_points():
        run(lambda point=point: scenario(point))  # type: ignore[misc]  # mypy infers no type for it
        points.append(point)
    return points


def described(points: list[CancellationPoint]) -> list[tuple[str, int, bool]]:
    return [(point.moment, point.index, point.reached) for point in points]


# --- which points there are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("awaits", [0, 1, 2, 5])
def test_each_await_is_cancelled_in_three_ways_and_then_the_scenario_ends_by_itself(awaits: int) -> None:
    outcomes = []

    async def scenario(point: CancellationPoint) -> None:
        done = 0

        async def verb() -> int:
            nonlocal done
            for _ in range(awaits):
                await asyncio.sleep(1)
                done += 1
            return done

        cancelled = await point.cancel(verb())
        outcomes.append(cancelled)
        assert cancelled is point.reached
        assert done == (point.index if cancelled else awaits)
        assert point.result == (None if cancelled else awaits)

    points = drive(scenario)
    expected = [
        (moment, index, index < awaits) for moment in ("waiting", "woken", "scope") for index in range(awaits + 1)
    ]
    assert described(points) == expected
    assert outcomes == [reached for _, _, reached in expected]


def test_a_bare_pass_of_the_loop_is_an_await_too() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> str:
            await asyncio.sleep(0)
            return "done"

        assert await point.cancel(verb()) is point.reached

    assert sum(point.reached for point in drive(scenario)) == 3


def test_awaits_inside_of_nested_coroutines_and_generators_count() -> None:
    async def numbers() -> Any:
        for number in range(2):
            await asyncio.sleep(1)
            yield number

    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> None:
            async for _ in numbers():
                await asyncio.sleep(1)

        await point.cancel(verb())

    assert sum(point.reached for point in drive(scenario)) == 3 * 4


def test_a_point_says_what_it_is() -> None:
    point = CancellationPoint(3, "woken")
    assert repr(point) == "<CancellationPoint 3 woken>"
    point.reached = True
    assert repr(point) == "<CancellationPoint 3 woken reached>"


# --- what each way finds ------------------------------------------------------------------------------------


class NaiveQueue:
    """Hands an item over to a waiter, and forgets that a waiter may be cancelled before it sees the item."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self.waiters: list[asyncio.Future[str]] = []

    def put(self, item: str) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(item)
                return
        self.items.append(item)

    async def get(self) -> str:
        if self.items:
            return self.items.pop(0)
        waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return await waiter


class ForgetfulQueue(NaiveQueue):
    """Hands an item over without looking whether the waiter still waits."""

    def put(self, item: str) -> None:
        if self.waiters:
            waiter = self.waiters.pop(0)
            if not waiter.done():
                waiter.set_result(item)
        else:
            self.items.append(item)


def losses(make: Callable[[], NaiveQueue]) -> set[str]:
    """Return the ways in which a cancelled `get` of this queue loses the item, or leaves its waiter behind."""
    found: set[str] = set()

    async def scenario(point: CancellationPoint) -> None:
        queue = make()
        asyncio.get_running_loop().call_later(1, queue.put, "item")
        got = [] if await point.cancel(queue.get()) else [point.result]
        await asyncio.sleep(2)
        if (got or queue.items) != ["item"] or (got == [] and any(not w.cancelled() for w in queue.waiters)):
            found.add(point.moment)

    drive(scenario)
    return found


def test_an_item_that_is_handed_to_nobody_is_found_by_cancelling_while_it_waits() -> None:
    assert losses(ForgetfulQueue) == {"waiting", "woken", "scope"}


def test_an_item_that_arrives_just_before_the_cancellation_is_found_by_cancelling_what_was_woken() -> None:
    assert losses(NaiveQueue) == {"woken"}


def test_clean_up_that_awaits_unshielded_is_found_by_the_scope() -> None:
    async def scenario(point: CancellationPoint) -> None:
        cleaned: list[bool] = []

        async def verb() -> None:
            try:
                await asyncio.sleep(1)
            finally:
                await asyncio.sleep(0.1)
                cleaned.append(True)

        await point.cancel(verb())
        if not cleaned and point.index == 0:
            uncleaned.add(point.moment)

    uncleaned: set[str] = set()
    drive(scenario)
    assert uncleaned == {"scope"}


def test_asyncios_own_queue_loses_nothing() -> None:
    async def scenario(point: CancellationPoint) -> None:
        queue: asyncio.Queue[str] = asyncio.Queue()
        asyncio.get_running_loop().call_later(1, queue.put_nowait, "item")
        got = [] if await point.cancel(queue.get()) else [point.result]
        await asyncio.sleep(2)
        assert got or queue.get_nowait() == "item"

    drive(scenario)


def test_what_was_woken_has_its_result_which_it_never_sees() -> None:
    async def scenario(point: CancellationPoint) -> None:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(5, future.set_result, "there")
        seen = []

        async def verb() -> None:
            seen.append(await future)

        cancelled = await point.cancel(verb())
        now = asyncio.get_running_loop().time()
        if not point.reached:
            assert (cancelled, seen, now) == (False, ["there"], 5)
        elif point.moment == "woken":
            assert (cancelled, seen, now, future.result()) == (True, [], 5, "there")
        else:
            assert (cancelled, seen, now, future.cancelled()) == (True, [], 0, True)
        await asyncio.sleep(10)  # the timer that sets the future: whoever cancelled it has nothing to do with that

    def quiet(point: CancellationPoint) -> Coroutine[Any, Any, None]:
        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # set_result on the cancelled future
            await scenario(point)

        return main()

    drive(quiet)


def test_anyio_scopes_inside_of_the_verb_keep_their_own_cancellations() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> str:
            with anyio.move_on_after(1):
                await asyncio.sleep(10)
            await asyncio.sleep(1)
            return "went on"

        if not await point.cancel(verb()):
            assert point.result == "went on"

    points = drive(scenario)
    assert sum(point.reached for point in points) == 3 * 2


# --- how a scenario may end ---------------------------------------------------------------------------------


def test_a_verb_that_swallows_the_cancellation_returns_its_result() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> str:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                return "swallowed"
            return "done"

        assert not await point.cancel(verb())
        assert point.result == ("swallowed" if point.reached else "done")

    drive(scenario)


def test_a_verb_that_turns_the_cancellation_into_an_error_raises_that() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> None:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                raise ValueError("turned") from None

        if point.index == 0:
            with pytest.raises(ValueError, match="turned"):
                await point.cancel(verb())
        else:
            assert not await point.cancel(verb())

    drive(scenario)


def test_an_error_of_the_verb_itself_is_raised() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> None:
            raise ValueError("its own")

        with pytest.raises(ValueError, match="its own"):
            await point.cancel(verb())

    assert described(drive(scenario)) == [("waiting", 0, False), ("woken", 0, False), ("scope", 0, False)]


def test_an_error_that_is_waited_for_reaches_the_verb() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def fail() -> None:
            await asyncio.sleep(1)
            raise ConnectionError("lost")

        async def verb() -> str:
            task = asyncio.create_task(fail())
            try:
                await task
            except ConnectionError as error:
                return str(error)
            return "no error"

        if not await point.cancel(verb()):
            assert point.result == "lost"

    drive(scenario)


def test_a_verb_that_cancels_itself_counts_as_cancelled() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def verb() -> None:
            raise asyncio.CancelledError

        assert await point.cancel(verb())
        assert not point.reached

    drive(scenario)


def test_a_coroutine_that_was_not_finished_is_closed() -> None:
    closed = []

    async def verb() -> None:
        try:
            while True:
                await asyncio.sleep(1)
        finally:
            closed.append(True)

    def step() -> None:
        driving = CancellationPoint(9, "waiting")._drive(verb(), None)
        next(driving)
        driving.close()

    async def main() -> None:
        step()

    run(main)
    assert closed == [True]


def test_whoever_is_cancelled_while_the_verb_runs_takes_the_verb_along() -> None:
    ended = []

    async def verb() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(asyncio.get_running_loop().time())

    async def main() -> None:
        with anyio.move_on_after(5):
            await CancellationPoint(9, "waiting").cancel(verb())
        await asyncio.sleep(1)

    run(main)
    assert ended == [5]


# --- wrong use ----------------------------------------------------------------------------------------------


def test_a_point_cancels_one_coroutine_only_and_closes_the_other() -> None:
    async def verb() -> None: ...

    async def main() -> None:
        point = CancellationPoint(0, "waiting")
        await point.cancel(verb())
        with pytest.raises(RuntimeError, match="take the next point for the next one"):
            await point.cancel(verb())

    run(main)
    gc.collect()  # a coroutine that was never awaited would warn now


def test_what_is_not_a_coroutine_is_refused_by_saying_what_to_write() -> None:
    async def verb() -> None: ...

    async def main() -> None:
        with pytest.raises(TypeError, match=r"as in point\.cancel\(verb\(\)\), not <function"):
            await CancellationPoint(0, "waiting").cancel(verb)  # type: ignore[arg-type]  # that is the mistake

    run(main)


def test_a_scenario_that_never_cancels_tests_nothing_and_is_told_so() -> None:
    points = cancellation_points()
    next(points)
    with pytest.raises(RuntimeError, match="the scenario never called"):
        next(points)


def test_outside_of_a_task_there_is_nothing_to_cancel() -> None:
    async def verb() -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        raised: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        def in_a_callback() -> None:
            try:
                CancellationPoint(0, "waiting")._drive(verb(), None).send(None)
            except RuntimeError as error:
                raised.set_result(error)

        asyncio.get_running_loop().call_soon(in_a_callback)
        assert "needs an asyncio task" in str(await raised)

    run(main)


@pytest.mark.real_time
async def test_it_works_on_an_ordinary_loop_too() -> None:
    for point in cancellation_points():

        async def verb() -> Awaitable[None] | None:
            await asyncio.sleep(0)
            return None

        assert await point.cancel(verb()) is point.reached
