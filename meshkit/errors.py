"""The errors of meshkit, by what the caller may do next.

    MeshkitError
    ├─ Refused          it did not start: safe to try again, after `retry_after` seconds where that is known
    ├─ OutcomeUnknown   it may have happened: try again only what is idempotent
    ├─ RemoteError      it ran and failed there: `code` and `retryable` say more
    ├─ Untrusted        the bytes did not prove themselves: never try again
    └─ Closed           you used it after closing it

Every error is built from data, which it keeps as attributes, and writes its own sentence from them only when it
is printed; so a refusal costs no formatting. `executed` says whether the work ran: "no", "maybe" or "yes". An error of
your own says "maybe", until its class says something else.
Errors pickle and copy with their notes and their `__cause__`.

>>> error = RateLimited(name="login", key="bob", max_count=5, window=60.0, retry_after=12.5)
>>> print(error)
login: 'bob' has used all 5 admissions of the last 60 s; try again in 12.5 s
>>> error.executed, isinstance(error, Refused)
('no', True)
"""

import pickle
import threading
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar

__all__ = [
    "BadSeal",
    "BadSignature",
    "BatchFull",
    "BulkheadFull",
    "CallTimeout",
    "CircuitOpen",
    "Closed",
    "Draining",
    "Executed",
    "MalformedFrame",
    "MeshkitError",
    "NoHandler",
    "NoQuorum",
    "NotAccepted",
    "OutcomeUnknown",
    "Overloaded",
    "PeerLost",
    "RateLimited",
    "Refused",
    "RemoteError",
    "Replayed",
    "Stale",
    "TooManyKeys",
    "UnknownSender",
    "UnknownVoter",
    "Unreachable",
    "Untrusted",
]

Executed: TypeAlias = Literal["no", "maybe", "yes"]
"""Whether the work behind an error ran."""


@dataclass(eq=False, kw_only=True)
class MeshkitError(Exception):
    """The base of everything that meshkit raises on purpose, except `ValueError` and `TypeError` for bad arguments."""

    executed: ClassVar[Executed] = "maybe"  # who cannot know says so: "no" may be what lets somebody do it again

    def __str__(self) -> str:
        return self._sentence()

    def _sentence(self) -> str:
        name = type(self).__name__
        line = (type(self).__doc__ or "").strip().partition("\n")[0]
        return name if line.startswith(f"{name}(") else line or name  # a dataclass without one has its signature there

    def __reduce__(self) -> tuple[Any, ...]:
        causes: list[BaseException] = []  # one after the other: nested, a long chain would be too deep
        outer, cause = _under_way.ids, self.__cause__
        met = {*outer, id(self)}
        while cause is not None and id(cause) not in met:
            causes.append(cause)
            met.add(id(cause))
            cause = cause.__cause__ if isinstance(cause, MeshkitError) else None
        _under_way.ids = met
        try:
            args = [_packed(value) for value in self.args]
            state = {name: _packed(value) for name, value in self.__dict__.items()}
            packed = [_packed(_without_cause(cause)) for cause in causes]
        finally:
            _under_way.ids = outer
        return _unpack, (type(self), args, state, packed, self.__suppress_context__)

    def __copy__(self) -> Self:
        copied = _without_cause(self)
        copied.__cause__ = self.__cause__
        copied.__suppress_context__ = self.__suppress_context__
        return copied


class _UnderWay(threading.local):
    """What this thread is pickling, so that circles end: `raise group.exceptions[0] from group` makes one."""

    ids: frozenset[int] | set[int] = frozenset()


_under_way = _UnderWay()
_Error = TypeVar("_Error", bound=BaseException)


def _without_cause(error: _Error) -> _Error:
    """Return a copy of `error`; one that is not ours as it is, since it leaves its cause behind when it is pickled."""
    if not isinstance(error, MeshkitError):
        return error
    copied = type(error).__new__(type(error), *error.args)
    copied.__dict__.update(error.__dict__)
    copied.__suppress_context__ = error.__suppress_context__
    return copied


def _unpack(
    kind: type[MeshkitError], args: list[bytes], state: dict[str, bytes], causes: list[bytes], suppress: bool
) -> MeshkitError:
    load = pickle.loads  # of the parts of what is being unpickled anyway
    error = last = kind.__new__(kind, *map(load, args))
    error.__dict__.update({name: load(value) for name, value in state.items()})
    for cause in map(load, causes):
        last.__cause__ = cause
        last = cause
    error.__suppress_context__ = suppress
    return error


def _packed(value: object) -> bytes:
    """Return `value` pickled, or else its text: an error must travel even if its cause, or a key in it, cannot."""
    try:
        packed = pickle.dumps(value)
        pickle.loads(packed)  # noqa: S301 - our own bytes, made on the line above
    except Exception:  # noqa: BLE001 - anything may go wrong in somebody's __reduce__, and none of it matters here
        return pickle.dumps(_stand_in(value))
    return packed


def _stand_in(value: object) -> object:
    name = type(value).__name__
    try:
        return RuntimeError(f"{name}: {value}") if isinstance(value, BaseException) else repr(value)
    except Exception:  # noqa: BLE001 - nor may a __str__ or __repr__ that fails stop it
        return RuntimeError(name) if isinstance(value, BaseException) else f"<{name}>"


def _seconds(value: float) -> str:
    """Return `value` for people: 3 digits, or the whole seconds; as it is where it is no finite float."""
    return f"{value:.3g} s" if value < 999.5 else f"{value:.0f} s" if value < 1e15 else f"{value} s"


# --- Refused: it did not start -----------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Refused(MeshkitError):
    """It did not start; it is safe to try again.

    `retry_after` says in how many seconds; None where nobody knows.
    """

    executed: ClassVar[Executed] = "no"

    retry_after: float | None = None

    def __str__(self) -> str:
        if self.retry_after is None:
            return self._sentence()
        return f"{self._sentence().removesuffix('.')}; try again in {_seconds(self.retry_after)}"


@dataclass(eq=False, kw_only=True)
class RateLimited(Refused):
    """The key has used up its admissions for now; None is the key where keys are not told apart."""

    name: str
    key: object
    max_count: int
    window: float

    def _sentence(self) -> str:
        limit = f"all {self.max_count} admissions of the last {_seconds(self.window)}"
        return f"{self.name}: {limit} are used" if self.key is None else f"{self.name}: {self.key!r} has used {limit}"


@dataclass(eq=False, kw_only=True)
class CircuitOpen(Refused):
    """The circuit breaker is not letting calls through."""

    name: str
    state: str

    def _sentence(self) -> str:
        return f"{self.name}: the circuit is {self.state}, the call was not made"


@dataclass(eq=False, kw_only=True)
class BulkheadFull(Refused):
    """Every slot of the bulkhead is taken, and so is every place in its queue."""

    name: str
    max_concurrent: int
    max_queue: int

    def _sentence(self) -> str:
        return f"{self.name}: {self.max_concurrent} calls are running and {self.max_queue} are waiting already"


@dataclass(eq=False, kw_only=True)
class BatchFull(Refused):
    """The batch collector has as many unflushed items as it may hold."""

    name: str
    max_pending: int

    def _sentence(self) -> str:
        return f"{self.name}: {self.max_pending} items are waiting to be flushed; flushing is slower than adding"


@dataclass(eq=False, kw_only=True)
class TooManyKeys(Refused):
    """A new key was refused because every key that is remembered is still needed."""

    name: str
    key: object
    max_keys: int

    def _sentence(self) -> str:
        return f"{self.name}: no room for {self.key!r}, all {self.max_keys} keys are in use; raise max_keys"


@dataclass(eq=False, kw_only=True)
class Unreachable(Refused):
    """There is no way to the node."""

    node: str
    reason: str = "not connected"

    def _sentence(self) -> str:
        return f"node {self.node!r} cannot be reached: {self.reason}"


@dataclass(eq=False, kw_only=True)
class NoHandler(Refused):
    """Nobody there handles this kind of message; if `node` is None, no node that is up does."""

    kind: str
    node: str | None

    def _sentence(self) -> str:
        who = "no node that is up has a" if self.node is None else f"node {self.node!r} has no"
        return f"{who} handler for {self.kind!r}"


@dataclass(eq=False, kw_only=True)
class NotAccepted(Refused):
    """The node handles this kind of message, but it did not take this one."""

    kind: str
    node: str
    reason: str

    def _sentence(self) -> str:
        return f"node {self.node!r} did not take this {self.kind!r}: {self.reason}"


@dataclass(eq=False, kw_only=True)
class Overloaded(Refused):
    """A bounded queue or table is full."""

    name: str
    limit: int

    def _sentence(self) -> str:
        return f"{self.name}: full, it holds {self.limit} already"


@dataclass(eq=False, kw_only=True)
class Draining(Refused):
    """The node is shutting down and takes no new work; another node may."""

    node: str

    def _sentence(self) -> str:
        return f"node {self.node!r} is draining; ask another one"


@dataclass(eq=False, kw_only=True)
class NoQuorum(Refused):
    """There are not enough votes, or they do not agree enough, for a result."""

    name: str
    votes: int
    threshold: int
    reason: str = ""

    def _sentence(self) -> str:
        return f"{self.name}: no quorum, {self.reason or f'{self.votes} of {self.threshold} votes are in'}"


@dataclass(eq=False, kw_only=True)
class UnknownVoter(Refused):
    """The vote came from somebody who has none."""

    name: str
    voter: object

    def _sentence(self) -> str:
        return f"{self.name}: {self.voter!r} is not one of the voters"


# --- OutcomeUnknown: it may have happened ------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class OutcomeUnknown(MeshkitError):
    """It may have happened; try again only if doing it twice is harmless."""

    executed: ClassVar[Executed] = "maybe"


@dataclass(eq=False, kw_only=True)
class CallTimeout(OutcomeUnknown, TimeoutError):
    """No answer came in time. Also a `TimeoutError`."""

    name: str
    timeout: float

    def _sentence(self) -> str:
        return f"{self.name}: no result within {_seconds(self.timeout)}; it may still have happened"


@dataclass(eq=False, kw_only=True)
class PeerLost(OutcomeUnknown):
    """The peer went away while it was asked."""

    node: str

    def _sentence(self) -> str:
        return f"node {self.node!r} went away before it answered; it may still have happened"


# --- RemoteError: it ran and failed there ------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class RemoteError(MeshkitError):
    """It ran on the other node and failed there. The text of the failure stays there, under `correlation_id`."""

    executed: ClassVar[Executed] = "yes"

    node: str
    kind: str
    code: str = "internal"
    retryable: bool = False
    detail: str = ""
    correlation_id: str = ""

    def _sentence(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        where = f" (look for {self.correlation_id} in its log)" if self.correlation_id else ""
        return f"{self.kind!r} failed on node {self.node!r} with code {self.code!r}{detail}{where}"


# --- Untrusted: the bytes did not prove themselves ---------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Untrusted(MeshkitError):
    """The bytes did not prove themselves; never retry."""

    executed: ClassVar[Executed] = "no"  # nothing was done with the bytes


@dataclass(eq=False, kw_only=True)
class BadSeal(Untrusted):
    """The sealed bytes could not be opened."""  # constant, whatever was wrong: details would help a forger


@dataclass(eq=False, kw_only=True)
class BadSignature(Untrusted):
    """The signature does not match the bytes and their sender."""


@dataclass(eq=False, kw_only=True)
class Stale(Untrusted):
    """The message was stamped outside the window in which it would be accepted."""


@dataclass(eq=False, kw_only=True)
class Replayed(Untrusted):
    """The message was seen before."""


@dataclass(eq=False, kw_only=True)
class UnknownSender(Untrusted):
    """The sender is not trusted here."""


@dataclass(eq=False, kw_only=True)
class MalformedFrame(Untrusted):
    """The bytes are not a frame that this version understands."""

    reason: str = ""

    def _sentence(self) -> str:
        return f"the bytes are not what was declared: {self.reason}" if self.reason else super()._sentence()


# --- Closed ------------------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Closed(MeshkitError):
    """It was closed: before the call (`executed` is "no"), or while the call was under way ("maybe")."""

    name: str
    executed: Executed = "no"  # type: ignore[misc]  # the one kind whose answer depends on when it was closed

    def _sentence(self) -> str:
        when = "is closed" if self.executed == "no" else "was closed while this call was under way"
        return f"{self.name} {when}"
