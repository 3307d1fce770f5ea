"""The backlog: what waits in a mailbox, and whose turn it is.

Rules:
- Of the items whose turn it can be, the oldest is taken first.
- Items with the same key (that is not None) are taken one after the other, in order of arrival: each when the one
  before is done. Meanwhile they stand in line, out of the way of the others.
- An item that was taken may rest, to be taken again. It keeps its place: in the order of arrival, within the limits,
  and before those with its key.
"""

import bisect
import itertools
from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

__all__ = ["Backlog", "Item"]


class Item(Protocol):
    """So many bytes, and a key if order matters. It hashes by identity; the backlog numbers it."""

    size: int
    key: Hashable
    number: int


T = TypeVar("T", bound=Item)


def _number(item: Item) -> int:
    return item.number


class Backlog(Generic[T]):
    """The core: a bounded number of items, and of bytes. One larger than `max_bytes` fits where nothing else is."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.bytes = 0
        self.reserved = 0
        """Places that are taken by items which have yet to come."""
        self.ready: deque[T] = deque()
        """What can be taken, the oldest first."""
        self.resting: dict[T, None] = {}
        self._lines: dict[Hashable, deque[T]] = {}  # by key of which one is ready, taken or rests: those after it
        self._waiting = 0  # items that are ready, in a line or resting
        self._count = 0  # items so far

    def __len__(self) -> int:
        return self._waiting

    def fits(self, size: int) -> bool:
        """Return whether an item of `size` bytes fits."""
        held = self.bytes
        return self._waiting + self.reserved < self.max_items and not (held and held + size > self.max_bytes)

    def offer(self, item: T) -> bool:
        """Add a new item if it fits; return whether it did."""
        held = self.bytes
        if self._waiting + self.reserved >= self.max_items or (held and held + item.size > self.max_bytes):
            return False
        self.add(item)
        return True

    def add(self, item: T) -> None:
        """Add a new item, whether it fits or not."""
        self.bytes += item.size
        self._waiting += 1
        self._count += 1
        item.number = self._count
        if item.key is not None:
            line = self._lines.get(item.key)
            if line is not None:
                line.append(item)
                return
            self._lines[item.key] = deque()
        self.ready.append(item)

    def take(self) -> T:
        """Take the first of those that are ready: there must be one."""
        item = self.ready.popleft()
        self._waiting -= 1
        self.bytes -= item.size
        return item

    def done(self, item: T) -> None:
        """Let the next one with the key of `item` go, which was taken and does not come back."""
        if item.key is None:
            return
        line = self._lines.get(item.key)
        if line:
            self._make_ready(line.popleft())
        else:
            self._lines.pop(item.key, None)

    def rest(self, item: T) -> None:
        """Let an item that was taken come back, whether it fits or not, but not be ready."""
        self.bytes += item.size
        self._waiting += 1
        self.resting[item] = None

    def end_rest(self, item: T) -> None:
        """Let an item that rests be ready again."""
        del self.resting[item]
        self._make_ready(item)

    def _make_ready(self, item: T) -> None:
        if not self.ready or item.number < self.ready[0].number:
            self.ready.appendleft(item)
        else:
            bisect.insort(self.ready, item, key=_number)

    def remove(self, item: T) -> bool:
        """Take `item` out, if it is here; return whether it was. Cost: O(items)."""
        if item in self.resting:
            del self.resting[item]
            self.done(item)
        elif item in self.ready:
            self.ready.remove(item)
            self.done(item)
        elif item in self._lines.get(item.key, ()):
            self._lines[item.key].remove(item)
        else:
            return False
        self._waiting -= 1
        self.bytes -= item.size
        return True

    def oldest(self) -> T:
        """Return the item that came first: there must be one. Cost: O(keys and resting items)."""
        lines = (line[0] for line in self._lines.values() if line)
        return min(itertools.chain(itertools.islice(self.ready, 1), self.resting, lines), key=_number)

    def clear(self) -> list[T]:
        """Take out all items, and return them in order of arrival."""
        items = sorted(itertools.chain(self.ready, self.resting, *self._lines.values()), key=_number)
        for held in (self.ready, self.resting, self._lines):
            held.clear()
        self._waiting = self.bytes = 0
        return items
