"""What counts as a failure (`trips_on`), and when there are too many (`FailureRate`)."""

import asyncio
import doctest
from types import ModuleType
from typing import Any

import anyio
import pytest

from meshkit import _generations, _trip_rule
from meshkit._generations import Window
from meshkit.circuit_breaker import CircuitBreaker, FailureRate, State
from meshkit.errors import (
    BulkheadFull,
    CallTimeout,
    CircuitOpen,
    OutcomeUnknown,
    PeerLost,
    RateLimited,
    Refused,
    RemoteError,
    Unreachable,
)
from meshkit.testing import cancellation_points, run

LIMITED = RateLimited(name="x", key="k", max_count=1, window=1.0)
FULL = BulkheadFull(name="x", max_concurrent=1, max_queue=0)
UNREACHABLE = Unreachable(node="bob")
LOST = PeerLost(node="bob")
LATE = CallTimeout(name="x", timeout=1.0)
REMOTE = RemoteError(node="bob", kind="x")


def seen(breaker: CircuitBreaker) -> State:
    """Return the state; a type checker would take `breaker.state` to be what it was asserted to be before."""
    return breaker.state


async def count(trips_on: Any, error: BaseException) -> bool:
    """Return whether a breaker with this `trips_on` counts `error`."""
    breaker = CircuitBreaker(failure_threshold=1, trips_on=trips_on)

    async def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        await breaker.call(fails)
    return seen(breaker) is State.OPEN


@pytest.mark.parametrize("part", [_generations, _trip_rule])
def test_the_examples_of_the_inner_parts_run(part: ModuleType) -> None:
    failed, attempted = doctest.testmod(part)
    assert (failed, attempted > 0) == (0, True)


# --- trips_on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trips_on", "error", "counts"),
    [
        (Exception, ValueError(), True),
        (ConnectionError, ConnectionResetError(), True),
        (ConnectionError, ValueError(), False),
        ((ConnectionError, TimeoutError), LATE, True),
        ((ConnectionError, TimeoutError), ValueError(), False),
        # Refused says nothing about the other side, unless it is named:
        (Exception, LIMITED, False),
        (Exception, FULL, False),
        (Exception, UNREACHABLE, False),
        (Exception, CircuitOpen(name="inner", state="open"), False),
        (Exception, LATE, True),
        (Exception, LOST, True),
        (Exception, REMOTE, True),
        ((Unreachable, OutcomeUnknown), UNREACHABLE, True),
        ((Unreachable, OutcomeUnknown), LOST, True),
        ((Unreachable, OutcomeUnknown), LIMITED, False),
        ((Unreachable, OutcomeUnknown), REMOTE, False),
        ((Exception, Unreachable), FULL, False),
        ((Exception, Unreachable), UNREACHABLE, True),
        (Refused, LIMITED, True),
        # A predicate decides on everything else:
        (lambda error: "bad" in str(error), ValueError("bad"), True),
        (lambda error: "bad" in str(error), ValueError("good"), False),
        (lambda error: error, ValueError(), True),
        (lambda _: True, LIMITED, False),
        # In a group, one that counts is enough:
        (ConnectionError, ExceptionGroup("g", [ValueError(), ConnectionError()]), True),
        (ConnectionError, ExceptionGroup("g", [ExceptionGroup("h", [ConnectionError()])]), True),
        (ConnectionError, ExceptionGroup("g", [ValueError(), KeyError()]), False),
        (Exception, ExceptionGroup("g", [LIMITED, FULL]), False),
        (Exception, ExceptionGroup("g", [LIMITED, ValueError()]), True),
        (lambda error: isinstance(error, KeyError), ExceptionGroup("g", [ValueError(), KeyError()]), True),
        # What is no exception never counts:
        (Exception, BaseExceptionGroup("g", [ValueError(), asyncio.CancelledError()]), False),
    ],
)
async def test_what_counts(trips_on: Any, error: BaseException, counts: bool) -> None:
    assert await count(trips_on, error) is counts


async def test_a_predicate_that_raises_masks_no_error_is_reported_and_the_failure_counts() -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def predicate(error: Exception) -> bool:
        raise LookupError(error.args)

    assert await count(predicate, ValueError("original"))
    assert [type(context["exception"]) for context in reported] == [LookupError]
    assert "trips_on" in reported[0]["message"]


@pytest.mark.parametrize(
    "nonsense", [None, 3, "ConnectionError", asyncio.CancelledError, (ValueError, None), (ValueError, int)]
)
def test_what_is_no_exception_class_is_refused(nonsense: Any) -> None:
    with pytest.raises(TypeError, match=r"^trips_on must"):
        CircuitBreaker(trips_on=nonsense)


def test_an_async_predicate_and_a_group_class_are_refused_with_a_hint() -> None:
    async def predicate(_: Exception) -> bool:
        return True

    with pytest.raises(TypeError, match="a plain function"):
        CircuitBreaker(trips_on=predicate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="asked about each error in a group: name those"):
        CircuitBreaker(trips_on=ExceptionGroup)


# --- FailureRate -------------------------------------------------------------------------------------------


def record(breaker: CircuitBreaker, outcomes: str) -> None:
    for outcome in outcomes:
        (breaker.record_success if outcome == "+" else breaker.record_failure)()


async def test_it_opens_at_exactly_the_threshold_and_not_before_minimum_calls() -> None:
    breaker = CircuitBreaker(FailureRate(threshold=0.5, minimum_calls=10))
    record(breaker, "-----++++")
    assert seen(breaker) is State.CLOSED
    assert (breaker.stats().calls, breaker.stats().failures) == (9, 5)
    record(breaker, "+")
    assert seen(breaker) is State.OPEN, "5 of 10: also a success can be the call that makes them enough"


@pytest.mark.parametrize(("threshold", "failures"), [(0.07, 7), (0.29, 29), (0.57, 57), (1.0, 100)])
async def test_a_decimal_threshold_is_met_exactly(threshold: float, failures: int) -> None:
    breaker = CircuitBreaker(FailureRate(threshold=threshold, calls=100, minimum_calls=100))
    record(breaker, "+" * (100 - failures) + "-" * (failures - 1))
    assert seen(breaker) is State.CLOSED
    record(breaker, "-")
    assert seen(breaker) is State.OPEN


async def test_calls_leave_the_window_after_its_length_at_the_latest() -> None:
    breaker = CircuitBreaker(FailureRate(threshold=0.5, window=10.0, minimum_calls=4))
    await asyncio.sleep(0.5)
    record(breaker, "---")
    await asyncio.sleep(9.4)
    assert breaker.stats().failures == 3
    await asyncio.sleep(0.6)
    assert breaker.stats().failures == 0
    assert breaker.idle
    record(breaker, "-++")
    assert seen(breaker) is State.CLOSED


async def test_of_the_last_calls_the_oldest_is_forgotten_with_each_new_one() -> None:
    breaker = CircuitBreaker(FailureRate(threshold=0.5, calls=4, minimum_calls=4))
    record(breaker, "-+++")
    for _ in range(5):
        record(breaker, "-+++")
    assert (seen(breaker), breaker.stats().calls, breaker.stats().failures) == (State.CLOSED, 4, 1)
    record(breaker, "--")
    assert seen(breaker) is State.OPEN


async def test_half_open_knows_probes_only_and_closing_forgets_the_rate() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=2), reset_timeout=1.0)
    record(breaker, "--")
    await asyncio.sleep(1)
    await breaker.call(asyncio.sleep, 0)
    assert seen(breaker) is State.CLOSED
    assert breaker.stats().calls == 0


async def test_the_rate_counts_in_every_form() -> None:
    async def fails() -> None:
        raise OSError

    breaker = CircuitBreaker(FailureRate(minimum_calls=20))
    decorated = breaker(fails)
    fine = breaker(asyncio.sleep)
    for _ in range(3):
        await asyncio.gather(breaker.call(fails), decorated(), return_exceptions=True)
        await breaker.call(asyncio.sleep, 0)
        await fine(0)
        async with breaker:
            pass
        with pytest.raises(OSError):
            async with breaker:
                raise OSError
    assert (breaker.stats().calls, breaker.stats().failures) == (18, 9)
    async with breaker:
        pass
    async with breaker:
        assert seen(breaker) is State.CLOSED
        breaker.record_failure()
        assert seen(breaker) is State.OPEN


async def test_slow_calls_count_as_failures_when_they_end() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=3, slow_call=2.0))
    await asyncio.gather(*(breaker.call(asyncio.sleep, seconds) for seconds in (1.9, 2.0, 2.1)))
    assert seen(breaker) is State.OPEN
    assert breaker.stats().opened == 1


async def test_slow_calls_count_while_they_are_under_way_as_soon_as_another_call_comes() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=3, slow_call=2.0))
    hanging = [asyncio.create_task(breaker.call(asyncio.sleep, 1_000)) for _ in range(3)]
    await asyncio.sleep(1.9)
    await breaker.call(asyncio.sleep, 0)
    assert seen(breaker) is State.CLOSED
    await asyncio.sleep(0.2)
    assert seen(breaker) is State.CLOSED, "nothing happens by itself"
    with pytest.raises(CircuitOpen):
        await breaker.call(asyncio.sleep, 0)
    await asyncio.gather(*hanging)
    assert breaker.stats().opened == 1


async def test_a_call_that_ended_in_time_leaves_the_next_oldest_to_be_watched() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=1, threshold=0.3, slow_call=2.0))
    first = asyncio.create_task(breaker.call(asyncio.sleep, 1.5))
    await asyncio.sleep(1)
    second = asyncio.create_task(breaker.call(asyncio.sleep, 100))
    await asyncio.sleep(1.5)
    await breaker.call(asyncio.sleep, 0)
    assert breaker.stats().failures == 0
    await asyncio.sleep(0.5)
    assert not breaker.allow_request(), "now the second is slow: 1 of 3"
    await asyncio.gather(first, second)


async def test_a_slow_call_counts_once() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=10, slow_call=2.0))
    hanging = asyncio.create_task(breaker.call(asyncio.sleep, 5))
    await asyncio.sleep(3)
    await breaker.call(asyncio.sleep, 0)
    assert (breaker.stats().calls, breaker.stats().failures) == (2, 1)
    await hanging
    assert (breaker.stats().calls, breaker.stats().failures) == (2, 1)


async def test_a_call_that_is_cancelled_after_it_was_slow_has_failed_and_one_before_has_not() -> None:
    breaker = CircuitBreaker(FailureRate(slow_call=2.0))
    for seconds in (1.9, 2.1):
        with anyio.move_on_after(seconds):
            await breaker.call(asyncio.sleep, 100)
    assert (breaker.stats().calls, breaker.stats().failures) == (1, 1)


async def test_a_slow_probe_opens_it_again_also_while_it_is_under_way() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=1, slow_call=2.0), reset_timeout=10.0)
    breaker.record_failure()
    await asyncio.sleep(10)
    await breaker.call(asyncio.sleep, 3)
    assert seen(breaker) is State.OPEN
    await asyncio.sleep(10)
    probe = asyncio.create_task(breaker.call(asyncio.sleep, 1_000))
    await asyncio.sleep(2)
    assert not breaker.allow_request()
    assert seen(breaker) is State.OPEN
    assert breaker.stats().opened == 3
    await probe
    assert seen(breaker) is State.HALF_OPEN


async def test_ten_thousand_calls_under_way_are_told_apart() -> None:
    breaker = CircuitBreaker(FailureRate(minimum_calls=20_000, slow_call=2.0))

    async def block(seconds: float) -> None:
        async with breaker:
            await asyncio.sleep(seconds)

    tasks = [asyncio.create_task(block(1 + number % 3)) for number in range(10_000)]
    await asyncio.sleep(0)
    assert len(breaker._circuit.generation.watched) == 10_000
    await asyncio.gather(*tasks)
    assert breaker.stats().failures == 6_666
    assert not breaker._circuit.generation.watched
    assert not breaker._apart


def test_a_slow_calls_circuit_loses_no_lease_at_any_cancellation() -> None:
    for point in cancellation_points():

        async def main() -> None:
            breaker = CircuitBreaker(FailureRate(slow_call=10.0))

            async def block() -> None:
                async with breaker:
                    await asyncio.sleep(1)

            if await point.cancel(block()):  # noqa: B023 - runs within this iteration
                assert breaker.idle
                assert breaker.stats().calls == 0

        run(main)


def test_at_a_rounding_error_between_two_tenths_nothing_is_lost_or_doubled() -> None:
    window = Window(0.5, 10**9, 10 / 3)
    edge = 267_461 * (10 / 3 / 10)
    assert edge // (10 / 3 / 10) == 267_460, "it is on both sides"
    for _ in range(100):
        window.record(True, edge)
    assert window.remembered(edge) == (100, 100)
    assert window.remembered(edge + 3) == (100, 100)
    assert window.remembered(edge + 4) == (0, 0)


async def test_the_memory_of_a_window_is_bounded() -> None:
    breaker = CircuitBreaker(FailureRate(threshold=1.0, window=10.0, minimum_calls=10**9))
    for _ in range(1_000):
        record(breaker, "+-")
        await asyncio.sleep(0.35)
    past = breaker._circuit.generation._past  # type: ignore[attr-defined]
    assert len(past) <= 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold must be more than 0 and at most 1, not 0.0"),
        ({"threshold": 1.01}, "threshold must be more than 0 and at most 1, not 1.01"),
        ({"threshold": float("nan")}, "threshold must be more than 0 and at most 1, not nan"),
        ({"window": 0}, "window must be finite and more than zero seconds, not 0"),
        ({"minimum_calls": 0}, "minimum_calls must be at least 1, not 0"),
        ({"slow_call": -1}, "slow_call must be finite and more than zero seconds, not -1"),
        ({"calls": 0}, "calls must be at least 1, not 0"),
        ({"calls": 10}, "minimum_calls=20 is more than calls=10: it would never open"),
        ({"calls": 100, "window": 10.0}, "window=10.0 and calls=100: give one of them"),
    ],
)
def test_bad_rates_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        FailureRate(**settings)
