"""What RateLimiter promises, seen from outside: in virtual time, with many tasks, and cancelled at every await."""

import asyncio
import pickle
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from meshkit import RateLimited, RateLimiter, TooManyKeys
from meshkit.testing import VirtualTimeLoop, cancellation_points, run


def now() -> float:
    return asyncio.get_running_loop().time()


@settings(max_examples=300)
@given(
    max_count=st.integers(1, 5),
    window=st.sampled_from([0.1, 1.0, 3.7]),
    steps=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3), st.booleans()), max_size=60),
)
def test_no_interval_of_a_window_over_admits_whoever_asks_and_however(
    max_count: int, window: float, steps: list[tuple[float, int, bool]]
) -> None:
    admitted: list[float] = []

    async def ask(limiter: RateLimiter, cost: int, waits: bool) -> None:
        if waits:
            await limiter.acquire("key", cost)
        elif not limiter.allow("key", cost):
            return
        admitted.extend([now()] * cost)

    async def main() -> None:
        limiter = RateLimiter(max_count, window)
        async with asyncio.TaskGroup() as group:
            for pause, cost, waits in steps:
                await asyncio.sleep(pause * window / 3)
                group.create_task(ask(limiter, min(cost, max_count), waits))

    run(main)
    for first, beyond in zip(admitted, admitted[max_count:], strict=False):
        assert beyond >= first + window


async def test_a_large_request_first_in_line_is_served_before_200_small_ones() -> None:
    limiter = RateLimiter(10, 1.0)
    order: list[str] = []

    async def ask(name: str, cost: int) -> None:
        await limiter.acquire("key", cost)
        order.append(name)

    assert limiter.allow("key", 5)
    async with asyncio.TaskGroup() as group:
        group.create_task(ask("large", 10))
        await asyncio.sleep(0)
        for number in range(200):
            group.create_task(ask(f"small {number}", 1))
        await asyncio.sleep(0)
        assert not limiter.allow("key")  # nobody overtakes
        assert limiter.stats().waiting == 201
    assert order == ["large", *(f"small {number}" for number in range(200))]
    assert now() == 1.0 + 20.0


def test_ten_thousand_waiters_of_a_key_need_one_timer_and_a_wake_up_each() -> None:
    set_timers = most = 0

    class Counting(VirtualTimeLoop):
        def call_at(self, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:  # type: ignore[override]  # passed on as it is
            nonlocal set_timers, most
            set_timers += 1
            timer = super().call_at(*args, **kwargs)
            most = max(most, len(self.live_timers()) if set_timers % 100 == 0 else 0)
            return timer

    passes = 0

    async def ask(limiter: RateLimiter) -> None:
        nonlocal passes
        await limiter.acquire("key")
        passes += 1

    async def main() -> None:
        limiter = RateLimiter(10, 1.0)
        await asyncio.gather(*(ask(limiter) for _ in range(10_000)))
        assert now() == 999.0

    with asyncio.Runner(loop_factory=Counting) as runner:
        runner.run(main())
    assert passes == 10_000
    assert most <= 1
    assert set_timers <= 10_000


def test_a_cancelled_waiter_costs_nothing_and_the_next_has_its_turn() -> None:
    for point in cancellation_points():

        async def scenario() -> None:
            limiter = RateLimiter(1, 1.0)
            assert limiter.allow("key")
            cancelled = asyncio.create_task(point.cancel(limiter.acquire("key")))  # noqa: B023 - runs now
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            next_one = asyncio.create_task(limiter.acquire("key"))
            was_cancelled = await cancelled
            await next_one
            # Whoever was cancelled took no turn: the next one waits one window, and not two.
            assert now() == (1.0 if was_cancelled else 2.0)
            assert limiter.stats().waiting == 0

        run(scenario)


async def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_says_when() -> None:
    limiter = RateLimiter(1, 10.0, name="api")
    assert limiter.allow("bob")
    with anyio.fail_after(5), pytest.raises(RateLimited) as caught:
        await limiter.acquire("bob")
    assert now() == 0.0
    assert caught.value.retry_after == 10.0
    assert str(caught.value) == "api: 'bob' has used all 1 admissions of the last 10 s; try again in 10 s"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with anyio.fail_after(11):
        await limiter.acquire("bob")
    assert now() == 10.0


async def test_retry_after_is_sufficient_and_tight() -> None:
    limiter = RateLimiter(2, 0.3)
    for pause in (0.1, 0.1, 0.05):
        limiter.allow("key")
        await asyncio.sleep(pause)
    wait = limiter.retry_after("key")
    assert wait > 0
    await asyncio.sleep(wait * 0.999)
    assert not limiter.check("key")
    await asyncio.sleep(limiter.retry_after("key"))
    assert limiter.check("key")
    assert limiter.allow("key")


async def test_a_spray_of_new_keys_cannot_un_limit_a_victim() -> None:
    limiter = RateLimiter(1, 60.0, max_keys=100)
    assert limiter.allow("victim")
    for number in range(10_000):
        limiter.allow(f"spray {number}")
        assert not limiter.check("victim")
    assert limiter.stats().keys == 100
    assert limiter.stats().refused_keys == 10_000 - 99
    with pytest.raises(TooManyKeys, match="no room for 'new'"):
        await limiter.acquire("new")
    await asyncio.sleep(60)
    assert limiter.allow("new")


async def test_the_ping_verification_of_the_specification() -> None:
    limiter = RateLimiter(1, 60.0)
    pings: list[str] = []

    def verify(peer: str) -> bool:
        allowed, cached, has_cached = limiter.allow_or_cached(peer)
        if not allowed:
            return bool(cached) if has_cached else False
        pings.append(peer)
        limiter.set_cached_result(peer, True)
        return True

    assert [verify("bob"), verify("bob"), verify("carol")] == [True, True, True]
    assert pings == ["bob", "carol"]
    assert limiter.allow_or_cached("bob") == (False, True, True)
    assert limiter.allow("dave")
    assert limiter.allow_or_cached("dave") == (False, None, False)
    await asyncio.sleep(60)
    assert verify("bob")
    assert pings == ["bob", "carol", "bob"]


async def test_none_is_a_result_like_any_other() -> None:
    limiter = RateLimiter(1, 60.0)
    calls = 0

    async def look() -> None:
        nonlocal calls
        calls += 1

    for _ in range(3):
        await limiter.call_or_cached("key", look)
    assert calls == 1


async def test_those_who_ask_at_the_same_time_share_one_call_even_if_the_first_is_cancelled() -> None:
    limiter = RateLimiter(1, 60.0)
    calls = 0

    async def look() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(1)
        return calls

    tasks = [asyncio.create_task(limiter.call_or_cached("key", look)) for _ in range(5)]
    await asyncio.sleep(0.5)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [1, 1, 1, 1]
    assert calls == 1
    assert await limiter.call_or_cached("key", look) == 1


async def test_a_failing_call_is_not_remembered_and_refused_without_a_result() -> None:
    limiter = RateLimiter(1, 60.0)

    async def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await limiter.call_or_cached("key", fail)
    with pytest.raises(RateLimited):
        await limiter.call_or_cached("key", fail)


def test_call_or_cached_leaves_nothing_wherever_it_is_cancelled() -> None:
    for point in cancellation_points():

        async def scenario() -> None:
            limiter = RateLimiter(1, 60.0)
            await point.cancel(limiter.call_or_cached("key", asyncio.sleep, 1.0, "result"))  # noqa: B023 - runs now
            await asyncio.sleep(2)
            assert limiter.stats().waiting == 0

        run(scenario)


async def test_as_a_guard_it_waits_for_its_key_and_keeps_the_result() -> None:
    limiter = RateLimiter(1, 1.0)

    @limiter.for_key("bob")
    async def answer(number: int) -> int:
        return number

    assert [await answer(1), await answer(2)] == [1, 2]
    assert now() == 1.0
    async with limiter.for_key("bob"):
        assert now() == 2.0
    async with limiter:
        assert now() == 2.0  # the limit without a key is another one
    assert await limiter.call(answer, 3) == 3
    assert now() == 3.0


def test_a_request_that_fits_does_not_suspend() -> None:
    acquiring = RateLimiter(1, 1.0).acquire("key")
    with pytest.raises(StopIteration):
        acquiring.send(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_count": 0, "window": 1.0}, "max_count must be at least 1, not 0"),
        ({"max_count": 1, "window": 0.0}, "window must be finite and more than zero seconds, not 0.0"),
        ({"max_count": 1, "window": float("nan")}, "window must be finite"),
        ({"max_count": 1, "window": 1.0, "max_keys": 0}, "max_keys must be at least 1, not 0"),
        ({"max_count": 1, "window": "1"}, "window must be a number of seconds, not '1'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RateLimiter(**arguments)


async def test_a_cost_that_can_never_fit_is_refused_as_an_argument() -> None:
    limiter = RateLimiter(3, 1.0)
    for verb in (limiter.allow, limiter.check, limiter.retry_after):
        with pytest.raises(ValueError, match="cost must be at most max_count, which is 3, not 4"):
            verb("key", 4)
    with pytest.raises(ValueError, match="cost must be at most"):
        await limiter.acquire("key", 4)
    with pytest.raises(ValueError, match="cost must be at least 1, not 0"):
        await limiter.acquire("key", 0)


def test_it_serves_one_loop_after_another_and_without_one() -> None:
    limiter = RateLimiter(1, 5.0)

    async def main() -> float:
        await limiter.acquire("key")
        await limiter.acquire("key")
        return now()

    limiter.allow("key")  # on the clock of the system
    assert run(main) <= 15.0
    assert run(main) <= 15.0
