"""What retries and hedges may cost over all calls (a core: whoever uses it tells it the time).

>>> budget = RetryBudget(ratio=0.5, min_per_second=0)
>>> for _ in range(4):
...     budget.record_call(now=100.0)
>>> [budget.try_spend(now=100.0 + i) for i in range(3)]
[True, True, False]
"""

import math
from collections import deque
from dataclasses import dataclass

from meshkit import _check

__all__ = ["RetryBudget", "RetryBudgetStats"]


@dataclass(frozen=True, slots=True)
class RetryBudgetStats:
    """What a `RetryBudget` has seen since it was made: calls, and retries and hedges that it granted or refused."""

    calls: int
    granted: int
    refused: int


@dataclass(slots=True)
class _Second:
    number: int
    calls: int = 0
    granted: int = 0


class RetryBudget:
    """What retries and hedges may cost, over all calls: share one among the guards that talk to one service.

    When a service is down every caller retries, and the retries keep it down. With a budget, a retry is granted only if
    those of the last ten seconds are then at most `ratio` for each call of these seconds, plus `min_per_second` for
    each second; else it is not made, and the error is raised at once. (Seconds of the clock: the one that runs counts
    as the tenth.) `min_per_second` is for clients with few calls: 0, or at least 0.1.

    The guards do the counting, and a retry whose delay is cancelled is given back. Cost: O(1), ten counters. After
    Finagle's RetryBudget (2016), whose defaults these are.
    """

    WINDOW = 10
    """The seconds that are looked back on."""

    def __init__(self, *, ratio: float = 0.2, min_per_second: float = 10.0) -> None:
        self._ratio = _check.ratio("ratio", ratio)
        self._min_per_second = _check.duration("min_per_second", min_per_second, zero=True)
        if 0 < min_per_second * self.WINDOW < 1:
            raise ValueError(f"min_per_second must be 0, or at least {1 / self.WINDOW:g}, not {min_per_second!r}")
        # The seconds in which something happened, the oldest first; never empty.
        self._seconds = deque([_Second(-self.WINDOW)], maxlen=self.WINDOW)
        self._calls = self._granted = self._refused = 0

    def __repr__(self) -> str:
        return (
            f"RetryBudget(ratio={self._ratio:g}, min_per_second={self._min_per_second:g}, "
            f"calls={self._calls}, granted={self._granted}, refused={self._refused})"
        )

    def stats(self) -> RetryBudgetStats:
        """Return the counts since it was made."""
        return RetryBudgetStats(self._calls, self._granted, self._refused)

    def record_call(self, now: float) -> None:
        """Count a call: its first attempt, which needs no grant."""
        self._calls += 1
        self._current(now).calls += 1

    def try_spend(self, now: float) -> bool:
        """Grant one retry or hedge and return True, if the budget allows it; a refusal costs nothing."""
        current = self._current(now)
        recent = [second for second in self._seconds if second.number > current.number - self.WINDOW]
        earned = self._ratio * sum(second.calls for second in recent) + self._min_per_second * self.WINDOW
        if sum(second.granted for second in recent) + 1 > earned:
            self._refused += 1
            return False
        self._granted += 1
        current.granted += 1
        return True

    def refund(self, spent_at: float) -> None:
        """Take back what was granted at the time `spent_at`: it was not used."""
        self._granted -= 1
        for second in self._seconds:
            if second.number == math.floor(spent_at) and second.granted:
                second.granted -= 1

    def _current(self, now: float) -> _Second:
        number = math.floor(now)
        last = self._seconds[-1]
        if number == last.number:
            return last
        if number < last.number:
            self._seconds.clear()  # the clock of another loop, which began later
        self._seconds.append(_Second(number))
        return self._seconds[-1]
