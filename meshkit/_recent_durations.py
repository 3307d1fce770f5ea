"""How long what ended lately took: a quantile of it (a core: whoever uses it measures).

>>> recent = RecentDurations(0.95)
>>> recent.quantile() is None
True
>>> for number in range(1, 101):
...     recent.add(number / 100)
>>> recent.quantile()
0.95
"""

import math
from bisect import bisect_left, insort
from collections import deque

from meshkit import _check

__all__ = ["RecentDurations"]


class RecentDurations:
    """The last `WINDOW` durations, and which of them the share `quantile` of all does not exceed.

    Cost: a binary search in a sorted list and a move of at most 8 KB, under a microsecond.
    """

    WINDOW = 1000
    LEAST = 100  # of fewer, the 95th percentile is one of the five longest: chance

    def __init__(self, quantile: float) -> None:
        self.share = _check.ratio("quantile", quantile)
        self._in_order_of_time: deque[float] = deque()
        self._in_order: list[float] = []

    def add(self, duration: float) -> None:
        """Take in a duration, and forget the one that is `WINDOW` older."""
        self._in_order_of_time.append(duration)
        insort(self._in_order, duration)
        if len(self._in_order) > self.WINDOW:
            del self._in_order[bisect_left(self._in_order, self._in_order_of_time.popleft())]

    def quantile(self) -> float | None:
        """Return the least duration that the share of all does not exceed; None while there are less than `LEAST`."""
        count = len(self._in_order)
        return None if count < self.LEAST else self._in_order[math.ceil(self.share * count) - 1]
