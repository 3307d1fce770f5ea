"""The computers of a simulation: each has a clock of its own, and can be stopped."""

import asyncio
import contextvars
import math
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from meshkit.testing.sim_loop import SimLoop

_T = TypeVar("_T")

current: contextvars.ContextVar["Machine | None"] = contextvars.ContextVar("meshkit.testing.machine", default=None)
"""What the code that runs belongs to: tasks, timers and callbacks pass it on to those that they make."""


class Machine:
    """A computer of its own within a simulation, made by `SimLoop.machine`; what runs on it sees its clocks only.

    To it belong the tasks that `create_task` starts on it, and all that these start: tasks, timers, callbacks.
    """

    def __init__(self, loop: "SimLoop", name: str, *, rate: float, wall_offset: float, booted: float) -> None:
        self.name = name
        self.rate = rate
        """Seconds by which its clocks advance in a second of the simulation."""
        self.wall_offset = wall_offset
        """Seconds by which its wall clock is ahead; may be changed at any time, which is a jump of that clock."""
        self.held: list[asyncio.Handle] = []
        """What is to run as soon as it is resumed."""
        self._loop = loop
        self._booted = booted

    def __repr__(self) -> str:
        state = "paused" if self in self._loop.paused else "running"
        return f"Machine({self.name!r}, rate={self.rate!r}, wall_offset={self.wall_offset!r}, {state})"

    @property
    def tasks(self) -> "list[asyncio.Task[Any]]":
        """The unfinished tasks that run on it, in the order in which they were made."""
        return [task for task in self._loop.tasks if machine_of(task) is self]

    def create_task(self, coro: Coroutine[Any, Any, _T], *, name: str | None = None) -> "asyncio.Task[_T]":
        """Start a task that runs on this machine."""
        context = contextvars.copy_context()
        context.run(current.set, self)
        return self._loop.create_task(coro, name=name, context=context)

    def pause(self) -> None:
        """Stop it, as a virtual machine is stopped: nothing on it runs, while its clocks go on. Twice is harmless."""
        if self not in self._loop.paused:
            self._loop.paused.append(self)

    def resume(self) -> None:
        """Let it go on: all that has become due meanwhile runs now, late. Harmless if it is not paused."""
        if self in self._loop.paused:
            self._loop.paused.remove(self)
        held, self.held = self.held, []
        self._loop.run_now(held)

    # --- for the loop

    def local(self, time: float) -> float:
        """Return what its monotonic clock says at a time of the simulation."""
        return self._booted + time * self.rate

    def moment(self, local: float) -> float:
        """Return the first time of the simulation at which its monotonic clock says `local`, or later."""
        time = (local - self._booted) / self.rate
        while self.local(time) < local < math.inf:
            time = max(math.nextafter(time, math.inf), time + math.ulp(local) / self.rate)
        return time


def machine_of(task: "asyncio.Task[Any]") -> Machine | None:
    """Return the machine that `task` was started on."""
    machine: Machine | None = getattr(task, "_sim_machine", None)
    return machine
