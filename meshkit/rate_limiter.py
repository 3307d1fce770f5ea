"""Limit how often something happens per key: an exact sliding window, and a line to wait in.

>>> import asyncio
>>> limiter = RateLimiter(max_count=2, window=60.0, name="login")
>>> [limiter.allow("bob") for _ in range(3)], limiter.allow("carol")
([True, True, False], True)
>>> async def main():
...     await limiter.acquire("dave")  # waits for its turn, where it has to
...     async with limiter:  # without a key: one limit for all
...         return limiter.check(), limiter.check("bob")
>>> asyncio.run(main())
(True, False)

The treaty:

- Of the admissions of a key, no interval [t, t + window) ever contains more than `max_count`.
- A refusal never charges. An admission that its waiter was cancelled before it could use is given back.
- Nobody overtakes: while others wait for a key, `allow` refuses it.
- A key that is limited is never forgotten, however many new ones come.
- Time is the loop's. What another clock said (a virtual loop's, say, before this one ran) counts only if it lies within
  a window of now, so that it holds a key up for two windows at most. Going back to a clock after another one was used
  may find forgotten what it had said: the first promise is made for one clock after the other.
"""

import math
from collections.abc import Awaitable, Callable, Container, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

import anyio

from meshkit import _check
from meshkit._key_times import KeyTimes
from meshkit._results import Results, SharedRun, SharedRuns
from meshkit._time import Clock
from meshkit._waiting_lines import Lines
from meshkit.errors import Overloaded, RateLimited, Refused, TooManyKeys
from meshkit.events import Event, Observer, notify
from meshkit.guard import Guard

__all__ = ["KeyLimit", "LimitRefused", "LimitWaited", "RateLimiter", "RateLimiterStats", "SlidingWindow"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LimitRefused(Event):
    """A request was refused; `error` says why, and when to try again."""

    name: str
    key: Hashable
    cost: int
    error: Refused


@dataclass(frozen=True, slots=True)
class LimitWaited(Event):
    """A request was admitted after it had waited for so many seconds."""

    name: str
    key: Hashable
    cost: int
    duration: float


@dataclass(frozen=True, slots=True)
class RateLimiterStats:
    """How many keys and results are remembered, and requests `waiting`, now; how many were refused in all.

    `refused` counts all refused requests; `refused_keys` those for which there was no room for the key.
    """

    keys: int
    waiting: int
    cached: int
    refused: int
    refused_keys: int


class SlidingWindow(KeyTimes):
    """The core: which requests are admitted. Time is a number.

    A request fits when the admission `max_count` units back has left the window. So nothing is counted: it is a sliding
    window log, read from its end. Cost: amortised O(1) for each unit.
    """

    def __init__(
        self, max_count: int, window: float, *, max_keys: int = 100_000, keep: Container[Hashable] = ()
    ) -> None:
        self.max_count = _check.count("max_count", max_count)
        self.refused_keys = 0
        super().__init__(max_count, _check.duration("window", window), _check.count("max_keys", max_keys), keep)
        self._is_ring = self._ring == self.max_count  # so that a full ring is a key at its limit

    def admit(self, key: Hashable, now: float, cost: int = 1) -> bool:
        """Admit a request if it fits, and return whether it did."""
        try:
            place = self._places[key]
        except KeyError:
            place = -1
        if place < 0 or cost != 1:
            return self._admit_other(key, now, cost)
        cells = self._cells
        end = cells[place] + self.window
        if now <= end <= now + self._horizon and (end > now or self.until(cells[place], now) > now):
            if self._is_ring:
                return False
            self.add(key, now)
            return True
        cells[place] = now
        place += 1
        self._places[key] = place if place % self._ring else place - self._ring
        return True

    def _admit_other(self, key: Hashable, now: float, cost: int) -> bool:
        times = self._long.get(key)
        if times is not None and cost == 1 and len(times) % 64:  # each 64th is added below, and old ones removed
            if len(times) >= self.max_count:
                blocker = times[-self.max_count]
                if blocker + self.window >= now and self.until(blocker, now) > now:
                    return False
            times.append(now)
            return True
        self.check_cost(cost)
        is_new = key not in self
        if not self.has_room(now) if is_new else self.free_at(key, now, cost) > now:
            self.refused_keys += is_new
            return False
        self.add(key, now, cost)
        return True

    def free_at(self, key: Hashable, now: float, cost: int = 1) -> float:
        """Return when a request will fit, if none is admitted before it: `now` if it fits already.

        That is exact, but for a new key for which there is no room among more than 64.
        """
        self.check_cost(cost)
        if key not in self:
            return self.room_at(now)
        times = self.of(key)
        index = len(times) - self.max_count + cost - 1
        return now if index < 0 else self.until(times[index], now)

    def check_cost(self, cost: int) -> None:
        """Raise `ValueError` if `cost` could never fit."""
        if _check.count("cost", cost) > self.max_count:
            raise ValueError(f"cost must be at most max_count, which is {self.max_count}, not {cost!r}")

    def fork(self, key: Hashable) -> "SlidingWindow":
        """Return a copy that knows of `key` only, to plan with."""
        copy = SlidingWindow(self.max_count, self.window, max_keys=1)
        self.copy_to(copy, key)
        return copy


class RateLimiter(Guard):
    """At most `max_count` admissions per key in any `window` seconds.

    Without a key, every verb speaks of one limit for all. As a guard, this waits for that one; `for_key` is the guard
    of a key. For one event loop at a time, and any number of tasks on it.

    Args:
        max_count: Units that may be admitted in a window. A request takes one unit, or its `cost`.
        window: Seconds. With one unit per 60 s, requests at 0.0 and at 60.0 are admitted.
        max_keys: Keys that are remembered. At that number a new key takes the place of one that is not limited any
            more. 64 are looked at to find it, 64 others the next time; where it finds none, the new key is refused.
        max_waiting: Requests that may wait, for all keys together.
        name: For errors, events and `repr`.
        observer: Is given a LimitRefused or LimitWaited for each request that was so.

    Cost: `allow`, and `acquire` where it need not wait, are O(1) and create nothing. Waiting takes a future for each
    request and one timer for each key. A key takes 100 to 300 bytes, a unit of cost 8: count kilobytes, not bytes.
    """

    kind: ClassVar[str] = "limiter"

    def __init__(
        self,
        max_count: int,
        window: float,
        *,
        max_keys: int = 100_000,
        max_waiting: int = 100_000,
        name: str = "limiter",
        observer: Observer | None = None,
    ) -> None:
        self._clock = Clock()
        self._lines = Lines(self._clock)
        self._window = self._lines.window = SlidingWindow(max_count, window, max_keys=max_keys, keep=self._lines)
        self._max_waiting = _check.count("max_waiting", max_waiting)
        self._name = name
        self._observer = observer
        self._refused = 0
        self._results = Results(ttl=2 * self._window.window, max_keys=max_keys)
        self._runs = SharedRuns()

    def __repr__(self) -> str:
        limit = f"{self._window.max_count} per {self._window.window:g} s"
        return f"RateLimiter({self._name!r}, {limit}, keys={len(self._window)}, waiting={self._lines.waiting})"

    def allow(self, key: Hashable = None, cost: int = 1) -> bool:
        """Admit a request and return True; or return False where it does not fit, or others wait for the key.

        Raises:
            ValueError: `cost` is more than `max_count`, or less than 1.
        """
        if (not self._lines or self._lines.clear_way(key, cost)) and self._window.admit(key, self._clock.now(), cost):
            return True
        if self._observer is None:
            self._refused += 1
        else:
            self._refuse(key, cost, self._refusal(key, cost))
        return False

    def check(self, key: Hashable = None, cost: int = 1) -> bool:
        """Return whether `allow` would admit a request now. Charges nothing."""
        now = self._clock.now()
        return self._lines.due(key, cost, now) <= now

    def retry_after(self, key: Hashable = None, cost: int = 1) -> float:
        """Return in how many seconds a request will be admitted: exactly then, not before. 0.0 means now.

        Those who wait are reckoned with, those who will come are not. For a new key for which there is no room among
        more than 64, it is an estimate.
        """
        now = self._clock.now()
        due = self._lines.due(key, cost, now)
        wait = due - now
        while now + wait > due:  # the difference was rounded up
            wait = math.nextafter(wait, 0.0)
        while now + wait < due:
            wait = math.nextafter(wait, math.inf)
        return wait

    def stats(self) -> RateLimiterStats:
        """Return what is remembered, who is waiting, and how many were refused."""
        window, lines = self._window, self._lines
        return RateLimiterStats(len(window), lines.waiting, len(self._results), self._refused, window.refused_keys)

    @property
    def idle(self) -> bool:
        """Whether no key is limited and nobody waits. Cost: O(keys) where that is so."""
        return not (self._lines.waiting or len(self._runs) or self._window.counts(self._clock.now()))

    def cleanup(self) -> int:
        """Forget now what would be forgotten little by little; return how many keys that were. Cost: O(keys).

        It is never needed. After a flood of keys it gives memory back at once.
        """
        now = self._clock.now()
        self._results.cleanup(now)
        return self._window.cleanup(now)

    async def acquire(self, key: Hashable = None, cost: int = 1) -> None:
        """Wait until the request is admitted. First come, first served, whatever it costs.

        A request that is cancelled takes nothing, and the next one has its turn.

        Raises:
            RateLimited: It cannot be admitted before the enclosing deadline (of anyio's scopes), so it did not wait.
            TooManyKeys: There is no room for a new key.
            Overloaded: `max_waiting` requests wait already.
            ValueError: `cost` is more than `max_count`, or less than 1.
        """
        if (not self._lines or self._lines.clear_way(key, cost)) and self._window.admit(key, self._clock.now(), cost):
            return
        await self._wait(key, cost)

    async def __aenter__(self) -> None:
        """Wait for the limit without a key."""
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        """Do nothing: what was admitted stays admitted."""

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Wait for the limit without a key, then call `fn`."""
        if not callable(fn):
            raise _check.not_a_function(fn)
        await self.acquire()
        return await fn(*args, **kwargs)

    def for_key(self, key: Hashable, cost: int = 1) -> "KeyLimit":
        """Return the guard that waits for `key`: `call`, decorator, `async with`."""
        self._window.check_cost(cost)
        return KeyLimit(self, key, cost)

    def allow_or_cached(self, key: Hashable = None) -> tuple[bool, Any, bool]:
        """Return `(allowed, cached, has_cached)`.

        `(True, None, False)`: admitted; do the work, then `set_cached_result`.
        `(False, cached, True)`: refused; this is the last result.
        `(False, None, False)`: refused, and there is no result of the last two windows.
        """
        if self.allow(key):
            return True, None, False
        has_cached, cached = self._results.get(key, self._clock.now())
        return False, cached, has_cached

    def set_cached_result(self, key: Hashable, result: object) -> None:
        """Remember the result that is given out while `key` is refused: for two windows, or until there is a new one.

        In the first one it is asked for. The second one is for the call that renews it, while that takes its time.
        """
        self._results.put(key, result, self._clock.now())

    async def call_or_cached(
        self, key: Hashable, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `fn` if `key` is admitted, and return its result; else return the last result.

        Those who come while a call for the key is under way share it, and its result or error. It runs in a task of its
        own until it is done, or until the last of them is cancelled; its deadline is the latest of theirs. Errors are
        not remembered. What `fn` itself asks for the same key is a request of its own.

        Raises:
            RateLimited: The request was refused, and there is no result of the last two windows.
            TooManyKeys: The same, because there is no room for a new key.
        """
        run: SharedRun[T] | None = self._runs.get(key)
        if run is None:
            allowed, cached, has_cached = self.allow_or_cached(key)
            if has_cached:
                return cast(T, cached)
            if not allowed:
                raise self._refusal(key, 1)

            async def work() -> T:
                result = await fn(*args, **kwargs)
                self.set_cached_result(key, result)
                return result

            run = self._runs.start(key, work, f"meshkit:{self._name}:{key!r}")
        return await run.result()

    async def _wait(self, key: Hashable, cost: int) -> None:
        now = self._clock.now()
        if key not in self._lines and key not in self._window:
            raise self._refuse(key, cost, self._refusal(key, cost))
        if self._lines.waiting >= self._max_waiting:
            wait, limit = self.retry_after(key, cost), self._max_waiting
            raise self._refuse(key, cost, Overloaded(name=f"the line of {self._name}", limit=limit, retry_after=wait))
        deadline = anyio.current_effective_deadline()  # -inf in a scope that is cancelled: waiting will end at once
        if -math.inf < deadline < math.inf and self._lines.due(key, cost, now) >= deadline:
            raise self._refuse(key, cost, self._refusal(key, cost))
        admitted = await self._lines.wait(key, cost, now)
        notify(self._observer, LimitWaited(self._name, key, cost, admitted - now))

    def _refusal(self, key: Hashable, cost: int) -> Refused:
        name, window, wait = self._name, self._window, self.retry_after(key, cost)
        if key in window:
            return RateLimited(name=name, key=key, max_count=window.max_count, window=window.window, retry_after=wait)
        return TooManyKeys(name=name, key=key, max_keys=window.max_keys, retry_after=wait)

    def _refuse(self, key: Hashable, cost: int, error: Refused) -> Refused:
        self._refused += 1
        notify(self._observer, LimitRefused(self._name, key, cost, error))
        return error


class KeyLimit(Guard):
    """One key of a RateLimiter, as a guard: made by `limiter.for_key(key)`. Each call waits for its turn."""

    kind: ClassVar[str] = "limiter"

    def __init__(self, limiter: RateLimiter, key: Hashable, cost: int = 1) -> None:
        self._limiter = limiter
        self._key = key
        self._cost = cost

    def __repr__(self) -> str:
        return f"{self._limiter!r}.for_key({self._key!r}, cost={self._cost})"

    async def __aenter__(self) -> None:
        """Wait for the turn."""
        await self._limiter.acquire(self._key, self._cost)

    async def __aexit__(self, *_: object) -> None:
        """Do nothing: what was admitted stays admitted."""

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Wait for the turn, then call `fn`."""
        if not callable(fn):
            raise _check.not_a_function(fn)
        await self._limiter.acquire(self._key, self._cost)
        return await fn(*args, **kwargs)
