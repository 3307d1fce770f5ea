"""The event batch of a Logger on a running loop: one timer, no task.

>>> import asyncio
>>> from meshkit.testing import run
>>> async def main():
...     def write(groups, dropped):
...         print(f"{asyncio.get_running_loop().time():.0f} s: {groups[0].counts}")
...     batch = TimedBatch(write, batch_window=3.0, max_wait=None, max_groups=1000, max_entries=250)
...     for _ in range(5):
...         batch.add(("stash", "request", None), "alice", None, 1, {})
...         await asyncio.sleep(2)
...     await asyncio.sleep(60)
...     batch.close()
>>> run(main)
11 s: {('alice', None): 5}
"""

import atexit
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from meshkit import _check
from meshkit._event_batch import EventBatch, Group, Key
from meshkit._time import now, running_loop, wall

if TYPE_CHECKING:
    import asyncio

__all__ = ["TimedBatch"]


class TimedBatch:
    """Calls `write(groups, dropped)` with groups when they are due, at most 50 in one pass of the loop.

    `dropped` says how many events of which service were dropped, where that is to be told now. The batch belongs to
    the loop that used it first until that loop has ended, then to the next one that uses it.
    """

    MAX_GROUPS_AT_ONCE = 50  # a millisecond of work, at the price of a line

    def __init__(
        self,
        write: Callable[[list[Group], dict[str, int]], None],
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._now = now  # the clock of the loop once there is one, without asking at each event which loop runs
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: Key, actor: str, message: str | None, count: int, fields: Mapping[str, object]) -> bool:
        """Batch an event, if that can be done here and now; return whether it could."""
        loop = running_loop()
        if loop is None or (loop is not self._loop and not self._take_up(loop)):
            return False
        at = self._now()
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
        self._give(self.groups.take_all(), math.inf)

    def close(self) -> None:
        """Write all groups now, and take no more events. Idempotent."""
        self.closed = True
        self._loop = None
        atexit.unregister(self.close)
        self.flush()

    def _take_up(self, loop: "asyncio.AbstractEventLoop") -> bool:
        if self.closed or (self._loop is not None and self._loop.is_running()):
            return False  # it runs in another thread, and the batch is there
        if self._loop is None:
            atexit.register(self.close)  # a program may end without closing it
        self.flush()  # what a loop left behind when it ended
        self._loop, self._now = loop, loop.time
        return True

    def _wake_up(self) -> None:
        """Set the timer, unless it is set: a group that is opened later cannot be due earlier."""
        when = self.groups.next_due
        if self._timer is None and self._loop is not None and when is not None:
            self._timer = self._loop.call_at(when, self._on_timer, when)

    def _on_timer(self, when: float) -> None:
        self._timer = None
        at = max(self._now(), when)  # the timers of some loops are a little early
        groups = self.groups.due(at, self.MAX_GROUPS_AT_ONCE)
        self._wake_up()
        self._give(groups, at)

    def _give(self, groups: list[Group], at: float) -> None:
        if groups:  # where there are none, nothing can have been dropped either
            self._write(groups, self.groups.take_dropped(at))
