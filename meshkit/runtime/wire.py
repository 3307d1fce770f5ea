"""The wire: what travels between nodes, as MessagePack.

    Tell     a message that nobody waits for
    Ask      a request, with the milliseconds that its caller will still wait
    Reply    the answer to a request
    Failure  the other answer: why there is no reply
    Cancel   the caller of a request has gone: stop working on it

Who sent it is not in it: that is for the transport to know. Payloads are embedded as they were encoded, and decoded
only once it is known what they are.
"""

from typing import Literal, TypeAlias, cast

import msgspec
import msgspec.inspect

from meshkit.errors import (
    Draining,
    MalformedFrame,
    MeshkitError,
    NoHandler,
    Overloaded,
    PeerLost,
    RemoteError,
)

__all__ = [
    "Ask",
    "Cancel",
    "Failure",
    "Reply",
    "Tell",
    "Why",
    "Wire",
    "decode",
    "encode",
    "encode_payload",
    "require_portable",
    "to_error",
]


class _Travels(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Array-like, tagged by position: the names of fields do not travel."""


class Tell(_Travels, tag="t", frozen=True):
    """A message that nobody waits for."""

    id: str
    kind: str
    time: float
    payload: msgspec.Raw


class Ask(_Travels, tag="a", frozen=True):
    """A request. `remaining` is how many milliseconds its caller will still wait."""

    id: str
    kind: str
    time: float
    remaining: int
    payload: msgspec.Raw


class Reply(_Travels, tag="r", frozen=True):
    """The answer to the request with this `id`."""

    id: str
    payload: msgspec.Raw


Why: TypeAlias = Literal["no_handler", "malformed", "overloaded", "draining", "cut", "failed"]


class Failure(_Travels, tag="f", frozen=True):
    """Why the request with this `id` has no reply. What only one of the reasons needs has a default."""

    id: str
    why: Why
    detail: str = ""
    limit: int = 0
    code: str = ""
    retryable: bool = False


class Cancel(_Travels, tag="c", frozen=True):
    """The caller of the request with this `id` has gone."""

    id: str


Wire: TypeAlias = Tell | Ask | Reply | Failure | Cancel

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Wire] = msgspec.msgpack.Decoder(Wire)

encode = _ENCODER.encode


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


def decode(frame: bytes) -> Wire:
    """Return what `frame` holds.

    Raises:
        MalformedFrame: It holds nothing that this version understands.
    """
    try:
        return _DECODER.decode(frame)
    except Exception as error:
        raise MalformedFrame from error  # hostile bytes raise more than msgspec's own error


def to_error(failure: Failure, node: str, kind: str) -> MeshkitError:
    """Return the error that `failure`, sent by `node` in answer to a request of `kind`, is for the caller."""
    match failure.why:
        case "no_handler":
            return NoHandler(kind=kind, node=node)
        case "malformed":
            return MalformedFrame(reason=failure.detail)
        case "overloaded":
            return Overloaded(name=failure.detail, limit=failure.limit)
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
