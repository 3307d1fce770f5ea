"""Only so many calls at once; a bounded line for those that come on top, and a refusal for the rest.

>>> import asyncio
>>> bulkhead = Bulkhead(2, max_queue=1, name="db")
>>> async def main():
...     calls = [bulkhead.call(asyncio.sleep, 0.01, number) for number in range(4)]
...     for result in await asyncio.gather(*calls, return_exceptions=True):
...         print(result)
>>> asyncio.run(main())
0
1
2
db: 2 calls are running and 1 are waiting already

The treaty: a slot that is given back goes to the first in line, so nobody overtakes; while anybody waits, every slot is
taken. Who is cancelled in line costs nothing; who is cancelled in the moment of being given a slot passes it on.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Generic, ParamSpec, TypeVar

from meshkit import _check
from meshkit._time import now, running_loop
from meshkit.errors import BulkheadFull
from meshkit.events import Event, Observer, notify
from meshkit.guard import Guard

__all__ = ["Bulkhead", "BulkheadRefused", "BulkheadStats", "BulkheadWaited", "Slots"]

P = ParamSpec("P")
T = TypeVar("T")
W = TypeVar("W", bound=Hashable)


@dataclass(frozen=True, slots=True)
class BulkheadRefused(Event):
    """A call was refused: so many were running, and so many waiting, already."""

    name: str
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class BulkheadWaited(Event):
    """A call was given a slot after it had waited for so many seconds."""

    name: str
    duration: float


@dataclass(frozen=True, slots=True)
class BulkheadStats:
    """How many calls are `running` and `waiting` now, and how many have been `refused` in all."""

    running: int
    waiting: int
    refused: int


class Slots(Generic[W]):
    """The core: who has a slot, who waits for one, who comes next. Every operation is O(1)."""

    def __init__(self, max_concurrent: int, max_queue: int) -> None:
        self.max_concurrent = _check.count("max_concurrent", max_concurrent)
        self.max_queue = _check.count("max_queue", max_queue, minimum=0)
        self.running = 0  # while it is less than max_concurrent, to take a slot is to add one
        self.waiting: OrderedDict[W, None] = OrderedDict()  # the first in line first

    def take(self) -> bool:
        """Take a slot if one is free, and return whether one was."""
        if self.running >= self.max_concurrent:
            return False
        self.running += 1
        return True

    def line_up(self, ticket: W) -> bool:
        """Stand in line, and return whether there was room for it."""
        if len(self.waiting) >= self.max_queue:
            return False
        self.waiting[ticket] = None
        return True

    def step_out(self, ticket: W) -> bool:
        """Leave the line, and return whether `ticket` stood in it: if not, it had its turn."""
        if ticket not in self.waiting:
            return False
        del self.waiting[ticket]
        return True

    def give_back(self) -> W | None:
        """Give a slot back; return the ticket of who has it now, None if it is free."""
        if self.waiting:
            return self.waiting.popitem(last=False)[0]
        self.running -= 1
        return None


class Bulkhead(Guard):
    """Let at most `max_concurrent` calls run at the same time: `call`, `@bulkhead`, or `async with bulkhead`.

    A call that finds no free slot waits in line, first come, first served, if fewer than `max_queue` wait there; else
    it is refused with `BulkheadFull`, by default (0) at once. How long a call waits is up to the caller: an enclosing
    `anyio.fail_after`, or a `Timeout` outside, ends the wait too.

    A task that enters the same bulkhead again while it has a slot takes a second one, and may wait for itself.

    Args:
        max_concurrent: So many calls may run at the same time.
        max_queue: So many more may wait.
        name: For errors, events and `repr`.
        observer: Is given a `BulkheadWaited` and a `BulkheadRefused` for each call that was so.

    Cost: nothing is created where a slot is free; a future for each call that waits.
    """

    kind: ClassVar[str] = "bulkhead"

    def __init__(
        self,
        max_concurrent: int,
        *,
        max_queue: int = 0,
        name: str = "bulkhead",
        observer: Observer | None = None,
    ) -> None:
        self._slots: Slots[asyncio.Future[None]] = Slots(max_concurrent, max_queue)
        self._name = name
        self._observer = observer
        self._refused = 0

    def __repr__(self) -> str:
        slots = self._slots
        return (
            f"Bulkhead({slots.max_concurrent}, max_queue={slots.max_queue}, name={self._name!r}, "
            f"running={slots.running}, waiting={len(slots.waiting)})"
        )

    @property
    def idle(self) -> bool:
        """Whether no call is running: forgetting the bulkhead would lose nothing."""
        return self._slots.running == 0

    def stats(self) -> BulkheadStats:
        """Return how many calls are running and waiting, and how many were refused."""
        return BulkheadStats(self._slots.running, len(self._slots.waiting), self._refused)

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn(*args, **kwargs)` with a slot of its own, if need be after waiting for one.

        Raises:
            BulkheadFull: The call was not made: every slot is taken, and so is every place in line.
        """
        if not callable(fn):
            raise _check.not_a_function(fn)
        if not self._slots.take():
            await self._wait()
        try:
            return await fn(*args, **kwargs)
        finally:
            self._give_back()

    async def __aenter__(self) -> None:
        """Take a slot for the block, if need be after waiting for one, or raise `BulkheadFull`."""
        if not self._slots.take():
            await self._wait()

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._give_back()

    async def _wait(self) -> None:
        slots, turn = self._slots, asyncio.get_running_loop().create_future()
        if not slots.line_up(turn):
            self._refused += 1
            notify(self._observer, BulkheadRefused(self._name, slots.running, len(slots.waiting)))
            raise BulkheadFull(name=self._name, max_concurrent=slots.max_concurrent, max_queue=slots.max_queue)
        since = now()
        try:
            await turn
            notify(self._observer, BulkheadWaited(self._name, now() - since))
        except BaseException:
            given = turn.done() and not turn.cancelled() and turn.exception() is None
            if not slots.step_out(turn) and given:
                self._give_back()  # it was given a slot, and cancelled before it could use it
            raise

    def _give_back(self) -> None:
        while (turn := self._slots.give_back()) is not None:
            # Cancelled, or left over from a loop that is gone: the slot goes on to the next in line.
            loop = turn.get_loop()
            if turn.done() or loop.is_closed():
                continue
            if loop is running_loop() or not loop.is_running():
                turn.set_result(None)
                return
            loop.call_soon_threadsafe(_refuse, turn, self._name)  # to wake it from here would not wake its loop


def _refuse(turn: "asyncio.Future[None]", name: str) -> None:
    """Fail one who waits on another loop, in another thread, than those who have the slots: else it waits for ever."""
    if not turn.done():
        turn.set_exception(RuntimeError(f"{name}: used on two event loops at a time: each needs a bulkhead of its own"))
