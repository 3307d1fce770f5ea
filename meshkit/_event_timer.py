"""The event batch of a Logger on a running loop: one timer, no task.

>>> import asyncio
>>> from meshkit.testing import run
>>> async def main():
...     def write(group):
...         print(f"{asyncio.get_running_loop().time():.0f} s: {group.counts}")
...     batch = TimedBatch(write, print, batch_window=3.0, max_wait=None, max_groups=1000, max_entries=250)
...     for _ in range(5):
...         batch.add(("stash", "request", None), "alice", None, 1, {})
...         await asyncio.sleep(2)
...     await asyncio.sleep(60)
...     batch.close()
>>> run(main)
11 s: {('alice', None): 5}
"""

import contextvars
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from meshkit import _check
from meshkit._event_batch import EventBatch, Group, Key
from meshkit._time import Clock, running_loop, wall

if TYPE_CHECKING:
    import asyncio

__all__ = ["TimedBatch"]


class TimedBatch:
    """Calls `write(group)` with each group when it is due, at most 10 in one pass of the loop.

    Where events were dropped, `tell(dropped)` says of which service how many, after groups are written. Both are called
    in an empty context: a line about many events must not bear the request id of whoever set the timer. The batch
    belongs to the loop that used it first until that loop has ended, then to the next one that uses it.
    """

    MAX_GROUPS_AT_ONCE = 10  # the largest take a millisecond each: 250 entries, and a formatter

    def __init__(
        self,
        write: Callable[[Group], None],
        tell: Callable[[dict[str, int]], None],
        *,
        batch_window: float,
        max_wait: float | None,
        max_groups: int,
        max_entries: int,
    ) -> None:
        self.window = _check.duration("batch_window", batch_window)
        max_wait = 5 * self.window if max_wait is None else _check.duration("max_wait", max_wait)
        if max_wait < self.window:
            raise ValueError(f"max_wait must be at least batch_window ({self.window:g} s), not {max_wait!r}")
        _check.count("max_groups", max_groups)
        _check.count("max_entries", max_entries)
        self.groups = EventBatch(window=self.window, max_wait=max_wait, max_groups=max_groups, max_entries=max_entries)
        self.closed = False
        self._write = write
        self._tell = tell
        self._clock = Clock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: Key, actor: str, message: str | None, count: int, fields: Mapping[str, object]) -> bool:
        """Batch an event, if that can be done here and now; return whether it could."""
        loop = running_loop()
        if loop is None or (loop is not self._loop and not self._take_up(loop)):
            return False
        at = self._clock.now()
        opened = self.groups.add(key, actor, message, count, fields, at)
        if opened is not None:
            opened.epoch = wall() - at
            self._wake_up()
        return True

    def flush(self) -> None:
        """Write all groups now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._write_due(math.inf, len(self.groups))

    def close(self) -> None:
        """Write all groups now, and take no more events. Idempotent."""
        self.closed = True
        self._loop = None
        self.flush()

    def __del__(self) -> None:
        if getattr(self, "groups", None):  # as a file does: what its owner forgot to write
            self.close()

    def _take_up(self, loop: "asyncio.AbstractEventLoop") -> bool:
        if self.closed or (self._loop is not None and self._loop.is_running()):
            return False  # it runs in another thread, and the batch is there
        self.flush()  # what a loop left behind when it ended
        self._loop = loop
        return True

    def _wake_up(self) -> None:
        """Set the timer, unless it is set: a group that is opened later cannot be due earlier."""
        when = self.groups.next_due
        loop = self._loop
        if self._timer is None and when is not None and loop is not None and not loop.is_closed():
            self._timer = loop.call_at(when, self._on_timer, when)

    def _on_timer(self, when: float) -> None:
        self._timer = None
        at = max(self._clock.now(), when)  # the timers of some loops are a little early
        self._write_due(at, self.MAX_GROUPS_AT_ONCE)

    def _write_due(self, at: float, limit: int) -> None:
        context = contextvars.Context()
        try:
            for _ in range(limit):
                group = self.groups.take(at)  # one by one: where writing is interrupted, the others are not lost
                if group is None:
                    break
                context.run(self._write, group)
            if dropped := self.groups.take_dropped(at):
                context.run(self._tell, dropped)
        finally:
            self._wake_up()
