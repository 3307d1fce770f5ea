"""Endings: who waits for the end of which node, so that none waits for itself, not even by way of others."""

import contextlib
import contextvars
from collections.abc import Generator

__all__ = ["Ending"]


class Ending:
    """The end of a node. Its own hooks may wait for the ends of other nodes, as a `stop` does that stops one."""

    def __init__(self) -> None:
        self._waits_for: list[Ending] = []

    def enter(self) -> None:
        """Let this task, and those that it begins from now on, be of this node."""
        _here.set(self)

    def waits_for_here(self) -> bool:
        """Return whether this can come only when what runs here goes on."""
        here = _here.get()
        return here is not None and self._leads_to(here)

    def _leads_to(self, other: "Ending") -> bool:
        return self is other or any(it._leads_to(other) for it in self._waits_for)

    @contextlib.contextmanager
    def awaited(self) -> Generator[None, None, None]:
        """Let what runs here wait for this."""
        here = _here.get()
        if here is not None:
            here._waits_for.append(self)
        try:
            yield
        finally:
            if here is not None:
                here._waits_for.remove(self)


_here: contextvars.ContextVar[Ending | None] = contextvars.ContextVar("meshkit_ending", default=None)
