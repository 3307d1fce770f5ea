"""The core of `ChaosProxy`: what becomes of the bytes of one direction of one connection."""

import math
from collections import deque
from random import Random


class End:
    """An action: there is nothing more in this direction."""


class Reset:
    """An action: the connection ends at once, in both directions."""


class Chaos:
    """The core: what becomes of the bytes of one direction of one connection. Bytes and time in, actions out.

    `feed` it what comes; `next(now)` is what is to be done by now: bytes to pass on in one piece, `End`, `Reset`, or
    None: nothing before `when`. No byte waits for those behind it. Cost: O(1) for each piece.
    """

    BLOCK = 1024
    """Bytes, for each of which `reset_rate` is the probability of a reset."""

    def __init__(
        self, rng: Random, *, latency: float, jitter: float, rate: int | None, max_slice: int, reset_rate: float
    ) -> None:
        self._latency, self._jitter, self._rate = latency, jitter, rate
        self._max_slice, self._reset_rate = max_slice, reset_rate
        self._cuts, self._resets = Random(rng.random()), Random(rng.random())  # so that neither depends on the other
        self._under_way: deque[tuple[float, bytes | End | Reset]] = deque()
        self._offset: int = 0
        self._slice_end: int = 0
        self._slice_jitter = 0.0
        self._block_end: int = 0
        self._reset_at: int = -1
        self._link_free = self._latest = -math.inf
        self._over = False
        self.waiting = 0
        """Bytes that came, and were not passed on yet."""

    @property
    def when(self) -> float:
        """The time at which there will be something to do; infinity if there is nothing."""
        return self._under_way[0][0] if self._under_way else math.inf

    def next(self, now: float) -> bytes | End | Reset | None:
        """Return what is to be done by now, and forget it."""
        if not self._under_way or self.when > now:
            return None
        _, action = self._under_way.popleft()
        if isinstance(action, bytes):
            self.waiting -= len(action)
        return action

    def feed(self, data: bytes, now: float) -> None:
        """Take what has come; behind a reset, or the end, nothing does."""
        begin = 0
        while begin < len(data) and not self._over:
            self._decide()
            size = min(len(data) - begin, min(self._slice_end, self._block_end) - self._offset)
            if self._reset_at >= 0:
                size = min(size, self._reset_at - self._offset)
            self._schedule(data[begin : begin + size], size, now)
            self.waiting += size
            self._offset += size
            begin += size
            if self._offset == self._reset_at:
                self._over = True
                self._schedule(Reset(), 0, now)

    def end(self, now: float) -> None:
        """Take note that nothing more will come."""
        if not self._over:
            self._over = True
            self._schedule(End(), 0, now)

    def _decide(self) -> None:
        """Decide what becomes of the byte at the present position, where that is not decided yet."""
        if self._offset == self._slice_end:
            self._slice_end += self._cuts.randint(1, self._max_slice)
            self._slice_jitter = self._cuts.uniform(0.0, self._jitter)
        if self._offset == self._block_end:
            if self._resets.random() < self._reset_rate:
                self._reset_at = self._block_end + self._resets.randint(1, self.BLOCK)
            self._block_end += self.BLOCK

    def _schedule(self, action: bytes | End | Reset, size: int, now: float) -> None:
        self._link_free = max(now, self._link_free) + (size / self._rate if self._rate else 0.0)
        self._latest = max(self._latest, self._link_free + self._latency + self._slice_jitter)
        self._under_way.append((self._latest, action))
