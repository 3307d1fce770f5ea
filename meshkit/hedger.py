"""A second copy of a slow call, to cut the tail of the latency. For idempotent work only.

>>> import asyncio
>>> seconds = iter([3600, 0.01])
>>> async def read(key):
...     await asyncio.sleep(next(seconds))
...     return f"value of {key}"
>>> asyncio.run(Hedger(delay=0.01).call(read, "color"))
'value of color'
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, ParamSpec, Protocol, TypeVar

import anyio

from meshkit import _check, _notes
from meshkit._executed import did_not_start
from meshkit._recent_durations import RecentDurations
from meshkit._time import now
from meshkit.errors import OutcomeUnknown
from meshkit.events import Event, Observer, notify
from meshkit.guard import Guard

__all__ = ["HedgeStarted", "HedgeWon", "Hedger"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HedgeStarted(Event):
    """No copy of the call had a result in time, so another one was started: the hedge with this number, from 1."""

    name: str
    hedge: int


@dataclass(frozen=True, slots=True)
class HedgeWon(Event):
    """The hedge with this number, from 1, had a result before all other copies of its call."""

    name: str
    hedge: int


class _Budget(Protocol):  # a RetryBudget is one
    def record_call(self, now: float) -> None: ...
    def try_spend(self, now: float) -> bool: ...


class Hedger(Guard):
    """Start another copy of a call that has no result after `delay` seconds; the first result wins.

    **For idempotent work only**: the call may run up to `1 + max_hedges` times, at the same time, and to the end.

    As long as a copy runs and none has succeeded, another is started every `delay` seconds, up to `max_hedges` of them,
    or until the `budget` is spent (a `RetryBudget`, best the one that the retries to the same service share). The first
    success is the result. The other copies are then cancelled, as by an anyio cancel scope, and waited for, so
    nothing runs on behind your back; what they still return or raise is dropped, but for what stops programs, such as
    `SystemExit`. A copy that ignores its cancellation holds up the call.

    With `quantile`, say 0.95, the delay is observed: what that share of the last 1,000 calls took at most, from their
    beginning until their result, whichever copy had it. Until 100 calls have ended it is the given `delay`. One that
    failed or was cancelled counts only if it had taken longer than the delay by then. Use one Hedger for calls that
    are alike.

    A hedge is for slowness, not for failure: a copy that fails starts no other (that is what a Retrier does). When all
    that were started have failed, the error that came first is raised, with a note on the others; errors that say that
    their copy did not start come after those that do not. A cancellation from outside cancels all copies, and is passed
    on when they have ended.

    The first copy runs in the caller's task, hedges in tasks of their own with the caller's context variables; all see
    the enclosing deadline. Cost: where the first copy is fast, a cancel scope and a timer, about 6 us, and half as
    much again for `quantile`.
    """

    kind: ClassVar[str] = "hedger"

    def __init__(
        self,
        *,
        delay: float,
        quantile: float | None = None,
        max_hedges: int = 1,
        budget: _Budget | None = None,
        name: str = "hedger",
        observer: Observer | None = None,
    ) -> None:
        self._delay = _check.duration("delay", delay, zero=True)
        self._recent = None if quantile is None else RecentDurations(quantile)
        self.max_hedges = _check.count("max_hedges", max_hedges)
        self.budget = budget
        self.name = name
        self.observer = observer

    def __repr__(self) -> str:
        quantile = "" if self._recent is None else f" (quantile={self._recent.share:g})"
        settings = f"delay={self.delay:g}{quantile}, max_hedges={self.max_hedges}, budget={self.budget!r}"
        return f"Hedger({settings}, name={self.name!r})"

    @property
    def delay(self) -> float:
        """The seconds after which a hedge of a call that begins now would start: as given, or as observed."""
        observed = None if self._recent is None else self._recent.quantile()
        return self._delay if observed is None else observed

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn(*args, **kwargs)`, again and at the same time if it is slow, and return the first result.

        Raises:
            Exception: All copies failed: the first error, those left out that say it did not start, unless all do.
            OutcomeUnknown: A hedge was cancelled from within, and all other copies say that they did not start.
        """
        if not callable(fn):
            raise _check.not_a_function(fn)
        if self.budget is not None:
            self.budget.record_call(now())
        race = _Race(self, functools.partial(fn, *args, **kwargs), self._recent)
        try:
            with race.scope:
                try:
                    race.succeeded(await fn(*args, **kwargs))
                except Exception as error:  # noqa: BLE001 - raised below, unless another copy succeeds
                    race.failed(error)
                race.left()
                if not race.over:
                    await race.loop.create_future()  # until a hedge ends the race, and so cancels this scope
        except Exception as error:  # noqa: BLE001 - from a group that was the first copy's answer to its cancellation
            race.failed(error)
        finally:
            race.timer.cancel()
            if not race.results:
                race.observe()
            if race.tasks:
                await race.stop()
        if race.results:
            return race.results[0]
        raise race.first_error()


class _Race(Generic[T]):
    """One call of a Hedger: its copies, and how it ends."""

    def __init__(self, hedger: Hedger, copy: Callable[[], Awaitable[T]], recent: RecentDurations | None) -> None:
        self.over = False
        self.results: list[T] = []  # at most one
        self.loop = asyncio.get_running_loop()
        self.scope = anyio.CancelScope()  # of the caller, and so of the first copy
        self._delay = hedger.delay
        self.timer = self.loop.call_later(self._delay, self.start_hedge)
        self.tasks: list[asyncio.Task[None]] = []  # of the hedges
        self._hedger = hedger
        self._copy = copy
        self._recent = recent
        self._begun = 0.0 if recent is None else now()
        self._deadline = anyio.current_effective_deadline()  # a task of its own would not see it
        self._scopes: list[anyio.CancelScope] = []  # of the hedges that have begun
        self._running = 1
        self._errors: list[Exception] = []
        self._cut: asyncio.CancelledError | None = None  # of a hedge, from within: no failure, but it had begun
        self._stopping: BaseException | None = None  # KeyboardInterrupt, SystemExit or the like, from a hedge

    def start_hedge(self) -> None:
        """Start another copy in a task of its own; called by the timer."""
        number = len(self.tasks) + 1
        self._running += 1
        self.tasks.append(self.loop.create_task(self._hedge(number), name=f"{self._hedger.name}: hedge {number}"))

    async def _hedge(self, number: int) -> None:
        hedger = self._hedger
        try:
            await asyncio.sleep(0)  # a copy that ends in this very moment comes first
            if self.over or (hedger.budget is not None and not hedger.budget.try_spend(now())):
                return
            if number < hedger.max_hedges:
                self.timer = self.loop.call_later(self._delay, self.start_hedge)
            notify(hedger.observer, HedgeStarted(hedger.name, number))
            with anyio.CancelScope(deadline=self._deadline) as scope:
                self._scopes.append(scope)
                self.succeeded(await self._copy(), number)
        except asyncio.CancelledError as error:  # from within the copy, or from who stops the loop
            self._cut = None if self.over else error
            raise
        except Exception as error:  # noqa: BLE001 - raised in the task of the caller
            self.failed(error)
        except BaseException as error:  # noqa: BLE001 - likewise, also if the race is over
            self.over, self._stopping = True, error
        finally:
            self.left()
            if self.over:
                self.scope.cancel()

    def succeeded(self, result: T, hedge: int = 0) -> None:
        """A copy has a result: it is the one, if it is the first."""
        if not self.over:
            self.over = True
            self.results.append(result)
            self._errors.clear()  # they hold this object, through their tracebacks
            self.observe()
            self._cut = None
            if hedge:
                notify(self._hedger.observer, HedgeWon(self._hedger.name, hedge))

    def observe(self) -> None:
        """Count how long the call has taken, when it has its result, or ends without one.

        What counts is neither the time of the winning copy alone (all that are longer than the delay would then be lost
        to shorter ones, and the delay would shrink from step to step) nor that of failures, which are often fast. But
        if only results counted, a delay that has become too short would stay so, and hedges keep up the overload in
        which no call ends in time: one that had none when the delay was over has taken longer, whatever came of it.
        """
        if self._recent is not None:
            duration = now() - self._begun
            if self.results or duration > self._delay:
                self._recent.add(duration)

    def failed(self, error: Exception) -> None:
        """A copy failed: others may still succeed."""
        if not self.over:
            self._errors.append(error)

    def left(self) -> None:
        """A copy has ended, in whatever way."""
        self._running -= 1
        self.over = self.over or not self._running

    def first_error(self) -> Exception:
        """Return the error to raise, and let go of all."""
        errors, cut = self._errors, self._cut
        self._errors, self._cut = [], None
        if cut is not None:
            errors.append(OutcomeUnknown())
            errors[-1].__cause__ = cut
        errors.sort(key=did_not_start)  # "no" is not to be said of what may have run
        error, *others = errors
        if others:
            kinds = ", ".join(type(other).__name__ for other in others)
            _notes.put(error, f"{self._hedger.name}: the other copies failed too: ", kinds)
        return error

    async def stop(self) -> None:
        """Cancel the hedges that still run and wait until all have ended, whatever happens to the caller meanwhile."""
        self.over = True
        for scope in self._scopes:
            scope.cancel()
        interruption: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while any(not task.done() for task in self.tasks):
                try:
                    await asyncio.wait(self.tasks)
                except asyncio.CancelledError as error:
                    interruption = error
        if self._stopping is not None:
            raise self._stopping
        if interruption is not None:
            raise interruption
