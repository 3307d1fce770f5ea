"""Mailboxes: what waits for a service's handlers, and the workers that run them.

A mailbox holds a bounded number of items, and of bytes. Of those whose turn it can be, workers begin the oldest, up to
`max_concurrent` at a time. There are no more workers than needed: one that takes an item wakes another one if more
items wait, which therefore runs only when the first one waits for something. An idle mailbox keeps one worker.

Rules:
- Items with the same key (that is not None) are run one after the other, in order of arrival. One whose key is taken
  stands in line, out of the way of the others.
- An item that failed may rest for a while, and be run again. Meanwhile it occupies no worker, but it keeps its place:
  in the order of arrival, within the limits, and before those with the same key.
- An item is taken and begun in one step: a worker that is cancelled loses nothing that waits.
- Whoever waits for room gets a place in order of arrival, and nobody overtakes; a cancelled waiter gives its place to
  the next.
"""

import asyncio
import bisect
import contextvars
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, Protocol, TypeVar

import anyio

from meshkit.errors import Closed, Overloaded

__all__ = ["Item", "Mailbox"]


class Item(Protocol):
    """What a mailbox holds: bytes, and a key if order matters. It hashes by identity; the mailbox numbers it."""

    size: int
    key: Hashable
    number: int


T = TypeVar("T", bound=Item)

_inside: contextvars.ContextVar[object] = contextvars.ContextVar("meshkit_mailbox", default=None)
"""The mailbox of which a handler runs here, or a task that it began."""


def _number(item: Item) -> int:
    return item.number


class Mailbox(Generic[T]):
    """A bounded queue of items, and workers that `run(item, scope)` them. Nothing is begun before `open`.

    What `run` returns is None, or the seconds that the item is to rest before it is run again. The scope is the
    worker's own, kept from item to item; to set its deadline, or to cancel it, ends the present item.
    An item that is larger than `max_bytes` has room where nothing else waits.
    """

    FAIRNESS = 32
    """Items that a worker takes before it lets other tasks run, if no handler waits for anything."""

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
        self.max_mailbox = max_mailbox
        self._max_bytes = max_bytes
        self._bytes = 0
        self.running = 0
        self._run = run
        self._spawn = spawn
        self._max_concurrent = max_concurrent
        self._count = 0  # items so far
        self._ready: deque[T] = deque()  # what can be begun, the oldest first
        self._lines: dict[Hashable, deque[T]] = {}  # by key that is ready, runs or rests: what waits for its turn
        self._in_line = 0  # items in them
        self._resting: dict[T, asyncio.TimerHandle] = {}
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
        return len(self._ready) + self._in_line + len(self._resting)

    # --- into it

    def has_room(self, size: int = 0) -> bool:
        """Return whether an item of `size` bytes can be put now; whoever waits for a place goes first."""
        return not self._waiters and not self.closed and self._fits(size)

    def _fits(self, size: int) -> bool:
        waiting = len(self._ready) + self._in_line + len(self._resting) + self._reserved
        return waiting < self.max_mailbox and (self._bytes + size <= self._max_bytes or not self._bytes)

    def overloaded(self) -> Overloaded:
        """Return the error that says of which it holds too much."""
        if len(self) + self._reserved < self.max_mailbox and not self._waiters:
            return Overloaded(name=f"{self.name}, in bytes", limit=self._max_bytes)
        return Overloaded(name=self.name, limit=self.max_mailbox)

    def put(self, item: T, *, reserved: bool = False) -> None:
        """Put `item`, for which there is room, or a place that was reserved."""
        if reserved:
            self._reserved -= 1
        self._bytes += item.size
        self._count += 1
        item.number = self._count
        if item.key is not None:
            line = self._lines.get(item.key)
            if line is not None:
                line.append(item)
                self._in_line += 1
                return
            self._lines[item.key] = deque()
        self._ready.append(item)
        if self._opened and not self._waking:
            self._wake()

    async def reserve(self) -> None:
        """Take a place, waiting for one if need be.

        Raises:
            Overloaded: It is full, and the one who would wait is one of its own handlers: it would wait for itself.
            Closed: It is closed, or was while waiting.
        """
        self._require_open()
        if self.has_room():
            self._reserved += 1
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
        self._reserved -= 1
        self._admit()
        self._notice_quiet()

    def discard(self, item: T) -> bool:
        """Take `item` out, unless it runs or has ended; return whether it was in. Cost: O(what waits)."""
        if item in self._resting:
            self._resting.pop(item).cancel()
            self._end_turn(item)
        elif item in self._ready:
            self._ready.remove(item)
            self._end_turn(item)
        elif item in self._lines.get(item.key, ()):
            self._lines[item.key].remove(item)
            self._in_line -= 1
        else:
            return False
        self._bytes -= item.size
        if self._ready and self._opened:
            self._wake()
        self._admit()
        self._notice_quiet()
        return True

    def discard_oldest(self, size: int) -> list[T]:
        """Take out the oldest items until one of `size` bytes has room, and return them. Cost of each: O(keys)."""
        discarded: list[T] = []
        while not self._fits(size):
            lines = (line[0] for line in self._lines.values() if line)
            oldest = min(itertools.chain(itertools.islice(self._ready, 1), self._resting, lines), key=_number)
            self.discard(oldest)
            discarded.append(oldest)
        return discarded

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
        if self._ready:
            self._wake()

    def _wake(self) -> None:
        if self._waking:
            return
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        elif len(self._workers) < self._max_concurrent:
            self._started += 1
            task = self._spawn(self._work, f"worker-{self._started}")
            self._workers.add(task)
            task.add_done_callback(self._on_worker_ended)
        else:
            return
        self._waking = True

    def _on_worker_ended(self, task: "asyncio.Task[None]") -> None:
        self._workers.discard(task)
        self._waking = False
        if self._ready and not self.closed:  # a handler cancelled its own worker: the others go on
            self._wake()

    async def _work(self) -> None:
        _inside.set(self)
        while True:
            with anyio.CancelScope() as scope:
                await self._take(scope)
            if not scope.cancel_called:
                return

    async def _take(self, scope: anyio.CancelScope) -> None:
        """Take items until another worker is idle, since one is enough; or until `scope` was cancelled with an item."""
        taken = 0
        while True:
            self._waking = False  # this one runs
            while self._ready and not scope.cancel_called:
                item = self._ready.popleft()
                self._bytes -= item.size
                if self._waiters:
                    self._admit()
                if self._ready and not self._waking:
                    self._wake()
                self.running += 1
                delay = None
                try:
                    delay = await self._run(item, scope)
                finally:
                    self.running -= 1
                    if delay is not None:
                        self._rest(item, delay)
                    elif item.key is not None:
                        self._end_turn(item)
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

    def _rest(self, item: T, delay: float) -> None:
        """Run `item` again after `delay` seconds; to what comes back, the limits do not apply."""
        self._bytes += item.size
        self._resting[item] = asyncio.get_running_loop().call_later(delay, self._end_rest, item)

    def _end_rest(self, item: T) -> None:
        del self._resting[item]
        self._make_ready(item)
        self._wake()

    def _end_turn(self, item: T) -> None:
        """Let the next one with the key of `item` go."""
        line = self._lines.get(item.key)
        if line:
            self._in_line -= 1
            self._make_ready(line.popleft())
        else:
            self._lines.pop(item.key, None)

    def _make_ready(self, item: T) -> None:
        """Put what has arrived earlier where it belongs."""
        if not self._ready or item.number < self._ready[0].number:
            self._ready.appendleft(item)
        else:
            bisect.insort(self._ready, item, key=_number)

    # --- the end

    @property
    def busy(self) -> bool:
        """Whether an item waits, runs or rests, or has a place reserved."""
        return bool(len(self) or self.running or self._reserved)

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
        for timer in self._resting.values():
            timer.cancel()
        left = sorted(itertools.chain(self._ready, self._resting, *self._lines.values()), key=_number)
        for items in (self._ready, self._resting, self._lines):
            items.clear()
        self._in_line = 0
        self._notice_quiet()
        return left
