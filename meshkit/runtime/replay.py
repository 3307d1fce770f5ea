"""The replay window: no frame is accepted twice.

>>> window = ReplayWindow(window=30 * MICRO, floor=0, max_keys=1000)
>>> now = 100 * MICRO
>>> window.accepts(now - 31 * MICRO, now), window.accepts(now, now)
(False, True)
>>> window.add(b"a frame", now, now), window.add(b"a frame", now, now)
(True, False)
"""

import heapq

from meshkit.errors import Overloaded

__all__ = ["MICRO", "ReplayWindow"]

MICRO = 1_000_000
"""µs in a second."""


class ReplayWindow:
    """The core: which stamps are accepted now, and what was accepted already. Times are whole µs since the epoch.

    A stamp is accepted up to `window` before and after now, and never if it is less than the floor. What is accepted is
    remembered until it would be no more. The clock may go back: so the floor rises to above all that is forgotten, and
    no further, lest a clock that once was years ahead make everything stale when it is set right.

    What came too late may be refused for good: then the floor rises above it, too.

    Keys lie in sets by the tenth of a second of their stamp; each new one takes up to two sets along that are due.
    """

    SLOT = MICRO // 10

    def __init__(self, *, window: int, floor: int, max_keys: int) -> None:
        self.window, self.floor, self.max_keys = window, floor, max_keys
        self.count = 0
        self._slots: dict[int, set[bytes]] = {}
        self._order: list[int] = []  # a heap of the slots

    def accepts(self, stamp: int, now: int) -> bool:
        """Return whether what is stamped so is neither too old nor too new."""
        return stamp >= self.floor and -self.window <= now - stamp <= self.window

    def refuse(self, stamp: int) -> None:
        """Never accept what is stamped so, and is too old now, nor what is older: the clock may go back."""
        self.floor = max(self.floor, stamp + 1)

    def add(self, key: bytes, stamp: int, now: int) -> bool:
        """Return False if `key` was added with a stamp in the same slot; else remember it, and return True.

        The stamp is one that is accepted now.

        Raises:
            Overloaded: It would be one too many, and none of the others may be forgotten yet.
        """
        slot = stamp // self.SLOT
        keys = self._slots.get(slot)
        if keys is not None and key in keys:
            return False
        for _ in range(2):  # one would never catch up; and as no set is empty, one is enough to make room
            if self._order and (end := (self._order[0] + 1) * self.SLOT) + self.window <= now:
                self.floor = max(self.floor, end)
                self.count -= len(self._slots.pop(heapq.heappop(self._order)))
        if self.count >= self.max_keys:
            wait = (self._order[0] + 1) * self.SLOT + self.window - now
            raise Overloaded(name="memory of frames", limit=self.max_keys, retry_after=wait / MICRO)
        if keys is None:
            keys = self._slots[slot] = set()
            heapq.heappush(self._order, slot)
        keys.add(key)
        self.count += 1
        return True
