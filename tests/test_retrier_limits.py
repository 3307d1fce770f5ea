"""What limits a Retrier: its timeouts, enclosing deadlines, cancellation, and a budget."""

import asyncio
import contextlib
import gc
import math
import weakref
from typing import Any

import anyio
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meshkit.errors import CallTimeout, Refused, Unreachable
from meshkit.events import Event
from meshkit.retrier import GaveUp, Retrier, RetryBudget, RetryBudgetStats, Retrying, RetryPolicy
from meshkit.testing import cancellation_points, run
from tests.test_retrier import PLAIN, Form, Script, clock, every_form

# --- The timeout of the call --------------------------------------------------------------------------------


@every_form
async def test_a_timeout_of_a_fifth_of_a_second_around_an_attempt_of_one_second_ends_it_then(form: Form) -> None:
    fn = Script("done", seconds=1.0)
    with pytest.raises(CallTimeout) as caught:
        await form(Retrier(RetryPolicy(timeout=0.2), on=OSError, name="store"), fn)
    assert clock() == pytest.approx(0.2)
    assert (caught.value.name, caught.value.timeout) == ("store", 0.2)
    assert str(caught.value) == "store: no result within 0.2 s; it may still have happened"
    assert caught.value.__notes__ == ["store: gave up after 1 attempt: its timeout is over"]
    assert isinstance(caught.value.__cause__, asyncio.CancelledError), "which shows where it was waiting"


@every_form
async def test_the_cause_of_a_timeout_in_a_later_attempt_is_the_error_before_it(form: Form) -> None:
    errors = iter([OSError(1), OSError(2)])

    async def fn() -> None:
        for error in errors:
            raise error
        await asyncio.sleep(60)

    with pytest.raises(CallTimeout) as caught:
        await form(Retrier(RetryPolicy(timeout=10.0, jitter=False), on=OSError), fn)
    assert clock() == pytest.approx(10.0)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.args == (2,)
    expected = "retrier: gave up after 3 attempts, 10 s after the first failure: its timeout is over"
    assert caught.value.__notes__ == [expected]


@every_form
async def test_it_never_sleeps_past_its_timeout_but_fails_now_with_the_last_error(form: Form) -> None:
    fn = Script(OSError())
    with pytest.raises(OSError) as caught:
        await form(Retrier(RetryPolicy(timeout=2.5, jitter=False), on=OSError), fn)
    assert fn.calls == [0.0, 1.0]
    assert clock() == 1.0
    (note,) = caught.value.__notes__
    assert note.endswith(": the next attempt, in 2 s, would come after the deadline")


async def test_a_delay_that_ends_exactly_at_the_deadline_is_not_begun() -> None:
    fn = Script(OSError())
    with pytest.raises(OSError):
        await Retrier(RetryPolicy(timeout=3.0, jitter=False), on=OSError).call(fn)
    assert fn.calls == [0.0, 1.0]


async def test_a_call_that_raises_when_the_timeout_cuts_it_is_not_retried() -> None:
    async def fn() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            raise OSError("interrupted") from None

    with pytest.raises(OSError, match="interrupted") as caught:
        await Retrier(RetryPolicy(timeout=0.2), on=OSError).call(fn)
    assert caught.value.__notes__ == ["retrier: gave up after 1 attempt: its timeout is over"]


async def test_a_result_that_came_although_the_attempt_was_cut_is_kept() -> None:
    async def fn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)
        return "saved"

    assert await Retrier(RetryPolicy(timeout=0.2), on=OSError).call(fn) == "saved"
    await asyncio.sleep(1)


async def test_errors_in_a_group_come_out_when_the_rest_of_it_was_cut() -> None:
    async def fn() -> None:
        async with anyio.create_task_group():
            try:
                await asyncio.sleep(5)
            finally:
                raise ValueError("while it was cut")

    with pytest.raises(ExceptionGroup) as caught:
        await Retrier(RetryPolicy(timeout=0.5), on=ValueError).call(fn)
    assert caught.group_contains(ValueError)
    assert clock() == 0.5


# --- The timeout of an attempt ------------------------------------------------------------------------------


@every_form
async def test_an_attempt_that_is_cut_is_not_retried_since_it_may_have_happened(form: Form) -> None:
    for on in (Exception, TimeoutError, OSError, lambda _: True):
        fn = Script("done", seconds=5.0)
        with pytest.raises(CallTimeout) as caught:
            await form(Retrier(RetryPolicy(attempt_timeout=1.0), on=on), fn)
        assert len(fn.calls) == 1
        assert caught.value.timeout == 1.0
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert clock() == 4.0


@every_form
async def test_an_attempt_that_is_cut_is_retried_where_that_is_harmless_or_named(form: Form) -> None:
    for arguments in ({"on": TimeoutError, "idempotent": True}, {"on": CallTimeout}):
        start = clock()
        fn = Script("done", seconds=5.0)
        with pytest.raises(CallTimeout) as caught:
            await form(Retrier(RetryPolicy(attempt_timeout=1.0, jitter=False), **arguments), fn)
        assert [at - start for at in fn.calls] == [0.0, 2.0, 5.0, 10.0]
        assert clock() - start == 11.0
        assert caught.value.__notes__ == [
            "retrier: gave up after 4 attempts, 10 s after the first failure: max_retries=3"
        ]


async def test_of_both_timeouts_the_one_that_comes_first_cuts() -> None:
    policy = RetryPolicy(timeout=6.5, attempt_timeout=1.0, jitter=False, max_retries=10)
    fn = Script("done", seconds=5.0)
    with pytest.raises(CallTimeout) as caught:
        await Retrier(policy, on=CallTimeout).call(fn)
    assert fn.calls == [0.0, 2.0, 5.0]
    assert (clock(), caught.value.timeout) == (6.0, 1.0), "the next delay of 4 s would end too late"
    fn = Script("done", seconds=5.0)
    start = clock()
    with pytest.raises(CallTimeout) as caught:
        await Retrier(RetryPolicy(timeout=2.5, attempt_timeout=1.0, jitter=False), on=CallTimeout).call(fn)
    assert (clock() - start, caught.value.timeout) == (2.5, 2.5)
    assert isinstance(caught.value.__cause__, CallTimeout), "that of the first attempt"
    with pytest.raises(CallTimeout) as caught:
        await Retrier(RetryPolicy(timeout=1.0, attempt_timeout=1.0), on=CallTimeout).call(fn)
    assert caught.value.__notes__ == ["retrier: gave up after 1 attempt: its timeout is over"]


async def test_a_timeout_error_of_the_call_itself_is_not_ours() -> None:
    policy = RetryPolicy(timeout=60.0, attempt_timeout=5.0, jitter=False)
    fn = Script(TimeoutError("its own"), "done", seconds=1.0)
    assert await Retrier(policy, on=TimeoutError).call(fn) == "done"
    with pytest.raises(TimeoutError, match="its own") as caught:
        await Retrier(policy, on=ValueError).call(Script(TimeoutError("its own")))
    assert not isinstance(caught.value, CallTimeout)


# --- Deadlines and cancellation from outside ----------------------------------------------------------------


@pytest.mark.parametrize("policy", [PLAIN, RetryPolicy(jitter=False, timeout=60.0, attempt_timeout=30.0)])
@every_form
async def test_an_enclosing_deadline_bounds_delays_and_cuts_attempts(form: Form, policy: RetryPolicy) -> None:
    retrier = Retrier(policy, on=(OSError, CallTimeout), idempotent=True)
    fn = Script(OSError())
    with pytest.raises(OSError) as caught, anyio.fail_after(2.5):
        await form(retrier, fn)
    assert (fn.calls, clock()) == ([0.0, 1.0], 1.0)
    assert "would come after the deadline" in caught.value.__notes__[0]

    fn = Script("done", seconds=5.0)
    with anyio.move_on_after(2.0) as scope:
        await form(retrier, fn)
    assert scope.cancelled_caught, "its deadline came first: nothing of ours is raised"
    assert (fn.calls, clock()) == ([1.0], 3.0)


async def test_a_shield_hides_the_deadline_outside_of_it() -> None:
    with anyio.move_on_after(2.5):
        with anyio.CancelScope(shield=True):
            with pytest.raises(OSError):
                await Retrier(PLAIN, on=OSError).call(Script(OSError()))
            assert clock() == 7.0


@every_form
async def test_nothing_is_retried_in_a_scope_that_is_cancelled_already(form: Form) -> None:
    fn = Script(OSError())
    with anyio.CancelScope() as scope, pytest.raises(OSError):
        scope.cancel()
        await form(Retrier(PLAIN, on=OSError), fn)
    assert len(fn.calls) == 1


async def test_an_outer_cancellation_at_the_moment_of_the_timeout_comes_first() -> None:
    for policy in (RetryPolicy(timeout=1.0), RetryPolicy(attempt_timeout=1.0)):
        with anyio.move_on_after(1.0) as scope:
            await Retrier(policy, on=CallTimeout).call(Script("done", seconds=5.0))
        assert scope.cancelled_caught

        call = asyncio.create_task(Retrier(policy, on=CallTimeout).call(Script("done", seconds=5.0)))
        await asyncio.sleep(1.0)  # wakes in the pass of the loop in which the timeout cancels the attempt
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert call.cancelled()


def test_wherever_it_is_cancelled_it_ends_and_the_budget_gets_back_what_was_not_used() -> None:
    policies = [
        RetryPolicy(jitter=False),
        RetryPolicy(jitter=False, timeout=60.0),
        RetryPolicy(jitter=False, attempt_timeout=30.0),
    ]
    forms = every_form.args[1]
    for form in forms:
        for policy in policies:
            for with_budget in (False, True):
                for point in cancellation_points():
                    fn = Script(OSError(), OSError(), "done", seconds=0.5)

                    async def main() -> None:
                        budget = RetryBudget() if with_budget else None  # noqa: B023 - runs within this turn
                        seen: list[Event] = []
                        retrier = Retrier(policy, on=OSError, budget=budget, observer=seen.append)  # noqa: B023
                        cancelled = await point.cancel(form(retrier, fn))  # noqa: B023
                        assert cancelled == point.reached  # noqa: B023
                        assert cancelled or point.result == "done"  # noqa: B023
                        assert not any(isinstance(event, GaveUp) for event in seen)
                        calls = len(fn.calls)  # noqa: B023
                        await asyncio.sleep(60)
                        assert len(fn.calls) == calls, "nothing goes on behind its back"  # noqa: B023
                        if budget is not None:
                            assert budget.stats() == RetryBudgetStats(1, calls - 1, 0)

                    run(main)


async def test_a_thousand_calls_that_are_cancelled_at_five_hundred_moments_lose_nothing() -> None:
    budget = RetryBudget(ratio=1.0)
    retrier = Retrier(RetryPolicy(jitter=False, timeout=20.0), on=OSError, budget=budget)
    scripts = [Script(OSError(), "done", seconds=0.25) for _ in range(1000)]
    tasks = [asyncio.create_task(retrier.call(script)) for script in scripts]
    for i, task in enumerate(tasks):
        asyncio.get_running_loop().call_later((i % 500) / 250, task.cancel)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {str, asyncio.CancelledError}
    retried = sum(max(0, len(script.calls) - 1) for script in scripts)
    begun = sum(bool(script.calls) for script in scripts)
    assert budget.stats() == RetryBudgetStats(begun, retried, 0)


async def test_a_scope_is_entered_only_where_a_timeout_is_set() -> None:
    deadlines = []

    async def fn() -> None:
        deadlines.append(anyio.current_effective_deadline())

    await Retrier(PLAIN, on=OSError).call(fn)
    await Retrier(RetryPolicy(timeout=5.0), on=OSError).call(fn)
    await Retrier(RetryPolicy(timeout=5.0, attempt_timeout=2.0), on=OSError).call(fn)
    with anyio.fail_after(1.0):
        await Retrier(RetryPolicy(timeout=5.0, attempt_timeout=2.0), on=OSError).call(fn)
    assert deadlines == [math.inf, 5.0, 2.0, 1.0], "and what is called within can see it"


def test_it_works_in_one_loop_after_another() -> None:
    budget = RetryBudget(ratio=1.0, min_per_second=0)
    retrier = Retrier(RetryPolicy(jitter=False, timeout=5.0, max_retries=1), on=OSError, budget=budget)

    async def main() -> None:
        assert await retrier.call(Script(OSError(), "done")) == "done"
        with pytest.raises(CallTimeout):
            await retrier.call(Script("done", seconds=9.0))
        await asyncio.sleep(100)
        assert await retrier.call(Script(OSError(), "done")) == "done"

    run(main)
    run(main)
    assert budget.stats() == RetryBudgetStats(6, 4, 0)


async def test_nothing_holds_an_error_after_the_call() -> None:
    class Big(Exception):
        pass

    refs: list[weakref.ref[Big]] = []

    def make() -> Big:
        error = Big()
        refs.append(weakref.ref(error))
        return error

    async def fn() -> str:
        if len(refs) == 3:
            return "done"
        raise make()

    async def fails_then_hangs() -> None:
        if not refs:
            raise make()
        await asyncio.sleep(60)

    async def fails_then_is_refused() -> None:
        if not refs:
            raise make()
        raise Unreachable(node="bob")

    gc.disable()
    try:
        for policy in (PLAIN, RetryPolicy(timeout=60.0, jitter=False)):
            refs.clear()
            await Retrier(policy, on=Big).call(fn)
            assert [ref() for ref in refs] == [None, None, None], "there are no cycles to collect"
            with contextlib.suppress(Big):
                refs.clear()
                await Retrier(RetryPolicy(max_retries=1, timeout=policy.timeout), on=Big).call(fn)
            assert [ref() for ref in refs] == [None, None]
        with contextlib.suppress(CallTimeout):
            refs.clear()
            await Retrier(RetryPolicy(timeout=10.0, jitter=False), on=Big).call(fails_then_hangs)
        assert [ref() for ref in refs] == [None], "also where one is the cause of a timeout"
        for policy in (RetryPolicy(max_retries=1), RetryPolicy(max_retries=1, timeout=60.0)):
            refs.clear()
            with contextlib.suppress(Big):
                await Retrier(policy, on=Exception).call(fails_then_is_refused)
            assert [ref() for ref in refs] == [None], "also where it is raised in place of a refusal"
    finally:
        gc.enable()


# --- The budget ---------------------------------------------------------------------------------------------


@every_form
async def test_when_the_budget_is_spent_the_error_is_raised_at_once_and_says_so(form: Form) -> None:
    seen: list[Event] = []
    budget = RetryBudget(ratio=0.5, min_per_second=0)
    retrier = Retrier(PLAIN, on=OSError, budget=budget, observer=seen.append)
    await form(retrier, Script("done"))
    error = OSError()
    fn = Script(error)
    with pytest.raises(OSError) as caught:  # two calls earn one retry
        await form(retrier, fn)
    assert (fn.calls, clock()) == ([0.0, 1.0], 1.0)
    reason = "the retry budget is spent"
    assert caught.value.__notes__ == [f"retrier: gave up after 2 attempts, 1 s after the first failure: {reason}"]
    assert seen == [Retrying("retrier", 1, 1.0, error), GaveUp("retrier", 2, reason, error)]
    assert budget.stats() == RetryBudgetStats(calls=2, granted=1, refused=1)


async def test_a_thousand_callers_share_what_the_budget_grants() -> None:
    budget = RetryBudget(ratio=0.1, min_per_second=1)
    retrier = Retrier(RetryPolicy(), on=OSError, budget=budget)
    calls = [retrier.call(Script(OSError())) for _ in range(1000)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, OSError) for result in results)
    assert budget.stats().granted == 1000 * 0.1 + 1 * 10, "instead of 3,000 retries"


async def test_what_is_not_retried_anyway_costs_the_budget_nothing() -> None:
    budget = RetryBudget()
    policy = RetryPolicy(jitter=False, max_retries=0)
    for on, retrier_policy, error in [
        (OSError, PLAIN, ValueError()),
        (OSError, policy, OSError()),
        (Refused, PLAIN, Refused(retry_after=99.0)),
    ]:
        with pytest.raises(type(error)):
            await Retrier(retrier_policy, on=on, budget=budget).call(Script(error))
    with pytest.raises(OSError), anyio.fail_after(0.5):
        await Retrier(PLAIN, on=OSError, budget=budget).call(Script(OSError()))
    assert budget.stats() == RetryBudgetStats(4, 0, 0)


class BudgetAgainstModel(RuleBasedStateMachine):
    """Holds RetryBudget against lists of the times of all calls and grants."""

    @initialize(ratio=st.sampled_from([0.125, 0.25, 0.5, 1.0]), per_second=st.sampled_from([0, 0.125, 0.5, 2]))
    def begin(self, ratio: float, per_second: float) -> None:
        self.budget = RetryBudget(ratio=ratio, min_per_second=per_second)
        self.ratio, self.per_second = ratio, per_second
        self.now = 1000.0
        self.calls: list[float] = []
        self.grants: list[float] = []
        self.refunded = self.refused = 0

    @rule(seconds=st.floats(0, 4) | st.floats(5, 40))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(count=st.integers(1, 10))
    def call(self, count: int) -> None:
        for _ in range(count):
            self.budget.record_call(self.now)
            self.calls.append(self.now)

    def recent(self, times: list[float]) -> int:
        return sum(math.floor(at) > math.floor(self.now) - 10 for at in times)

    @rule()
    def spend(self) -> None:
        allowed = self.recent(self.grants) + 1 <= self.ratio * self.recent(self.calls) + 10 * self.per_second
        assert self.budget.try_spend(self.now) == allowed
        if allowed:
            self.grants.append(self.now)
        else:
            self.refused += 1

    @rule(pick=st.integers(0, 99))
    def refund(self, pick: int) -> None:
        if self.grants:
            self.budget.refund(self.grants.pop(pick % len(self.grants)))
            self.refunded += 1

    @invariant()
    def the_counts_are_right_and_little_is_held(self) -> None:
        if hasattr(self, "budget"):
            stats = self.budget.stats()
            assert stats == RetryBudgetStats(len(self.calls), len(self.grants), self.refused)
            assert len(self.budget._seconds) <= 10


TestBudgetAgainstModel = BudgetAgainstModel.TestCase
TestBudgetAgainstModel.settings = settings(max_examples=25, stateful_step_count=25)


def test_a_call_earns_for_ten_seconds_of_the_clock() -> None:
    for spent_at, allowed in ((109.9, True), (110.0, False)):
        budget = RetryBudget(ratio=1.0, min_per_second=0)
        budget.record_call(100.5)
        assert budget.try_spend(spent_at) == allowed


def test_in_a_loop_whose_clock_began_later_nothing_counts_that_happened_before() -> None:
    budget = RetryBudget(ratio=1.0, min_per_second=0)
    budget.record_call(1000.0)
    assert not budget.try_spend(5.0)
    budget.record_call(5.0)
    assert budget.try_spend(5.0)


def test_a_budget_shows_what_it_is_and_does() -> None:
    budget = RetryBudget()
    budget.record_call(0.0)
    budget.try_spend(0.5)
    assert repr(budget) == "RetryBudget(ratio=0.2, min_per_second=10, calls=1, granted=1, refused=0)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "ratio must be more than 0 and at most 1, not 0"),
        ({"ratio": 1.5}, "ratio must be more than 0 and at most 1, not 1.5"),
        ({"ratio": math.nan}, "ratio must be more than 0 and at most 1, not nan"),
        ({"min_per_second": -1}, "min_per_second must be finite and zero or more seconds, not -1"),
        ({"min_per_second": 0.01}, "min_per_second must be 0, or at least 0.1, not 0.01"),
    ],
)
def test_a_bad_budget_is_refused_by_the_name_of_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetryBudget(**arguments)
