"""The lines of those who wait for the keys of a RateLimiter."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

from meshkit._time import Clock, running_loop

__all__ = ["Line", "Lines", "Window"]


class Window(Protocol):
    """What lines need of a SlidingWindow."""

    def admit(self, key: Hashable, now: float, cost: int = 1) -> bool:
        """Admit a request if it fits, and return whether it did."""
        ...

    def free_at(self, key: Hashable, now: float, cost: int = 1) -> float:
        """Return when a request will fit."""
        ...

    def check_cost(self, cost: int) -> None:
        """Raise `ValueError` if `cost` could never fit."""
        ...

    def remove(self, key: Hashable, time: float, count: int = 1) -> None:
        """Take back what was admitted at `time`."""
        ...

    def fork(self, key: Hashable) -> "Window":
        """Return a copy that knows of `key` only, to plan with."""
        ...


class Line:
    """The requests that wait for one key. The first one is served first, whatever it costs.

    How long it takes is read from a plan: a copy of the window in which each of them is admitted as early as can be. It
    is made when somebody asks, and goes on with each one that joins.

    Cost: O(1) to join and to leave, and to ask; but O(length) to ask after one has left without being served.
    """

    __slots__ = ("_plan", "_plan_end", "_served", "key", "loop", "timer", "waiters", "window")

    def __init__(self, key: Hashable, window: Window, loop: asyncio.AbstractEventLoop) -> None:
        self.key = key
        self.window = window
        self.loop = loop
        self.timer: asyncio.TimerHandle | None = None  # one for all of them: when the first fits
        self.waiters: OrderedDict[asyncio.Future[float], int] = OrderedDict()  # and what they cost
        self._plan: Window | None = None
        self._plan_end = 0.0  # when the last of them is admitted
        self._served = 0  # since it was made

    def join(self, cost: int, now: float) -> "asyncio.Future[float]":
        """Return a future of the time at which the request is admitted."""
        waiter: asyncio.Future[float] = self.loop.create_future()
        self.waiters[waiter] = cost
        if self._plan is not None:
            self._plan_for(self._plan, cost, now)
        return waiter

    def replan(self) -> None:
        """Say that things have not gone as planned."""
        self._plan = None

    def serve(self, now: float) -> float | None:
        """Admit from the front what fits; return when the next one will, or None if nobody is left."""
        while self.waiters:
            waiter, cost = next(iter(self.waiters.items()))
            if waiter.done():  # cancelled, and not aware of it yet
                self.replan()
            elif self.window.admit(self.key, now, cost):
                waiter.set_result(now)
                self._served += 1
            else:
                return self.window.free_at(self.key, now, cost)
            del self.waiters[waiter]
        return None

    def set_timer(self, due: float | None, callback: Callable[["Line"], None]) -> None:
        """Have `callback` called at the time `due`, and at no other."""
        if self.timer is not None and self.timer.when() != due:
            self.timer.cancel()
            self.timer = None
        if self.timer is None and due is not None:
            self.timer = self.loop.call_at(due, callback, self)

    def due(self, cost: int, now: float) -> float:
        """Return when a request will be admitted that joins now."""
        # They are served a little later than planned, since timers are late. So no plan gets older than its line.
        if self._plan is None or self._served > len(self.waiters):
            self._plan, self._plan_end, self._served = self.window.fork(self.key), now, 0
            for waiter, ahead in self.waiters.items():
                if not waiter.done():
                    self._plan_for(self._plan, ahead, now)
        return self._plan.free_at(self.key, max(self._plan_end, now), cost)

    def _plan_for(self, plan: Window, cost: int, now: float) -> None:
        self._plan_end = plan.free_at(self.key, max(self._plan_end, now), cost)
        plan.admit(self.key, self._plan_end, cost)


class Lines(dict[Hashable, Line]):
    """The lines of all keys that somebody waits for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.window: Window  # given later: it has to know that these keys are to be kept
        self.waiting = 0
        self._clock = clock

    def clear_way(self, key: Hashable, cost: int) -> bool:
        """Serve those who wait for `key` as far as possible; return whether a request of `cost` would be the next."""
        self.window.check_cost(cost)
        line = self.of(key)
        if line is not None:
            self._serve(line)
        return key not in self

    def of(self, key: Hashable) -> Line | None:
        """Return the line of `key`, if somebody waits in it who can still be served."""
        line = self.get(key)
        if line is None or (line.waiters and not line.loop.is_closed()):
            return line
        line.set_timer(None, self._on_timer)
        del self[key]
        return None

    def due(self, key: Hashable, cost: int, now: float) -> float:
        """Return when a request will be admitted that comes now."""
        line = self.of(key)
        return self.window.free_at(key, now, cost) if line is None else line.due(cost, now)

    async def wait(self, key: Hashable, cost: int, now: float) -> float:
        """Wait in line; return the time at which the request was admitted.

        Raises:
            RuntimeError: Another loop, that can go on, has tasks in this line.
        """
        loop = asyncio.get_running_loop()
        line = self.of(key)
        if line is None:
            line = self[key] = Line(key, self.window, loop)
        elif line.loop is not loop:
            raise RuntimeError(f"tasks of another event loop, which is not closed, are waiting for {key!r}")
        waiter = line.join(cost, now)
        self.waiting += 1
        if len(line.waiters) == 1:
            self._serve(line)
        try:
            return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():  # admitted, but too late
                self.window.remove(key, waiter.result(), cost)
            line.waiters.pop(waiter, None)
            self._after_leave(key)
            raise
        finally:
            self.waiting -= 1

    def _after_leave(self, key: Hashable) -> None:
        line = self.of(key)
        if line is not None:
            line.replan()
            self._serve(line)

    def _serve(self, line: Line) -> None:
        if line.loop is not running_loop():
            return  # its timer will do it, in its own time
        due = line.serve(self._clock.now())
        line.set_timer(due, self._on_timer)
        if due is None:
            self.pop(line.key, None)

    def _on_timer(self, line: Line) -> None:
        line.timer = None
        self._serve(line)
