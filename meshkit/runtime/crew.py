"""Crews: the named tasks of one service, restarted when they fail, and ended together."""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from meshkit import _time

__all__ = ["Crew", "Restarts"]


class Restarts:
    """How often a task may be restarted: `max_restarts` times in any `restart_window` seconds.

    The delay before a restart doubles with each one in the window. It is capped such that a task that always fails at
    once reaches the limit.
    """

    def __init__(self, max_restarts: int, restart_window: float, first_delay: float = 0.1) -> None:
        self._max = max_restarts
        self._window = restart_window
        self._first = first_delay
        self._cap = restart_window / (2 * max_restarts) if max_restarts else 0.0
        self._at: deque[float] = deque()

    def next(self, now: float) -> float | None:
        """Return how long to wait before the restart that is due `now`; None if there have been too many."""
        while self._at and self._at[0] <= now - self._window:
            self._at.popleft()
        if len(self._at) >= self._max:
            return None
        self._at.append(now)
        return min(self._cap, self._first * 2.0 ** min(len(self._at) - 1, 60))


class Crew:
    """The tasks of one service, each named `<prefix>:<what>`.

    They run in the context that the crew was made in, not in that of whoever happens to cause them.
    """

    PATIENCE = 1.0
    """Seconds that a cancelled task has to end, before it is cancelled again; after the third time it is given up."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._context = contextvars.copy_context()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    def spawn(self, coro: Coroutine[Any, Any, None], what: str) -> "asyncio.Task[None]":
        """Run `coro` in a task of its own."""
        name = f"{self._prefix}:{what}"
        task = asyncio.get_running_loop().create_task(coro, name=name, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self) -> list[str]:
        """Cancel every task and wait for all of them; return the names of those that refuse to end."""
        left = set(self._tasks)
        for _ in range(3):
            for task in left:
                task.cancel()
            if left:
                _, left = await asyncio.wait(left, timeout=self.PATIENCE)
        return sorted(task.get_name() for task in left)


async def supervise(
    run: Callable[[], Coroutine[Any, Any, object]],
    restarts: Restarts,
    on_failure: Callable[[Exception, float | None], None],
) -> None:
    """Run `run()`, again after a delay when it raises, until it returns or there have been too many restarts.

    Each failure is told to `on_failure(error, delay)`; the delay is None when it was the last one.
    """
    while True:
        try:
            await run()
            return
        except Exception as error:  # noqa: BLE001 - whatever a background task raises is its failure
            delay = restarts.next(_time.now())
            on_failure(error, delay)
        if delay is None:
            return
        await asyncio.sleep(delay)
