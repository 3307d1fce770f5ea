"""Cancellation at every await: prove that code loses nothing, wherever it is cancelled.

>>> import asyncio
>>> from meshkit.testing import cancellation_points, run
>>> def test_a_cancelled_get_loses_no_item():
...     for point in cancellation_points():
...         async def main():
...             queue = asyncio.Queue()
...             asyncio.get_running_loop().call_later(1, queue.put_nowait, "item")
...             got = [] if await point.cancel(queue.get()) else [point.result]
...             await asyncio.sleep(2)
...             assert got or queue.get_nowait() == "item"
...         run(main)
>>> test_a_cancelled_get_loses_no_item()

Each iteration runs the scenario once more and cancels one await later, in three ways: by `task.cancel()` while it
waits; by `task.cancel()` when what it waited for has just arrived, but before it has seen it; and by an anyio
cancel scope, which cancels again at every further await, so that clean-up which awaits unshielded is found.
The loop ends when the scenario finishes before the point is reached.
"""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, Literal

import anyio

__all__ = ["CancellationPoint", "cancellation_points"]

_Moment = Literal["waiting", "woken", "scope"]
_MOMENTS: tuple[_Moment, ...] = ("waiting", "woken", "scope")


class CancellationPoint:
    """One place to cancel at: the await with this `index`, counted from 0, at this `moment`."""

    def __init__(self, index: int, moment: _Moment) -> None:
        self.index = index
        self.moment: _Moment = moment
        self.used = False
        self.reached = False
        self.result: Any = None

    def __repr__(self) -> str:
        return f"<CancellationPoint {self.index} {self.moment}{' reached' if self.reached else ''}>"

    async def cancel(self, coro: Coroutine[Any, Any, Any]) -> bool:
        """Run `coro` in a task of its own and cancel it at this point; return whether it ended cancelled.

        If it ended otherwise, its result is in `result`, or its exception is raised.
        """
        if not hasattr(coro, "send"):
            raise TypeError(f"cancel() drives a coroutine, as in point.cancel(verb()), not {coro!r}")
        if self.used:
            coro.close()
            raise RuntimeError("a CancellationPoint cancels one coroutine; take the next point for the next one")
        self.used = True
        task = asyncio.create_task(self._run(coro), name=f"cancelled at {self.index} {self.moment}")
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        if task.cancelled():
            return True
        cancelled, self.result = task.result()
        return cancelled

    async def _run(self, coro: Coroutine[Any, Any, Any]) -> tuple[bool, Any]:
        if self.moment != "scope":
            return False, await self._drive(coro, None)
        with anyio.CancelScope() as scope:
            return False, await self._drive(coro, scope)
        return True, None

    @types.coroutine
    def _drive(self, coro: Coroutine[Any, Any, Any], scope: anyio.CancelScope | None) -> Generator[Any, Any, Any]:
        """Step `coro` as its task would, and strike at the chosen await."""
        advance: Callable[[Any], Any] = coro.send
        argument: Any = None
        suspensions = 0
        try:
            while True:
                try:
                    awaited: Any = advance(argument)
                except StopIteration as stop:
                    return stop.value
                if suspensions == self.index:
                    self._strike(awaited, scope)
                suspensions += 1
                try:
                    argument = yield awaited
                    advance = coro.send
                except GeneratorExit:
                    raise
                except BaseException as error:  # noqa: BLE001 - whatever the task throws in belongs to coro
                    advance, argument = coro.throw, error
        finally:
            coro.close()

    def _strike(self, awaited: Any, scope: anyio.CancelScope | None) -> None:
        self.reached = True
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a CancellationPoint needs an asyncio task to cancel")
        if scope is not None:
            scope.cancel()
        elif self.moment == "woken" and asyncio.isfuture(awaited):
            # Runs before the task's own callback, which is added only after this: the result is there, unseen.
            awaited.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


def cancellation_points() -> Iterator[CancellationPoint]:
    """Yield every point at which a scenario can be cancelled, until the scenario ends before the point is reached.

    Cost: 3 runs per await of the scenario. The scenario must call `point.cancel(coro)` exactly once per run.
    """
    for moment in _MOMENTS:
        index = 0
        while True:
            point = CancellationPoint(index, moment)
            yield point
            if not point.used:
                raise RuntimeError("the scenario never called point.cancel(): nothing was tested")
            if not point.reached:
                break
            index += 1
