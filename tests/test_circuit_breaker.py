"""What CircuitBreaker promises to those who call through it; the core has tests of its own."""

import asyncio
import pickle
import traceback
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest

from meshkit.circuit_breaker import CircuitBreaker, CircuitChanged, FailureRate, State
from meshkit.errors import CircuitOpen
from meshkit.events import Event
from meshkit.testing import cancellation_points, run


def seen(breaker: CircuitBreaker) -> State:
    """Return the state; a type checker would take `breaker.state` to be what it was asserted to be before."""
    return breaker.state


async def ok(value: int = 1) -> int:
    return value


async def boom() -> None:
    raise ConnectionError("no route")


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(ConnectionError):
            await breaker.call(boom)


def tripped(**settings: Any) -> CircuitBreaker:
    """Return a breaker that opened just now."""
    breaker = CircuitBreaker(1, **settings)
    breaker.record_failure()
    assert seen(breaker) is State.OPEN
    return breaker


# --- closed, open, half-open, closed -----------------------------------------------------------------------


async def test_so_many_failures_in_a_row_open_it_and_calls_are_refused_without_being_made() -> None:
    breaker = CircuitBreaker(failure_threshold=3, reset_timeout=30.0, name="bob")
    await fail(breaker, 2)
    assert await breaker.call(ok, 7) == 7  # success in between: they were not in a row
    await fail(breaker, 2)
    assert seen(breaker) is State.CLOSED
    await fail(breaker)
    assert seen(breaker) is State.OPEN
    calls: list[int] = []

    async def called() -> None:
        calls.append(1)

    with pytest.raises(CircuitOpen) as caught:
        await breaker.call(called)
    assert calls == []
    error = caught.value
    assert (error.name, error.state, error.retry_after, error.executed) == ("bob", "open", 30.0, "no")
    assert str(error) == "bob: the circuit is open, the call was not made; try again in 30 s"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_retry_after_shrinks_with_time_and_then_a_probe_goes_through_and_closes_it() -> None:
    breaker = tripped(reset_timeout=30.0)
    await asyncio.sleep(29)
    with pytest.raises(CircuitOpen) as caught:
        await breaker.call(ok)
    assert caught.value.retry_after == pytest.approx(1.0)
    assert breaker.stats().retry_after == pytest.approx(1.0)
    await asyncio.sleep(1)
    assert seen(breaker) is State.HALF_OPEN
    assert await breaker.call(ok, 5) == 5
    assert seen(breaker) is State.CLOSED


async def test_of_fifty_concurrent_callers_at_half_open_exactly_one_is_the_probe() -> None:
    breaker = tripped(reset_timeout=30.0, name="bob")
    await asyncio.sleep(30)
    made = 0

    async def probe() -> str:
        nonlocal made
        made += 1
        await asyncio.sleep(1)
        return "fine"

    results = await asyncio.gather(*(breaker.call(probe) for _ in range(50)), return_exceptions=True)
    assert made == 1
    assert results.count("fine") == 1
    refused = [result for result in results if isinstance(result, CircuitOpen)]
    assert len(refused) == 49
    assert {(error.state, error.retry_after) for error in refused} == {("half-open", 30.0)}  # at the latest then
    assert seen(breaker) is State.CLOSED
    assert breaker.stats().refused == 49


@pytest.mark.parametrize("form", ["call", "decorated", "block", "by hand"])
async def test_half_open_max_bounds_the_probes_in_every_form(form: str) -> None:
    breaker = tripped(half_open_max=3)
    await asyncio.sleep(30)
    under_way = peak = 0

    async def probe() -> None:
        nonlocal under_way, peak
        under_way += 1
        peak = max(peak, under_way)
        await asyncio.sleep(1)
        under_way -= 1

    decorated = breaker(probe)

    async def through() -> None:
        if form == "call":
            await breaker.call(probe)
        elif form == "decorated":
            await decorated()
        elif form == "block":
            async with breaker:
                await probe()
        elif breaker.allow_request():
            await probe()
            breaker.record_success()
        else:
            raise CircuitOpen(name="by hand", state="half-open")

    results = await asyncio.gather(*(through() for _ in range(50)), return_exceptions=True)
    assert peak == 3
    assert sum(isinstance(result, CircuitOpen) for result in results) == 47
    assert seen(breaker) is State.CLOSED, "three successes are enough"


async def test_one_failed_probe_opens_it_again_for_a_full_break() -> None:
    breaker = tripped(reset_timeout=10.0, half_open_max=3)
    await asyncio.sleep(12)
    await breaker.call(ok)
    await breaker.call(ok)
    await fail(breaker)
    assert seen(breaker) is State.OPEN
    assert breaker.stats().retry_after == 10.0


async def test_breaks_grow_up_to_the_maximum_and_start_anew_after_closing() -> None:
    breaker = tripped(reset_timeout=10.0, max_reset_timeout=35.0)
    lengths = []
    for _ in range(4):
        wait = breaker.stats().retry_after
        assert wait is not None
        lengths.append(wait)
        await asyncio.sleep(wait)
        await fail(breaker)
    assert lengths == [10.0, 20.0, 35.0, 35.0]
    await asyncio.sleep(35)
    await breaker.call(ok)
    await fail(breaker)
    assert breaker.stats().retry_after == 10.0


async def test_reading_the_state_changes_nothing() -> None:
    events: list[Event] = []
    breaker = tripped(observer=events.append)
    await asyncio.sleep(30)
    for _ in range(3):
        assert seen(breaker) is State.HALF_OPEN
        assert breaker.stats().state is State.HALF_OPEN
        assert "half-open" in repr(breaker)
        assert not breaker.idle
    assert [event.after for event in events if isinstance(event, CircuitChanged)] == [State.OPEN]
    results = await asyncio.gather(*(breaker.call(asyncio.sleep, 1) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, CircuitOpen) for result in results) == 4, "the one place was still free"


async def test_refusals_are_freshly_made_and_their_traceback_never_grows() -> None:
    breaker = tripped()
    errors: list[CircuitOpen] = []
    for _ in range(50):
        with pytest.raises(CircuitOpen) as caught:
            await breaker.call(ok)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 50
    assert len({len(traceback.extract_tb(error.__traceback__)) for error in errors}) == 1
    assert all(error.__context__ is None for error in errors)


# --- what does not count -----------------------------------------------------------------------------------


async def test_two_cancelled_calls_at_threshold_two_leave_it_closed() -> None:
    breaker = CircuitBreaker(failure_threshold=2)
    for _ in range(2):
        with anyio.move_on_after(1):
            await breaker.call(forever)
    assert seen(breaker) is State.CLOSED
    assert breaker.idle


async def test_a_cancelled_call_between_failures_neither_counts_nor_resets() -> None:
    breaker = CircuitBreaker(failure_threshold=2)
    await fail(breaker)
    with anyio.move_on_after(1):
        await breaker.call(forever)
    assert (seen(breaker), breaker.stats().failures) == (State.CLOSED, 1)
    await fail(breaker)
    assert seen(breaker) is State.OPEN


async def test_an_ignored_exception_between_failures_does_not_reset_the_count() -> None:
    breaker = CircuitBreaker(failure_threshold=2, trips_on=ConnectionError)

    async def bad_input() -> None:
        raise ValueError

    await fail(breaker)
    for _ in range(5):
        with pytest.raises(ValueError):
            await breaker.call(bad_input)
    assert breaker.stats().failures == 1
    await fail(breaker)
    assert seen(breaker) is State.OPEN


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_passes_through_and_never_counts(kind: type[BaseException]) -> None:
    breaker = CircuitBreaker(failure_threshold=1)

    async def interrupted() -> None:
        raise kind

    async def interrupted_in_a_group() -> None:
        raise BaseExceptionGroup("group", [ConnectionError(), kind()])

    for coroutine in (breaker.call(interrupted), breaker(interrupted)(), breaker.call(interrupted_in_a_group)):
        with pytest.raises((kind, BaseExceptionGroup)):
            coroutine.send(None)
    assert seen(breaker) is State.CLOSED
    assert breaker.idle


# --- leases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["call", "decorated", "block"])
def test_a_call_cancelled_at_any_await_gives_its_place_back_exactly_once(form: str) -> None:
    async def work() -> None:
        await asyncio.sleep(1)
        await asyncio.sleep(1)

    for point in cancellation_points():

        async def main() -> None:
            breaker = tripped(reset_timeout=30.0)
            await asyncio.sleep(30)
            decorated = breaker(work)

            async def block() -> None:
                async with breaker:
                    await work()

            verb: dict[str, Coroutine[Any, Any, None]]
            verb = {"call": breaker.call(work), "decorated": decorated(), "block": block()}
            coroutine = verb.pop(form)
            for other in verb.values():
                other.close()
            if await point.cancel(coroutine):  # noqa: B023 - runs within this iteration
                assert seen(breaker) is State.HALF_OPEN
                assert breaker.stats().probes == 0
                assert breaker.allow_request(), "the place of the probe was not given back"
                assert not breaker.allow_request(), "it was given back twice"
            else:
                assert seen(breaker) is State.CLOSED

        run(main)


def test_a_closed_breaker_learns_nothing_from_a_call_cancelled_at_any_await() -> None:
    thresholds: list[int | FailureRate] = [1, FailureRate(calls=20), FailureRate(slow_call=9.0)]
    for threshold in thresholds:
        for point in cancellation_points():

            async def main() -> None:
                breaker = CircuitBreaker(threshold)  # noqa: B023 - runs within this iteration
                if await point.cancel(breaker.call(asyncio.sleep, 1)):  # noqa: B023
                    assert breaker.idle
                    assert breaker.stats().calls == 0

            run(main)


async def test_an_ignored_probe_gives_its_place_back() -> None:
    breaker = tripped(trips_on=ConnectionError)
    await asyncio.sleep(30)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await breaker.call(divide)
        assert seen(breaker) is State.HALF_OPEN
    await breaker.call(ok)
    assert seen(breaker) is State.CLOSED


async def divide() -> float:
    return 1 / 0


async def test_a_probe_that_never_ends_expires_after_reset_timeout() -> None:
    breaker = tripped(reset_timeout=30.0)
    await asyncio.sleep(30)
    hangs = asyncio.create_task(breaker.call(forever))
    await asyncio.sleep(29)
    with pytest.raises(CircuitOpen) as caught:
        await breaker.call(ok)
    assert caught.value.retry_after == pytest.approx(1.0)
    await asyncio.sleep(1)
    await breaker.call(ok)
    assert seen(breaker) is State.CLOSED
    hangs.cancel()
    await asyncio.gather(hangs, return_exceptions=True)
    assert breaker.idle


async def test_probes_that_take_longer_than_reset_timeout_can_still_close_the_circuit() -> None:
    breaker = tripped(reset_timeout=1.0)
    await asyncio.sleep(1)
    first = asyncio.create_task(breaker.call(asyncio.sleep, 5, "up"))
    for _ in range(3):
        await asyncio.sleep(1)
        assert seen(breaker) is State.HALF_OPEN
        with pytest.raises(TimeoutError), anyio.fail_after(0.5):
            await breaker.call(forever)
    assert await first == "up"
    assert seen(breaker) is State.CLOSED


@pytest.mark.parametrize("outcome", ["success", "failure"])
@pytest.mark.parametrize("form", ["call", "decorated", "block", "by hand"])
async def test_a_straggler_admitted_in_an_older_state_changes_nothing(form: str, outcome: str) -> None:
    breaker = CircuitBreaker(failure_threshold=2, reset_timeout=10.0, half_open_max=2)
    go = asyncio.Event()

    async def work() -> None:
        await go.wait()
        if outcome == "failure":
            raise ConnectionError

    async def straggle() -> None:
        if form == "call":
            await breaker.call(work)
        elif form == "decorated":
            await breaker(work)()
        elif form == "block":
            async with breaker:
                await work()
        else:
            assert breaker.allow_request()
            await go.wait()
            (breaker.record_success if outcome == "success" else breaker.record_failure)()

    async def while_it_is(state: State, stragglers: "list[asyncio.Task[None]]") -> None:
        before = breaker.stats()
        assert before.state is state
        go.set()
        await asyncio.gather(*stragglers, return_exceptions=True)
        go.clear()
        assert breaker.stats() == before, f"{form}, {outcome}, while {state}"

    def start(number: int) -> "list[asyncio.Task[None]]":
        return [asyncio.create_task(straggle()) for _ in range(number)]

    stragglers = start(3)
    await asyncio.sleep(0)
    await fail(breaker, 2)
    await while_it_is(State.OPEN, stragglers)

    breaker.reset()
    stragglers = start(3)
    await asyncio.sleep(0)
    await fail(breaker, 2)
    await asyncio.sleep(10)
    await breaker.call(ok)
    await while_it_is(State.HALF_OPEN, stragglers)

    breaker.reset()
    stragglers = start(3)
    await asyncio.sleep(0)
    await fail(breaker, 2)
    await asyncio.sleep(10)
    await breaker.call(ok)
    await breaker.call(ok)
    await fail(breaker)  # one failure is remembered, that no success of a straggler may reset
    await while_it_is(State.CLOSED, stragglers)
    await fail(breaker)
    assert seen(breaker) is State.OPEN


async def test_stats_say_how_many_probes_hold_a_place_and_only_while_half_open() -> None:
    breaker = tripped(reset_timeout=10.0, half_open_max=3)
    decorated = breaker(asyncio.sleep)

    async def block() -> None:
        async with breaker:
            await asyncio.sleep(2)

    assert breaker.stats().probes == 0
    await asyncio.sleep(10)
    tasks = [asyncio.create_task(coroutine) for coroutine in (breaker.call(asyncio.sleep, 1), decorated(2), block())]
    assert breaker.stats().probes == 0, "a call that has not started is no probe yet"
    await asyncio.sleep(0.5)
    assert breaker.stats().probes == 3
    await asyncio.sleep(1)
    assert (breaker.stats().probes, breaker.stats().calls) == (2, 1)
    await asyncio.gather(*tasks)
    assert seen(breaker) is State.CLOSED
    async with breaker:
        assert breaker.stats().probes == 0


def test_a_probe_whose_coroutine_is_thrown_away_gives_its_place_back() -> None:
    async def main() -> None:
        breaker = tripped(reset_timeout=10.0)
        await asyncio.sleep(10)
        coroutine = breaker.call(forever)
        coroutine.send(None)
        assert breaker.stats().probes == 1
        coroutine.close()
        assert breaker.stats().probes == 0

    run(main)
