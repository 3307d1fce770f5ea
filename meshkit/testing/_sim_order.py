"""What asyncio leaves in the order of memory, or without one: here its order obeys the seed of a `SimLoop`."""

import asyncio
import weakref
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from meshkit.testing.sim_loop import SimLoop


class Timer(asyncio.TimerHandle):
    """A timer that has a place among those that are due at the same time."""

    __slots__ = ("number",)
    number: int
    _when: float
    _scheduled: bool

    def take_place(self, number: int) -> None:
        """Note that it is now among the timers of the loop, as asyncio does, and which place it has there."""
        self.number = number
        self._scheduled = True

    def __lt__(self, other: "Timer") -> bool:  # type: ignore[override]  # a SimLoop has no others
        return (self._when, self.number) < (other._when, other.number)


class Task(asyncio.Task[Any]):
    """A task whose hash is drawn from the seed, so that the order of a `set` of tasks is that of the seed."""

    def __init__(self, loop: "SimLoop", coro: Coroutine[Any, Any, Any], **more: Any) -> None:
        self._hash = loop.hashes.getrandbits(60)
        super().__init__(coro, loop=loop, **more)

    def __hash__(self) -> int:
        return self._hash


class WeakOrderedSet(weakref.WeakKeyDictionary[Any, None]):
    """Stands for a `weakref.WeakSet`, in which asyncio keeps the async generators that it has to close."""

    def add(self, item: object) -> None:
        """Add `item` at the end."""
        self[item] = None

    def discard(self, item: object) -> None:
        """Remove `item`, if it is there."""
        self.pop(item, None)


_STEPS = {None, "task_wakeup"}
"""The names of the two callbacks by which asyncio runs a step of a task (one has none); its methods do not."""


def stepped(handle: Any) -> Any:
    """Return the task that takes a step when `handle` runs; None for any other callback."""
    callback = handle._callback
    task: object = getattr(callback, "__self__", None)
    steps = isinstance(task, asyncio.Task) and getattr(callback, "__name__", None) in _STEPS
    return cast("Any", task) if steps else None
