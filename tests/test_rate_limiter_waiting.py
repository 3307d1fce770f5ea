"""Waiting for a turn: first come, first served; nobody overtakes, nothing is lost, deadlines are known in advance."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from meshkit.errors import Overloaded, RateLimited
from meshkit.rate_limiter import RateLimiter
from meshkit.testing import CancellationPoint, VirtualTimeLoop, cancellation_points, run


def now() -> float:
    return asyncio.get_running_loop().time()


def timers() -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return len(loop.live_timers())


class Race:
    """Tasks that acquire, and the order and the times in which they were served."""

    def __init__(self, limiter: RateLimiter, key: str = "bob") -> None:
        self.limiter = limiter
        self.key = key
        self.served: list[tuple[str, float]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, name: str, cost: int = 1) -> asyncio.Task[None]:
        async def acquire() -> None:
            await self.limiter.acquire(self.key, cost)
            self.served.append((name, now()))

        self.tasks.append(asyncio.create_task(acquire(), name=name))
        await asyncio.sleep(0)
        return self.tasks[-1]

    async def end(self) -> list[tuple[str, float]]:
        await asyncio.gather(*self.tasks, return_exceptions=True)
        return self.served


async def test_who_comes_first_is_served_first_also_when_it_is_large() -> None:
    limiter = RateLimiter(100, 10.0)
    await limiter.acquire("bob", 50)
    await asyncio.sleep(5)
    await limiter.acquire("bob", 50)
    race = Race(limiter)
    await race.start("large", 100)
    for number in range(200):
        await race.start(f"small {number}")
    await asyncio.sleep(6)
    assert not race.served, "50 would fit, but the large one comes first"
    assert await race.end() == [
        ("large", 15.0),
        *[(f"small {number}", 25.0) for number in range(100)],
        *[(f"small {number}", 35.0) for number in range(100, 200)],
    ]


async def test_nobody_overtakes_those_who_wait() -> None:
    limiter = RateLimiter(2, 10.0)
    await limiter.acquire("bob")
    await asyncio.sleep(1)
    race = Race(limiter)
    await race.start("large", 2)
    assert not limiter.check("bob")
    assert not limiter.allow("bob"), "one would fit, but it would delay the large one"
    assert limiter.retry_after("bob") == 19.0
    assert limiter.allow("carol"), "other keys have other lines"
    await asyncio.sleep(9)
    assert await race.end() == [("large", 10.0)]
    await asyncio.sleep(10)
    assert limiter.allow("bob")


async def test_when_those_before_are_due_allow_serves_them_and_then_itself() -> None:
    """Whichever of the timers of one instant runs first."""
    limiter = RateLimiter(2, 10.0)
    await limiter.acquire("bob", 2)
    allowed: list[bool] = []
    asyncio.get_running_loop().call_at(10.0, lambda: allowed.append(limiter.check("bob")))
    asyncio.get_running_loop().call_at(10.0, lambda: allowed.append(limiter.allow("bob")))
    race = Race(limiter)
    await race.start("first")
    assert limiter.retry_after("bob") == 10.0
    assert await race.end() == [("first", 10.0)]
    assert allowed == [True, True]
    assert not limiter.check("bob")


async def test_ten_thousand_waiters_are_one_timer_and_a_wake_up_each() -> None:
    loop = asyncio.get_running_loop()
    limiter = RateLimiter(100, 1.0)
    await limiter.acquire("bob", 100)
    most = calls = 0
    call_soon: Callable[..., Any] = loop.call_soon

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, most
        calls += 1
        most = max(most, timers())
        return call_soon(*args, **kwargs)

    tasks = [asyncio.create_task(limiter.acquire("bob")) for _ in range(10_000)]
    await asyncio.sleep(0)
    assert limiter.stats().waiting == 10_000
    assert timers() == 1
    loop.call_soon = counting  # type: ignore[assignment, method-assign]  # the loop of this test; it counts what is woken
    await asyncio.wait(tasks)
    del loop.call_soon  # back to that of its class
    assert now() == 100.0
    assert most <= 1
    # The task wakes up; it tells asyncio.wait that it is done; 100 times, the timer fires.
    assert calls <= 2 * 10_000 + 100 + 10
    assert limiter.stats().waiting == 0


async def test_a_request_that_need_not_wait_does_not_suspend_and_creates_nothing() -> None:
    limiter = RateLimiter(3, 10.0)
    for coro in (limiter.acquire("bob"), limiter.for_key("bob").__aenter__(), limiter.__aenter__()):
        with pytest.raises(StopIteration):
            coro.send(None)
    assert timers() == 0
    assert not limiter._lines


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_cancelled_waiter_costs_nothing_and_wakes_the_next(position: int) -> None:
    """Cancelled at every point; wherever it stands in line, and also when its turn has just come."""

    async def main(point: CancellationPoint) -> None:
        limiter = RateLimiter(2, 10.0)
        race = Race(limiter)
        await limiter.acquire("bob")
        await asyncio.sleep(1)
        await limiter.acquire("bob")
        for number in range(position):
            await race.start(f"{number}")
        scenario = asyncio.create_task(point.cancel(limiter.acquire("bob", 2)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number in range(position + 1, 4):
            await race.start(f"{number}")
        cancelled = await scenario
        assert cancelled == point.reached
        others = [str(number) for number in range(4) if number != position]
        served = await race.end()
        assert [name for name, _ in served] == others
        # As if it had never been there; but where its turn had come, the next one has it at that moment.
        woken = {0: [11.0, 11.0, 21.0], 1: [10.0, 20.0, 20.0], 2: [10.0, 11.0, 21.0]}[position]
        if cancelled:
            assert [time for _, time in served] == (woken if point.moment == "woken" else [10.0, 11.0, 20.0])
        assert limiter.stats().waiting == 0
        assert not limiter._lines
        assert timers() == 0

    for point in cancellation_points():
        run(lambda point=point: main(point))  # type: ignore[misc]  # mypy cannot infer a lambda's default


async def test_the_last_one_cancelled_leaves_nothing() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    for _ in range(3):
        with anyio.move_on_after(1):
            limiter_task = asyncio.create_task(limiter.acquire("bob"))
            await anyio.sleep(0.5)
            limiter_task.cancel()
            await anyio.sleep_forever()
        assert timers() == 0
        assert not limiter._lines
    assert limiter.retry_after("bob") == 7.0


async def test_one_granted_and_cancelled_in_the_same_moment_gives_it_back_to_nobody_too() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    race = Race(limiter)
    first = await race.start("first")
    asyncio.get_running_loop().call_at(10.0, first.cancel)
    await race.end()
    assert now() == 10.0
    assert limiter.allow("bob"), "what it was granted is given back"
    assert not limiter.allow("bob")


async def test_many_cancelled_at_once_leave_the_others_in_order() -> None:
    limiter = RateLimiter(10, 1.0)
    await limiter.acquire("bob", 10)
    race = Race(limiter)
    for number in range(2000):
        await race.start(f"{number}")
    for number in range(2000):
        if number % 20:
            race.tasks[number].cancel()
    served = await race.end()
    assert [name for name, _ in served] == [str(number) for number in range(0, 2000, 20)]
    assert now() == 10.0


# --- deadlines


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    limiter = RateLimiter(1, 10.0, name="login")
    await limiter.acquire("bob")
    race = Race(limiter)
    await race.start("first")
    with pytest.raises(RateLimited) as caught, anyio.fail_after(19.9):
        await limiter.acquire("bob")
    assert now() == 0.0
    assert caught.value.retry_after == 20.0
    with pytest.raises(RateLimited), anyio.fail_after(20.0):
        await limiter.acquire("bob")  # it would be admitted at the moment in which it is cancelled
    assert limiter.stats().waiting == 1
    with anyio.fail_after(20.1):
        await limiter.acquire("bob")
    assert now() == 20.0
    assert limiter.stats().refused == 2


async def test_the_nearest_deadline_counts_and_a_shield_hides_those_outside() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    with anyio.move_on_after(1), anyio.CancelScope(shield=True):
        await limiter.acquire("bob")
    assert now() == 10.0
    with anyio.move_on_after(100), anyio.move_on_after(1), pytest.raises(RateLimited):
        await limiter.acquire("bob")


async def test_where_it_is_cancelled_already_that_is_what_it_says() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await limiter.acquire("bob")
        pytest.fail("it was cancelled")
    assert scope.cancelled_caught
    assert timers() == 0


async def test_after_a_cancellation_the_line_is_shorter_for_deadlines_too() -> None:
    limiter = RateLimiter(2, 10.0)
    await limiter.acquire("bob", 2)
    race = Race(limiter)
    large = await race.start("large", 2)
    await race.start("small")
    assert limiter.retry_after("bob") == 20.0
    assert limiter.retry_after("bob", 2) == 30.0
    large.cancel()
    await asyncio.sleep(0)
    assert limiter.retry_after("bob") == 10.0
    assert limiter.retry_after("bob", 2) == 20.0
    with anyio.fail_after(11):
        await limiter.acquire("bob")
    assert now() == 10.0
    assert await race.end() == [("small", 10.0)]


async def test_one_that_is_cancelled_and_not_aware_of_it_yet_is_not_reckoned_with() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    race = Race(limiter)
    for name in ("first", "second"):
        (await race.start(name)).cancel()
    assert limiter.retry_after("bob") == 10.0


async def test_a_plan_is_made_anew_when_its_line_has_gone_by() -> None:
    """Timers are late on ordinary loops; here the loop is blocked, which delays all that comes after."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    race = Race(limiter)
    await race.start("first")
    assert limiter.retry_after("bob") == 20.0
    await race.start("second")
    await race.start("third")
    assert limiter.retry_after("bob") == 40.0
    await asyncio.sleep(9)
    loop._now += 3  # it is served at 12 instead of 10
    await asyncio.sleep(11)
    assert race.served == [("first", 12.0), ("second", 22.0)]
    assert limiter.retry_after("bob") == 19.0
    assert [time for _, time in await race.end()] == [12.0, 22.0, 32.0]


@settings(max_examples=100)
@given(
    max_count=st.sampled_from([1, 2, 5, 20]),
    window=st.sampled_from([0.3, 1.0, 10.0]),
    requests=st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.1, 0.5, 2.0]), st.integers(1, 20), st.booleans()),
        max_size=25,
    ),
)
def test_what_was_foretold_comes_true(max_count: int, window: float, requests: list[tuple[float, int, bool]]) -> None:
    """Each request is served exactly when `retry_after` said it would be, unless one before it was cancelled."""

    async def main() -> None:
        limiter = RateLimiter(max_count, window)
        foretold: dict[str, float] = {}
        race = Race(limiter)
        for number, (step, cost, cancel) in enumerate(requests):
            await asyncio.sleep(step * window)
            cost = min(cost, max_count)  # noqa: PLW2901 - what the limit allows
            wait = limiter.retry_after("bob", cost)
            assert limiter.check("bob", cost) == (wait == 0.0)
            foretold[str(number)] = now() + wait
            task = await race.start(str(number), cost)
            if cancel and wait:
                task.cancel()
                await asyncio.sleep(0)
                del foretold[str(number)]
        # To the last bit or two: there need not be a float that leads exactly from now to then.
        assert dict(await race.end()) == {name: pytest.approx(time, rel=1e-15) for name, time in foretold.items()}
        admitted = [time for (name, time) in race.served for _ in range(min(requests[int(name)][1], max_count))]
        assert all(b - a >= window for a, b in zip(admitted, admitted[max_count:], strict=False))
        assert [name for name, _ in race.served] == sorted(foretold, key=int)

    run(main)


@given(
    max_count=st.integers(1, 5),
    window=st.sampled_from([0.1, 1.0, 3.7]),
    steps=st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.integers(1, 3), st.booleans()), max_size=40),
)
def test_no_interval_over_admits_whoever_asks_and_however(
    max_count: int, window: float, steps: list[tuple[float, int, bool]]
) -> None:
    admitted: list[float] = []

    async def ask(limiter: RateLimiter, cost: int, waits: bool) -> None:
        if waits:
            await limiter.acquire("bob", cost)
        elif not limiter.allow("bob", cost):
            return
        admitted.extend([now()] * cost)

    async def main() -> None:
        limiter = RateLimiter(max_count, window)
        async with asyncio.TaskGroup() as group:
            for pause, cost, waits in steps:
                await asyncio.sleep(pause * window)
                group.create_task(ask(limiter, min(cost, max_count), waits))

    run(main)
    assert all(later - earlier >= window for earlier, later in zip(admitted, admitted[max_count:], strict=False))


@settings(max_examples=100)
@given(st.data())
def test_cancelling_anyone_at_any_time_never_over_admits_nor_wastes(data: st.DataObject) -> None:
    """Against a naive queue that is served from the front whenever anything happens."""
    max_count = data.draw(st.integers(1, 4))
    costs = data.draw(st.lists(st.integers(1, max_count), min_size=1, max_size=12))
    cancels = data.draw(
        st.lists(st.tuples(st.sampled_from([0.5, 10.0, 10.5, 20.0]), st.integers(0, len(costs) - 1)), max_size=6)
    )

    def naive() -> list[tuple[str, float]]:
        window: list[tuple[float, int]] = [(0.0, max_count)]
        queue = list(range(len(costs)))
        served: list[tuple[str, float]] = []
        for tick in range(4000):
            time = tick / 2
            queue = [name for name in queue if (time, name) not in cancels]
            while queue:
                used = sum(cost for since, cost in window if since + 10 > time)
                if used + costs[queue[0]] > max_count:
                    break
                window.append((time, costs[queue[0]]))
                served.append((str(queue.pop(0)), time))
        return served

    async def main() -> None:
        limiter = RateLimiter(max_count, 10.0)
        loop = asyncio.get_running_loop()
        await limiter.acquire("bob", max_count)
        race = Race(limiter)
        for time, number in cancels:  # these timers are set first, so at one instant they come first
            loop.call_at(time, lambda number=number: race.tasks[number].cancel())  # type: ignore[misc]  # a default
        for number, cost in enumerate(costs):
            await race.start(str(number), cost)
        assert await race.end() == expected
        await asyncio.sleep(100)
        assert timers() == 0

    expected = naive()
    run(main)


# --- bounds, loops, tables


async def test_only_so_many_may_wait() -> None:
    limiter = RateLimiter(1, 10.0, max_waiting=2)
    await limiter.acquire("bob")
    await limiter.acquire("carol")
    race = Race(limiter)
    await race.start("first")
    race.key = "carol"
    second = await race.start("second")
    with pytest.raises(Overloaded) as caught:
        await limiter.acquire("bob")
    assert caught.value.retry_after == 20.0
    second.cancel()
    await asyncio.sleep(0)
    await limiter.acquire("bob")
    assert now() == 20.0


async def test_a_key_that_somebody_waits_for_does_not_lose_its_place_to_a_new_one() -> None:
    limiter = RateLimiter(1, 10.0, max_keys=1)
    await limiter.acquire("bob")
    stolen: list[bool] = []
    asyncio.get_running_loop().call_at(10.0, lambda: stolen.append(limiter.allow("thief")))
    race = Race(limiter)
    await race.start("waiter")
    assert await race.end() == [("waiter", 10.0)]
    assert stolen == [False]


async def test_cleaning_up_does_not_disturb_those_who_wait() -> None:
    limiter = RateLimiter(1, 10.0)
    await limiter.acquire("bob")
    asyncio.get_running_loop().call_at(10.0, limiter.cleanup)
    race = Race(limiter)
    await race.start("first")
    await race.start("second")
    assert await race.end() == [("first", 10.0), ("second", 20.0)]


def abandon(limiter: RateLimiter, *, close: bool) -> VirtualTimeLoop:
    """Leave a task waiting in a loop that does not run any more."""
    loop = VirtualTimeLoop()
    loop.set_exception_handler(lambda *_: None)  # it will complain that the task was destroyed

    async def main() -> None:
        await limiter.acquire("bob")
        loop.create_task(limiter.acquire("bob"))
        await asyncio.sleep(0)

    loop.run_until_complete(main())
    if close:
        loop.close()
    return loop


def test_those_left_behind_in_a_closed_loop_hold_nobody_up() -> None:
    limiter = RateLimiter(1, 10.0)
    abandon(limiter, close=True)

    async def main() -> None:
        assert not limiter.allow("bob")
        assert limiter.retry_after("bob") == 10.0
        await limiter.acquire("bob")
        assert now() == 10.0
        race = Race(limiter)
        await race.start("next")
        gc.collect()
        assert await race.end() == [("next", 20.0)]

    run(main)
    assert limiter.stats().waiting == 0


def test_a_line_of_a_loop_that_may_go_on_is_left_alone() -> None:
    limiter = RateLimiter(1, 10.0, name="login")
    loop = abandon(limiter, close=False)
    assert not limiter.allow("bob"), "without a loop"

    async def main() -> None:
        assert not limiter.allow("bob")
        with pytest.raises(RuntimeError, match="another event loop, which is not closed, are waiting for 'bob'"):
            await limiter.acquire("bob")
        await limiter.acquire("carol")

    run(main)
    assert limiter.stats().waiting == 1

    async def rest() -> None:
        await asyncio.sleep(11)

    loop.run_until_complete(rest())
    assert limiter.stats().waiting == 0
    assert not limiter._lines
    loop.close()


def test_a_waiter_that_is_closed_instead_of_cancelled_leaves_too() -> None:
    async def main() -> None:
        limiter = RateLimiter(1, 10.0)
        await limiter.acquire("bob")
        race = Race(limiter)
        waiter = limiter.acquire("bob")
        waiter.send(None)
        await race.start("next")
        waiter.close()
        assert await race.end() == [("next", 10.0)]

    run(main)


def test_a_waiter_closed_outside_of_its_loop_leaves_too() -> None:
    limiter = RateLimiter(1, 10.0)
    loop = VirtualTimeLoop()
    waiter = limiter.acquire("bob")

    async def main() -> None:
        await limiter.acquire("bob")
        waiter.send(None)

    loop.run_until_complete(main())
    waiter.close()
    assert limiter.stats().waiting == 0
    assert not limiter._lines
    assert not loop.live_timers()
    loop.close()
