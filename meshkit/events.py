"""Events: what just happened, as data.

A utility that is given an `observer` hands it one frozen `Event` for everything worth telling. Logs, metrics,
traces and tests are all observers. Nobody listening costs one `is None`.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True, slots=True)
... class Landed(Event):
...     planet: str
>>> seen = []
>>> notify(seen.append, Landed("Mars"))
>>> seen
[Landed(planet='Mars')]
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from meshkit._time import running_loop

__all__ = ["Event", "Observer", "notify", "report"]


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events: a frozen dataclass that says what just happened."""


Observer: TypeAlias = Callable[[Event], None]
"""Whoever listens: called with each event, in order, after the state is consistent. It must not block."""

_E = TypeVar("_E", bound=Event)


def notify(observer: Callable[[_E], None] | None, event: _E) -> None:
    """Give `event` to `observer`, if there is one; what the observer raises is reported, never passed on."""
    if observer is None:
        return
    try:
        observer(event)
    except Exception as error:  # noqa: BLE001 - an observer must not be able to break what it watches
        report(error, f"observer failed on {type(event).__name__}", observer)


def report(error: Exception, message: str, source: object) -> None:
    """Report an error of a user callback that may not disturb the work: to the loop's exception handler.

    Without a running loop it goes to `sys.unraisablehook`, as errors of finalizers do.
    """
    loop = running_loop()
    if loop is not None:
        loop.call_exception_handler({"message": f"meshkit: {message}", "exception": error})
        return
    # The hook cannot be called from here: Python's own takes only what the interpreter makes. So the error is raised
    # where the interpreter has nobody else to tell: in the callback of a weak reference.
    gone: set[object] = set()
    reference = weakref.ref(gone, _Raise(error, message, source))
    del gone, reference


class _Raise:
    def __init__(self, error: Exception, message: str, source: object) -> None:
        self._error, self._message, self._source = error, message, source

    def __call__(self, _: object) -> None:
        raise self._error

    def __repr__(self) -> str:
        """What the hook says was at work: "Exception ignored in: meshkit: observer failed on Event: <function ...>"."""
        return f"meshkit: {self._message}: {self._source!r}"
