import asyncio
import contextlib
import contextvars
import gc
import math
import random
import sys
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import assume, given, settings, strategies as st

from meshkit._recent_durations import RecentDurations
from meshkit.errors import CallTimeout, OutcomeUnknown, PeerLost, Unreachable
from meshkit.events import Event
from meshkit.guard import stack
from meshkit.hedger import Hedger, HedgeStarted, HedgeWon
from meshkit.retrier import Retrier, RetryBudget, RetryBudgetStats, RetryPolicy
from meshkit.testing import VirtualTimeLoop, cancellation_points, run
from meshkit.timeout import Timeout


def clock() -> float:
    return asyncio.get_running_loop().time()


class Copies:
    """A function whose copies do as they are told: each sleeps so long, then returns or raises. It keeps a record."""

    def __init__(self, *plans: tuple[float, object]) -> None:
        self.plans = plans
        self.begun: list[float] = []
        self.ended: list[str] = []

    async def __call__(self) -> object:
        seconds, outcome = self.plans[len(self.begun)]
        self.begun.append(clock())
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("ended")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def test_a_fast_result_starts_no_other_copy_and_leaves_nothing() -> None:
    fn = Copies((0.5, "first"))
    assert await Hedger(delay=1.0).call(fn) == "first"
    assert fn.begun == [0.0]
    assert isinstance(loop := asyncio.get_running_loop(), VirtualTimeLoop)
    assert loop.live_timers() == []


async def test_a_slow_first_copy_loses_to_the_hedge_and_is_cancelled_and_awaited() -> None:
    fn = Copies((60.0, "first"), (0.5, "second"))
    assert await Hedger(delay=1.0).call(fn) == "second"
    assert fn.begun == [0.0, 1.0]
    assert fn.ended == ["ended", "cancelled"]
    assert clock() == 1.5
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_first_copy_that_wins_late_cancels_and_awaits_the_hedge() -> None:
    fn = Copies((1.5, "first"), (60.0, "second"))
    assert await Hedger(delay=1.0).call(fn) == "first"
    assert fn.ended == ["ended", "cancelled"]
    assert clock() == 1.5


async def test_a_result_in_the_very_moment_of_the_delay_keeps_the_hedge_from_running() -> None:
    reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(1.0, reply.set_result, "first")
    begun = 0
    budget = RetryBudget()
    seen: list[Event] = []

    async def fn() -> str:
        nonlocal begun
        begun += 1
        return await reply

    assert await Hedger(delay=1.0, budget=budget, observer=seen.append).call(fn) == "first"
    assert clock() == 1.0
    assert begun == 1
    assert seen == [], "it has not been started"
    assert budget.stats() == RetryBudgetStats(calls=1, granted=0, refused=0), "nor paid for"


async def test_a_failure_in_the_very_moment_of_the_delay_is_hedged_only_if_the_budget_grants_it() -> None:
    for min_per_second in (0, 1):
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(1.0, reply.set_exception, OSError("first"))
        replies = iter([reply, asyncio.sleep(1.0, "second")])
        hedged = Hedger(delay=1.0, budget=RetryBudget(min_per_second=min_per_second)).call(lambda: next(replies))  # noqa: B023
        if min_per_second:
            assert await hedged == "second"
        else:
            with pytest.raises(OSError, match="first"):
                await hedged
            next(replies).close()  # type: ignore[attr-defined]


async def test_none_is_a_result() -> None:
    assert await Hedger(delay=1.0).call(Copies((60.0, 1), (0.5, None))) is None


async def test_hedges_start_one_by_one_up_to_the_limit() -> None:
    fn = Copies(*[(60.0, number) for number in range(5)])
    assert await Hedger(delay=1.0, max_hedges=3).call(fn) == 0
    assert fn.begun == [0.0, 1.0, 2.0, 3.0]
    assert clock() == 60.0
    assert fn.ended == ["ended", *["cancelled"] * 3]


async def test_without_a_delay_all_copies_start_at_once() -> None:
    fn = Copies((60.0, 0), (2.0, 1), (1.0, 2))
    assert await Hedger(delay=0, max_hedges=2).call(fn) == 2
    assert fn.begun == [0.0, 0.0, 0.0]


@given(
    plans=st.lists(st.tuples(st.floats(0.01, 10), st.booleans()), min_size=5, max_size=5),
    delay=st.floats(0.1, 5),
    max_hedges=st.integers(1, 4),
)
@settings(max_examples=60)
def test_who_runs_when_and_who_wins_agrees_with_the_naive_model(
    plans: list[tuple[float, bool]], delay: float, max_hedges: int
) -> None:
    def naive() -> tuple[list[float], float, int | None]:
        """Return when copies begin, when the call ends, and which copy wins or else fails first."""
        begins = [0.0]
        while len(begins) <= max_hedges:
            next_begin = begins[-1] + delay
            ends = [begin + seconds for begin, (seconds, _) in zip(begins, plans, strict=False)]
            assume(all(abs(end - next_begin) > 1e-6 for end in ends))
            if any(end < next_begin and good for end, (_, good) in zip(ends, plans, strict=False)):
                break
            if all(end < next_begin for end in ends):
                break
            begins.append(next_begin)
        ends = [begin + seconds for begin, (seconds, _) in zip(begins, plans, strict=False)]
        assume(len({round(end, 6) for end in ends}) == len(ends))
        good = [number for number in range(len(begins)) if plans[number][1]]
        if good:
            winner = min(good, key=ends.__getitem__)
            return [begin for begin in begins if begin < ends[winner]], ends[winner], winner
        return begins, max(ends), min(range(len(begins)), key=ends.__getitem__)

    expected_begun, expected_end, expected = naive()
    fn = Copies(*((s, number if good else OSError(number)) for number, (s, good) in enumerate(plans)))

    async def main() -> tuple[object, float]:
        try:
            winner = await Hedger(delay=delay, max_hedges=max_hedges).call(fn)
        except OSError as error:
            return error.args[0], clock()
        return winner, clock()

    result, end = run(main)
    assert result == expected
    assert end == pytest.approx(expected_end)
    assert fn.begun == pytest.approx(expected_begun)


# --- The observed delay -------------------------------------------------------------------------------------


async def test_the_observed_delay_stays_at_the_95th_percentile_although_hedges_cut_what_is_longer() -> None:
    rng = random.Random(1)
    hedges: list[Event] = []
    hedger = Hedger(delay=10.0, quantile=0.95, observer=hedges.append)

    async def fn() -> None:
        await asyncio.sleep(rng.expovariate(1.0))

    for _ in range(3):
        hedges.clear()
        for _ in range(2000):
            await hedger.call(fn)
        assert hedger.delay == pytest.approx(-math.log(0.05), rel=0.15)
    assert sum(isinstance(event, HedgeStarted) for event in hedges) == pytest.approx(0.05 * 2000, rel=0.3)


async def test_a_delay_that_has_become_too_short_grows_although_its_hedges_win() -> None:
    hedger = Hedger(delay=10.0, quantile=0.95)
    for slower in (1.0, 100.0):
        rng = random.Random(1)

        async def fn() -> None:
            await asyncio.sleep(slower * rng.uniform(0.5, 1.0))  # noqa: B023 - runs within this turn of the loop

        for _ in range(3000):
            await hedger.call(fn)
        assert hedger.delay == pytest.approx(0.975 * slower, rel=0.02)


async def test_until_a_hundred_calls_have_ended_the_delay_is_the_one_given() -> None:
    hedger = Hedger(delay=10.0, quantile=0.95)
    for _ in range(99):
        await hedger.call(asyncio.sleep, 1.0)
    assert hedger.delay == 10.0
    await hedger.call(asyncio.sleep, 1.0)
    assert hedger.delay == 1.0
    assert "delay=1 (quantile=0.95), max_hedges=1" in repr(hedger)
    fn = Copies((60.0, "first"), (0.5, "second"))
    start = clock()
    assert await hedger.call(fn) == "second"
    assert fn.begun == [start, start + 1.0]


async def test_calls_that_all_take_the_same_time_are_not_hedged() -> None:
    seen: list[Event] = []
    hedger = Hedger(delay=10.0, quantile=0.95, observer=seen.append)
    for _ in range(200):
        await hedger.call(asyncio.sleep, 0.5)
    assert hedger.delay == 0.5
    assert seen == []


async def test_a_call_counts_once_with_the_time_until_its_result_whichever_copy_had_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def cleans_up() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(7.0)

    monkeypatch.setattr(RecentDurations, "LEAST", 1)
    for plans, expected in (
        ([(0.5, "first")], 0.5),
        ([(1.5, "first"), (60.0, "second")], 1.5),
        ([(60.0, "first"), (0.75, "second")], 1.75),
        ([(1.25, OSError()), (0.75, "second")], 1.75),
    ):
        hedger = Hedger(delay=1.0, quantile=1.0)
        await hedger.call(Copies(*plans))
        assert hedger.delay == expected
    hedger = Hedger(delay=1.0, quantile=1.0)
    copies = iter([cleans_up(), asyncio.sleep(0.75)])
    await hedger.call(lambda: next(copies))
    assert hedger.delay == 1.75, "not with the time that the loser takes to end"
    hedger = Hedger(delay=1.0, quantile=1.0)
    copies = iter([asyncio.sleep(1.25), cleans_up()])
    await hedger.call(lambda: next(copies))
    assert hedger.delay == 1.25


async def test_a_failure_or_a_cancellation_counts_only_after_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecentDurations, "LEAST", 1)
    for after, expected in ((0.25, 1.0), (1.0, 1.0), (5.0, 5.0)):
        hedger = Hedger(delay=1.0, quantile=1.0)
        with pytest.raises(OSError):
            await hedger.call(Copies((after, OSError()), (after - 1.0, OSError())))
        assert hedger.delay == expected
        hedger = Hedger(delay=1.0, quantile=1.0)
        with anyio.move_on_after(after):
            await hedger.call(asyncio.sleep, 60.0)
        assert hedger.delay == expected


async def test_when_every_call_is_cut_by_its_timeout_hedges_end() -> None:
    rng = random.Random(1)
    seen: list[Event] = []
    hedger = Hedger(delay=1.0, quantile=0.95, observer=seen.append)
    for _ in range(1000):
        await hedger.call(asyncio.sleep, 0.5)
    assert seen == []
    for _ in range(1000):
        with anyio.move_on_after(rng.uniform(4.0, 5.0)):
            await hedger.call(asyncio.sleep, 60.0)
    assert 4.5 < hedger.delay < 5.0
    assert len(seen) < 300, "fewer and fewer"


# --- Failures -----------------------------------------------------------------------------------------------


async def test_a_failure_before_the_delay_is_raised_at_once_and_hedges_nothing() -> None:
    error = OSError()
    fn = Copies((0.5, error))
    with pytest.raises(OSError) as caught:
        await Hedger(delay=1.0).call(fn)
    assert caught.value is error
    assert (fn.begun, clock()) == ([0.0], 0.5)
    assert not hasattr(error, "__notes__")
    assert error.__context__ is None


async def test_a_failure_waits_for_the_copies_that_still_run() -> None:
    assert await Hedger(delay=1.0).call(Copies((1.5, OSError()), (5.0, "second"))) == "second"
    assert clock() == 6.0
    assert await Hedger(delay=1.0).call(Copies((5.0, "first"), (0.5, OSError()))) == "first"
    assert clock() == 11.0
    fn = Copies((1.5, OSError()), (9.0, "second"), (1.0, "third"))
    assert await Hedger(delay=1.0, max_hedges=2).call(fn) == "third", "a slow copy is hedged although another failed"


async def test_when_all_fail_the_error_that_came_first_is_raised_with_a_note_on_the_others() -> None:
    first = PeerLost(node="bob")
    for _ in range(2):  # raised again, it has one note, not two
        fn = Copies((3.0, ValueError()), (0.5, first), (0.75, KeyError()))
        with pytest.raises(PeerLost) as caught:
            await Hedger(delay=1.0, max_hedges=2, name="read").call(fn)
        assert caught.value is first
        assert first.__notes__ == ["read: the other copies failed too: KeyError, ValueError"]


async def test_an_error_that_says_it_did_not_start_is_raised_only_if_no_copy_did() -> None:
    refused, late = Unreachable(node="bob"), CallTimeout(name="read", timeout=1.0)
    for plans in ([(1.25, refused), (0.5, late)], [(2.0, late), (0.5, refused)]):
        with pytest.raises(CallTimeout) as caught:
            await Hedger(delay=1.0, name="read").call(Copies(*plans))
        assert caught.value is late
        assert late.__notes__ == ["read: the other copies failed too: Unreachable"]
    with pytest.raises(Unreachable) as not_caught:
        await Hedger(delay=1.0).call(Copies((1.25, refused), (0.5, Unreachable(node="carol"))))
    assert not_caught.value is refused, "the first one, where none has started"


async def test_a_hedge_that_is_cancelled_from_within_had_begun() -> None:
    for seconds in (0.25, 0.5):  # before the first copy ends, and after
        cut = asyncio.CancelledError()
        with pytest.raises(OutcomeUnknown) as caught:
            await Hedger(delay=1.0).call(Copies((1.375, Unreachable(node="bob")), (seconds, cut)))
        assert caught.value.__cause__ is cut
        with pytest.raises(OSError, match="first"):
            await Hedger(delay=1.0).call(Copies((1.375, OSError("first")), (seconds, cut)))


async def test_losers_that_fail_or_suppress_their_cancellation_mask_nothing() -> None:
    async def fails(_: BaseException) -> object:
        raise ValueError("while it was cancelled")

    async def suppresses(_: BaseException) -> object:
        return "late"

    async def fails_in_a_group(error: BaseException) -> object:
        raise BaseExceptionGroup("group", [error, ValueError()])

    async def cleans_up(error: BaseException) -> object:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(0.25)
        raise error

    for answer in (fails, suppresses, fails_in_a_group, cleans_up):
        for first_is_slow in (True, False):
            slow = iter([first_is_slow, not first_is_slow])

            async def fn() -> object:
                if next(slow):  # noqa: B023 - runs within this turn of the loops
                    try:
                        await asyncio.sleep(60)
                    except asyncio.CancelledError as error:
                        return await answer(error)  # noqa: B023
                await asyncio.sleep(1.5)
                return "winner"

            start = clock()
            seen: list[Event] = []
            assert await Hedger(delay=1.0, name="read", observer=seen.append).call(fn) == "winner"
            cleaning = 0.25 if answer is cleans_up else 0.0
            assert clock() - start == (2.5 if first_is_slow else 1.5) + cleaning
            assert seen == [HedgeStarted("read", 1), *[HedgeWon("read", 1)] * first_is_slow]
    await asyncio.sleep(1)


@pytest.mark.parametrize("stopping", [KeyboardInterrupt(), SystemExit(), BaseExceptionGroup("g", [SystemExit()])])
@pytest.mark.parametrize("by_the_hedge", [False, True])
async def test_what_stops_programs_passes_untouched(stopping: BaseException, by_the_hedge: bool) -> None:
    plans: list[tuple[float, object]] = [(1.5, OSError("ignored")), (60.0, "second"), (60.0, "third")]
    plans[by_the_hedge] = (1.75, stopping)
    fn = Copies(*plans)
    with pytest.raises(type(stopping)) as caught:
        await Hedger(delay=1.0, max_hedges=2).call(fn)
    assert caught.value is stopping
    assert fn.ended.count("cancelled") == len(fn.begun) - 1 - by_the_hedge


async def test_what_stops_programs_passes_also_if_the_race_is_over_or_the_caller_is_cancelled() -> None:
    stopping = SystemExit()

    async def fn(first: list[bool]) -> str:
        if first.pop():
            await asyncio.sleep(1.5)
            return "first"
        try:
            await asyncio.sleep(60)
        finally:
            raise stopping

    for cancel in (False, True):
        call = asyncio.create_task(_caught(Hedger(delay=1.0).call(fn, [False, True])))
        if cancel:
            asyncio.get_running_loop().call_later(1.25, call.cancel)
        assert await call is stopping


async def _caught(call: Awaitable[object]) -> BaseException:  # a task that raises SystemExit would end the loop
    with pytest.raises(SystemExit) as caught:
        await call
    return caught.value


@pytest.mark.skipif(sys.version_info < (3, 12), reason="has no eager tasks")
async def test_tasks_that_start_eagerly_change_nothing() -> None:
    seen: list[Event] = []
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - Python 3.11 has none
    hedger = Hedger(delay=1.0, max_hedges=2, name="read", observer=seen.append)
    seconds = iter([60.0, 0.0])

    async def fn() -> float:
        if result := next(seconds):
            await asyncio.sleep(result)
        return result

    assert await hedger.call(fn) == 0.0
    assert seen == [HedgeStarted("read", 1), HedgeWon("read", 1)]
    assert isinstance(loop, VirtualTimeLoop)
    assert loop.live_timers() == []


async def test_a_copy_that_is_cancelled_from_within_counts_as_no_failure() -> None:
    cancelled = Copies((0.5, asyncio.CancelledError()))
    assert await Hedger(delay=1.0).call(Copies((3.0, "first"), (0.5, asyncio.CancelledError()))) == "first"
    with pytest.raises(OSError):
        await Hedger(delay=1.0).call(Copies((1.25, OSError()), (0.5, asyncio.CancelledError())))
    with pytest.raises(asyncio.CancelledError):  # that of the first copy is the caller's, as without a Hedger
        await Hedger(delay=1.0).call(cancelled)


async def test_a_function_that_fails_to_start_at_all_is_a_failure() -> None:
    first = iter([True, False])

    def fn() -> Any:
        if next(first):
            return asyncio.sleep(2, "first")
        raise OSError("no coroutine")

    assert await Hedger(delay=1.0).call(fn) == "first"


# --- Cancellation and deadlines -----------------------------------------------------------------------------


def test_wherever_it_is_cancelled_all_copies_are_cancelled_and_awaited() -> None:
    scenarios: list[Callable[[], Copies]] = [
        lambda: Copies((0.5, "first")),
        lambda: Copies((60.0, "first"), (60.0, "second"), (0.5, "third")),
        lambda: Copies((1.5, OSError()), (60.0, "second"), (5.0, "third")),
        lambda: Copies((2.5, "first"), (60.0, "second"), (60.0, "third")),
    ]
    for scenario in scenarios:
        for point in cancellation_points():

            async def main() -> None:
                fn = scenario()  # noqa: B023 - runs within this turn of the loops
                cancelled = await point.cancel(Hedger(delay=1.0, max_hedges=2).call(fn))  # noqa: B023
                assert len(fn.ended) == len(fn.begun), "all have ended by the time the call has"
                assert cancelled or point.result in {"first", "third"}  # noqa: B023
                assert cancelled == point.reached or fn.begun == [0.0, 1.0, 2.0]  # noqa: B023
                begun = list(fn.begun)
                await asyncio.sleep(100)
                assert fn.begun == begun, "and no other is started"

            run(main)


async def test_a_hedge_that_was_about_to_begin_when_the_caller_was_cancelled_does_not() -> None:
    fn = Copies((60.0, "first"), (60.0, "second"))
    budget = RetryBudget()
    call = asyncio.create_task(Hedger(delay=1.0, budget=budget).call(fn))
    asyncio.get_running_loop().call_later(1.0, call.cancel)  # set before the timer of the hedge, so it comes first
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (fn.begun, fn.ended, clock()) == ([0.0], ["cancelled"], 1.0)
    assert budget.stats() == RetryBudgetStats(calls=1, granted=0, refused=0)


async def test_an_enclosing_scope_that_is_cancelled_while_losers_clean_up_waits_for_them_in_peace() -> None:
    first = iter([True, False])

    async def fn() -> str:
        if next(first):
            await asyncio.sleep(2)
            return "first"
        try:
            await asyncio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
        return "never"

    with anyio.move_on_after(2.5):
        assert await Hedger(delay=1.0).call(fn) == "first", "as of whatever awaits no more"
        assert clock() == 3.0
        await asyncio.sleep(1)
    assert clock() == 3.0


async def test_a_second_cancellation_while_losers_clean_up_does_not_leave_them_behind() -> None:
    cleaned_up = []

    async def fn() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
            cleaned_up.append(clock())
        return "never"

    call = asyncio.create_task(Hedger(delay=1.0).call(fn))
    for seconds in (1.5, 1.25, 0.25):  # the first copy cleans up until 2.5, then the hedge until 3.5
        await asyncio.sleep(seconds)
        call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert cleaned_up == [2.5, 3.5]
    assert clock() == 3.5


async def test_a_result_does_not_survive_a_cancellation_that_arrives_while_losers_clean_up() -> None:
    first = iter([True, False])

    async def fn() -> str:
        if next(first):
            await asyncio.sleep(2)
            return "first"
        try:
            await asyncio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
        return "never"

    call = asyncio.create_task(Hedger(delay=1.0).call(fn))
    await asyncio.sleep(2.5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert clock() == 3.0


async def test_all_copies_see_the_enclosing_deadline_and_the_context_of_the_caller() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen = []

    async def fn() -> str:
        seen.append((anyio.current_effective_deadline(), variable.get()))
        variable.set("changed by a copy")
        await asyncio.sleep(60)
        return "never"

    variable.set("of the caller")
    with pytest.raises(CallTimeout):
        await Timeout(5.0).call(Hedger(delay=1.0, max_hedges=2).call, fn)
    assert seen == [(5.0, "of the caller")] * 3
    assert clock() == 5.0


async def test_a_hedge_that_is_cut_by_the_deadline_alone_ends_the_call_with_it() -> None:
    fn = Copies((1.5, OSError()), (60.0, "second"))
    with anyio.move_on_after(3.0) as scope:
        await Hedger(delay=1.0).call(fn)
    assert scope.cancelled_caught
    assert clock() == 3.0

    fn = Copies((1.5, OSError("first")), (60.0, "second"))
    with pytest.raises(OSError, match="first"), anyio.move_on_after(3.0) as scope:
        asyncio.get_running_loop().call_later(2.0, setattr, scope, "deadline", clock() + 99.0)  # moved meanwhile
        await Hedger(delay=1.0).call(fn)


async def test_the_moment_of_an_outer_cancellation_and_of_a_result_of_a_hedge_is_the_cancellations() -> None:
    with anyio.move_on_after(2.0) as scope:
        await Hedger(delay=1.0).call(Copies((60.0, 1), (1.0, 2)))
    assert scope.cancelled_caught

    call = asyncio.create_task(Hedger(delay=1.0).call(Copies((60.0, 1), (1.0, 2))))
    await asyncio.sleep(1.5)
    asyncio.get_running_loop().call_at(4.0, call.cancel)
    with pytest.raises(asyncio.CancelledError):
        await call


# --- Around it ----------------------------------------------------------------------------------------------


async def test_the_budget_is_shared_with_retries_and_ends_hedging_when_it_is_spent() -> None:
    budget = RetryBudget(ratio=0.5, min_per_second=0)
    hedger = Hedger(delay=1.0, max_hedges=3, budget=budget)
    fn = Copies(*[(5.0, number) for number in range(4)])
    for _ in range(3):
        await hedger.call(Copies((0.5, "fast")))
    assert await hedger.call(fn) == 0
    assert len(fn.begun) == 3, "four calls earn two hedges"
    assert budget.stats() == RetryBudgetStats(calls=4, granted=2, refused=1)
    with pytest.raises(OSError) as caught:
        await Retrier(RetryPolicy(), on=OSError, budget=budget).call(Copies((0.0, OSError())))
    assert caught.value.__notes__ == ["retrier: gave up after 1 attempt: the retry budget is spent"]


async def test_one_hedger_serves_many_tasks() -> None:
    hedger = Hedger(delay=1.0)

    async def fn(number: int, seconds: list[float]) -> int:
        await asyncio.sleep(seconds.pop(0))
        return number

    calls = [hedger.call(fn, number, [60.0 if number % 3 else 0.5, 0.25]) for number in range(200)]
    assert await asyncio.gather(*calls) == list(range(200))
    assert clock() == 1.25


async def test_the_decorator_hedges_as_call_does() -> None:
    seconds = iter([60.0, 0.5])

    @Hedger(delay=1.0)
    async def read(key: str, *, upper: bool) -> str:
        await asyncio.sleep(next(seconds))
        return key.upper() if upper else key

    assert await read("color", upper=True) == "COLOR"
    with pytest.raises(TypeError, match="@Hedger guards async functions"):
        Hedger(delay=1.0)(lambda: None)  # type: ignore[arg-type, return-value]


async def test_the_observer_hears_of_hedges_and_of_those_that_win() -> None:
    seen: list[Event] = []
    hedger = Hedger(delay=1.0, max_hedges=2, name="read", observer=seen.append)
    await hedger.call(Copies((0.5, "fast")))
    assert seen == []
    await hedger.call(Copies((60.0, 1), (60.0, 2), (0.5, 3)))
    assert seen == [HedgeStarted("read", 1), HedgeStarted("read", 2), HedgeWon("read", 2)]
    seen.clear()
    await hedger.call(Copies((1.5, 1), (60.0, 2)))
    assert seen == [HedgeStarted("read", 1)]


def test_an_observer_that_fails_is_reported_and_changes_nothing() -> None:
    def broken(_: Event) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        hedger = Hedger(delay=1.0, observer=broken)
        assert await hedger.call(Copies((60.0, "first"), (0.5, "second"))) == "second"
        assert len(unhandled) == 2

    run(main)


def test_it_works_in_one_loop_after_another() -> None:
    hedger = Hedger(delay=1.0, budget=RetryBudget())

    async def main() -> None:
        await asyncio.sleep(50)
        assert await hedger.call(Copies((60.0, "first"), (0.5, "second"))) == "second"

    run(main)
    run(main)


async def test_nothing_holds_errors_after_the_call() -> None:
    class Big(Exception):
        pass

    refs: list[weakref.ref[Big]] = []

    def make() -> Big:
        error = Big()
        refs.append(weakref.ref(error))
        return error

    async def fn(seconds: list[float], fails: list[bool]) -> None:
        slow, error = seconds.pop(0), fails.pop(0)
        try:
            await asyncio.sleep(slow)
        finally:
            if error:
                raise make()

    gc.disable()
    try:
        for seconds, fails in [
            ([0.5], [True]),
            ([1.5, 1.0], [True, True]),
            ([1.5, 1.0], [True, False]),
            ([3.0, 1.0], [False, True]),
            ([3.0, 1.0], [True, False]),
        ]:
            expected = sum(fails)
            refs.clear()
            with contextlib.suppress(Big):
                await Hedger(delay=1.0).call(fn, seconds, fails)
            await asyncio.sleep(1)  # what the loop still held of tasks that ended
            assert [ref() for ref in refs] == [None] * expected, "there are no cycles to collect"
    finally:
        gc.enable()


def test_it_says_what_it_is_also_to_a_stack() -> None:
    hedger = Hedger(delay=0.05, name="read")
    assert repr(hedger) == "Hedger(delay=0.05, max_hedges=1, budget=None, name='read')"
    assert hedger.time_limit is None
    with pytest.raises(ValueError, match="every hedge would retry by itself"):
        stack(hedger, Retrier(RetryPolicy(), on=OSError))
    with pytest.raises(ValueError, match="their copies multiply"):
        stack(hedger, Hedger(delay=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay": -0.1}, "delay must be finite and zero or more seconds, not -0.1"),
        ({"delay": math.nan}, "delay must be finite and zero or more seconds, not nan"),
        ({"delay": 1.0, "quantile": 95}, "quantile must be more than 0 and at most 1, not 95"),
        ({"delay": 1.0, "max_hedges": 0}, "max_hedges must be at least 1, not 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hedger(**arguments)
