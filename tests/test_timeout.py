import asyncio
import contextlib
import math
import pickle
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from meshkit.errors import CallTimeout, OutcomeUnknown
from meshkit.events import Event
from meshkit.guard import stack
from meshkit.testing import VirtualTimeLoop, cancellation_points, run
from meshkit.timeout import TimedOut, Timeout


def clock() -> float:
    return asyncio.get_running_loop().time()


async def slow(seconds: float = 1.0, result: str = "done") -> str:
    await asyncio.sleep(seconds)
    return result


async def test_what_is_in_time_returns_its_result_and_leaves_no_timer() -> None:
    timeout = Timeout(2.0)
    assert await timeout.call(slow, 1.0, result="x") == "x"
    assert isinstance(loop := asyncio.get_running_loop(), VirtualTimeLoop)
    assert loop.live_timers() == []


async def test_what_is_late_is_cut_at_its_await_and_raises_calltimeout() -> None:
    cleaned_up = []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            cleaned_up.append(clock())

    with pytest.raises(CallTimeout) as caught:
        await Timeout(0.2, name="fetch").call(work)
    assert clock() == cleaned_up[0] == pytest.approx(0.2)
    error = caught.value
    assert (error.name, error.timeout, error.executed) == ("fetch", 0.2, "maybe")
    assert isinstance(error, OutcomeUnknown)
    assert isinstance(error, TimeoutError)
    assert str(error) == "fetch: no result within 0.2 s; it may still have happened"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), type(copy.__cause__)) == (str(error), asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the cancellation was only ours"
    await asyncio.sleep(1)


async def test_the_cause_shows_where_it_was_waiting() -> None:
    with pytest.raises(CallTimeout) as caught:
        await Timeout(0.2).call(slow)
    cause = caught.value.__cause__
    assert isinstance(cause, asyncio.CancelledError)
    functions = []
    traceback = cause.__traceback__
    while traceback is not None:
        functions.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert "slow" in functions


async def test_the_decorator_and_the_block_limit_as_call_does() -> None:
    timeout = Timeout(0.5)

    @timeout
    async def decorated(seconds: float, *, result: str) -> str:
        return await slow(seconds, result)

    assert await decorated(0.1, result="x") == "x"
    with pytest.raises(CallTimeout):
        await decorated(1.0, result="x")
    async with timeout:
        await asyncio.sleep(0.4)
    start = clock()
    with pytest.raises(CallTimeout):
        async with timeout:
            await asyncio.sleep(1)
    assert clock() - start == pytest.approx(0.5)


def test_a_plain_function_cannot_be_decorated() -> None:
    with pytest.raises(TypeError, match="@Timeout guards async functions"):
        Timeout(1.0)(lambda: None)  # type: ignore[arg-type, return-value]


async def test_errors_of_the_call_pass_untouched_also_its_own_timeouterror() -> None:
    raised: list[BaseException] = [ValueError("x"), TimeoutError("its own"), CallTimeout(name="inner", timeout=0.1)]

    async def work(error: BaseException) -> None:
        await asyncio.sleep(0.1)
        raise error

    for error in raised:
        with pytest.raises(type(error)) as caught:
            await Timeout(1.0).call(work, error)
        assert caught.value is error
        assert error.__cause__ is None
    with pytest.raises(KeyError):
        async with Timeout(1.0):
            raise KeyError


async def test_an_error_that_a_late_call_makes_of_its_cancellation_is_raised_as_it_is() -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            raise ValueError("interrupted") from None

    with pytest.raises(ValueError, match="interrupted"):
        await Timeout(0.2).call(work)
    await asyncio.sleep(0.1)


async def test_a_call_that_returns_although_it_was_cancelled_keeps_its_result() -> None:
    async def work() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)
        return "saved"

    assert await Timeout(0.2).call(work) == "saved"
    assert clock() == pytest.approx(0.2)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(1)


async def test_a_late_call_is_cancelled_again_at_each_further_await() -> None:
    cancelled = 0

    async def work() -> None:
        nonlocal cancelled
        for _ in range(3):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                cancelled += 1
        await asyncio.sleep(1)

    with pytest.raises(CallTimeout):
        await Timeout(0.2).call(work)
    assert cancelled == 3
    assert clock() == pytest.approx(0.2)


@pytest.mark.parametrize("result_first", [True, False])
async def test_a_result_that_came_in_the_same_pass_of_the_loop_is_kept(result_first: bool) -> None:
    reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def arrive() -> None:
        if not reply.done():
            reply.set_result("just in time")

    async def wait() -> str:
        return await reply

    if result_first:
        asyncio.get_running_loop().call_at(1.0, arrive)
        assert await Timeout(1.0).call(wait) == "just in time"
    else:  # the timer of the timeout was set first: the future was cancelled before the result could reach it
        call = asyncio.create_task(Timeout(1.0).call(wait))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_at(1.0, arrive)
        with pytest.raises(CallTimeout):
            await call


async def test_a_call_that_never_awaits_cannot_be_cut() -> None:
    async def work() -> str:
        return "at once"

    assert await Timeout(1e-9).call(work) == "at once"


async def test_an_enclosing_deadline_that_comes_first_wins() -> None:
    with anyio.move_on_after(0.1) as scope:
        await Timeout(1.0).call(slow, 5.0)
    assert scope.cancelled_caught
    assert clock() == pytest.approx(0.1)
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.1):
            await Timeout(1.0).call(slow, 5.0)
    assert not isinstance(caught.value, CallTimeout)


async def test_an_outer_cancellation_at_the_same_moment_comes_first() -> None:
    with anyio.move_on_after(1.0) as scope:
        await Timeout(1.0).call(slow, 5.0)
    assert scope.cancelled_caught
    assert clock() == 1.0

    call = asyncio.create_task(Timeout(1.0).call(slow, 5.0))
    await asyncio.sleep(1.0)  # wakes in the pass of the loop in which the timeout cancels the call
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()


async def test_a_cancellation_of_the_task_is_never_converted() -> None:
    task = asyncio.create_task(Timeout(1.0).call(slow, 5.0))
    await asyncio.sleep(0.5)
    task.cancel("by hand")
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_errors_in_a_group_come_out_when_the_rest_of_it_was_cut() -> None:
    async def work() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(slow, 5.0)
            try:
                await asyncio.sleep(5)
            finally:
                raise ValueError("while it was cut")

    with pytest.raises(ExceptionGroup) as caught:
        await Timeout(0.5).call(work)
    assert caught.group_contains(ValueError)
    assert not caught.group_contains(asyncio.CancelledError)

    async def only_cut() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(slow, 5.0)

    with pytest.raises(CallTimeout):
        await Timeout(0.5).call(only_cut)


async def test_one_object_serves_many_tasks_at_once_and_nests_in_itself() -> None:
    timeout = Timeout(1.0)

    async def block(seconds: float) -> str:
        try:
            async with timeout:
                await asyncio.sleep(seconds)
                async with timeout:  # a limit of its own, from here on
                    await asyncio.sleep(0.4)
                await asyncio.sleep(0.1)
        except CallTimeout:
            return f"cut at {clock():.2f}"
        return "in time"

    results = await asyncio.gather(*(block(seconds) for seconds in [0.1, 0.3, 0.45, 0.55, 0.7, 2.0] * 20))
    assert results == ["in time", "in time", "in time", "cut at 1.00", "cut at 1.00", "cut at 1.00"] * 20
    assert timeout._entered == {}


async def test_a_block_that_is_left_in_another_task_is_an_error_that_says_so() -> None:
    timeout = Timeout(1.0)
    await asyncio.create_task(timeout.__aenter__())
    with pytest.raises(RuntimeError, match=r"Timeout\(1, name='timeout'\) is left in another task"):
        await timeout.__aexit__(None, None, None)


def test_wherever_it_is_cancelled_the_cancellation_arrives_and_nothing_is_left() -> None:
    async def block(timeout: Timeout) -> str:
        async with timeout:
            await asyncio.sleep(0.1)
            await asyncio.sleep(0.1)
        return "done"

    verbs: list[Callable[[Timeout], Any]] = [lambda timeout: timeout.call(slow, 0.2), block]
    for verb in verbs:
        for point in cancellation_points():

            async def main() -> None:
                timeout = Timeout(0.5)
                cancelled = await point.cancel(verb(timeout))  # noqa: B023 - runs within this turn of the loops
                assert cancelled == point.reached  # noqa: B023
                assert cancelled or point.result == "done"  # noqa: B023
                assert timeout._entered == {}

            run(main)


def test_it_works_in_one_loop_after_another() -> None:
    timeout = Timeout(0.5)

    async def main() -> None:
        await asyncio.sleep(100)
        async with timeout:
            await asyncio.sleep(0.4)
        with pytest.raises(CallTimeout):
            await timeout.call(slow)

    run(main)
    run(main)


async def test_the_observer_hears_of_what_was_cut_and_of_nothing_else() -> None:
    seen: list[Event] = []
    timeout = Timeout(0.5, name="fetch", observer=seen.append)
    await timeout.call(slow, 0.1)
    with anyio.move_on_after(0.1):
        await timeout.call(slow)
    assert seen == []
    with pytest.raises(CallTimeout):
        await timeout.call(slow)
    assert seen == [TimedOut("fetch", 0.5)]


def test_it_says_what_it_is_also_to_a_stack() -> None:
    timeout = Timeout(2, name="fetch")
    assert repr(timeout) == "Timeout(2, name='fetch')"
    assert timeout.time_limit == 2.0
    with pytest.raises(ValueError, match="the longer limit inside"):
        stack(Timeout(1.0), timeout)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_a_timeout_must_be_finite_and_more_than_zero(bad: float) -> None:
    with pytest.raises(ValueError, match="timeout must be finite and more than zero seconds, not"):
        Timeout(bad)
    with pytest.raises(TypeError, match="timeout must be a number of seconds"):
        Timeout("1")  # type: ignore[arg-type]
