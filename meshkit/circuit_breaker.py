"""Stop calling what keeps failing, and notice when it works again.

    closed     failures reach the threshold                         -> open
    open       reset_timeout seconds have passed, and a call comes  -> half-open
    half-open  half_open_max probes have succeeded                  -> closed
    half-open  a probe has failed                                   -> open

- Who is admitted holds a lease, and a lease belongs to a generation: one stay in one state. What comes of a call that
  was admitted in an earlier generation changes nothing.
- A lease ends once: in success, in failure, or ignored. Ignored (cancelled, refused, not in `trips_on`) is neither.
- Nothing happens by itself: the time is looked at when somebody calls. To ask for the state changes nothing.

>>> import asyncio
>>> breaker = CircuitBreaker(failure_threshold=2, reset_timeout=30.0, name="bob")
>>> async def store() -> None:
...     raise ConnectionError("no route to bob")
>>> async def main() -> None:
...     for _ in range(3):
...         try:
...             await breaker.call(store)
...         except (ConnectionError, CircuitOpen) as error:
...             print(error)
>>> asyncio.run(main())
no route to bob
no route to bob
bob: the circuit is open, the call was not made; try again in 30 s
"""

import asyncio
import enum
import functools
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

from meshkit import _check
from meshkit._generations import Generation, LastCalls, Lease, Probation, Streak, Window
from meshkit._time import Clock
from meshkit._trip_rule import TripRule, TripsOn
from meshkit.errors import CircuitOpen
from meshkit.events import Event, Observer, notify
from meshkit.guard import Guard, require_async

__all__ = ["Circuit", "CircuitBreaker", "CircuitChanged", "CircuitRefused", "CircuitStats", "FailureRate", "State"]

P = ParamSpec("P")
T = TypeVar("T")


class State(enum.StrEnum):
    """Closed lets calls through, open refuses them, half-open lets a few through to see whether it works again."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


_CLOSED, _OPEN, _HALF_OPEN = State  # on 3.11, `State.OPEN` takes as long as half of a call


@dataclass(frozen=True, slots=True)
class CircuitChanged(Event):
    """The circuit went from one state to another; if it opened, for `retry_after` seconds (None: until `reset`)."""

    name: str
    before: State
    after: State
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class CircuitRefused(Event):
    """A call was refused; after `retry_after` seconds one may be admitted (None: only after `reset`)."""

    name: str
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class CircuitStats:
    """What is remembered now (`failures` of `calls`), and how often the circuit has `opened` and `refused` in all.

    While half-open, `probes` are under way and hold a place.
    """

    state: State
    calls: int
    failures: int
    probes: int
    opened: int
    refused: int
    retry_after: float | None


@dataclass(frozen=True)
class FailureRate:
    """Open when at least `threshold` of the recent calls failed, and there were at least `minimum_calls`.

    Recent are those that ended in the last `window` seconds (default 30; forgotten a tenth of it at a time, none is
    kept longer), or the last `calls`, if that is given instead. A call that has run for `slow_call` seconds has failed
    at that moment, whatever becomes of it; it is noticed by the next call, or when it ends.
    """

    threshold: float = 0.5
    window: float | None = None
    minimum_calls: int = 20
    slow_call: float | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        _check.ratio("threshold", self.threshold)
        _check.count("minimum_calls", self.minimum_calls)
        if self.slow_call is not None:
            _check.duration("slow_call", self.slow_call)
        if self.calls is None:
            object.__setattr__(self, "window", _check.duration("window", 30.0 if self.window is None else self.window))
        elif self.window is not None:
            raise ValueError(f"window={self.window!r} and calls={self.calls!r}: give one of them")
        elif _check.count("calls", self.calls) < self.minimum_calls:
            raise ValueError(
                f"minimum_calls={self.minimum_calls!r} is more than calls={self.calls!r}: it would never open"
            )


class Circuit:
    """The core: who is admitted, and what follows from what came of it.

    `admit` gives a lease or None; each lease goes to `end` once. While `free` is a generation, that is everybody's
    lease and `admit` need not be asked; while a lease is `calm`, a success of it need not go to `end`.
    """

    def __init__(
        self,
        failure_threshold: int | FailureRate = 5,
        *,
        reset_timeout: float = 30.0,
        max_reset_timeout: float | None = None,
        half_open_max: int = 1,
    ) -> None:
        slow_call = None
        if isinstance(failure_threshold, FailureRate):
            slow_call = failure_threshold.slow_call
        else:
            _check.count("failure_threshold", failure_threshold)
        self._threshold = failure_threshold
        self._slow_call = math.inf if slow_call is None else slow_call
        self._reset_timeout = self._longest = _check.duration("reset_timeout", reset_timeout)
        if max_reset_timeout is not None:
            self._longest = _check.duration("max_reset_timeout", max_reset_timeout)
            if self._longest < self._reset_timeout:
                raise ValueError(f"{max_reset_timeout=!r} is less than {reset_timeout=!r}")
        self._half_open_max = _check.count("half_open_max", half_open_max)
        self._break: float  # how long the next one lasts
        self._opened_at = self._until = 0.0  # the last one
        self.opened = 0  # so often
        self.reset()

    def state(self, now: float) -> State:
        """Return the state. An open circuit is half-open as soon as its break is over, though nobody called yet."""
        return _HALF_OPEN if self.mode is _OPEN and self._break_is_over(now) else self.mode

    def retry_after(self, now: float) -> float | None:
        """Return the seconds until a call may be admitted: 0 if one may now, None if only `reset` can tell."""
        if self.isolated:
            return None
        if self.mode is _OPEN:
            return self._until - now if self._opened_at <= now < self._until else 0.0
        if self.generation.full:
            start = next(iter(self.generation.watched)).start
            return max(0.0, start + self._reset_timeout - now) if start <= now else 0.0
        return 0.0

    def idle(self, now: float) -> bool:
        """Return whether forgetting all this would lose nothing; see `CircuitBreaker.idle`."""
        if self.isolated:
            return False
        memory = 10 * self._longest
        if self.mode is not _CLOSED:
            return not self._opened_at <= now < self._until + memory
        generation = self.generation
        lapsed = not generation.failed_at <= now < generation.failed_at + memory
        # A window forgets by itself, others only here: what failed and is never asked again must not stay for ever.
        return generation.remembered(now)[1] == 0 or (lapsed and not isinstance(generation, Window))

    @property
    def probes(self) -> int:
        """The number of probes that are under way and hold a place."""
        return len(self.generation.watched) if self.mode is _HALF_OPEN else 0

    def admit(self, now: float) -> Lease | None:
        """Return a lease for one call, or None if it must not be made."""
        generation = self.generation
        if not generation.since <= now < generation.since + generation.patience and generation.look(now):
            self.attend(now)
        if self.free is not None:
            return self.free
        if self.mode is _OPEN:
            if not self._break_is_over(now):
                return None
            self._begin(_HALF_OPEN, Probation(self._half_open_max, self._reset_timeout, self._slow_call))
        return None if self.generation.full else self.generation.watch(now)

    def end(self, lease: Lease, failed: bool | None, now: float) -> None:
        """Take back the lease of a call that `failed` or did not (None: what came of it says nothing)."""
        if lease.record(failed, now):
            self.attend(now)

    def attend(self, now: float) -> None:
        """Draw the consequences: what is to be done when `lease.record` returns true."""
        generation = self.generation
        if generation.fails:
            if self.mode is _HALF_OPEN:
                self._break = min(self._break * 2, self._longest)
            self._opened_at, self._until = now, now + self._break
            self.opened += 1
            self._begin(_OPEN, Generation())
        elif generation.passed:
            self.reset()

    def isolate(self) -> None:
        """Open, and stay open until `reset`."""
        self.isolated = True
        self._begin(_OPEN, Generation())

    def reset(self) -> None:
        """Close, and remember nothing."""
        self.isolated = False
        self._break = self._reset_timeout
        self._begin(_CLOSED, _closed(self._threshold, self._slow_call))

    def _begin(self, mode: State, generation: Generation) -> None:
        self.mode = mode
        self.generation = generation
        self.free = generation if mode is _CLOSED and self._slow_call == math.inf else None

    def _break_is_over(self, now: float) -> bool:
        return not self.isolated and not self._opened_at <= now < self._until  # before: the clock of another loop


def _closed(threshold: int | FailureRate, slow_call: float) -> Generation:
    if isinstance(threshold, int):
        return Streak(threshold)
    share, minimum, limit = threshold.threshold, threshold.minimum_calls, threshold.calls
    if limit is not None:
        return LastCalls(share, minimum, limit, slow_call)
    return Window(share, minimum, cast("float", threshold.window), slow_call)


class CircuitBreaker(Guard):
    """Refuse calls, with `CircuitOpen`, while what they call keeps failing; now and then let one through to see.

    `await breaker.call(fn)`, `@breaker`, `async with breaker`, or by hand `allow_request` and `record_*`. Any number
    of tasks may share a breaker. One per peer: `PerKey(lambda peer: CircuitBreaker(name=f"stash of {peer}"))`.

    Args:
        failure_threshold: So many failures in a row open the circuit; or a `FailureRate`.
        reset_timeout: Seconds that a break lasts; after it, calls are let through as probes. A probe that has not
            ended after so many seconds gives its place to another call (if it ends after all, it counts).
        max_reset_timeout: A break that follows on a failed probe is twice as long as the one before, up to this many
            seconds (default: all are equally long).
        half_open_max: So many probes may be under way, and so many successes close the circuit.
        trips_on: What counts as a failure: an exception class, a tuple of them, or a function that is given the
            exception. `Refused` (by a limiter inside, or another breaker) says nothing about the other side: it counts
            only if it, or a subclass, is named. In a group each error is judged; one that counts is enough.
        name: For errors, events and `repr`.
        observer: Is given a `CircuitChanged` whenever the state changes, and a `CircuitRefused` for each refusal.

    Cost: while closed, a tenth of what a bare async wrapper costs comes on top. No task, no timer, bounded memory.
    """

    kind: ClassVar[str] = "breaker"

    def __init__(
        self,
        failure_threshold: int | FailureRate = 5,
        *,
        reset_timeout: float = 30.0,
        max_reset_timeout: float | None = None,
        half_open_max: int = 1,
        trips_on: TripsOn = Exception,
        name: str = "breaker",
        observer: Observer | None = None,
    ) -> None:
        self._circuit = Circuit(
            failure_threshold,
            reset_timeout=reset_timeout,
            max_reset_timeout=max_reset_timeout,
            half_open_max=half_open_max,
        )
        self._settings = f"{failure_threshold=!r}, {reset_timeout=!r}"
        self._slow_call = failure_threshold.slow_call if isinstance(failure_threshold, FailureRate) else None
        self._rule = TripRule(trips_on)
        self._name = name
        self._observer = observer
        self._refused = 0
        self._manual: deque[Lease] = deque()  # the oldest first
        self._clock = Clock()
        self._mode = self._circuit.mode  # that the observer knows of
        self._common: Lease = self._circuit.generation  # of the `_open` blocks that are not told apart
        self._open = 0
        self._apart: dict[asyncio.Task[Any] | None, list[Lease]] = {}  # what else a task holds, inside of those

    def __repr__(self) -> str:
        return f"CircuitBreaker({self._settings}, name={self._name!r}, state={self.state})"

    @property
    def state(self) -> State:
        """The state now. An open circuit is half-open as soon as its break is over; asking changes nothing."""
        return self._circuit.state(self._clock.now())

    @property
    def attempt_limit(self) -> float | None:
        """After how many seconds a call counts as slow, if it ever does."""
        return self._slow_call

    @property
    def idle(self) -> bool:
        """Whether forgetting this breaker would lose nothing: closed, and no failure remembered.

        So that peers which are gone for good do not fill a `PerKey`, a breaker is also idle when it has not been
        called for ten of its longest breaks since its last break was over, or since the last of too few failures.
        """
        return self._circuit.idle(self._clock.now())

    def stats(self) -> CircuitStats:
        """Return what is remembered now."""
        circuit, moment = self._circuit, self._clock.now()
        calls, failures = circuit.generation.remembered(moment)
        return CircuitStats(
            state=circuit.state(moment),
            calls=calls,
            failures=failures,
            probes=circuit.probes,
            opened=circuit.opened,
            refused=self._refused,
            retry_after=circuit.retry_after(moment),
        )

    def isolate(self) -> None:
        """Open the circuit by hand: every call is refused until `reset`."""
        self._circuit.isolate()
        self._tell()

    def reset(self) -> None:
        """Close the circuit and forget everything; what comes of calls that are under way changes nothing."""
        self._circuit.reset()
        self._tell()

    # `call` and the decorated function are the same few lines twice: a call between them would cost more than they do.

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn(*args, **kwargs)`, unless the circuit is open, and learn from what comes of it.

        Raises:
            CircuitOpen: The call was not made; after `retry_after` seconds one may be.
        """
        if not callable(fn):
            raise _check.not_a_function(fn)
        lease = self._circuit.free or self._admit()
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            self._failed(lease, error)
            raise
        if not lease.calm and lease.record(False, self._clock.now()):
            self._attend()
        return result

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate the async function `fn`: every call of it goes through this breaker."""
        require_async(fn, self)
        circuit, clock, admit, failed, attend = self._circuit, self._clock, self._admit, self._failed, self._attend

        @functools.wraps(fn)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            lease = circuit.free or admit()
            try:
                result = await fn(*args, **kwargs)
            except BaseException as error:
                failed(lease, error)
                raise
            if not lease.calm and lease.record(False, clock.now()):
                attend()
            return result

        return guarded

    # All blocks are of one object, so it must be found out which lease a block holds. As a rule all hold the same one,
    # and are only counted. Where one holds another (after a change of state, or as a probe), its task tells it apart.

    async def __aenter__(self) -> None:
        """Enter a block that counts as one call, or raise `CircuitOpen`. Leave it in the task that entered it."""
        lease = self._circuit.free or self._admit()
        if lease is self._common and not self._apart:
            self._open += 1
        else:
            self._enter(lease)

    def _enter(self, lease: Lease) -> None:
        task = _current_task()
        if not self._open and lease is self._circuit.free:
            self._common = lease
        if lease is self._common and task not in self._apart:
            self._open += 1
        else:
            self._apart.setdefault(task, []).append(lease)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._apart:
            lease = self._leave()
        else:
            self._open -= 1
            lease = self._common
        if error is not None:
            self._failed(lease, error)
        elif not lease.calm and lease.record(False, self._clock.now()):
            self._attend()

    def _leave(self) -> Lease:
        task = _current_task()
        if task not in self._apart:
            if self._open:
                self._open -= 1
                return self._common
            task = next(iter(self._apart))  # another task entered it, as happens with async generators
        leases = self._apart[task]
        lease = leases.pop()
        if not leases:
            del self._apart[task]
        return lease

    def allow_request(self) -> bool:
        """Return whether a call may be made now; if so, say by exactly one `record_*` what came of it.

        While half-open it takes the place of a probe. `record_*` ends the oldest call from here that has not ended.
        At most 10,000 are waited for: then the oldest counts as ignored.
        """
        lease = self._admit_or_refuse(self._clock.now())
        if lease is None:
            return False
        self._manual.append(lease)
        if len(self._manual) > 10_000:
            self.record_ignored()
        return True

    def record_success(self) -> None:
        """Report a success. One that `allow_request` knows nothing of counts only while the circuit is closed."""
        self._record(False)

    def record_failure(self) -> None:
        """Report a failure. One that `allow_request` knows nothing of counts only while the circuit is closed."""
        self._record(True)

    def record_ignored(self) -> None:
        """Report that what came of a call says nothing about the other side: it was cancelled, or not made."""
        self._record(None)

    def _record(self, failed: bool | None) -> None:
        self._end(self._manual.popleft() if self._manual else self._circuit.generation, failed)

    def _admit(self) -> Lease:
        moment = self._clock.now()
        lease = self._admit_or_refuse(moment)
        if lease is None:
            circuit = self._circuit
            state = "isolated" if circuit.isolated else "open" if circuit.mode is _OPEN else "half-open"
            raise CircuitOpen(name=self._name, state=state, retry_after=circuit.retry_after(moment))
        return lease

    def _admit_or_refuse(self, moment: float) -> Lease | None:
        lease = self._circuit.admit(moment)
        self._refused += lease is None
        try:
            self._tell()
        except BaseException:  # an observer that interrupts: the call will not be made
            if lease is not None:
                self._circuit.end(lease, None, moment)
            raise
        if lease is None and self._observer is not None:
            notify(self._observer, CircuitRefused(self._name, self._circuit.retry_after(moment)))
        return lease

    def _failed(self, lease: Lease, error: BaseException) -> None:
        failed = None  # what is no Exception, or does not count, says nothing about the other side
        try:
            if isinstance(error, Exception) and self._rule.counts(error):
                failed = True
        finally:  # also if a predicate interrupts
            self._end(lease, failed)

    def _end(self, lease: Lease, failed: bool | None) -> None:
        self._circuit.end(lease, failed, self._clock.now())
        self._tell()

    def _attend(self) -> None:
        self._circuit.attend(self._clock.now())
        self._tell()

    def _tell(self) -> None:
        """Tell the observer, if the state is another one than it knows of."""
        circuit, before = self._circuit, self._mode
        if circuit.mode is not before:
            self._mode = circuit.mode
            retry_after = circuit.retry_after(self._clock.now())
            notify(self._observer, CircuitChanged(self._name, before, circuit.mode, retry_after))


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # there is no loop: somebody drives the coroutine by hand
        return None
