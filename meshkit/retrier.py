"""Retries with exponential backoff, and a budget that keeps them from becoming a storm.

>>> import asyncio
>>> answers = iter([ConnectionError("reset"), ConnectionError("reset"), "hello"])
>>> async def fetch():
...     if isinstance(answer := next(answers), Exception):
...         raise answer
...     return answer
>>> retrier = Retrier(RetryPolicy(max_retries=3, base_delay=0.01), on=ConnectionError)
>>> asyncio.run(retrier.call(fetch))
'hello'
"""

import asyncio
import functools
import math
import random
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, ParamSpec, Self, TypeVar

import anyio

from meshkit import _check, _notes
from meshkit._executed import did_not_start
from meshkit._retry_budget import RetryBudget as RetryBudget, RetryBudgetStats as RetryBudgetStats
from meshkit._retry_policy import NOT_COVERED, On, RetryPolicy as RetryPolicy, RetryRule, asked_delay
from meshkit._time import now
from meshkit.errors import CallTimeout
from meshkit.events import Event, Observer, notify
from meshkit.guard import Guard, require_async

__all__ = ["Attempts", "Backoff", "GaveUp", "Retrier", "RetryBudget", "RetryBudgetStats", "RetryPolicy", "Retrying"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retrying(Event):
    """The attempt with this number, from 1, failed with `error`; the next one follows after `delay` seconds."""

    name: str
    attempt: int
    delay: float
    error: Exception


@dataclass(frozen=True, slots=True)
class GaveUp(Event):
    """After so many attempts `error` is raised; `reason` says why no other follows."""

    name: str
    attempts: int
    reason: str
    error: Exception


class Backoff:
    """How long to wait before the n-th retry: `base_delay`, twice that, four times that, ... up to `max_delay`.

    With `jitter` the delay is drawn evenly from zero up to that, so that callers who failed together do not come back
    together, also when all have reached the cap ("full jitter": M. Brooker, Exponential Backoff And Jitter, 2015).
    """

    def __init__(self, *, base_delay: float, max_delay: float, jitter: bool) -> None:
        self._base_delay = _check.duration("base_delay", base_delay, zero=True)
        self._max_delay = _check.duration("max_delay", max_delay, zero=True)
        self._jitter = jitter

    def delay(self, n: int, draw: Callable[[], float]) -> float:
        """Return the seconds before the `n`-th retry, from 1; `draw` returns a number of [0, 1)."""
        try:
            delay = min(math.ldexp(self._base_delay, _check.count("n", n) - 1), self._max_delay)
        except OverflowError:
            delay = self._max_delay
        return delay * draw() if self._jitter else delay


class Retrier(Guard):
    """Call again what fails for a passing reason: `await retrier.call(fn)`, `@retrier`, or `retrier.attempts()`.

    `on` says which errors pass: a class, several, or a predicate. Two kinds are retried only if `on` names their class,
    and not because of a broad one such as `Exception`, which was not written with them in mind:

    - what may have happened (`OutcomeUnknown`; an attempt that `attempt_timeout` cut is one), unless `idempotent=True`
      says that doing it twice is harmless. A predicate is not enough;
    - what says that trying again is no use (`Untrusted`, `Closed`, a `RemoteError` that is not `retryable`), unless a
      predicate says otherwise.

    In an exception group every error must pass. The delay is the policy's backoff. An error's `retry_after` is a floor
    under it, and jitter is put on top, so that those who were told the same time do not come back together. A delay
    that would end after the deadline (the policy's, or of an enclosing anyio scope) is not begun. In the end the last
    error is raised, the very object, with a note: after how many attempts, how long after the first failure, and why no
    other followed. But if the last attempt did not start (`executed` is "no") and an earlier one did, or may have, then
    the error of that one is raised, and the note names the last: so "no" is never said of what has begun. The policy's
    `timeout` cuts the attempt in flight: a `CallTimeout`, whose cause is the error before it.

    One object serves any number of tasks: what belongs to a call lives in its `Attempts`. Cost: while first attempts
    succeed and no timeout is set, that of a bare wrapper (and half a microsecond for a budget).
    """

    kind: ClassVar[str] = "retrier"

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        on: On,
        idempotent: bool = False,
        budget: RetryBudget | None = None,
        rng: random.Random | None = None,
        name: str = "retrier",
        observer: Observer | None = None,
    ) -> None:
        """`rng` draws the jitter; by default Python's global generator, which no two forks of a process share."""
        if not isinstance(policy, RetryPolicy):
            raise TypeError(f"policy must be a RetryPolicy, not {policy!r}")
        self.policy = policy
        self.rule = RetryRule(on=on, idempotent=idempotent)
        self.budget = budget
        self.name = name
        self.observer = observer
        self._backoff = Backoff(base_delay=policy.base_delay, max_delay=policy.max_delay, jitter=policy.jitter)
        self._draw: Callable[[], float] = random.random if rng is None else rng.random
        # Where there is nothing to cut, a call needs no state before its first failure.
        self._limited = policy.timeout is not None or policy.attempt_timeout is not None

    def __repr__(self) -> str:
        return f"Retrier({self.policy!r}, {self.rule!r}, budget={self.budget!r}, name={self.name!r})"

    @property
    def time_limit(self) -> float | None:
        """The policy's timeout."""
        return self.policy.timeout

    @property
    def attempt_limit(self) -> float | None:
        """The policy's timeout for each attempt."""
        return self.policy.attempt_timeout

    def delay_for(self, n: int) -> float:
        """Return the seconds to wait before the `n`-th retry, from 1; with jitter, each time another draw."""
        return self._backoff.delay(n, self._draw)

    def attempts(self) -> "Attempts":
        """Return the attempts of one call, to retry a block: see `Attempts`."""
        return Attempts(self)

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn(*args, **kwargs)` until it succeeds, and return its result.

        Raises:
            CallTimeout: The policy's `timeout` is over; or `attempt_timeout` is, and no other attempt followed.
            Exception: The last error of `fn`, those left out that say it did not start, unless all do.
        """
        if not callable(fn):
            raise _check.not_a_function(fn)
        if self._limited:
            return await _repeat(Attempts(self), fn, args, kwargs)
        if self.budget is not None:
            self.budget.record_call(now())
        try:
            return await fn(*args, **kwargs)
        except Exception as error:
            attempts = Attempts(self)
            if attempts.failed(error) is not None:
                raise
        return await _repeat(attempts, fn, args, kwargs)

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate the async function `fn`: every call of it is retried."""
        if self._limited:
            return super().__call__(fn)
        require_async(fn, self)
        budget = self.budget

        @functools.wraps(fn)
        async def retried(*args: P.args, **kwargs: P.kwargs) -> T:  # call() once more, one wrapper cheaper
            if budget is not None:
                budget.record_call(now())
            try:
                return await fn(*args, **kwargs)
            except Exception as error:
                attempts = Attempts(self)
                if attempts.failed(error) is not None:
                    raise
            return await _repeat(attempts, fn, args, kwargs)

        return retried


class Attempts:
    """The attempts of one call, made by `retrier.attempts()` to retry a block.

        async for attempt in retrier.attempts():
            with attempt:
                reply = await ask()
        use(reply)

    An error inside `with attempt` that may be retried is held back, and the loop goes round again after the delay; any
    other is raised. So the loop ends after the first attempt without an error, and what it assigned is the result;
    `return` and `break` inside `with attempt` end it as well. The timeouts cut what runs inside `with attempt`. What
    stands in the loop but outside of it is not cut, and runs after failures too.

    `attempt.number` counts from 1.
    """

    def __init__(self, retrier: Retrier) -> None:
        self.number = 0
        self._retrier = retrier
        self._state: Literal["waiting", "ready", "running", "over"] = "waiting"
        self._deadline = math.inf  # of the whole call
        self._scope: anyio.CancelScope | None = None  # of the attempt that runs, if it has a limit
        self._delay = 0.0  # before the next attempt
        self._failed_at = self._first_failed_at = 0.0  # when the call began is not known: to ask would cost a success
        self._earlier: Exception | None = None  # what would be raised if this attempt did not start

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Self:
        if self._state == "over":
            raise StopAsyncIteration
        if self._state != "waiting":
            raise RuntimeError("an attempt was not made: enter it in each turn of the loop, `with attempt: ...`")
        if self.number:
            await self._wait()
        else:
            if self._retrier.budget is not None:
                self._retrier.budget.record_call(now())
            if self._retrier.policy.timeout is not None:
                self._deadline = now() + self._retrier.policy.timeout
        self.number += 1
        self._state = "ready"
        return self

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(self._delay)
        except BaseException:  # the attempt that was granted will not be made
            self._state, self._earlier = "over", None
            if self._retrier.budget is not None:
                self._retrier.budget.refund(self._failed_at)
            raise

    def __enter__(self) -> Self:
        if self._state != "ready":
            raise RuntimeError("an attempt is entered once, in its own turn of the loop")
        self._state = "running"
        limit = self._retrier.policy.attempt_timeout
        if limit is not None or self._deadline != math.inf:
            self._scope = anyio.CancelScope()
            self._scope.deadline = self._deadline if limit is None else min(self._deadline, now() + limit)
            self._scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        self._state = "over"
        scope, self._scope = self._scope, None
        earlier, self._earlier = self._earlier, None
        failure = self._late(error, earlier) if scope is not None and scope.__exit__(kind, error, where) else error
        if not isinstance(failure, Exception):
            return False
        raised = self.failed(failure, earlier)
        if raised is None or raised is error:
            return raised is None
        context = raised.__context__
        try:
            raise raised
        finally:
            raised.__context__ = context  # it was not raised because of the last one
            del raised, failure, earlier  # else its traceback would hold it, in a cycle

    def _late(self, cut: BaseException | None, earlier: Exception | None) -> CallTimeout:
        """Return what to say of an attempt that a limit of ours cut."""
        policy = self._retrier.policy
        final = now() >= self._deadline
        limit = policy.timeout if final else policy.attempt_timeout  # what cut it is not None
        late = CallTimeout(name=self._retrier.name, timeout=limit or math.inf)
        late.__cause__ = earlier if final and earlier is not None else cut
        late.__context__ = cut
        return late

    def failed(self, error: Exception, earlier: Exception | None = None) -> Exception | None:
        """Take in that the attempt failed with `error`, after it was `earlier`; return None if another one follows.

        Else return what is to be raised.
        """
        self.number = self.number or 1  # the first attempt may have been made without this object
        self._failed_at = now()
        if self.number == 1:
            self._first_failed_at = self._failed_at
        delay = self._next_delay(error)
        telling = error  # what tells the truth about all attempts: not a refusal, if one of them may have run
        if earlier is not None and did_not_start(error) and not did_not_start(earlier):
            telling = earlier
        if isinstance(delay, str):
            self._give_up(error, telling, delay)
            return telling
        self._state, self._delay, self._earlier = "waiting", delay, telling
        notify(self._retrier.observer, Retrying(self._retrier.name, self.number, delay, error))
        return None

    def _next_delay(self, error: Exception) -> float | str:
        """Return the delay before the next attempt, or the reason why there is none."""
        retrier, policy = self._retrier, self._retrier.policy
        if self._failed_at >= self._deadline:
            return "its timeout is over"
        if objection := retrier.rule.objection(error):
            return objection
        if self.number > policy.max_retries:
            return f"max_retries={policy.max_retries}"
        asked = asked_delay(error)
        if asked > policy.max_retry_after:
            return f"it asks to wait {asked:g} s, more than max_retry_after={policy.max_retry_after:g}"
        delay = retrier.delay_for(self.number)
        delay = asked + delay if policy.jitter else max(asked, delay)  # who was told one time must not come at one time
        if self._failed_at + delay >= min(self._deadline, anyio.current_effective_deadline()):
            return f"the next attempt, in {delay:.3g} s, would come after the deadline"
        if retrier.budget is not None and not retrier.budget.try_spend(self._failed_at):
            return "the retry budget is spent"
        return delay

    def _give_up(self, last: Exception, error: Exception, reason: str) -> None:
        retrier = self._retrier
        if last is not error:
            reason += f"; the last one did not start: {traceback.format_exception_only(last)[0].strip()}"
        if self.number > 1 or reason is not NOT_COVERED:  # what is none of our business stays as it is
            waited = f"s, {self._failed_at - self._first_failed_at:.3g} s after the first failure"
            start = f"{retrier.name}: gave up after "
            _notes.put(error, start, f"{self.number} attempt{waited if self.number > 1 else ''}: {reason}")
        notify(retrier.observer, GaveUp(retrier.name, self.number, reason, error))


async def _repeat(attempts: Attempts, fn: Callable[..., Awaitable[T]], args: Any, kwargs: Mapping[str, Any]) -> T:
    while True:
        with await anext(attempts):
            return await fn(*args, **kwargs)
