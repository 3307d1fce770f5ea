"""Mailboxes: what waits for a service's handlers, and the workers that run them.

A mailbox holds a bounded number of items, and of bytes, in order of arrival. Workers begin them in that order, up to
`max_concurrent` at a time. There are no more workers than needed: one that takes an item wakes another one if more
items wait, which therefore runs only when the first one waits for something. An idle mailbox keeps one worker.

Rules:
- Items with the same key (that is not None) are run one after the other, in order of arrival. One whose key is busy
  stands in line, out of the way of the others; the worker that is done with its predecessor goes on with it.
- An item is taken and begun in one step: a worker that is cancelled loses nothing that waits.
- Whoever waits for room gets a place in order of arrival, and nobody overtakes; a cancelled waiter gives its place to
  the next.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, Protocol, TypeVar

import anyio

from meshkit.errors import Closed, Overloaded

__all__ = ["Item", "Mailbox"]


class Item(Protocol):
    """What a mailbox holds: so many bytes, and a key if order matters."""

    size: int
    key: Hashable


T = TypeVar("T", bound=Item)


class Mailbox(Generic[T]):
    """A bounded queue of items, and workers that `run(item, scope)` them. Nothing is begun before `open`.

    The scope is the worker's own, kept from item to item; to set its deadline, or to cancel it, ends the present item.
    An item that is larger than `max_bytes` has room where nothing else waits.
    """

    FAIRNESS = 32
    """Items that a worker takes before it lets other tasks run, if no handler waits for anything."""

    def __init__(
        self,
        name: str,
        run: Callable[[T, anyio.CancelScope], Coroutine[Any, Any, None]],
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]], str], "asyncio.Task[None]"],
        *,
        max_mailbox: int,
        max_bytes: int,
        max_concurrent: int,
    ) -> None:
        self.name = name
        self.max_mailbox = max_mailbox
        self._max_bytes = max_bytes
        self._bytes = 0
        self.running = 0
        self._run = run
        self._spawn = spawn
        self._max_concurrent = max_concurrent
        self._items: deque[T] = deque()
        self._lines: dict[Hashable, deque[T]] = {}  # by key that is busy: what waits for its turn
        self._next: deque[T] = deque()  # whose turn it is
        self._in_line = 0  # items in both
        self._reserved = 0
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._workers: set[asyncio.Task[None]] = set()
        self._started = 0  # workers so far, for their names
        self._waking = False  # whether a worker has been woken or spawned that has not run yet
        self._idle: asyncio.Future[None] | None = None  # what the one idle worker waits for
        self._quiet: asyncio.Future[None] | None = None  # what `quiet` waits for
        self._opened = False
        self.closed = False

    def __len__(self) -> int:
        return len(self._items) + self._in_line

    # --- into it

    def has_room(self, size: int = 0) -> bool:
        """Return whether an item of `size` bytes can be put now; whoever waits for a place goes first."""
        return not self._waiters and not self.closed and self._fits(size)

    def _fits(self, size: int) -> bool:
        waiting = len(self._items) + self._in_line + self._reserved
        return waiting < self.max_mailbox and (self._bytes + size <= self._max_bytes or not self._bytes)

    def put(self, item: T, *, reserved: bool = False) -> None:
        """Put `item`, for which there is room, or a place that was reserved."""
        if reserved:
            self._reserved -= 1
        self._bytes += item.size
        self._items.append(item)
        if self._opened and not self._waking:
            self._wake()

    async def reserve(self) -> None:
        """Take a place, waiting for one if need be.

        Raises:
            Overloaded: It is full, and the one who would wait is one of its own workers: it would wait for itself.
            Closed: It is closed, or was while waiting.
        """
        self.require_open()
        if self.has_room():
            self._reserved += 1
            return
        if asyncio.current_task() in self._workers:
            raise Overloaded(name=self.name, limit=self.max_mailbox)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[place] = None
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._waiters.pop(place, None)
            elif place.exception() is None:
                self.release()  # it was given, and is not used
            raise

    def require_open(self) -> None:
        """Raise `Closed` if it is closed."""
        if self.closed:
            raise Closed(name=self.name)

    def keep_place(self) -> None:
        """Reserve a place for an item that a worker has taken, and that comes back: to it the limit does not apply."""
        self._reserved += 1

    def release(self) -> None:
        """Give back a place that was reserved."""
        self._reserved -= 1
        self._admit()
        self._notice_quiet()

    def discard(self, item: T) -> bool:
        """Take `item` out, unless it has been begun; return whether it was in. Cost: O(what waits)."""
        if item in self._items:
            self._items.remove(item)
        elif item in self._next:
            self._next.remove(item)
            self._in_line -= 1
            self._end_turn(item.key)
        elif item in self._lines.get(item.key, ()):
            self._lines[item.key].remove(item)
            self._in_line -= 1
        else:
            return False
        self._bytes -= item.size
        self._admit()
        self._notice_quiet()
        return True

    def discard_oldest(self, size: int) -> list[T]:
        """Take out the oldest items until one of `size` bytes has room, and return them."""
        oldest: list[T] = []
        while not self._fits(size) and self._items:
            oldest.append(self._items.popleft())
            self._bytes -= oldest[-1].size
        return oldest

    def _admit(self) -> None:
        while self._waiters and self._fits(0):
            place, _ = self._waiters.popitem(last=False)
            if not place.done():
                self._reserved += 1
                place.set_result(None)

    # --- workers

    def open(self) -> None:
        """Let the workers begin."""
        self._opened = True
        if self._items:
            self._wake()

    def _wake(self) -> None:
        if self._waking:
            return
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        elif len(self._workers) < self._max_concurrent:
            self._started += 1
            self._workers.add(self._spawn(self._work, f"worker-{self._started}"))
        else:
            return
        self._waking = True

    async def _work(self) -> None:
        try:
            while True:
                with anyio.CancelScope() as scope:
                    await self._take(scope)
                if not scope.cancel_called:
                    return
        finally:
            self._workers = {task for task in self._workers if task is not asyncio.current_task()}
            self._waking = False
            if (self._items or self._next) and not self.closed:  # a handler cancelled its own worker: the others go on
                self._wake()

    async def _take(self, scope: anyio.CancelScope) -> None:
        """Take items until another worker is idle, since one is enough; or until `scope` was cancelled with an item."""
        taken = 0
        while True:
            self._waking = False  # this one runs
            while (self._items or self._next) and not scope.cancel_called:
                if self._next:
                    item = self._next.popleft()
                    self._in_line -= 1
                else:
                    item = self._items.popleft()
                    if item.key is not None and not self._gets_turn(item):
                        continue
                self._bytes -= item.size
                if self._waiters:
                    self._admit()
                if self._items and not self._waking:
                    self._wake()
                self.running += 1
                try:
                    await self._run(item, scope)
                finally:
                    self.running -= 1
                    if item.key is not None:
                        self._end_turn(item.key)
                    if self._quiet is not None:
                        self._notice_quiet()
                taken += 1
                if taken % self.FAIRNESS == 0:
                    await asyncio.sleep(0)
            if scope.cancel_called or self._idle is not None or self.closed:
                return
            self._idle = asyncio.get_running_loop().create_future()
            try:
                await self._idle
            finally:
                self._idle = None

    def _gets_turn(self, item: T) -> bool:
        """Return whether no other item with its key runs; else let it stand in line."""
        line = self._lines.get(item.key)
        if line is None:
            self._lines[item.key] = deque()
            return True
        line.append(item)
        self._in_line += 1
        return False

    def _end_turn(self, key: Hashable) -> None:
        """Let the next one with this key go, before all that have not had a turn yet."""
        line = self._lines[key]
        if line:
            self._next.append(line.popleft())
        else:
            del self._lines[key]

    # --- the end

    @property
    def busy(self) -> bool:
        """Whether an item waits, runs, or has a place kept."""
        return bool(self._items or self._in_line or self.running or self._reserved)

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
        """Take no more items, fail whoever waits for a place, and return the items that no worker has begun."""
        self.closed = True
        for place in self._waiters:
            if not place.done():
                place.set_exception(Closed(name=self.name))
        self._waiters.clear()
        left = [*self._next, *(item for line in self._lines.values() for item in line), *self._items]
        self._items.clear()
        self._next.clear()
        for line in self._lines.values():
            line.clear()
        self._in_line = 0
        self._notice_quiet()
        return left
