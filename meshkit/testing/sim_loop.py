"""A simulation from one seed: virtual time, and another order of events for each seed.

`SimLoop` is a `VirtualTimeLoop` on which the seed decides what chance decides elsewhere: which of several tasks that
could run runs first, and all that is random: Python's `random`, and the ids, keys and nonces of meshkit. The same seed
does the same in every process, on every machine, and on every Python that meshkit supports.

>>> import asyncio
>>> from meshkit.testing import simulated
>>> async def main(sim):
...     order = []
...     async def arrive(name):
...         await asyncio.sleep(3600)
...         order.append(name)
...     await asyncio.gather(arrive("a"), arrive("b"), arrive("c"))
...     return order, sim.time()
>>> simulated(1, main)
(['c', 'b', 'a'], 3600.0)
>>> simulated(2, main)
(['b', 'a', 'c'], 3600.0)
"""

import asyncio
import contextvars
import gc
import hashlib
import heapq
import itertools
import math
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from operator import itemgetter
from typing import Any, TypeVar

from meshkit import _check, _entropy
from meshkit.testing._sim_faults import Faults
from meshkit.testing._sim_machine import Machine as Machine, current
from meshkit.testing._sim_order import Task, Timer, WeakOrderedSet, stepped
from meshkit.testing.virtual_time import Livelock, VirtualTimeLoop

__all__ = ["Machine", "SimLoop"]

_T = TypeVar("_T")


class SimLoop(VirtualTimeLoop):
    """An event loop on virtual time whose `seed` decides which of several tasks runs first, and all that is random.

    What is ready at one moment runs as one batch: its task steps in an order drawn from the seed, and between them the
    callbacks (`call_soon`, timers, what futures call when they are done) in the order in which they were due. Timers
    of one moment are due in the order in which they were set.

    It keeps a digest of all that ran: `trace`. While it runs, `random` and the garbage collector of the process are its
    own: so one at a time, and no other threads that use them. Cost: up to twice that of a `VirtualTimeLoop`.
    """

    MAX_STEPS = 1_000_000
    """Callbacks and task steps at one moment, before it counts as a `Livelock`."""

    STEPS_PER_COLLECTION = 10_000
    """How many steps the garbage collector waits: by itself it would come when the memory, not the seed, says so."""

    # Beyond what VirtualTimeLoop relies on: the deque `_ready`, the `_callback` and `_context` of a handle, the
    # `_scheduled` of a timer, `_timer_cancelled_count`, `_asyncgens` and the names of what runs a step of a task (see
    # _sim_order.py). tests/testing/test_sim_loop.py fails where that changes.
    _ready: deque[Any]
    _timer_cancelled_count: int

    def __init__(self, seed: int, *, buggify: bool = False, wall_start: float = 1_767_225_600.0) -> None:
        """`wall_start` is what wall clocks say at the start (default: 2026-01-01 00:00 UTC).

        With `buggify`, points of `meshkit.buggify` fire: for a seed each is armed or not, and fires now and then if so.
        """
        super().__init__(wall_start=wall_start)
        if isinstance(seed, bool) or not isinstance(seed, int):
            self.close()
            raise TypeError(f"seed must be an int, not {seed!r}")
        self.seed = seed
        self.rng = self.stream("test")
        """For what the test itself draws."""
        self.fired: Counter[str] = Counter()
        """How often each point of `meshkit.buggify` has fired."""
        self._faults = Faults(self) if buggify else None
        self.log: Callable[[str], object] | None = None
        """Set it to `print` to see each task step."""
        self.paused: list[Machine] = []
        self.hashes = self.stream("hashes")
        """For the hashes of tasks."""
        self.set_task_factory(Task)  # type: ignore[arg-type]  # typeshed wants a protocol of all its arguments
        self._asyncgens = WeakOrderedSet()
        self._order = self.stream("order")
        self._entropy = self.stream("entropy")
        self._random_state = self.stream("random").getstate()
        self._machines = self.stream("machines")
        self._task_numbers = itertools.count(1)
        self._timer_numbers = itertools.count(1)
        self._steps = 0
        self._uncollected = self._collections = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._clock_resolution = 0.0  # timers are taken at their exact times, by `next_batch`

    def __repr__(self) -> str:
        return f"<SimLoop seed={self.seed} time={self._now!r}>"

    # --- for tests

    @property
    def trace(self) -> str:
        """A digest of what has run so far, in which order, and at which times."""
        return self._digest.copy().hexdigest()

    def note(self, text: str) -> None:
        """Let `text` count in the `trace`; what it says must be the same each time, so no address and no `set`."""
        self._digest.update(struct.pack("<dq", self._now, -1) + text.encode("utf-8", "backslashreplace") + b"\0")
        if self.log is not None:
            self.log(f"{self._now:.6f} {text}")

    def stream(self, purpose: str) -> random.Random:
        """Return a generator of random numbers of its own for `purpose`: drawing from it disturbs nobody else."""
        return random.Random(f"{self.seed} {purpose}")

    @property
    def now(self) -> float:
        """The time of the simulation in seconds, whatever the clock of a machine says."""
        return self._now

    @property
    def tasks(self) -> "list[asyncio.Task[Any]]":
        """The unfinished tasks, in the order in which they were made (`asyncio.all_tasks` has no order)."""
        return sorted(asyncio.all_tasks(self), key=self._number)

    def machine(self, name: str, *, rate: float = 1.0, wall_offset: float = 0.0) -> Machine:
        """Return a new computer, whose clocks are its own: see `Machine`.

        Args:
            name: What it is called.
            rate: Seconds by which its clocks advance in a second of the simulation: 1.0001 gains 8.6 s in a day.
            wall_offset: Seconds by which its wall clock is ahead. Its monotonic clock started somewhere else, anyway.
        """
        _check.duration("rate", rate)
        return Machine(self, name, rate=rate, wall_offset=wall_offset, booted=self._machines.randrange(1000))

    # --- an event loop

    def time(self) -> float:
        """Return the virtual time in seconds; on a `Machine`, what its clock says."""
        machine = current.get()
        return self._now if machine is None else machine.local(self._now)

    def wall_time(self) -> float:
        """Return the virtual wall clock in seconds since the epoch; on a `Machine`, what its clock says."""
        machine = current.get()
        if machine is None:
            return self._wall_start + self._now
        return self._wall_start + self._now * machine.rate + machine.wall_offset

    def call_at(  # type: ignore[override]  # typeshed's overloads spell TypeVarTuple arguments
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Call `callback(*args)` at `when`; at equal times, in the order of these calls."""
        if self.is_closed():
            raise RuntimeError("the event loop is closed")
        if math.isnan(when):
            raise ValueError("when must be a time, not NaN")
        machine = current.get()
        timer = Timer(when if machine is None else machine.moment(when), callback, args, self, context)
        timer.take_place(next(self._timer_numbers))
        heapq.heappush(self._scheduled, timer)
        return timer

    def create_task(  # type: ignore[override]  # typeshed's has other types on each Python
        self,
        coro: Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **more: Any,
    ) -> "asyncio.Task[_T]":
        """Create a task; a default name is the same in each run."""
        number = next(self._task_numbers)
        name = f"Task-{number}" if name is None else name
        task: asyncio.Task[_T] = super().create_task(coro, name=name, context=context, **more)
        task._sim_number = number  # type: ignore[attr-defined]
        task._sim_machine = current.get() if context is None else context.get(current)  # type: ignore[attr-defined]
        return task

    def run_forever(self) -> None:
        """Run until `stop`; meanwhile, what is random obeys the seed, and so does the garbage collector."""
        collects, outside = gc.isenabled(), random.getstate()
        gc.disable()
        random.setstate(self._random_state)
        _entropy.simulations[self] = self._entropy
        if self._faults is not None:
            _entropy.buggified[self] = self._faults.fires
        try:
            super().run_forever()
        finally:
            del _entropy.simulations[self]
            _entropy.buggified.pop(self, None)
            for machine in list(self.paused):  # or what is left on it could not be cancelled
                machine.resume()
            self._random_state = random.getstate()
            random.setstate(outside)
            if collects:
                gc.enable()

    # --- for the clock and the machines

    def run_now(self, handles: Iterable[asyncio.Handle]) -> None:
        """Let `handles` run in the next batch."""
        self._ready.extend(handles)

    def next_batch(self, *, wait: bool) -> None:
        """Move the time on if there is nothing to do (`wait`), and put what is ready in order."""
        if wait:
            self.refuse_threads()
            if not self.wake_settled():
                self._steps = 0
                self.jump_to_next_timer()
        now, timers, ready = self._now, self._scheduled, self._ready
        while timers and timers[0]._when <= now:  # type: ignore[attr-defined]
            timer = heapq.heappop(timers)
            timer._scheduled = False  # type: ignore[attr-defined]
            if timer.cancelled():
                self._timer_cancelled_count -= 1
            else:
                ready.append(timer)
        if ready:
            self._steps += len(ready)
            if self._steps > self.MAX_STEPS:
                self._steps = 0
                raise Livelock(f"{self.MAX_STEPS} steps at one moment; " + self.where_tasks_wait())
            self._uncollected += len(ready)
            if self._uncollected >= self.STEPS_PER_COLLECTION:
                self._uncollected = 0
                self._collections += 1
                gc.collect(2 if self._collections % 100 == 0 else 1 if self._collections % 10 == 0 else 0)
            self._put_in_order()

    def jump_to_next_timer(self) -> None:
        """Move the clock to the earliest timer."""
        super().jump_to_next_timer()
        self._clock_resolution = 0.0

    def where_tasks_wait(self) -> str:
        """Describe every unfinished task and where it waits, and which machines are paused."""
        paused = sorted(machine.name for machine in self.paused)
        return super().where_tasks_wait() + (f"\npaused: {', '.join(paused)}" if paused else "")

    def _put_in_order(self) -> None:
        """Shuffle the task steps among what is ready; the callbacks stay in their order.

        The steps are sorted first: where a set of tasks was woken or cancelled, their order depends on the memory. And
        it is drawn anew which places the callbacks get, for the same reason.
        """
        ready = self._ready
        steps: list[tuple[int, Any]] = []
        callbacks: deque[Any] = deque()
        for handle in ready:
            if handle._cancelled:
                continue
            if self.paused and (machine := handle._context.get(current)) in self.paused:
                machine.held.append(handle)
                continue
            if (task := stepped(handle)) is not None:
                steps.append((self._number(task), handle))
            else:
                callbacks.append(handle)
        ready.clear()
        if not steps:
            ready.extend(callbacks)
            return
        steps.sort(key=itemgetter(0))
        places: list[tuple[int, Any]] = steps + [(0, None)] * len(callbacks)
        if len(places) > 1:
            self._order.shuffle(places)
        ready.extend(handle or callbacks.popleft() for _, handle in places)
        steps = [(number, handle) for number, handle in places if handle]
        self._digest.update(struct.pack(f"<d{len(steps)}q", self._now, *(number for number, _ in steps)))
        if self.log is not None:
            for number, handle in steps:
                machine = handle._context.get(current)
                on = "" if machine is None else f" on {machine.name}"
                self.log(f"{self._now:.6f} #{number} {stepped(handle).get_name()}{on}")

    def _number(self, task: Any) -> int:
        number: int | None = getattr(task, "_sim_number", None)
        if number is None:  # made without the loop: asyncio.Task(...)
            number = task._sim_number = next(self._task_numbers)
        return number
