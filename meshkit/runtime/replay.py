"""The replay window: no frame is accepted twice.

>>> window = ReplayWindow(window=30 * MICRO, floor=0, max_keys=1000)
>>> now = 100 * MICRO
>>> window.accepts("alice", now - 31 * MICRO, now), window.accepts("alice", now, now)
(False, True)
>>> window.add("alice", b"a frame", now, now), window.add("alice", b"a frame", now, now)
(True, False)
"""

from collections import OrderedDict, deque

from meshkit.errors import Overloaded

__all__ = ["MICRO", "ReplayWindow"]

MICRO = 1_000_000
"""µs in a second."""


class _Page:
    """What one sender has stamped in one span of time: its keys, and these with their stamps in order of arrival."""

    __slots__ = ("floor", "keys", "order")

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.order: deque[tuple[bytes, int]] = deque()  # the first of a dict takes time to find, once others have gone
        self.floor = 0  # what is stamped less is not accepted: it may have been forgotten


class ReplayWindow:
    """The core: which stamps are accepted now, and what was accepted already. Times are whole µs since the epoch.

    A stamp is accepted up to `window` before and after now, and never if it is less than the floor. What is accepted is
    remembered until it would be no more. The clock may go back: so the floor rises to above all that is forgotten, and
    no further, lest a clock that once was years ahead make everything stale when it is set right.

    When more than `max_keys` are remembered, of a sender that has most (to a factor of two) the one that came first is
    forgotten, and a floor of its own rises above that. Its next stamps are later: so if it sends in order it does not
    notice, and who has less than half of its share loses nothing. Only if more than `max_senders` come in twice the
    window, new ones are refused.

    What came too late may be refused for good: then the floor rises above it, too.

    What a sender has stamped in the same two windows is on one page: so at any time it has two at most that matter,
    and what it stamped while clocks were wrong is in nobody's way. Each new key takes up to two steps along that are
    due, round and round through the pages: a key, or an empty page, that is forgotten; or to go on to the next page.
    """

    def __init__(self, *, window: int, floor: int, max_keys: int, max_senders: int = 10_000) -> None:
        self.window, self.floor, self.max_keys, self.max_senders = window, floor, max_keys, max_senders
        self.count = 0
        self._span = 2 * window + 1
        self._pages: OrderedDict[tuple[str, int], _Page] = OrderedDict()
        # By how many bits their size has: what has most, to a factor of two, is found at once, and seldom moved.
        self._by_size: list[OrderedDict[_Page, None]] = [OrderedDict() for _ in range(max_keys.bit_length() + 2)]
        self._largest = 0

    def floor_of(self, sender: str, stamp: int) -> int:
        """Return the least stamp that is accepted of this sender, about the time of `stamp`."""
        page = self._pages.get((sender, stamp // self._span))
        return self.floor if page is None else max(self.floor, page.floor)

    def accepts(self, sender: str, stamp: int, now: int) -> bool:
        """Return whether what is stamped so is neither too old nor too new."""
        return -self.window <= now - stamp <= self.window and stamp >= self.floor_of(sender, stamp)

    def refuse(self, stamp: int, now: int) -> None:
        """Never accept what is stamped so, if it is too old now, nor what is older: the clock may go back."""
        if now - stamp > self.window:  # else it is below a floor already
            self.floor = max(self.floor, stamp + 1)

    def add(self, sender: str, key: bytes, stamp: int, now: int) -> bool:
        """Return False if `key` of this sender was added with about this stamp; else remember it, and return True.

        The stamp is one that is accepted now.

        Raises:
            Overloaded: It is of a new sender, and there are too many.
        """
        at = sender, stamp // self._span
        page = self._pages.get(at)
        if page is not None and key in page.keys:
            return False
        self._go_round(now)
        if page is None or at not in self._pages:
            if len(self._pages) >= 2 * self.max_senders:
                raise Overloaded(name="memory of senders of frames", limit=self.max_senders)
            page = self._pages[at] = _Page()
        page.keys.add(key)
        page.order.append((key, stamp))
        self.count += 1
        self._resized(page, len(page.order) - 1)
        if self.count > self.max_keys:
            self._forget_first(next(iter(self._by_size[self._largest])))
        return True

    def _go_round(self, now: int) -> None:
        """Take two steps: one would never catch up."""
        pages = self._pages
        for _ in range(min(2, len(pages))):
            at = next(iter(pages))
            page = pages[at]
            if page.order and now - page.order[0][1] > self.window:
                self._forget_first(page)
            elif page.order or now - page.floor < self.window:
                pages.move_to_end(at)
            else:
                del pages[at]
                self.floor = max(self.floor, page.floor)

    def _forget_first(self, page: _Page) -> None:
        key, stamp = page.order.popleft()
        page.keys.remove(key)
        page.floor = max(page.floor, stamp + 1)
        self.count -= 1
        self._resized(page, len(page.order) + 1)

    def _resized(self, page: _Page, before: int) -> None:
        """Take note that a page has one key more, or less, than before."""
        old, new = before.bit_length(), len(page.order).bit_length()
        if old != new:
            self._by_size[old].pop(page, None)
            if new:
                self._by_size[new][page] = None
            self._largest = max(self._largest, new)
            while self._largest and not self._by_size[self._largest]:
                self._largest -= 1
