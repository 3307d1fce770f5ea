"""The verbs that do not wait: on virtual time, without a loop, with one loop after the other."""

import asyncio
import dataclasses
import pickle
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from meshkit import guard
from meshkit.errors import Overloaded, RateLimited, Refused, TooManyKeys
from meshkit.events import Event
from meshkit.guard import PerKey, stack
from meshkit.rate_limiter import KeyLimit, LimitRefused, LimitWaited, RateLimiter, RateLimiterStats
from meshkit.testing import run


async def test_so_many_are_allowed_in_a_window_and_each_key_has_its_own() -> None:
    limiter = RateLimiter(3, 10.0)
    assert [limiter.allow("bob") for _ in range(5)] == [True, True, True, False, False]
    assert limiter.allow("carol")
    assert limiter.allow(), "without a key: one limit for all"
    await asyncio.sleep(10)
    assert [limiter.allow("bob", cost) for cost in (2, 2, 1)] == [True, False, True]


async def test_a_query_charges_nothing_and_a_refusal_neither() -> None:
    limiter = RateLimiter(1, 10.0)
    for _ in range(5):
        assert limiter.check("bob")
        assert limiter.retry_after("bob") == 0.0
    assert limiter.stats().keys == 0
    assert limiter.allow("bob")
    await asyncio.sleep(5)
    for _ in range(5):
        assert not limiter.check("bob")
        assert not limiter.allow("bob")
        assert limiter.retry_after("bob") == 5.0
    await asyncio.sleep(5)
    assert limiter.allow("bob")


async def test_retry_after_is_sufficient_and_tight() -> None:
    loop = asyncio.get_running_loop()
    limiter = RateLimiter(3, 0.7)
    await asyncio.sleep(0.1)
    for _ in range(200):
        await asyncio.sleep(0.13)
        for cost in (1, 2, 3):
            wait = limiter.retry_after("bob", cost)
            if wait:
                just_before = asyncio.Event()
                loop.call_at(loop.time() + wait * (1 - 1e-9), just_before.set)
                await just_before.wait()
                assert not limiter.check("bob", cost)
                await asyncio.sleep(limiter.retry_after("bob", cost))
            assert limiter.check("bob", cost)
            assert limiter.allow("bob", cost)


def test_it_needs_no_loop() -> None:
    limiter = RateLimiter(2, 3600.0)
    assert limiter.allow("bob")
    assert limiter.allow("bob")
    assert not limiter.allow("bob")
    assert 3590 < limiter.retry_after("bob") <= 3600
    assert limiter.cleanup() == 0


def test_one_loop_after_the_other_sees_the_same_limit() -> None:
    limiter = RateLimiter(2, 10.0)

    async def first() -> None:
        await asyncio.sleep(3)
        await limiter.acquire("bob", 2)

    async def second() -> float:
        assert not limiter.allow("bob"), "virtual time starts again, at 0: what was said at 3 is in the window"
        await limiter.acquire("bob")
        return asyncio.get_running_loop().time()

    run(first)
    assert run(second) == 13.0


def test_a_loop_with_another_clock_starts_afresh() -> None:
    limiter = RateLimiter(1, 0.001)
    assert limiter.allow("bob"), "by the system's clock"
    assert time.monotonic() > 1, "which is more than a window ahead of virtual time"

    async def main() -> None:
        assert limiter.allow("bob")
        assert not limiter.allow("bob")
        assert limiter.retry_after("bob") == 0.001

    run(main)
    assert limiter.allow("bob")


@pytest.mark.real_time
async def test_it_waits_on_an_ordinary_loop_too() -> None:
    limiter = RateLimiter(2, 0.002)
    await asyncio.gather(*[limiter.acquire("bob") for _ in range(6)])
    assert limiter.stats().waiting == 0


async def test_at_max_keys_a_new_one_is_refused_counted_and_told_when() -> None:
    limiter = RateLimiter(1, 10.0, max_keys=2, name="login")
    assert limiter.allow("bob")
    await asyncio.sleep(1)
    assert limiter.allow("carol")
    assert not limiter.check("dave")
    assert not limiter.allow("dave")
    assert limiter.retry_after("dave") == 9.0
    with pytest.raises(TooManyKeys) as caught:
        await limiter.acquire("dave")
    assert str(caught.value) == ("login: no room for 'dave', all 2 keys are in use; raise max_keys; try again in 9 s")
    assert caught.value.retry_after == 9.0
    assert limiter.stats() == RateLimiterStats(keys=2, waiting=0, cached=0, refused=2, refused_keys=2)
    await asyncio.sleep(9)
    assert limiter.check("dave")
    assert limiter.allow("dave")
    assert not limiter.allow("erin")


async def test_cleanup_forgets_only_what_is_not_limited() -> None:
    limiter = RateLimiter(2, 10.0)
    assert limiter.allow("bob", 2)
    await asyncio.sleep(5)
    assert limiter.allow("carol", 2)
    limiter.set_cached_result("bob", 1)
    await asyncio.sleep(5)
    assert limiter.cleanup() == 1
    assert limiter.stats() == RateLimiterStats(keys=1, waiting=0, cached=1, refused=0, refused_keys=0)
    assert not limiter.allow("carol")
    await asyncio.sleep(15)
    assert limiter.cleanup() == 1
    assert limiter.stats() == RateLimiterStats(keys=0, waiting=0, cached=0, refused=1, refused_keys=0)


async def test_the_observer_is_told_of_refusals_and_of_waiting() -> None:
    events: list[Event] = []
    limiter = RateLimiter(2, 10.0, max_keys=1, name="login", observer=events.append)
    assert limiter.allow("bob", 2)
    assert not limiter.allow("bob", 2)
    assert not limiter.allow("carol")
    await limiter.acquire("bob")
    await limiter.acquire("bob")
    refused, no_room, *waited = events
    assert isinstance(refused, LimitRefused)
    assert (refused.name, refused.key, refused.cost) == ("login", "bob", 2)
    assert isinstance(refused.error, RateLimited)
    assert str(refused.error) == "login: 'bob' has used all 2 admissions of the last 10 s; try again in 10 s"
    assert isinstance(no_room, LimitRefused)
    assert isinstance(no_room.error, TooManyKeys)
    assert waited == [LimitWaited("login", "bob", 1, 10.0)]


async def test_an_observer_that_raises_disturbs_nothing() -> None:
    def broken(event: Event) -> None:
        raise ValueError("broken")

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    limiter = RateLimiter(1, 10.0, observer=broken)
    await limiter.acquire("bob")
    assert not limiter.allow("bob")
    await limiter.acquire("bob")
    assert [str(context["exception"]) for context in reported] == ["broken", "broken"]


async def test_its_repr_shows_the_limit_and_what_is_going_on() -> None:
    limiter = RateLimiter(5, 60.0, name="login")
    limiter.allow("bob")
    assert repr(limiter) == "RateLimiter('login', 5 per 60 s, keys=1, waiting=0)"
    assert repr(limiter.for_key("bob", cost=2)) == f"{limiter!r}.for_key('bob', cost=2)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        limiter.stats().keys = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_count": 0, "window": 1.0}, ValueError, "max_count must be at least 1, not 0"),
        ({"max_count": 1.5, "window": 1.0}, TypeError, "max_count must be a whole number, not 1.5"),
        ({"max_count": 1, "window": 0}, ValueError, "window must be finite and more than zero seconds, not 0"),
        ({"max_count": 1, "window": float("nan")}, ValueError, "window must be finite"),
        ({"max_count": 1, "window": "1"}, TypeError, "window must be a number of seconds, not '1'"),
        ({"max_count": 1, "window": 1.0, "max_keys": 0}, ValueError, "max_keys must be at least 1"),
        ({"max_count": 1, "window": 1.0, "max_waiting": 0}, ValueError, "max_waiting must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RateLimiter(**arguments)


@pytest.mark.parametrize("cost", [0, 4, -1])
async def test_a_cost_that_can_never_fit_is_an_error_for_every_verb(cost: int) -> None:
    limiter = RateLimiter(3, 10.0)
    await limiter.acquire("bob", 3)
    async with anyio.create_task_group() as group:
        for key in ("bob", "carol"):  # one that others wait for, one that is new
            for verb in (limiter.allow, limiter.check, limiter.retry_after, limiter.for_key):
                with pytest.raises(ValueError, match="cost must be at") as caught:
                    verb(key, cost)
                assert caught.value.__context__ is None
            with pytest.raises(ValueError, match="cost must be at"):
                await limiter.acquire(key, cost)
            group.start_soon(limiter.acquire, "bob")
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert limiter.stats().refused == 0


async def test_an_unhashable_key_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        RateLimiter(1, 1.0).allow(["bob"])  # type: ignore[arg-type]


async def test_its_errors_are_refusals_that_print_and_pickle() -> None:
    limiter = RateLimiter(1, 10.0, max_keys=1, max_waiting=1, name="login")
    await limiter.acquire("bob")
    waiting = asyncio.create_task(limiter.acquire("bob"))
    await asyncio.sleep(0)
    errors: list[Refused] = []
    for key in ("bob", "carol"):
        with pytest.raises(Refused) as caught:
            await limiter.acquire(key)
        errors.append(caught.value)
    with anyio.move_on_after(5), pytest.raises(Refused) as caught:
        await limiter.acquire("bob")
    assert [type(error) for error in errors] == [Overloaded, TooManyKeys]
    assert str(errors[0]) == "the line of login: full, it holds 1 already; try again in 20 s"
    for error in errors:
        assert error.executed == "no"
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.retry_after) == (str(error), error.retry_after)
    assert limiter.stats().refused == 3
    await waiting


# --- as a guard


async def double(number: int, *, plus: int = 0) -> int:
    """Return twice the number."""
    return number * 2 + plus


@pytest.fixture(params=["limiter", "for_key"])
def make(request: pytest.FixtureRequest) -> Callable[[RateLimiter], "RateLimiter | KeyLimit"]:
    if request.param == "limiter":
        return lambda limiter: limiter
    return lambda limiter: limiter.for_key("bob", cost=2)


async def test_a_guard_waits_for_its_turn(make: Callable[[RateLimiter], "RateLimiter | KeyLimit"]) -> None:
    limiter = RateLimiter(2, 10.0)
    limit = make(limiter)
    loop = asyncio.get_running_loop()
    await limiter.acquire(None if limit is limiter else "bob", 2)
    assert await limit.call(double, 4, plus=1) == 9
    assert loop.time() == 10.0
    await limiter.acquire(None if limit is limiter else "bob", 2 if limit is not limiter else 1)
    decorated = limit(double)
    assert decorated.__name__ == "double"
    assert decorated.__doc__ == "Return twice the number."
    assert await decorated(4) == 8
    async with limit:
        pass
    assert loop.time() == (20.0 if limit is limiter else 40.0)
    assert stack(limit).describe().endswith("2. your function")
    assert isinstance(limit, guard.Guard)
    assert limit.kind == "limiter"


async def test_entering_from_many_tasks_at_once_is_right() -> None:
    limiter = RateLimiter(3, 10.0)
    loop = asyncio.get_running_loop()
    entered: list[float] = []

    async def enter() -> None:
        async with limiter:
            entered.append(loop.time())
            await asyncio.sleep(25)

    await asyncio.gather(*[enter() for _ in range(10)])
    assert entered == [0.0] * 3 + [10.0] * 3 + [20.0] * 3 + [30.0]


async def test_what_fails_under_a_guard_is_still_charged() -> None:
    limiter = RateLimiter(1, 10.0)

    async def fail() -> None:
        raise OSError

    with pytest.raises(OSError):
        await limiter.for_key("bob").call(fail)
    with pytest.raises(OSError):
        async with limiter:
            raise OSError
    assert not limiter.allow("bob")
    assert not limiter.allow()


def test_one_that_limits_a_key_is_not_idle() -> None:
    async def main() -> None:
        limiters: PerKey[str, RateLimiter] = PerKey(lambda _: RateLimiter(1, 10.0), max_keys=1)
        assert limiters["bob"].idle
        assert limiters["bob"].allow()
        with pytest.raises(TooManyKeys):
            limiters["carol"]
        await asyncio.sleep(10)
        assert limiters["bob"].idle
        assert limiters["carol"].allow()

    run(main)


async def test_one_that_somebody_waits_for_is_not_idle() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire()
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(1)
    limiter._window.remove(None, 0.0)  # nothing is limited, but one still waits
    assert not limiter.idle
    await waiting
    shared = asyncio.create_task(limiter.call_or_cached("bob", asyncio.sleep, 60))
    await asyncio.sleep(30)
    assert not limiter.idle
    await shared
