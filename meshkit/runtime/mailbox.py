"""Mailboxes: what waits for a service's handlers, and the workers that run them.

A mailbox holds a bounded number of items, and of bytes. Of those whose turn it can be, workers begin the oldest, up to
`max_concurrent` at a time. There are no more workers than needed: one that takes an item wakes another one if more
items wait, which therefore runs only when the first one waits for something. An idle mailbox keeps one worker.

Rules, besides those of `Backlog`, which say whose turn it is:
- What rests occupies no worker.
- An item is taken and begun in one step: a worker that is cancelled loses nothing that waits.
- What an item's handler does to its own task befalls no other item: a worker that was cancelled from inside, or whose
  context variables are not what they were, ends, and a new one goes on.
- Whoever waits for room gets a place in order of arrival, and nobody overtakes; a cancelled waiter gives its place to
  the next.
"""

import asyncio
import contextvars
import math
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

import anyio

from meshkit.errors import Closed, Overloaded
from meshkit.faults import buggify
from meshkit.runtime.backlog import Backlog, Item

__all__ = ["Mailbox"]


T = TypeVar("T", bound=Item)

_inside: contextvars.ContextVar[object] = contextvars.ContextVar("meshkit_mailbox", default=None)
"""The mailbox of which a handler runs here, or a task that it began."""


class Mailbox(Generic[T]):
    """A bounded queue of items, and workers that `run(item, scope)` them. Nothing is begun before `open`.

    What `run` returns is None, or the seconds that the item is to rest before it is run again. The scope is the
    worker's own, kept from item to item; to set its deadline, or to cancel it, ends the present item.
    An item that is larger than `max_bytes` has room where nothing else waits.
    """

    FAIRNESS = 32
    """Items that a worker takes before it lets other tasks run, if no handler waits for anything."""
    LATE = 0.05
    """Seconds by which a new worker begins late, where a simulation asks for it."""

    def __init__(
        self,
        name: str,
        run: Callable[[T, anyio.CancelScope], Coroutine[Any, Any, float | None]],
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]], str], "asyncio.Task[None]"],
        *,
        max_mailbox: int,
        max_bytes: int,
        max_concurrent: int,
    ) -> None:
        self.name = name
        self._backlog: Backlog[T] = Backlog(max_mailbox, max_bytes)
        self._ready = self._backlog.ready
        self._timers: dict[T, asyncio.TimerHandle] = {}  # of those that rest
        self.running = 0
        self._run = run
        self._spawn = spawn
        self._max_concurrent = max_concurrent
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._workers: set[asyncio.Task[None]] = set()
        self._started = 0  # workers so far, for their names
        self._woken: asyncio.Task[None] | None = None  # the worker that has been woken or spawned, and has not run yet
        self._idle: tuple[asyncio.Future[None], asyncio.Task[None]] | None = None  # the idle worker, and what wakes it
        self._quiet: asyncio.Future[None] | None = None  # what `quiet` waits for
        self._opened = False
        self.closed = False

    def __len__(self) -> int:
        return len(self._backlog)

    # --- into it

    def has_room(self, size: int = 0) -> bool:
        """Return whether an item of `size` bytes can be put now; whoever waits for a place goes first."""
        return not self._waiters and not self.closed and self._backlog.fits(size)

    def overloaded(self) -> Overloaded:
        """Return the error that says of what it holds too much."""
        backlog = self._backlog
        if len(backlog) + backlog.reserved < backlog.max_items and not self._waiters:
            return Overloaded(name=f"{self.name}, in bytes", limit=backlog.max_bytes)
        return Overloaded(name=self.name, limit=backlog.max_items)

    def offer(self, item: T) -> bool:
        """Put `item`, if there is room for it; return whether there was."""
        if self._waiters or self.closed or not self._backlog.offer(item):
            return False
        if self._woken is None and self._ready and self._opened:
            self._wake()
        return True

    def put_reserved(self, item: T) -> None:
        """Put `item` in a place that was reserved."""
        self._backlog.reserved -= 1
        self._backlog.add(item)
        if self._ready and self._opened:
            self._wake()

    async def reserve(self) -> None:
        """Take a place, waiting for one if need be.

        Raises:
            Overloaded: It is full, and the one who would wait is one of its own handlers: it would wait for itself.
            Closed: It is closed, or was while waiting.
        """
        self._require_open()
        if self.has_room():
            self._backlog.reserved += 1
            return
        if _inside.get() is self:
            raise self.overloaded()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[place] = None
        try:
            await place
            self._require_open()
        except BaseException:
            if place.cancelled():
                self._waiters.pop(place, None)
            elif place.exception() is None:
                self.release()  # it was given, and is not used
            raise

    def _require_open(self) -> None:
        if self.closed:
            raise Closed(name=self.name)

    def release(self) -> None:
        """Give back a place that was reserved."""
        self._backlog.reserved -= 1
        self._admit()
        self._notice_quiet()

    def discard(self, item: T) -> bool:
        """Take `item` out, unless it runs or has ended; return whether it was in. Cost: O(what waits)."""
        if not self._backlog.remove(item):
            return False
        timer = self._timers.pop(item, None)
        if timer is not None:
            timer.cancel()
        if self._ready and self._opened:
            self._wake()
        self._admit()
        self._notice_quiet()
        return True

    def discard_oldest(self, size: int) -> list[T]:
        """Take out the oldest items until one of `size` bytes fits, and return them. Cost of each: O(what waits)."""
        discarded: list[T] = []
        while not self._backlog.fits(size) and len(self._backlog):
            discarded.append(self._backlog.oldest())
            self.discard(discarded[-1])
        return discarded

    def _admit(self) -> None:
        while self._waiters and self._backlog.fits(0):
            place, _ = self._waiters.popitem(last=False)
            if not place.done():
                self._backlog.reserved += 1
                place.set_result(None)

    # --- workers

    def open(self) -> None:
        """Let the workers begin."""
        self._opened = True
        if self._ready:
            self._wake()

    def _wake(self) -> None:
        if self._woken is not None:
            return
        if self._idle is not None and not self._idle[0].done():
            wakes, self._woken = self._idle
            wakes.set_result(None)
        elif len(self._workers) < self._max_concurrent:
            self._started += 1
            self._woken = task = self._spawn(self._work, f"worker-{self._started}")
            self._workers.add(task)
            task.add_done_callback(self._on_worker_ended)

    def _on_worker_ended(self, task: "asyncio.Task[None]") -> None:
        self._workers.discard(task)
        if self._woken is task:
            self._woken = None
        if self._ready and not self.closed:  # a handler cancelled its own worker: the others go on
            self._wake()

    async def _work(self) -> None:
        if buggify("mailbox: a new worker begins late"):
            await asyncio.sleep(self.LATE)
        _inside.set(self)
        me, context = cast("asyncio.Task[None]", asyncio.current_task()), contextvars.copy_context()
        while True:
            with anyio.CancelScope() as scope:
                await self._take(scope, me, context)
            if not scope.cancel_called or not _unchanged(context):
                return

    async def _take(self, scope: anyio.CancelScope, me: "asyncio.Task[None]", context: contextvars.Context) -> None:
        """Take items until another worker is idle, since one is enough; or until `scope` was cancelled with an item."""
        while True:
            taken = 0
            if self._woken is me:
                self._woken = None
            while self._ready and not scope.cancel_called:
                item = self._backlog.take()
                if self._waiters:
                    self._admit()
                if self._ready and self._woken is None:
                    self._wake()
                self.running += 1
                delay = None
                try:
                    delay = await self._run(item, scope)
                finally:
                    self.running -= 1
                    if delay is not None:
                        self._rest(item, delay)
                    else:
                        self._backlog.done(item)
                    if self._quiet is not None:
                        self._notice_quiet()
                if (me.cancelling() and not scope.cancel_called) or not _unchanged(context):
                    return  # what the handler did to its own task is not to befall the next item: a new worker takes it
                taken += 1
                if taken % self.FAIRNESS == 0:
                    await asyncio.sleep(0)
            if scope.cancel_called or self._idle is not None or self.closed:
                return
            if scope.deadline != math.inf:  # of the last item
                scope.deadline = math.inf
            wakes = asyncio.get_running_loop().create_future()
            self._idle = (wakes, me)
            try:
                await wakes
            finally:
                self._idle = None

    def _rest(self, item: T, delay: float) -> None:
        """Run `item` again after `delay` seconds."""
        self._backlog.rest(item)
        self._timers[item] = asyncio.get_running_loop().call_later(delay, self._end_rest, item)

    def _end_rest(self, item: T) -> None:
        del self._timers[item]
        self._backlog.end_rest(item)
        self._wake()

    # --- the end

    @property
    def busy(self) -> bool:
        """Whether an item waits, runs or rests, or has a place reserved."""
        return bool(len(self) or self.running or self._backlog.reserved)

    async def quiet(self) -> None:
        """Wait until none does."""
        while self.busy:
            self._quiet = self._quiet or asyncio.get_running_loop().create_future()
            await asyncio.wait([self._quiet])

    def _notice_quiet(self) -> None:
        if self._quiet is not None and not self.busy:
            self._quiet.set_result(None)
            self._quiet = None

    def close(self) -> list[T]:
        """Take no more items, fail whoever waits for a place, and return the items that do not run, by age."""
        self.closed = True
        for place in self._waiters:
            if not place.done():
                place.set_exception(Closed(name=self.name))
        self._waiters.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        left = self._backlog.clear()
        self._notice_quiet()
        return left


def _unchanged(context: contextvars.Context) -> bool:
    """Return whether the context variables are as they were. Cost: O(1) where they are."""
    try:
        return contextvars.copy_context() == context
    except Exception:  # noqa: BLE001 - values that cannot be compared are others
        return False
