"""Supervisors: the tasks of one service. They have names, are restarted when they fail, and end together."""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from meshkit import _time

__all__ = ["ENDS_THE_PROCESS", "Restarts", "Supervisor", "begin", "uncancel", "was_cancelled", "within"]

ENDS_THE_PROCESS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What passes through everything. Any other error, also if it is no `Exception`, is a failure of who raised it."""


class Restarts:
    """How often one task may be restarted: `max_restarts` times in any `restart_window` seconds.

    The delay before a restart doubles with each one in the window, from `FIRST_DELAY`. It is capped such that a task
    that always fails at once does reach the limit.
    """

    FIRST_DELAY = 0.1

    def __init__(self, max_restarts: int, restart_window: float) -> None:
        self._max = max_restarts
        self._window = restart_window
        self._at: deque[float] = deque()

    def delay(self, now: float) -> float | None:
        """Count a restart and return the seconds to wait before it; None if there have been too many."""
        while self._at and self._at[0] <= now - self._window:
            self._at.popleft()
        if len(self._at) >= self._max:
            return None
        self._at.append(now)
        return min(self.FIRST_DELAY * 2.0 ** (len(self._at) - 1), self._window / (2 * self._max))


class Supervisor:
    """The tasks of one service, each named `<prefix>:<what>`.

    They run in the context in which the supervisor was made, not in that of whoever happens to cause them.
    `on_failure(what, error, delay)` is told each failure of a supervised task; the delay is None when it was the last.
    """

    def __init__(self, prefix: str, on_failure: Callable[[str, BaseException, float | None], None]) -> None:
        self._prefix = prefix
        self._on_failure = on_failure
        self._context = contextvars.copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False
        self._loop = asyncio.get_running_loop()

    @property
    def runs(self) -> bool:
        """Whether it has not ended, and its loop was not closed under it."""
        return not self._ended and not self._loop.is_closed()

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    def spawn(self, run: Callable[[], Coroutine[Any, Any, None]], what: str) -> "asyncio.Task[None]":
        """Run `run()` in a task of its own."""
        name = f"{self._prefix}:{what}"
        if self._ended:
            raise RuntimeError(f"{name} cannot begin: its service has stopped")
        task = begin(self._loop, run, name, self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def supervise(
        self, run: Callable[[], Coroutine[Any, Any, object]], what: str, restarts: Restarts
    ) -> "asyncio.Task[None]":
        """Run `run()` in a task of its own, again when it raises, until it returns or `restarts` has no more.

        What it raises when it has been cancelled, it raises to whoever awaits the task: it does not run again.
        """

        async def supervised() -> None:
            while True:
                try:
                    await run()
                    return
                except ENDS_THE_PROCESS:
                    raise
                except BaseException as error:
                    if was_cancelled():
                        raise
                    failure = error  # a CancelledError, too: it awaited something else that was cancelled
                delay = restarts.delay(_time.now())
                self._on_failure(what, failure, delay)
                if delay is None:
                    return
                await asyncio.sleep(delay)

        return self.spawn(supervised, what)

    async def end(self, patience: float) -> list[str]:
        """Cancel every task and wait for `patience` seconds, half-way cancelling again those that go on.

        Returns:
            The names of the tasks that refuse to end.
        """
        self._ended = True
        left = set(self._tasks)
        for _ in range(2):
            for task in left:
                task.cancel()
            if left:
                _, left = await asyncio.wait(left, timeout=patience / 2)
        return sorted(task.get_name() for task in left)


def begin(
    loop: asyncio.AbstractEventLoop,
    run: Callable[[], Coroutine[Any, Any, None]],
    name: str,
    context: contextvars.Context | None = None,
) -> "asyncio.Task[None]":
    """Run `run()` in a task that begins later, also where the loop's task factory is eager to begin at once."""

    async def later() -> None:
        await asyncio.sleep(0)
        await run()

    coro = run() if loop.get_task_factory() is None else later()
    return loop.create_task(coro, name=name, context=context)


def was_cancelled() -> bool:
    """Return whether somebody has cancelled the current task; else a `CancelledError` in it is its own doing."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def uncancel() -> None:
    """Let the current task go on although it was cancelled, as if it had not been."""
    task = asyncio.current_task()
    while task is not None and task.uncancel():
        pass


async def within(timeout: float, hook: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a hook; `TimeoutError` if it takes longer than `timeout` seconds."""
    with anyio.move_on_after(timeout) as scope:
        await hook()
    if scope.cancelled_caught:
        raise TimeoutError(f"it took longer than {timeout:g} s")
