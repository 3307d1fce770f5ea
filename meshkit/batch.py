"""Batches: collect items and flush them together, when there are enough of them or the first has waited long enough.

>>> import asyncio
>>> async def save(rows):
...     print("saving", rows)
...     return [row * 10 for row in rows]
>>> async def main():
...     async with BatchCollector(save, max_size=3, max_wait=0.01) as collector:
...         for row in range(4):
...             await collector.add(row)
...         print(await collector.submit(4))
>>> asyncio.run(main())
saving [0, 1, 2]
saving [3, 4]
40

The treaty: to add an item either gets a place for it, and then it is *accepted*, or does nothing. Every accepted item
is flushed; or its failure is told once: to its submitter, or else to `on_error`.
"""

import asyncio
import functools
import inspect
import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import anyio

from meshkit import _check
from meshkit._flushes import AnyFuture, Flush, Flushes
from meshkit._time import now
from meshkit.errors import BatchFull, Closed
from meshkit.events import Event, Observer, notify, report

__all__ = ["Batch", "BatchCollector", "BatchDone", "BatchStats", "Taken"]

T = TypeVar("T")
W = TypeVar("W")
R = TypeVar("R")
F_co = TypeVar("F_co", covariant=True)
_Results: TypeAlias = Awaitable[Sequence[R | Exception]] | Sequence[R | Exception]


@dataclass(frozen=True, slots=True)
class BatchDone(Event):
    """A batch of `size` items is done: `failed` of them, the first with `error`; its flush took `duration` seconds."""

    name: str
    size: int
    failed: int
    duration: float
    error: Exception | None


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Items held now (`in_flight` of them being flushed), callers waiting to add, and totals since construction."""

    pending: int
    in_flight: int
    waiting: int
    flushed: int
    failed: int
    batches: int


@dataclass(slots=True, eq=False)
class Taken(Generic[T, W]):
    """A batch that was taken to be flushed: its items in order and, by position, what waits for a result."""

    number: int
    items: list[T]
    tickets: dict[int, W]


class Batch(Generic[T, W]):
    """The core: which items are accepted, in which batches, and when those are due, in seconds on any clock.

    At most `max_pending` items are accepted and not yet settled. Batches are numbered from 0 and taken in order.
    Every operation is O(1); to settle, O(batches in flight).
    """

    def __init__(self, *, max_size: int, max_wait: float, max_pending: int) -> None:
        self.max_size, self.max_wait, self.max_pending = max_size, max_wait, max_pending
        self.items: list[T] = []  # the batch that is being filled
        self.tickets: dict[int, W] = {}
        self.quick = 0  # while `items` is shorter, adding is `items.append(item)`: there is nothing else to decide
        self.flying: list[Taken[T, W]] = []
        self._full: deque[Taken[T, W]] = deque()
        self._elsewhere = 0  # items in flying and _full
        self._number = 0
        self._due_at = math.inf

    @property
    def pending(self) -> int:
        """How many items are accepted and not settled."""
        return self._elsewhere + len(self.items)

    @property
    def due_at(self) -> float:
        """When the next batch is due: -inf for at once, inf for never."""
        return -math.inf if self._full else self._due_at

    @property
    def oldest(self) -> int:
        """The number of the oldest batch that is not settled: all before it are."""
        unsettled = self.flying or self._full
        return unsettled[0].number if unsettled else self._number

    def add(self, item: T, now: float, ticket: W | None = None) -> bool:
        """Accept `item` if there is room, and return whether there was."""
        room = self.max_pending - self.pending
        if room <= 0:
            return False
        if not self.items:
            self._due_at = now + self.max_wait
        if ticket is not None:
            self.tickets[len(self.items)] = ticket
        self.items.append(item)
        if len(self.items) == self.max_size:
            self._fill()
        else:
            self.quick = min(self.max_size, len(self.items) + room) - 1
        return True

    def hurry(self) -> int:
        """Make everything accepted due at once; return the number of the last batch with any of it."""
        if not self.items:
            return self._number - 1
        self._due_at = -math.inf
        return self._number

    def take(self, now: float) -> Taken[T, W] | None:
        """Return the next batch if it is due."""
        if self.due_at > now or not (self._full or self.items):
            return None
        if not self._full:
            self._fill()
        taken = self._full.popleft()
        self.flying.append(taken)
        return taken

    def settle(self, taken: Taken[T, W]) -> None:
        """Give the places of a taken batch back."""
        self.flying.remove(taken)
        self._elsewhere -= len(taken.items)

    def _fill(self) -> None:
        self._full.append(Taken(self._number, self.items, self.tickets))
        self._elsewhere += len(self.items)
        self._number += 1
        self.items, self.tickets, self.quick, self._due_at = [], {}, 0, math.inf


class BatchCollector(Generic[T, F_co]):
    """Collect items of type `T` and give them in batches to `flush(items) -> F_co`, a function or an async function.

    A batch is due when it has `max_size` items, or `max_wait` seconds after its first one (0: when all tasks that are
    ready now have run). Batches start in order, each in a task of its own, at most `concurrency` at once. At most
    `max_pending` items are held (default: ten batches per flush that may run), those being flushed included; whoever
    adds more waits, first come, first served.

    Use it with `async with`. Leaving that, also by an error or a cancellation, stops it: what was accepted is flushed;
    after `stop_timeout` seconds, or when cancelled once more, the flushes that still run are cancelled and awaited, and
    what is left fails with `Closed`. No task or timer survives. It may be left in another task than it was entered in,
    and be entered again later, on another loop too.

    If `flush` raises, all items of its batch fail with that error. If it returns one result per item, those whose
    result is an exception fail with it. A cancelled flush fails with `OutcomeUnknown`, at a stop with `Closed`. The
    error goes to whoever waits for the item's result; else to `on_error(items, error)`, a plain function that must not
    block; without one, to the loop's exception handler. The collector goes on.

    Inside `flush` adding is legal, also while stopping; what could only wait for itself is refused: `add` raises
    `BatchFull` where it would wait; `submit`, `flush`, `stop` and leaving the `async with` raise `RuntimeError`.

    For the tasks of one loop; from other threads, use `anyio.from_thread`.
    Cost: an `add` that finds room is an await and a list append; a batch is a task and a few turns of the loop (30 µs).
    """

    def __init__(
        self,
        flush: Callable[[list[T]], F_co],
        *,
        max_size: int,
        max_wait: float,
        max_pending: int | None = None,
        concurrency: int = 1,
        stop_timeout: float = 5.0,
        on_error: Callable[[list[T], Exception], None] | None = None,
        name: str = "batch",
        observer: Observer | None = None,
    ) -> None:
        if not callable(flush):
            raise TypeError(f"flush must be a function of a list of items, not {flush!r}")
        if inspect.isgeneratorfunction(flush) or inspect.isasyncgenfunction(flush):
            raise TypeError("flush must not yield: calling a generator function runs nothing of it")
        if inspect.iscoroutinefunction(on_error) or inspect.iscoroutinefunction(getattr(on_error, "__call__", None)):  # noqa: B004 - asks whether calling it is async
            raise TypeError("on_error must be a plain function: it is called where nothing can be awaited")
        self._max_size = _check.count("max_size", max_size)
        self._max_wait = _check.duration("max_wait", max_wait, zero=True)
        self._concurrency = _check.count("concurrency", concurrency)
        default = 10 * max_size * concurrency
        self._max_pending = _check.count("max_pending", default if max_pending is None else max_pending)
        if self._max_pending < max_size:
            raise ValueError(f"max_pending must be at least max_size ({max_size}), not {max_pending!r}")
        self._stop_timeout = _check.duration("stop_timeout", stop_timeout, zero=True)
        self._name, self._on_error, self._observer = name, on_error, observer
        self._flushed = self._failed = self._batches = 0
        self._flushes: Flushes[T] = Flushes(flush, name)
        self._core = self._new_core()  # of this opening; when it is closed, the next one gets another
        self._state = "new"  # -> open -> draining -> cut -> closed -> open -> ...
        self._line: OrderedDict[object, AnyFuture] = OrderedDict()  # who waits to add; O(1) in its middle too
        self._watchers: set[AnyFuture] = set()  # who waits for progress
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def _new_core(self) -> Batch[T, AnyFuture]:
        return Batch(max_size=self._max_size, max_wait=self._max_wait, max_pending=self._max_pending)

    def __repr__(self) -> str:
        return (
            f"BatchCollector({self._name!r}, max_size={self._max_size}, max_wait={self._max_wait}, max_pending="
            f"{self._max_pending}, concurrency={self._concurrency}, {self._state}, pending={self._core.pending})"
        )

    def stats(self) -> BatchStats:
        """Return what is held now, and the totals since construction."""
        in_flight = sum(len(taken.items) for taken in self._core.flying)
        totals = (self._flushed, self._failed, self._batches)
        return BatchStats(self._core.pending, in_flight, len(self._line), *totals)

    async def __aenter__(self) -> "BatchCollector[T, F_co]":
        if self._state not in {"new", "closed"}:
            raise RuntimeError(f"{self._name} is open already: it can be entered again after its `async with`")
        self._loop = asyncio.get_running_loop()
        self._interrupts: list[BaseException] = []  # what a callback raised to stop the program, until it comes out
        self._flushes.open()
        self._state = "open"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._refuse_inside_flush("stop")
        interrupted: asyncio.CancelledError | None = None
        core = self._core
        self._close()
        with anyio.CancelScope(shield=True):
            while self._core is core and self._state != "closed":
                try:
                    await self._progress()
                except asyncio.CancelledError as error:  # a task.cancel(), which no shield holds off: stop draining
                    interrupted = error
                    self._cut()
        if interrupted is not None:
            raise interrupted

    async def add(self, item: T) -> None:
        """Add `item`, as soon as there is room. Cancelled while it waits, it adds nothing.

        Raises:
            Closed: The collector is stopped, or was while this waited.
            BatchFull: There is no room, and this is called from inside `flush`, which alone could make some.
        """
        core = self._core
        items = core.items
        if len(items) < core.quick:
            items.append(item)
        elif not self._accept(item):
            await self._accept_in_turn(item)

    def try_add(self, item: T) -> bool:
        """Add `item` if there is room and nobody waits for it; return whether it was added. Raises `Closed`."""
        core = self._core
        if len(core.items) < core.quick:
            core.items.append(item)
            return True
        return self._accept(item)

    async def submit(self: "BatchCollector[T, _Results[R]]", item: T) -> R:
        """Add `item` as `add` does, wait until it is flushed, and return its result: its part of what `flush` returned.

        Cancelled before the item is accepted, it adds nothing; after that the item is flushed all the same.

        Raises:
            Exception: What `flush` raised, or returned for this item.
            RuntimeError: `flush` did not return one result per item; or this is called from inside `flush`.
            OutcomeUnknown: The flush was cancelled.
            Closed: The collector was stopped before the item was flushed (`executed` is "no"), or meanwhile ("maybe").
        """
        self._refuse_inside_flush("submit")
        try:
            future = self.submit_nowait(item)
        except BatchFull:
            future = None
        if future is None:
            future = self._loop.create_future()
            await self._accept_in_turn(item, future)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancel() and not future.cancelled() and isinstance(error := future.exception(), Exception):
                self._tell([item], error)  # it failed just when its submitter was cancelled, who will never know
            raise

    def submit_nowait(self: "BatchCollector[T, _Results[R]]", item: T) -> asyncio.Future[R]:
        """Add `item` and return the future of its result: thousands of results, and no task for any of them.

        Cancelling the future does not take the item back. asyncio reports an error in a future that nobody looks at.

        Raises:
            BatchFull: There is no room, or others wait for it.
            Closed: The collector is stopped, or was before the item was flushed; OutcomeUnknown and others as `submit`.
        """
        core = self._core
        position = len(core.items)
        if position < core.quick:
            future: asyncio.Future[R] = asyncio.Future(loop=self._loop)
            core.tickets[position] = future
            core.items.append(item)
            return future
        self._check_open()
        future = self._loop.create_future()
        if not self._accept(item, future):
            raise BatchFull(name=self._name, max_pending=self._max_pending)
        return future

    async def flush(self) -> None:
        """Flush what is accepted without waiting for more; return when all of it is flushed, or told to have failed."""
        self._refuse_inside_flush("flush")
        core = self._core
        last = core.hurry()
        self._schedule()
        while core.oldest <= last:
            await self._progress()

    async def stop(self) -> None:
        """Refuse new items; return when what was accepted is flushed or, at `stop_timeout`, told to have failed.

        Whoever waits to add gets `Closed`. Cancelling this call does not undo the stop; call again to wait again.
        """
        self._refuse_inside_flush("stop")
        core = self._core
        self._close()
        while self._core is core and self._state not in {"new", "closed"}:
            await self._progress()

    def _check_open(self) -> None:
        if self._state == "open" or (self._state == "draining" and self._flushes.inside()):
            return
        if self._state == "new":
            raise RuntimeError(f"{self._name} is not open yet: add to it inside `async with`")
        raise Closed(name=self._name)

    def _refuse_inside_flush(self, verb: str) -> None:
        if self._flushes.running and self._flushes.inside():
            raise RuntimeError(f"{self._name}: {verb}() inside flush would wait for itself; use add() there")

    def _accept(self, item: T, ticket: AnyFuture | None = None, place: object = None) -> bool:
        """Accept `item` if there is room, and nobody in line before `place`."""
        self._check_open()
        if self._line and next(iter(self._line)) is not place and not self._flushes.inside():  # that cannot wait
            return False
        accepted = self._core.add(item, now(), ticket)
        if self._line or self._state != "open":
            self._core.quick = 0  # everybody has to come here
        self._schedule()
        return accepted

    async def _accept_in_turn(self, item: T, ticket: AnyFuture | None = None) -> None:
        if self._flushes.inside():
            raise BatchFull(name=self._name, max_pending=self._max_pending)
        place = object()
        try:
            accepted = False
            while not accepted:
                self._line[place] = self._loop.create_future()
                await self._line[place]
                accepted = self._accept(item, ticket, place)
        finally:  # accepted, closed or cancelled: in each case it is the next one's turn
            del self._line[place]
            self._wake_next()

    def _wake_next(self) -> None:
        if self._line and self._core.pending < self._max_pending:
            _wake([next(iter(self._line.values()))])

    def _schedule(self, at: float = -math.inf) -> None:
        """Start batches that are due at `at` (full ones are at any time), as many as may run; set the timer."""
        if self._state == "cut":
            return
        while self._flushes.running < self._concurrency and (taken := self._core.take(at)) is not None:
            self._flushes.start(taken.items, taken.tickets, functools.partial(self._ended, taken))
        due_at = self._core.due_at
        if self._timer is None and self._flushes.running < self._concurrency and due_at < math.inf:
            # It is left alone when its batch fills up earlier: when it fires, it looks for what is due then.
            self._timer = self._loop.call_at(due_at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._schedule(now())

    def _ended(self, taken: Taken[T, AnyFuture], flush: Flush[T]) -> None:
        self._core.settle(taken)
        self._account(flush)
        self._wake_next()
        _wake(self._watchers)
        if self._state == "cut" or (self._state == "draining" and not self._core.pending):
            self._finish()
        else:
            self._schedule(now())

    def _account(self, flush: Flush[T]) -> None:
        size = len(flush.items)
        self._batches += 1
        self._failed += flush.failed
        self._flushed += size - flush.failed
        for items, error in flush.untold:
            self._call_back(self._tell, items, error)
        if self._observer is not None:
            done = BatchDone(self._name, size, flush.failed, now() - flush.started, flush.error)
            self._call_back(notify, self._observer, done)

    def _call_back(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call back; what stops programs comes out of the loop a moment later, once everybody else is told."""
        try:
            callback(*arguments)
        except BaseException as stop:  # noqa: BLE001 - as said
            if not self._interrupts:  # one is enough: a second would interrupt how the program ends after the first
                self._interrupts.append(stop)
                self._loop.call_soon(self._raise_interrupt)

    def _raise_interrupt(self) -> None:
        raise self._interrupts.pop()

    def _tell(self, items: list[T], error: Exception) -> None:
        try:
            if self._on_error is not None:
                self._on_error(items, error)
                return
        except Exception as failure:  # noqa: BLE001 - it may neither hide the error nor stop the collector
            report(failure, f"{self._name}: on_error failed", self)
        report(error, f"{self._name}: {len(items)} items were not flushed", self)

    def _close(self) -> None:
        if self._state != "open":
            return
        self._state = "draining"
        self._core.quick, self._core.max_wait = 0, -math.inf  # what flush adds from here on is due at once
        self._core.hurry()
        _wake(self._line.values())
        if self._core.pending and self._stop_timeout:
            self._deadline = self._loop.call_later(self._stop_timeout, self._cut)
            self._schedule()
        else:
            self._cut()

    def _cut(self) -> None:
        """Cancel the flushes that still run; when they have ended, what is left is told to have failed."""
        if self._state == "closed":
            return
        self._state = "cut"
        self._flushes.cancel()
        self._finish()

    def _finish(self) -> None:
        if self._flushes.running:
            return  # the last one that ends comes back here
        self._state = "closed"
        for timer in (self._timer, self._deadline):
            if timer is not None:
                timer.cancel()
        self._timer = self._deadline = None
        _wake(self._watchers)
        core, self._core = self._core, self._new_core()
        while (taken := core.take(math.inf)) is not None:
            core.settle(taken)
            flush = Flush(self, taken.items, taken.tickets, None)
            flush.settle((), dict.fromkeys(range(len(taken.items)), Closed(name=self._name)))
            self._account(flush)

    async def _progress(self) -> None:
        """Wait until a batch is settled, or the collector is closed."""
        watcher: AnyFuture = self._loop.create_future()
        self._watchers.add(watcher)
        try:
            await watcher
        finally:
            self._watchers.discard(watcher)


def _wake(futures: Iterable[AnyFuture]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
