"""Which exceptions count as failures of what a circuit breaker guards: what `trips_on` says.

>>> from meshkit.errors import RateLimited, Unreachable
>>> rule = TripRule(Exception)
>>> rule.counts(ConnectionError()), rule.counts(Unreachable(node="bob"))
(True, False)
>>> TripRule((OSError, Unreachable)).counts(Unreachable(node="bob"))
True
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from meshkit.errors import Refused
from meshkit.events import report

__all__ = ["TripRule", "TripsOn"]

TripsOn: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
"""What counts as a failure: a class, several, or a predicate."""


class TripRule:
    """Judges exceptions for the CircuitBreaker, whose documentation has the rules."""

    __slots__ = ("_classes", "_named", "_predicate")

    def __init__(self, trips_on: TripsOn) -> None:
        self._classes, self._predicate = _checked(trips_on)
        self._named = tuple(c for c in self._classes if issubclass(c, Refused))

    def counts(self, error: Exception) -> bool:
        """Return whether `error` is a failure of the other side."""
        if isinstance(error, ExceptionGroup):
            members: tuple[Exception, ...] = cast("Any", error).exceptions
            return any(map(self.counts, members))
        if isinstance(error, Refused):
            return isinstance(error, self._named)
        if self._predicate is None:
            return isinstance(error, self._classes)
        try:
            return bool(self._predicate(error))
        except Exception as failure:  # noqa: BLE001 - it must not mask the error that it was asked about
            report(failure, f"the predicate `trips_on` failed on {type(error).__name__}, which counts", self._predicate)
            return True


def _checked(trips_on: Any) -> tuple[tuple[type[Exception], ...], Callable[[Exception], bool] | None]:
    """Return `trips_on` as classes and a predicate, one of which is missing."""
    if not isinstance(trips_on, type | tuple):
        if not callable(trips_on) or inspect.iscoroutinefunction(trips_on):
            raise TypeError(
                f"trips_on must be an exception class, a tuple of them, or a plain function, not {trips_on!r}"
            )
        return (), cast("Callable[[Exception], bool]", trips_on)
    classes: tuple[Any, ...] = trips_on if isinstance(trips_on, tuple) else (trips_on,)  # pyright: ignore[reportUnknownVariableType]  # judged below
    if not classes:
        raise ValueError("trips_on must name at least one exception class: with none, the circuit would never open")
    for c in classes:
        if not (isinstance(c, type) and issubclass(c, Exception)):
            raise TypeError(f"trips_on must name classes of Exception (cancellations never count), not {c!r}")
        if issubclass(c, ExceptionGroup):
            raise TypeError("trips_on is asked about each error in a group: name those, not ExceptionGroup")
    return classes, None
