"""When something happened, per key, for as long as that counts: the memory of a sliding window.

>>> times = KeyTimes(length=2, window=10.0, max_keys=1)
>>> times.add("bob", 1.0)
>>> list(times.of("bob")), times.has_room(10.9), times.has_room(11.0)
([-inf, 1.0], False, True)
"""

import math
from array import array
from collections.abc import Container, Hashable
from typing import Final

__all__ = ["KeyTimes"]

_NOBODY: Final = object()


class _Parts(dict[Hashable, int]):
    """What KeyTimes needs of a dict, in several dicts: one of a million keys would pause for 24 ms when it grows."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        # An odd number of parts: else keys that are all multiples of 64 would share one.
        self._parts: list[dict[Hashable, int]] = [{} for _ in range(parts | 1)]

    def _part(self, key: object) -> dict[Hashable, int]:
        return self._parts[hash(key) % len(self._parts)]

    def __getitem__(self, key: Hashable) -> int:
        return self._part(key)[key]

    def __setitem__(self, key: Hashable, value: int) -> None:
        self._part(key)[key] = value

    def __delitem__(self, key: Hashable) -> None:
        del self._part(key)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._part(key)


class KeyTimes:
    """The last `length` times of each key, or more, in order. A time counts for `window` seconds.

    A key has a ring of up to 16 cells in an array that all keys share, and a dict says which cell is to be written
    next: the oldest one. So no key has an object that the garbage collector would have to visit, and 100,000 keys cost
    no pauses. Only a key of which more than 16 times count has an array of its own.

    Each new key takes the walk round all keys two steps further; it forgets those of which no time counts, so that
    they are hardly ever more than the others. At `max_keys` it takes up to 64 steps, until it finds one; where it finds
    none, there is no room for the new key. Keys in `keep` are not forgotten.

    Cost: amortised O(1) time; about 100 bytes per key and 8 per cell.
    """

    RING = 16
    STEPS = 64
    MANY = 1 << 17

    def __init__(self, length: int, window: float, max_keys: int, keep: Container[Hashable] = ()) -> None:
        self.window = window
        self.max_keys = max_keys
        self._keep = keep
        self._horizon = 2 * window
        self._ring = min(length, self.RING)
        self._blank = array("d", [-math.inf]) * self._ring
        self._cells = array("d")
        self._keys: list[Hashable] = []  # whose the rings are
        self._free: list[int] = []  # the rings that are nobody's
        self._places: dict[Hashable, int] = {} if max_keys <= self.MANY else _Parts(max_keys // self.MANY + 1)
        self._long: dict[Hashable, array[float]] = {}  # keys with an array; the place of these is negative
        self._step = 0
        self._oldest = self._none_before = -math.inf  # when the next is free: what this walk knows, and the last one

    def __len__(self) -> int:
        """Return how many keys are remembered, also those of which no time counts and that are not yet forgotten."""
        return len(self._keys) - len(self._free)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def of(self, key: Hashable) -> "array[float]":
        """Return the times of a remembered `key`, the oldest first; minus infinity stands for none."""
        place = self._places[key]
        if place < 0:
            return self._long[key]
        start = place - place % self._ring
        return self._cells[place : start + self._ring] + self._cells[start:place]

    def until(self, time: float, now: float) -> float:
        """Return until when a `time` counts: the first float not before time + window, or `now` if that is past.

        One that is more than a window ahead was told by another clock, and does not count.
        """
        end = time + self.window
        if not now <= end <= now + self._horizon:
            return now
        tail = end - time
        if (time - (end - tail)) + (self.window - tail) > 0:  # what the sum lost, exactly: Knuth's TwoSum
            end = math.nextafter(end, math.inf)
        return end

    def add(self, key: Hashable, now: float, count: int = 1) -> None:
        """Remember the time `now`, `count` times. A new key must have room."""
        ring = self._ring
        place = self._places[key] if key in self._places else self._take_ring(key)
        if place >= 0:
            start = place - place % ring
            if count <= ring and self.until(self._cells[start + (place + count - 1) % ring], now) <= now:
                for cell in range(place, place + count):
                    self._cells[start + cell % ring] = now
                self._places[key] = start + (place + count) % ring
                return
            self._long[key] = self.of(key)
            self._places[key] = -1
        times = self._long[key]
        times.extend(array("d", [now]) * count)
        if len(times) >= 64 and self.until(times[len(times) // 2], now) <= now:
            del times[: len(times) // 2]

    def remove(self, key: Hashable, time: float, count: int = 1) -> None:
        """Forget the time `time`, which was added `count` times."""
        if key not in self._places:
            return
        times = self.of(key)
        end = len(times)
        while end and times[end - 1] != time:
            end -= 1
        del times[max(0, end - count) : end]
        self._oldest = self._none_before = -math.inf  # the key may be free sooner than the walks found
        place = self._places[key]
        if place >= 0:
            start = place - place % self._ring
            self._cells[start : start + self._ring] = self._blank[len(times) :] + times
            self._places[key] = start

    def has_room(self, now: float) -> bool:
        """Return whether a new key can be added."""
        full = len(self) >= self.max_keys
        if full and now < self._none_before <= now + self.window:
            return False
        for _ in range(self.STEPS + 1 if full else 2):  # one of them goes back to the start
            if self._step == len(self._keys):
                self._none_before, self._oldest, self._step = self._oldest + self.window, now, 0
            elif self._forget(self._step, now) and full:
                return True
            else:
                self._step += 1
        return not full

    def room_at(self, now: float) -> float:
        """Return when a new key can be added if nothing else is; where there are more than 64, an estimate."""
        if self.has_room(now):
            return now
        first = min(map(self._last, self._keys[: self.STEPS]))
        return max(self.until(first, now), math.nextafter(now, math.inf))

    def counts(self, now: float) -> bool:
        """Return whether any time counts. Cost: O(keys) where none does."""
        return any(self.until(self._last(key), now) > now for key in self._keys if key is not _NOBODY)

    def cleanup(self, now: float) -> int:
        """Forget every key of which no time counts, and return how many. Cost: O(keys)."""
        forgotten = sum(self._forget(ring, now) for ring in range(len(self._keys)))
        if not len(self):
            self._cells, self._keys, self._free, self._step = array("d"), [], [], 0
        return forgotten

    def copy_to(self, other: "KeyTimes", key: Hashable) -> None:
        """Let `other`, which has as long rings and knows nothing yet, remember what is remembered of `key`."""
        if key in self:
            other._take_ring(key)
            if self._places[key] < 0:
                other._places[key] = -1
                other._long[key] = self._long[key][:]
            else:
                other._cells[:] = self.of(key)

    def _forget(self, ring: int, now: float) -> bool:
        key = self._keys[ring]
        if key is _NOBODY:
            return False
        last = self._last(key)
        if self.until(last, now) > now or key in self._keep:
            self._oldest = min(self._oldest, last)
            return False
        if key in self._places:  # else see `_last`
            del self._places[key]
        self._long.pop(key, None)
        self._keys[ring] = _NOBODY
        self._free.append(ring)
        return True

    def _last(self, key: Hashable) -> float:
        try:
            place = self._places[key]
        except KeyError:  # its hash is another one now: nobody finds it again, and nobody else shall suffer from that
            return -math.inf
        if place < 0:
            times = self._long[key]
            return times[-1] if times else -math.inf
        return self._cells[place - 1 if place % self._ring else place + self._ring - 1]

    def _take_ring(self, key: Hashable) -> int:
        """Give `key` a ring, and return its place: the first cell."""
        if self._free:
            ring = self._free.pop()
            self._keys[ring] = key
            self._cells[ring * self._ring : (ring + 1) * self._ring] = self._blank
        else:
            ring = len(self._keys)
            self._keys.append(key)
            self._cells.extend(self._blank)
        place = self._places[key] = ring * self._ring
        return place
