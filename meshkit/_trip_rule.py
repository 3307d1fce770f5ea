"""Which exceptions count as failures of what a circuit breaker guards: what `trips_on` says.

>>> from meshkit.errors import RateLimited, Unreachable
>>> rule = TripRule(Exception)
>>> rule.counts(ConnectionError()), rule.counts(Unreachable(node="bob"))
(True, False)
>>> TripRule((OSError, Unreachable)).counts(Unreachable(node="bob"))
True
"""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from meshkit import _check
from meshkit.errors import Refused
from meshkit.events import report

__all__ = ["TripRule", "TripsOn"]

TripsOn: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
"""What counts as a failure: a class, several, or a predicate."""


class TripRule:
    """Judges exceptions for the CircuitBreaker, whose documentation has the rules."""

    __slots__ = ("_classes", "_named", "_predicate")

    def __init__(self, trips_on: TripsOn) -> None:
        self._classes, self._predicate = _check.errors("trips_on", trips_on, none="the circuit would never open")
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
