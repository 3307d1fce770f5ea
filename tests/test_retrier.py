import asyncio
import dataclasses
import math
import pickle
import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import assume, example, given, settings, strategies as st

from meshkit.circuit_breaker import CircuitBreaker
from meshkit.errors import CallTimeout, PeerLost, Refused, Unreachable
from meshkit.events import Event
from meshkit.guard import stack
from meshkit.retrier import Backoff, GaveUp, Retrier, Retrying, RetryPolicy
from meshkit.testing import VirtualTimeLoop, run
from meshkit.timeout import Timeout

PLAIN = RetryPolicy(jitter=False)
"""Delays of 1, 2 and 4 seconds."""


def clock() -> float:
    return asyncio.get_running_loop().time()


class Script:
    """A function that does what it is told: raise each error in turn, then return the rest. It remembers when."""

    def __init__(self, *outcomes: object, seconds: float = 0.0) -> None:
        self.outcomes = list(outcomes)
        self.seconds = seconds
        self.calls: list[float] = []

    async def __call__(self) -> object:
        self.calls.append(clock())
        if self.seconds:
            await asyncio.sleep(self.seconds)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def by_call(retrier: Retrier, fn: Callable[[], Awaitable[object]]) -> object:
    return await retrier.call(fn)


async def by_decorator(retrier: Retrier, fn: Callable[[], Awaitable[object]]) -> object:
    @retrier
    async def decorated() -> object:
        return await fn()

    return await decorated()


async def by_loop(retrier: Retrier, fn: Callable[[], Awaitable[object]]) -> object:
    result: object = "nothing"
    async for attempt in retrier.attempts():
        with attempt:
            result = await fn()
    return result


every_form = pytest.mark.parametrize("form", [by_call, by_decorator, by_loop])
Form = Callable[[Retrier, Callable[[], Awaitable[object]]], Awaitable[object]]


# --- Backoff -----------------------------------------------------------------------------------------------


@given(
    base=st.floats(min_value=0, max_value=1e300),
    cap=st.floats(min_value=0, max_value=1e300),
    n=st.integers(min_value=1, max_value=1100) | st.sampled_from([10**6, 10**30]),
    drawn=st.floats(min_value=0, max_value=1, exclude_max=True),
)
@example(base=5e-324, cap=1e300, n=2100, drawn=0.5)
@example(base=0.0, cap=0.0, n=10**6, drawn=0.5)
def test_the_delay_doubles_up_to_the_cap_and_never_overflows(base: float, cap: float, n: int, drawn: float) -> None:
    def naive() -> float:
        delay = base
        for _ in range(n - 1):
            if not 0 < delay < cap:
                break
            delay *= 2  # a float that grows too large becomes infinite
        return min(delay, cap)

    assert Backoff(base_delay=base, max_delay=cap, jitter=False).delay(n, lambda: drawn) == naive()
    assert Backoff(base_delay=base, max_delay=cap, jitter=True).delay(n, lambda: drawn) == naive() * drawn


def test_delay_for_gives_base_twice_base_four_times_base() -> None:
    retrier = Retrier(RetryPolicy(base_delay=0.5, max_delay=3.0, jitter=False), on=OSError)
    assert [retrier.delay_for(n) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert retrier.delay_for(10**6) == 3.0
    for bad in (0, -1):
        with pytest.raises(ValueError, match="n must be at least 1"):
            retrier.delay_for(bad)


def test_a_backoff_by_itself_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="base_delay must be finite"):
        Backoff(base_delay=math.nan, max_delay=1.0, jitter=True)
    with pytest.raises(ValueError, match="max_delay must be finite"):
        Backoff(base_delay=1.0, max_delay=-1.0, jitter=True)
    with pytest.raises(ValueError, match="n must be at least 1"):
        Backoff(base_delay=1.0, max_delay=1.0, jitter=True).delay(0, random.random)


def test_at_its_cap_the_backoff_still_has_all_its_entropy() -> None:
    retrier = Retrier(RetryPolicy(max_delay=30.0), on=OSError, rng=random.Random(1))
    draws = [retrier.delay_for(10**6) for _ in range(4000)]
    assert all(0 <= draw < 30 for draw in draws)
    tenths = [sum(3 * i <= draw < 3 * (i + 1) for draw in draws) for i in range(10)]
    assert all(300 < tenth < 500 for tenth in tenths), "drawn evenly from the whole of it"
    assert len(set(draws)) == 4000


def test_the_same_generator_draws_the_same_delays() -> None:
    first, second = (Retrier(RetryPolicy(), on=OSError, rng=random.Random(7)) for _ in range(2))
    assert [first.delay_for(3) for _ in range(5)] == [second.delay_for(3) for _ in range(5)]
    assert 0 <= Retrier(RetryPolicy(), on=OSError).delay_for(1) < 1.0


# --- What it does ------------------------------------------------------------------------------------------


@every_form
async def test_it_retries_until_it_succeeds(form: Form) -> None:
    fn = Script(OSError(), OSError(), "done")
    assert await form(Retrier(PLAIN, on=OSError), fn) == "done"
    assert fn.calls == [0.0, 1.0, 3.0]


@every_form
async def test_a_first_success_waits_for_nothing(form: Form) -> None:
    fn = Script(None)
    assert await form(Retrier(PLAIN, on=OSError), fn) is None
    assert fn.calls == [clock()]
    assert isinstance(loop := asyncio.get_running_loop(), VirtualTimeLoop)
    assert loop.live_timers() == []


@every_form
async def test_the_last_error_is_raised_itself_at_once_with_a_note(form: Form) -> None:
    errors = [OSError(str(number)) for number in range(4)]
    fn = Script(*errors, "too late")
    with pytest.raises(OSError, match="3") as caught:
        await form(Retrier(PLAIN, on=OSError, name="store"), fn)
    assert caught.value is errors[3]
    assert fn.calls == [0.0, 1.0, 3.0, 7.0]
    assert clock() == 7.0, "no sleep after the last attempt"
    note = "store: gave up after 4 attempts, 7 s after the first failure: max_retries=3"
    assert caught.value.__notes__ == [note]
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


@every_form
async def test_the_error_that_is_raised_does_not_say_no_of_what_may_have_begun(form: Form) -> None:
    late, gone, refused = CallTimeout(name="store", timeout=1.0), OSError("reset"), Unreachable(node="bob")
    before = late.__context__ = KeyError("its own story")
    waiting = Refused()
    for script, raised in [
        ((late, refused), late),
        ((gone, refused), gone),
        ((gone, late, refused), late),
        ((late, refused, waiting), late),
        ((refused, late, refused), late),
        ((late, ExceptionGroup("both", [refused, waiting])), late),
        ((refused, waiting), waiting),
        ((late, gone), gone),
        ((refused, gone), gone),
    ]:
        policy = RetryPolicy(max_retries=len(script) - 1, jitter=False)
        with pytest.raises(type(raised)) as caught:
            await form(Retrier(policy, on=Exception, idempotent=True), Script(*script))
        assert caught.value is raised
    assert late.__context__ is before
    assert (late.__cause__, refused.__cause__, refused.__context__) == (None, None, None)


@every_form
async def test_the_note_names_the_last_error_where_another_one_is_raised(form: Form) -> None:
    class Odd(Refused):
        def __str__(self) -> str:
            raise ZeroDivisionError

    seen: list[Event] = []
    retrier = Retrier(PLAIN, on=OSError, observer=seen.append)
    for last, says in [
        (Unreachable(node="bob"), "Unreachable: node 'bob' cannot be reached: not connected"),
        (Odd(), "Odd: <"),
    ]:
        with pytest.raises(OSError) as caught:
            await form(retrier, Script(error := OSError(), last))
        (note,) = caught.value.__notes__
        start = (
            "retrier: gave up after 2 attempts, 1 s after the first failure: `on` does not cover it; the last one did"
        )
        assert note.startswith(f"{start} not start: ")
        assert says in note
        gave_up = seen[-1]
        assert isinstance(gave_up, GaveUp)
        assert (gave_up.attempts, gave_up.error) == (2, error)
        assert note.endswith(gave_up.reason)


@every_form
async def test_a_breaker_that_opens_meanwhile_does_not_hide_what_opened_it(form: Form) -> None:
    breaker = CircuitBreaker(failure_threshold=1)
    fn = Script(PeerLost(node="bob"))
    with pytest.raises(PeerLost):
        await form(Retrier(RetryPolicy(max_retries=1), on=Exception, idempotent=True), breaker(fn))
    assert len(fn.calls) == 1


async def test_without_retries_there_is_one_attempt() -> None:
    fn = Script(OSError())
    with pytest.raises(OSError) as caught:
        await Retrier(RetryPolicy(max_retries=0), on=OSError).call(fn)
    assert len(fn.calls) == 1
    assert caught.value.__notes__ == ["retrier: gave up after 1 attempt: max_retries=0"]


@every_form
async def test_what_on_does_not_cover_is_raised_at_once_and_untouched(form: Form) -> None:
    fn = Script(KeyError("x"))
    with pytest.raises(KeyError) as caught:
        await form(Retrier(PLAIN, on=(OSError, ValueError)), fn)
    assert len(fn.calls) == 1
    assert not hasattr(caught.value, "__notes__")


async def test_an_uncovered_error_after_retries_says_what_came_before() -> None:
    with pytest.raises(KeyError) as caught:
        await Retrier(PLAIN, on=OSError).call(Script(OSError(), KeyError("x")))
    expected = "retrier: gave up after 2 attempts, 1 s after the first failure: `on` does not cover it"
    assert caught.value.__notes__ == [expected]


async def test_notes_do_not_pile_up_on_an_object_that_is_raised_again_and_again() -> None:
    error = OSError("always the same")
    error.add_note("of somebody else")
    retrier = Retrier(PLAIN, on=OSError)
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            await retrier.call(Script(error))
        assert caught.value is error
    await asyncio.gather(*(retrier.call(Script(error)) for _ in range(10)), return_exceptions=True)
    assert len(error.__notes__) == 2
    assert error.__notes__[0] == "of somebody else"


async def test_an_exception_that_takes_no_note_is_raised_without() -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    with pytest.raises(Frozen):
        await Retrier(PLAIN, on=Frozen).call(Script(Frozen(1)))


async def test_one_retrier_serves_many_tasks() -> None:
    retrier = Retrier(RetryPolicy(jitter=False, max_retries=4), on=OSError)
    scripts = [Script(*[OSError()] * (i % 6), i) for i in range(300)]
    tasks = [asyncio.create_task(retrier.call(script)) for script in scripts]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for i, (script, result) in enumerate(zip(scripts, results, strict=True)):
        assert script.calls == [0.0, 1.0, 3.0, 7.0, 15.0][: i % 6 + 1]
        assert isinstance(result, OSError) if i % 6 == 5 else result == i
    assert set(vars(retrier)) == set(vars(Retrier(PLAIN, on=OSError))), "it holds nothing of a call"


# None of these is a number of seconds to wait.
NONSENSE = [None, math.nan, -1.0, -1, 0, "7", True, [5.0], 3 + 4j]


@given(
    failures=st.lists(
        st.tuples(
            st.just(0.0) | st.floats(0.01, 3),
            st.floats(0.01, 100) | st.integers(1, 100) | st.just(math.inf) | st.sampled_from(NONSENSE),
        ),
        max_size=6,
    ),
    max_retries=st.integers(0, 5),
    max_delay=st.floats(1, 20),
    max_retry_after=st.floats(0, 90),
    timeout=st.none() | st.floats(0.5, 60),
    enclosing=st.none() | st.floats(0.5, 60),
)
@settings(max_examples=60)
def test_when_it_tries_and_how_it_ends_agrees_with_the_naive_model(
    failures: list[tuple[float, Any]],
    max_retries: int,
    max_delay: float,
    max_retry_after: float,
    timeout: float | None,
    enclosing: float | None,
) -> None:
    script = [*failures, (0.25, "success")]

    def naive() -> tuple[list[float], str]:
        at, begun = 0.0, []
        deadline = min(timeout or math.inf, enclosing or math.inf)
        too_late = "timeout" if deadline == timeout else "enclosing"
        for number, (seconds, asked) in enumerate(script, 1):
            begun.append(at)
            assume(abs(at + seconds - deadline) > 1e-6)
            if seconds and at + seconds > deadline:
                return begun, too_late
            at += seconds
            if asked == "success":
                break
            hint = 0.0 if any(asked is nonsense for nonsense in NONSENSE) else asked
            if number > max_retries or hint > max_retry_after:
                return begun, "error"
            delay = max(min(2.0 ** (number - 1), max_delay), hint)
            assume(abs(at + delay - deadline) > 1e-6)
            if at + delay > deadline:
                return begun, "error"
            at += delay
        return begun, "success"

    class Asked(Exception):
        def __init__(self, retry_after: object) -> None:
            self.retry_after = retry_after

    begun: list[float] = []

    async def fn() -> str:
        seconds, asked = script[len(begun)]
        begun.append(clock())
        if seconds:
            await asyncio.sleep(seconds)
        if asked != "success":
            raise Asked(asked)
        return "success"

    async def main() -> str:
        policy = RetryPolicy(
            max_retries=max_retries,
            max_delay=max_delay,
            max_retry_after=max_retry_after,
            timeout=timeout,
            jitter=False,
        )
        try:
            with anyio.move_on_after(math.inf if enclosing is None else enclosing):
                return await Retrier(policy, on=Asked).call(fn)
        except Asked:
            return "error"
        except CallTimeout:
            return "timeout"
        return "enclosing"

    expected_begun, expected = naive()
    outcome = run(main)
    assert outcome == expected
    assert begun == pytest.approx(expected_begun)


# --- The loop of attempts -----------------------------------------------------------------------------------


async def test_leaving_the_loop_early_ends_it_and_leaves_nothing() -> None:
    retrier = Retrier(RetryPolicy(jitter=False, timeout=60.0, attempt_timeout=10.0), on=OSError)

    async def returns() -> int:
        async for attempt in retrier.attempts():
            with attempt:
                if attempt.number < 2:
                    raise OSError
                return attempt.number
        raise AssertionError

    assert await returns() == 2

    numbers = []
    async for attempt in retrier.attempts():
        with attempt:
            numbers.append(attempt.number)
            if attempt.number == 2:
                break
            raise OSError
    assert numbers == [1, 2]

    async for attempt in retrier.attempts():
        with attempt:
            raise OSError
        if attempt.number == 2:
            break

    with pytest.raises(KeyError):
        async for attempt in retrier.attempts():
            with attempt:
                raise OSError
            raise KeyError("outside of the attempt")

    assert anyio.current_effective_deadline() == math.inf
    assert isinstance(loop := asyncio.get_running_loop(), VirtualTimeLoop)
    assert loop.live_timers() == []


async def test_after_its_success_the_loop_ends_and_stays_ended() -> None:
    attempts = Retrier(PLAIN, on=OSError).attempts()
    turns = 0
    async for attempt in attempts:
        with attempt:
            turns += 1
    assert [attempt async for attempt in attempts] == []
    assert turns == 1


async def test_after_a_cancelled_delay_the_loop_stays_ended() -> None:
    attempts = Retrier(PLAIN, on=OSError).attempts()
    with anyio.CancelScope() as scope:
        async for attempt in attempts:
            with attempt:
                asyncio.get_running_loop().call_later(0.5, scope.cancel)
                raise OSError
    assert clock() == 0.5
    assert [attempt async for attempt in attempts] == []


async def test_an_attempt_that_is_not_entered_or_entered_twice_is_an_error_that_says_so() -> None:
    retrier = Retrier(PLAIN, on=OSError)
    with pytest.raises(RuntimeError, match="enter it in each turn of the loop"):
        async for _ in retrier.attempts():
            pass
    async for attempt in retrier.attempts():
        with attempt:
            pass
        with pytest.raises(RuntimeError, match="entered once"), attempt:
            pass


# --- Around it ----------------------------------------------------------------------------------------------


async def test_the_observer_hears_of_each_retry_and_of_giving_up() -> None:
    seen: list[Event] = []
    errors = [OSError("1"), OSError("2"), KeyError("3")]
    retrier = Retrier(PLAIN, on=OSError, name="store", observer=seen.append)
    with pytest.raises(KeyError):
        await retrier.call(Script(*errors))
    assert seen == [
        Retrying("store", 1, 1.0, errors[0]),
        Retrying("store", 2, 2.0, errors[1]),
        GaveUp("store", 3, "`on` does not cover it", errors[2]),
    ]
    seen.clear()
    await retrier.call(Script("done"))
    assert seen == []


async def test_it_says_what_it_is_also_to_a_stack() -> None:
    policy = RetryPolicy(timeout=5.0)
    retrier = Retrier(policy, on=(OSError, ValueError), name="store")
    assert retrier.time_limit == 5.0
    assert Retrier(PLAIN, on=OSError).time_limit is None
    assert repr(retrier) == (
        "Retrier(RetryPolicy(max_retries=3, base_delay=1.0, max_delay=30.0, jitter=True, timeout=5.0, "
        "attempt_timeout=None, max_retry_after=60.0), on=OSError | ValueError, idempotent=False, budget=None, "
        "name='store')"
    )
    assert f"on={callable!r}" in repr(Retrier(policy, on=callable))
    with pytest.raises(ValueError, match="their attempts multiply"):
        stack(retrier, Retrier(policy, on=OSError))
    with pytest.raises(ValueError, match="the longer limit inside"):
        stack(retrier, Timeout(6.0))
    fn = Script("too slow", "too slow", seconds=3.0)
    with pytest.raises(CallTimeout):
        await stack(Retrier(PLAIN, on=CallTimeout), Timeout(2.0)).call(fn)
    assert fn.calls == [0.0, 3.0, 7.0, 13.0]


def test_a_plain_function_cannot_be_decorated() -> None:
    for policy in (PLAIN, RetryPolicy(timeout=1.0)):
        with pytest.raises(TypeError, match="@Retrier guards async functions"):
            Retrier(policy, on=OSError)(lambda: None)  # type: ignore[arg-type, return-value]


def test_a_policy_is_a_value() -> None:
    assert RetryPolicy() == RetryPolicy(max_retries=3, base_delay=1, max_delay=30)
    assert pickle.loads(pickle.dumps(RetryPolicy(timeout=1.0))) == RetryPolicy(timeout=1.0)
    assert dataclasses.replace(RetryPolicy(), max_retries=5).max_retries == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy().max_retries = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_retries": -1}, "max_retries must be at least 0, not -1"),
        ({"base_delay": math.nan}, "base_delay must be finite and zero or more seconds, not nan"),
        ({"base_delay": -1.0}, "base_delay must be finite and zero or more seconds, not -1.0"),
        ({"max_delay": math.inf}, "max_delay must be finite and zero or more seconds, not inf"),
        ({"base_delay": 31.0}, "base_delay must be at most max_delay=30.0, not 31.0"),
        ({"timeout": 0}, "timeout must be finite and more than zero seconds, not 0"),
        ({"timeout": math.nan}, "timeout must be finite and more than zero seconds, not nan"),
        ({"attempt_timeout": -1}, "attempt_timeout must be finite and more than zero seconds, not -1"),
        ({"timeout": 1.0, "attempt_timeout": 2.0}, "attempt_timeout must be at most timeout=1.0, not 2.0"),
        ({"max_retry_after": -0.5}, "max_retry_after must be finite and zero or more seconds, not -0.5"),
    ],
)
def test_a_bad_policy_is_refused_by_the_name_of_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetryPolicy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_retries": 2.0}, "max_retries must be a whole number, not 2.0"),
        ({"max_retries": None}, "max_retries must be a whole number"),
        ({"jitter": 0.5}, "jitter must be True or False, not 0.5"),
        ({"timeout": "1"}, "timeout must be a number of seconds, not '1'"),
    ],
)
def test_arguments_of_a_policy_of_the_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RetryPolicy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": RetryPolicy}, "policy must be a RetryPolicy, not <class"),
        ({"policy": 3}, "policy must be a RetryPolicy, not 3"),
        ({"idempotent": "no"}, "idempotent must be True or False, not 'no'"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Retrier(**{"policy": PLAIN, "on": OSError, **arguments})
