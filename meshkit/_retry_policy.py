"""How often to retry, and which errors: what `on` says of them, and what they say of themselves.

>>> from meshkit.errors import PeerLost
>>> rule = RetryRule(on=Exception, idempotent=False)
>>> rule.objection(ConnectionError())
>>> rule.objection(PeerLost(node="bob"))
'PeerLost means that it may have happened; say idempotent=True if doing it twice is harmless'
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from meshkit import _check
from meshkit.errors import Closed, MeshkitError, RemoteError, Untrusted
from meshkit.events import report

__all__ = ["NOT_COVERED", "On", "RetryPolicy", "RetryRule", "asked_delay"]

On: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
"""What the caller says may be retried: a class, several, or a predicate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often, how patiently and for how long to retry. All times are in seconds.

    `max_retries` does not count the first attempt. The n-th retry waits `base_delay` * 2**(n-1), at most `max_delay`;
    with `jitter` a random part of that. `timeout` limits a whole call with its delays, `attempt_timeout` each attempt.
    An error whose `retry_after` is more than `max_retry_after` is not waited for.
    """

    max_retries: int = 3
    base_delay: float = 1.0
    max_delay: float = 30.0
    jitter: bool = True
    timeout: float | None = None
    attempt_timeout: float | None = None
    max_retry_after: float = 60.0

    def __post_init__(self) -> None:
        _check.count("max_retries", self.max_retries, minimum=0)
        for name in ("base_delay", "max_delay", "max_retry_after"):
            _check.duration(name, getattr(self, name), zero=True)
        for name in ("timeout", "attempt_timeout"):
            if getattr(self, name) is not None:
                _check.duration(name, getattr(self, name))
        if not isinstance(self.jitter, bool):
            raise TypeError(f"jitter must be True or False, not {self.jitter!r}")
        if self.base_delay > self.max_delay:
            raise ValueError(f"base_delay must be at most max_delay={self.max_delay!r}, not {self.base_delay!r}")
        if self.timeout is not None and self.timeout < (self.attempt_timeout or 0):
            raise ValueError(f"attempt_timeout must be at most timeout={self.timeout!r}, not {self.attempt_timeout!r}")


NOT_COVERED = "`on` does not cover it"
_NO_USE = (Untrusted, Closed, RemoteError)  # the last may say otherwise of itself: `retryable`


class RetryRule:
    """Judges errors for the Retrier, whose documentation has the rules."""

    def __init__(self, *, on: On, idempotent: bool) -> None:
        if not isinstance(idempotent, bool):
            raise TypeError(f"idempotent must be True or False, not {idempotent!r}")
        self.idempotent = idempotent
        self._classes, self._predicate = _check.errors("on", on, none="to retry nothing, say max_retries=0")
        # To name is to name a kind that would be objected to; Exception, or a base of one's own, says nothing of it.
        self._named = tuple(
            c for c in self._classes if issubclass(c, MeshkitError) and (_says_maybe(c) or issubclass(c, _NO_USE))
        )

    def __repr__(self) -> str:
        on = " | ".join(c.__name__ for c in self._classes) if self._predicate is None else repr(self._predicate)
        return f"on={on}, idempotent={self.idempotent}"

    def objection(self, error: Exception) -> str | None:
        """Return why `error` must not be retried, or None if it may be."""
        if isinstance(error, ExceptionGroup):
            return next(filter(None, map(self.objection, _members(error))), None)
        kind = type(error).__name__
        if not (isinstance(error, self._classes) or self._says_yes(error)):
            return NOT_COVERED
        if isinstance(error, self._named) or type(error) in self._classes or not isinstance(error, MeshkitError):
            return None
        if error.executed == "maybe" and not self.idempotent:
            return f"{kind} means that it may have happened; say idempotent=True if doing it twice is harmless"
        no_use = isinstance(error, _NO_USE) and not getattr(error, "retryable", False)
        if no_use and self._predicate is None:
            return f"{kind} means that trying again is no use; name it in `on` if it is"
        return None

    def _says_yes(self, error: Exception) -> bool:
        if self._predicate is None:
            return False
        try:
            return bool(self._predicate(error))
        except Exception as failure:  # noqa: BLE001 - it must not mask the error that it was asked about
            report(failure, f"the predicate `on` failed on {type(error).__name__}", self._predicate)
            return False


def _says_maybe(kind: type[MeshkitError]) -> bool:
    """Return whether errors of a kind may have happened because it says so, and not because nobody said otherwise."""
    says = next(base for base in kind.__mro__ if "executed" in vars(base))
    return says is not MeshkitError and kind.executed == "maybe"


def asked_delay(error: Exception) -> float:
    """Return the `retry_after` of `error`, the longest in a group; 0.0 where there is none, or nonsense."""
    if isinstance(error, ExceptionGroup):
        return max(map(asked_delay, _members(error)))
    try:
        asked: object = getattr(error, "retry_after", None)
        if isinstance(asked, bool) or not isinstance(asked, int | float):
            return 0.0
        return max(0.0, float(asked))  # in this order: for NaN that is 0.0
    except OverflowError:
        return math.inf
    except Exception:  # noqa: BLE001 - a property of somebody's exception
        return 0.0


def _members(group: Any) -> tuple[Exception, ...]:
    members: tuple[Exception, ...] = group.exceptions
    return members
