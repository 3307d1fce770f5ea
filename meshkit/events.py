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

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar

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
    unraisable: Any = SimpleNamespace(  # what the hook is given cannot be constructed; this has its attributes
        exc_type=type(error),
        exc_value=error,
        exc_traceback=error.__traceback__,
        err_msg=f"meshkit: {message}",
        object=source,
    )
    sys.unraisablehook(unraisable)
