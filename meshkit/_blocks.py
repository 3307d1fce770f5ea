"""Which lease a block holds that was entered by `async with`, when many tasks enter the same object.

>>> blocks = Blocks()
>>> blocks.enter("closed", "task 1", shared=True)
>>> blocks.turn()
>>> blocks.enter("probe", "task 2", shared=False)
>>> blocks.leave("task 1", None), blocks.leave("task 2", None)
(None, 'probe')
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Blocks"]

L = TypeVar("L")


class Blocks(Generic[L]):
    """The blocks that are open. As a rule all hold the same lease, the shared one; then they are only counted.

    When the shared lease becomes another one, those that hold the old one become strays: what comes of them changes
    nothing, so that it is enough to count them too. While there are strays, or blocks with a lease of their own, those
    that are entered are told apart by a key: the task.
    """

    __slots__ = ("_apart", "_quiet", "_shared", "_strays", "alike", "count", "quiet")

    def __init__(self) -> None:
        self.count = 0  # of blocks that hold the shared lease and are not told apart
        self.alike = False  # all that are open do, and the next one would: to enter is to count
        self.quiet = False  # and there is nothing to do about a success: to leave is to count
        self._shared = self._quiet = False
        self._strays = 0
        self._apart: dict[Hashable, list[L]] = {}

    def turn(self) -> None:
        """From now on the shared lease is another one, or none."""
        self._strays += self.count
        self.count = 0

    def settle(self, *, shared: bool, quiet: bool) -> None:
        """Say whether there is a shared lease, and whether nothing has to be done about its successes."""
        self._shared, self._quiet = shared, quiet
        self.alike = shared and not self._strays and not self._apart
        self.quiet = self.alike and quiet

    def enter(self, lease: L, key: Hashable, *, shared: bool) -> None:
        """Remember that a block with this lease was entered; `shared` says whether that is the shared one."""
        if shared and not self._strays and key not in self._apart:
            self.count += 1
        else:
            self._apart.setdefault(key, []).append(lease)
            self.settle(shared=self._shared, quiet=self._quiet)

    def leave(self, key: Hashable, shared: L | None) -> L | None:
        """Return the lease of the block that is left: its own, the `shared` one, or None for a stray."""
        if key not in self._apart and not self._strays and not self.count:
            key = next(iter(self._apart))  # it was entered by another task, as happens with async generators
        if key in self._apart:
            lease: L | None = self._apart[key].pop()
            if not self._apart[key]:
                del self._apart[key]
        elif self._strays:
            lease = None
            self._strays -= 1
        else:
            lease = shared
            self.count -= 1
        self.settle(shared=self._shared, quiet=self._quiet)
        return lease
