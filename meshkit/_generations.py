"""What a circuit remembers during one stay in one state: a generation; and the leases that it gives out.

A lease is given back by `lease.record(failed, now)`: what came of the call (None: nothing that says anything). It
returns whether the circuit must look at its generation again, which may be over. While a lease is `calm`, there is
nothing to record about a success.

>>> generation = Window(threshold=0.5, minimum_calls=2, window=30.0)
>>> generation.record(False, 1.0), generation.record(True, 2.0), generation.fails
(False, True, True)
>>> generation.remembered(29.0), generation.remembered(31.0)
((2, 1), (0, 0))
"""

import math
from collections import deque
from typing import TypeAlias

__all__ = ["Generation", "LastCalls", "Lease", "Probation", "Streak", "Watched", "Window"]


class Generation:
    """One stay in one state; here: open. It is itself the lease of all its calls that need not be told apart."""

    __slots__ = ("calls", "calm", "failed_at", "failures", "patience", "since", "slow_call", "watched")

    def __init__(self, slow_call: float = math.inf) -> None:
        self.calls: int = 0
        self.failures: int = 0
        self.calm = False
        self.failed_at = 0.0
        self.slow_call = self.patience = slow_call
        self.watched: dict[Watched, bool] = {}  # what is told apart, the oldest first
        self.since = -math.inf  # when the oldest began, or earlier: for `patience` from then, nothing to `look` for

    @property
    def fails(self) -> bool:
        """Whether there are too many failures."""
        return False

    @property
    def passed(self) -> bool:
        """Whether there are enough successes."""
        return False

    @property
    def full(self) -> bool:
        """Whether no further lease may be given out for now."""
        return False

    def record(self, failed: bool | None, now: float) -> bool:
        """Take what came of a call."""
        return False

    def record_watched(self, failed: bool, now: float, in_time: bool) -> bool:
        """Take what came of a watched call; unless it was `in_time`, it was slow and has been counted."""
        return in_time and self.record(failed, now)

    def remembered(self, now: float) -> tuple[int, int]:
        """Return how many calls are remembered, and how many of them failed."""
        return self.calls, self.failures

    def watch(self, now: float) -> "Watched":
        """Give out a lease that is told apart."""
        lease = Watched(self, now)
        self.watched[lease] = True
        return lease

    def look(self, now: float) -> bool:
        """Stop waiting for watched calls that take too long; return what `record` returns."""
        self.since = now
        late: list[Watched] = []
        for lease in self.watched:
            if lease.start <= now < lease.start + self.patience:  # else: late, or of a loop with another clock
                self.since = lease.start
                break
            late.append(lease)
        return any(lease.record(None, now) for lease in late)


class Watched:
    """The lease of a call that is told apart: of a probe, or of one that may turn out to be slow."""

    __slots__ = ("generation", "start")

    calm = False

    def __init__(self, generation: Generation, start: float) -> None:
        self.generation = generation
        self.start = start

    def record(self, failed: bool | None, now: float) -> bool:
        """Take what came of the call."""
        generation = self.generation
        in_time = generation.watched.pop(self, False)
        if now >= self.start + generation.slow_call:
            failed = True
        return failed is not None and generation.record_watched(failed, now, in_time)


Lease: TypeAlias = Generation | Watched


class Streak(Generation):
    """Closed, counting failures in a row."""

    __slots__ = ("_threshold",)

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self._threshold = threshold
        self.calm = True

    @property
    def fails(self) -> bool:
        """Whether there were too many failures in a row."""
        return self.failures >= self._threshold

    def record(self, failed: bool | None, now: float) -> bool:
        """Take what came of a call."""
        if failed is None:
            return False
        self.calls = self.failures = self.failures + 1 if failed else 0
        self.calm = not failed
        if failed:
            self.failed_at = now
        return self.fails


class _Rate(Generation):
    """Closed, judging by the part of the recent calls that failed."""

    __slots__ = ("_minimum", "_threshold")

    def __init__(self, threshold: float, minimum_calls: int, slow_call: float = math.inf) -> None:
        super().__init__(slow_call)
        self._threshold, self._minimum = threshold, minimum_calls

    @property
    def fails(self) -> bool:
        """Whether too many of the recent calls failed."""
        return self.calls >= self._minimum and self.failures / self.calls >= self._threshold


class LastCalls(_Rate):
    """Closed, remembering which of the last `limit` calls failed."""

    __slots__ = ("_failed", "_limit", "_number")

    def __init__(self, threshold: float, minimum_calls: int, limit: int, slow_call: float = math.inf) -> None:
        super().__init__(threshold, minimum_calls, slow_call)
        self._limit = limit
        self._number = 0  # of the last call
        self._failed: deque[int] = deque()  # numbers of calls

    def record(self, failed: bool | None, now: float) -> bool:
        """Take what came of a call."""
        if failed is None:
            return False
        self._number += 1
        if self.calls < self._limit:
            self.calls += 1
        if failed:
            self._failed.append(self._number)
            self.failed_at = now
        elif not self._failed:
            return False
        if self._failed[0] <= self._number - self._limit:
            self._failed.popleft()
        self.failures = len(self._failed)
        return self.fails


class Window(_Rate):
    """Closed, counting outcomes per tenth of the window. The tenths are aligned to the clock."""

    __slots__ = ("_before", "_end", "_past", "_start", "_tenth", "_width")

    def __init__(self, threshold: float, minimum_calls: int, window: float, slow_call: float = math.inf) -> None:
        super().__init__(threshold, minimum_calls, slow_call)
        self._width = window / 10
        self._tenth = self._start = self._end = -math.inf  # the one that is being counted
        self._past: list[tuple[float, int, int]] = []  # the nine before: tenth, calls, failures
        self._before = (0, 0)  # their sums

    def record(self, failed: bool | None, now: float) -> bool:
        """Take what came of a call."""
        if failed is None:
            return False
        if not self._start <= now < self._end:
            self._turn(now // self._width)
        self.calls += 1
        if failed:
            self.failures += 1
        return self.failures > 0 and self.fails

    def _turn(self, tenth: float) -> None:
        if tenth == self._tenth:
            return  # a rounding error away from the next
        calls, failures = self._before
        self._past.append((self._tenth, self.calls - calls, self.failures - failures))
        gone = tenth - 10 if tenth > self._tenth else math.inf  # the clock went back (another loop): all is gone
        while self._past and self._past[0][0] <= gone:
            _, calls, failures = self._past.pop(0)
            self.calls -= calls
            self.failures -= failures
        self._before = (self.calls, self.failures)
        self._tenth, self._start, self._end = tenth, tenth * self._width, (tenth + 1) * self._width

    def remembered(self, now: float) -> tuple[int, int]:
        """Return how many calls are in the window at `now`, and how many of them failed."""
        tenth = now // self._width
        calls, failures = self._before
        entries = [*self._past, (self._tenth, self.calls - calls, self.failures - failures)]
        kept = [entry for entry in entries if entry[0] > tenth - 10 and self._tenth <= tenth]
        return sum(entry[1] for entry in kept), sum(entry[2] for entry in kept)


class Probation(Generation):
    """Half-open, waiting for the success of so many probes."""

    __slots__ = ("_probes",)

    def __init__(self, probes: int, patience: float, slow_call: float = math.inf) -> None:
        super().__init__(slow_call)
        self.patience = min(patience, slow_call)
        self._probes = probes

    @property
    def fails(self) -> bool:
        """Whether a probe failed."""
        return self.failures > 0

    @property
    def passed(self) -> bool:
        """Whether enough probes succeeded."""
        return self.calls >= self._probes

    @property
    def full(self) -> bool:
        """Whether enough probes are under way, or have succeeded."""
        return len(self.watched) + self.calls >= self._probes

    def record_watched(self, failed: bool, now: float, in_time: bool) -> bool:
        """Take what came of a probe, also of one that was no longer waited for."""
        self.calls += 1
        self.failures += failed
        return True
