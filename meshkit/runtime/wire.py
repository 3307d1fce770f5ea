"""The wire: what travels between nodes, as MessagePack.

    Tell     a message that nobody waits for
    Ask      a request, with the milliseconds that its caller will still wait
    Reply    the answer to a request
    Failure  the other answer: why there is no reply
    Cancel   the caller of a request has gone: stop working on it
    Beat     a node is up, is called so, handles these kinds of requests, and takes new ones (or does not)
    Goodbye  a node is leaving

They travel in bundles: what one node had for another in one turn of its loop. Who sent a bundle is not in it: that is
for the frame around it to prove. Payloads are embedded as they were encoded, and decoded only once it is known what
they are.
"""

import math
from typing import Annotated, Literal, TypeAlias, cast

import msgspec
import msgspec.inspect

from meshkit.errors import (
    Draining,
    MalformedFrame,
    MeshkitError,
    NoHandler,
    NotAccepted,
    Overloaded,
    PeerLost,
    RateLimited,
    RemoteError,
)
from meshkit.runtime.message import MAX_DETAIL, MAX_ID, MAX_NAME

__all__ = [
    "MAX_BUNDLE",
    "MAX_KINDS",
    "Ask",
    "Beat",
    "Cancel",
    "Failure",
    "Goodbye",
    "Reply",
    "Tell",
    "Why",
    "Wire",
    "decode",
    "decode_each",
    "encode",
    "encode_into",
    "encode_payload",
    "refusal",
    "rejection",
    "require_portable",
    "to_error",
]

MAX_BUNDLE = 256
"""Messages that one bundle may hold."""
MAX_KINDS = 1_000
"""Kinds of requests that a node may say it handles."""

_Id: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_ID)]
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
_Detail: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_DETAIL)]
_Time: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=253_402_300_800)]  # until the year 10000; and never NaN
_Milliseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _Travels(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Array-like, tagged by position: the names of fields do not travel."""


class Tell(_Travels, tag="t", frozen=True):
    """A message that nobody waits for."""

    id: _Id
    kind: _Name
    version: int
    time: _Time
    payload: msgspec.Raw


class Ask(_Travels, tag="a", frozen=True):
    """A request. `remaining` is how many milliseconds its caller will still wait."""

    id: _Id
    kind: _Name
    version: int
    time: _Time
    remaining: _Milliseconds
    payload: msgspec.Raw


class Reply(_Travels, tag="r", frozen=True):
    """The answer to the request with this `id`."""

    id: _Id
    payload: msgspec.Raw


Why: TypeAlias = Literal[
    "no_handler", "not_accepted", "malformed", "overloaded", "rate_limited", "draining", "cut", "failed"
]


class Failure(_Travels, tag="f", frozen=True):
    """Why the request with this `id` has no reply. What only some of the reasons need has a default.

    A request may be sent again, under its id, while a refusal is under way: `asked` is the `time` of the one refused.
    """

    id: _Id
    why: Why
    detail: _Detail = ""
    limit: int = 0
    window: float = 0.0
    retry_after: float | None = None
    code: _Name = ""
    retryable: bool = False
    asked: _Time = 0.0

    @property
    def refuses(self) -> bool:
        """Whether it says that a handler has not begun."""
        return self.why not in {"cut", "failed"}


class Cancel(_Travels, tag="c", frozen=True):
    """The caller of the request with this `id` has gone."""

    id: _Id


class Beat(_Travels, tag="b", frozen=True):
    """A node is up. `every` is how many seconds pass until its next one.

    One that `greets` says: nothing that I was asked before is done any more. Who hears it sends one that `answers`.
    """

    name: _Name
    kinds: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MAX_KINDS)]
    every: float
    draining: bool = False
    greets: bool = False
    answers: bool = False


class Goodbye(_Travels, tag="g", frozen=True):
    """A node is leaving."""


Wire: TypeAlias = Tell | Ask | Reply | Failure | Cancel | Beat | Goodbye

_MAX_REASON = 1_000  # characters of what an error says
_MAX_QUOTE = 200  # of what the decoder says, which may quote the bytes at length
_ENCODER = msgspec.msgpack.Encoder()
_BUNDLE = Annotated[list[Wire], msgspec.Meta(max_length=MAX_BUNDLE)]
_DECODER: msgspec.msgpack.Decoder[list[Wire]] = msgspec.msgpack.Decoder(_BUNDLE)
_ITEMS = msgspec.msgpack.Decoder(Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_BUNDLE)])
_ITEM: msgspec.msgpack.Decoder[Wire] = msgspec.msgpack.Decoder(Wire)
_FAILURES = msgspec.msgpack.Decoder(Failure)

encode = _ENCODER.encode
encode_into = _ENCODER.encode_into


def encode_payload(payload: object) -> msgspec.Raw:
    """Return `payload` as it travels."""
    return msgspec.Raw(_ENCODER.encode(payload))


def require_portable(declared: object) -> None:
    """Raise `TypeError` if there is a class in the declared type that msgspec does not know how to encode."""
    todo: list[object] = [msgspec.inspect.type_info(declared)]
    seen: set[int] = set()
    while todo:
        info = todo.pop()
        if isinstance(info, msgspec.inspect.CustomType):
            raise TypeError(f"{info.cls.__name__} is not a Struct, a dataclass or another type that msgspec encodes")
        if isinstance(info, tuple):
            todo.extend(cast("tuple[object, ...]", info))
        elif isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field) and id(info) not in seen:
            seen.add(id(info))
            todo.extend(getattr(info, name) for name in info.__struct_fields__ if not name.startswith("default"))


def decode(bundle: bytes) -> list[Wire]:
    """Return what `bundle` holds.

    Raises:
        MalformedFrame: It is not something that this version understands.
    """
    try:
        return _DECODER.decode(bundle)
    except Exception as error:  # hostile bytes raise more than msgspec's own error
        raise _malformed(error) from error


def decode_each(bundle: bytes) -> list[Wire | MalformedFrame]:
    """Return what `bundle` holds, with an error in the place of each message that this version does not understand.

    A newer node may say things of which this version knows nothing. Takes several times as long as `decode`.

    Raises:
        MalformedFrame: It is no bundle at all.
    """
    try:
        items = _ITEMS.decode(bundle)
    except Exception as error:
        raise _malformed(error) from error
    return [_decode_one(item) for item in items]


def _decode_one(item: msgspec.Raw) -> Wire | MalformedFrame:
    try:
        return _ITEM.decode(item)
    except Exception as error:  # noqa: BLE001
        return _malformed(error)


def _malformed(error: Exception) -> MalformedFrame:
    return MalformedFrame(reason=str(error)[:_MAX_QUOTE])


def refusal(call_id: str, error: MeshkitError) -> Failure:
    """Return what tells a caller about `error`, which is why its request was not handled: the reverse of `to_error`.

    A stage may raise an error made of anything: what cannot travel would spoil all that travels with it.
    """
    try:
        return _FAILURES.decode(encode(_refusal(call_id, error)))
    except Exception:  # noqa: BLE001 - the fields of the error, or its text, are not what they must be
        return Failure(call_id, "not_accepted", type(error).__name__[:MAX_NAME])


def rejection(call_id: str, code: str, detail: str, *, retryable: bool) -> Failure:
    """Return what tells a caller that a handler rejects its request; "internal" for what the handler has made untold.

    That is what cannot travel: a `Reject` checks what it is given, but its attributes may be set to anything later.
    """
    try:
        return _FAILURES.decode(encode(Failure(call_id, "failed", detail, code=code, retryable=retryable)))
    except Exception:  # noqa: BLE001
        return Failure(call_id, "failed", code="internal")


def _refusal(call_id: str, error: MeshkitError) -> Failure:
    match error:
        case NoHandler():
            return Failure(call_id, "no_handler")
        case NotAccepted():
            return Failure(call_id, "not_accepted", error.reason[:_MAX_REASON])
        case MalformedFrame():
            return Failure(call_id, "malformed", error.reason[:_MAX_REASON])
        case Overloaded():
            return Failure(call_id, "overloaded", error.name[:_MAX_REASON], error.limit)
        case RateLimited():
            name, wait = error.name[:_MAX_REASON], error.retry_after
            return Failure(call_id, "rate_limited", name, error.max_count, error.window, retry_after=wait)
        case Draining():
            return Failure(call_id, "draining")
        case _:
            return Failure(call_id, "not_accepted", str(error)[:_MAX_REASON])


def to_error(failure: Failure, node: str, kind: str, me: str) -> MeshkitError:
    """Return the error that `failure`, sent by `node` in answer to a request of `kind` from `me`, is for the caller."""
    wait = failure.retry_after
    match failure.why:
        case "no_handler":
            return NoHandler(kind=kind, node=node)
        case "not_accepted":
            return NotAccepted(kind=kind, node=node, reason=failure.detail)
        case "malformed":
            return MalformedFrame(reason=failure.detail)
        case "overloaded":
            return Overloaded(name=failure.detail, limit=failure.limit)
        case "rate_limited":
            return RateLimited(
                name=failure.detail,
                key=me,
                max_count=failure.limit,
                window=failure.window,
                # What callers may sleep for must be a number that a clock can hold.
                retry_after=wait if wait is not None and 0 <= wait < math.inf else None,
            )
        case "draining":
            return Draining(node=node)
        case "cut":
            return PeerLost(node=node)
        case _:
            return RemoteError(
                node=node,
                kind=kind,
                code=failure.code,
                retryable=failure.retryable,
                detail=failure.detail,
                correlation_id=failure.id if failure.code == "internal" else "",  # what is rejected is not logged
            )
