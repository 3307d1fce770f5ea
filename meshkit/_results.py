"""What is known of a call: its last result, for a while, and the run that is under way.

>>> results = Results(ttl=10.0, max_keys=2)
>>> results.put("bob", None, now=0.0)
>>> results.get("bob", now=9.0), results.get("bob", now=10.0), results.get("carol", now=9.0)
((True, None), (False, None), (False, None))
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import anyio

from meshkit._time import now, running_loop
from meshkit.errors import CallTimeout

__all__ = ["Results", "SharedRun", "SharedRuns"]

T = TypeVar("T")

# The ends of the runs from within which a call is made. (Not the runs: a task may live, and keep them, for long.)
_inside: ContextVar[tuple[asyncio.Event, ...]] = ContextVar("_inside", default=())


class Results:
    """The last result of each key, for `ttl` seconds. At `max_keys` one of the oldest makes room for a new one.

    Cost: amortised O(1): each new key looks at two others, and forgets them if they are too old.
    """

    def __init__(self, *, ttl: float, max_keys: int) -> None:
        self._ttl = ttl
        self._max_keys = max_keys
        self._results: dict[Hashable, tuple[float, Any]] = {}
        self._to_check: list[Hashable] = []  # the last of these is next

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: Hashable, now: float) -> tuple[bool, Any]:
        """Return whether there is a result that is not too old, and the result."""
        since, result = self._results.get(key, (-math.inf, None))
        # Less than 0: another clock said it.
        return (True, result) if abs(now - since) < self._ttl else (False, None)

    def put(self, key: Hashable, result: object, now: float) -> None:
        """Remember the result of `key`."""
        if key not in self._results:
            for _ in range(2):
                self._check_one(now)
            if len(self._results) >= self._max_keys:
                self._check_one(math.inf)
            if len(self._results) >= self._max_keys:  # that one was not found: its hash has changed
                self._results.popitem()
        self._results[key] = (now, result)

    def _check_one(self, now: float) -> None:
        if not self._to_check:
            self._to_check = list(reversed(self._results))
        if self._to_check:
            key = self._to_check.pop()
            if not self.get(key, now)[0]:
                self._results.pop(key, None)

    def cleanup(self, now: float) -> None:
        """Forget every result that is too old. Cost: O(keys)."""
        self._results = {key: value for key, value in self._results.items() if self.get(key, now)[0]}
        self._to_check = []


class SharedRun(Generic[T]):
    """A call in a task of its own, for any number of callers. It ends early only when the last of them is cancelled.

    Its deadline is the latest of theirs.
    """

    def __init__(self, fn: Callable[[], Awaitable[T]], name: str) -> None:
        self.loop = asyncio.get_running_loop()
        self._name = name
        self._callers = 0
        self._abandoned = False
        self._ended = asyncio.Event()
        self._scope = anyio.CancelScope(deadline=anyio.current_effective_deadline())
        self.task = self.loop.create_task(self._run(fn), name=name)
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be nobody's any more

    @property
    def open(self) -> bool:
        """Whether the caller can join: it has not ended, nor is about to, and this is no call from within.

        It is about to end when everybody has left, or is out of time. A call from within would wait for itself.
        """
        return not (self.task.done() or self._abandoned or self._scope.cancel_called or self._ended in _inside.get())

    async def _run(self, fn: Callable[[], Awaitable[T]]) -> T:
        # The context is this task's own, and that of the tasks it starts.
        _inside.set((*(ended for ended in _inside.get() if not ended.is_set()), self._ended))
        start = now()
        try:
            with self._scope:
                return await fn()
        finally:
            self._ended.set()
        if self._abandoned:
            raise asyncio.CancelledError
        raise CallTimeout(name=self._name, timeout=now() - start)  # for a caller whose deadline was moved meanwhile

    async def result(self) -> T:
        """Wait for the result.

        The last caller to be cancelled cancels the call, and waits for its end, as if it had made it itself.
        """
        self._callers += 1
        self._scope.deadline = max(self._scope.deadline, anyio.current_effective_deadline())
        try:
            await asyncio.wait([self.task])
        except asyncio.CancelledError:
            if self._leave():
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([self.task])
                if not self.task.cancelled():
                    self.task.result()  # what its clean-up raised goes to whoever cancelled it
            raise
        except GeneratorExit:
            self._leave()
            raise
        return self.task.result()

    def _leave(self) -> bool:
        self._callers -= 1
        if self._callers or self.task.done():
            return False
        self._abandoned = True
        if not (self.loop.is_closed() or self._scope.cancel_called):  # once is enough: it may be cleaning up
            self.task.cancel()
        return True


class SharedRuns:
    """The runs that are under way, one for a key."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, SharedRun[Any]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, key: Hashable) -> SharedRun[Any] | None:
        """Return the run of `key` that can be joined, if there is one."""
        run = self._runs.get(key)
        return run if run is not None and run.open and run.loop is running_loop() else None

    def start(self, key: Hashable, fn: Callable[[], Awaitable[T]], name: str) -> SharedRun[T]:
        """Start a run, for others to join."""
        run = self._runs[key] = SharedRun(fn, name)
        run.task.add_done_callback(lambda _: self._end(key, run))
        return run

    def _end(self, key: Hashable, run: SharedRun[Any]) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
