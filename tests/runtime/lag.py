"""A hub on which frames take time."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable

from meshkit.errors import Unreachable
from meshkit.runtime.transport import Receiver
from meshkit.transports import MemoryHub


class LaggingHub(MemoryHub):
    """Each frame is on its way for `lag` seconds, and so is the news that a node has left; on a link, all in order."""

    def __init__(self, lag: float) -> None:
        super().__init__()
        self.lag = lag
        self._links: dict[tuple[str, str], deque[Callable[[], None]]] = {}

    def send(self, sender: str, to: str, frame: bytes) -> None:
        """Hand `frame` over to the node `to`, later, if it is still there then."""
        if to not in self.nodes:
            raise Unreachable(node=to)
        self._later(sender, to, functools.partial(super().send, sender, to, frame))

    def leave(self, node: str, receiver: Receiver | None = None) -> None:
        """Let `node` leave; the others learn of it later."""
        if self._nodes.pop(node, None) is not None:
            for other, told in self._nodes.items():
                self._later(node, other, functools.partial(told.lost, node))

    def _later(self, sender: str, to: str, what: Callable[[], None]) -> None:
        self._links.setdefault((sender, to), deque()).append(what)
        asyncio.get_running_loop().call_later(self.lag, self._arrive, sender, to)

    def _arrive(self, sender: str, to: str) -> None:
        what = self._links[sender, to].popleft()
        if to in self.nodes:
            what()
