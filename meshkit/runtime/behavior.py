"""Behaviors: what kinds of messages there are, and which method handles them.

A behavior declares a kind once, for those who send it and for those who handle it:

>>> import msgspec
>>> class Store(msgspec.Struct, frozen=True):
...     data: bytes
>>> class StoreAck(msgspec.Struct, frozen=True):
...     size: int
>>> STORE = request("stash:store", Store, reply=StoreAck)  # one node is asked, and answers
>>> STORED = local("stash:stored", str)  # never leaves this node
>>> class Stash:
...     @handles(STORE)
...     async def store(self, msg):
...         return StoreAck(len(msg.payload.data))
>>> behaviors_of(Stash.store)
(Request('stash:store', Store, reply=StoreAck),)
"""

import contextlib
import functools
import types
import typing
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, cast, overload

import msgspec

from meshkit.runtime.message import Message, check_name
from meshkit.runtime.wire import require_portable

__all__ = [
    "Behavior",
    "Broadcast",
    "Local",
    "Reject",
    "Request",
    "behaviors_of",
    "broadcast",
    "handles",
    "local",
    "request",
]

P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")


class Reject(Exception):
    """Raised by a handler to fail a call on purpose, with a `code` that its caller can act upon.

    The caller gets a `RemoteError` with this `code`, `detail` and `retryable`, and nothing is logged. Of any other
    exception the caller learns no more than the code "internal", and the id to look for in the log.
    """

    def __init__(self, code: str, detail: str = "", *, retryable: bool = False) -> None:
        super().__init__(code, detail)
        self.code = check_name("the code of a Reject", code)
        if code in {"internal", "bad_reply"}:
            raise ValueError(f"the code of a Reject cannot be {code!r}, which says that nobody chose to fail")
        self.detail = str(detail).encode("utf-8", "backslashreplace").decode()  # a file's name may hold anything
        self.retryable = bool(retryable)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


@dataclass(frozen=True, repr=False)
class Behavior(Generic[P]):
    """The declaration of one kind of message: its name and the type of its payload.

    Made by `local`, `broadcast` or `request`. Equal declarations are the same behavior.
    """

    kind: str
    payload: type[P]

    def __post_init__(self) -> None:
        check_name("the kind of a behavior", self.kind)
        self._require_type("payload", self.payload)

    def _require_type(self, what: str, declared: object) -> None:
        if isinstance(declared, type) or typing.get_origin(declared) is not None or declared is Any:
            return
        raise TypeError(f"{self.kind}: {what} must be a type, not {declared!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind!r}, {_name(self.payload)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # decoders do not pickle

    @functools.cached_property
    def decoder(self) -> msgspec.msgpack.Decoder[P]:
        """What decodes its payload, checking every field. Made at first use, when all types are defined."""
        require_portable(self.payload)
        return msgspec.msgpack.Decoder(self.payload)

    def prepare(self) -> None:
        """Raise an error if its types cannot travel, and have to."""
        _ = self.decoder

    @functools.cached_property
    def _class(self) -> Any:
        return _checkable(self.payload)

    def check(self, payload: object) -> None:
        """Raise `TypeError` unless `payload` is of the declared type, as far as `isinstance` can tell."""
        if not isinstance(payload, self._class):
            raise TypeError(f"{self.kind}: the payload must be {_name(self.payload)}, not {type(payload).__name__}")


@dataclass(frozen=True, repr=False)
class Local(Behavior[P]):
    """A kind that never leaves its node: handlers get the very object that was emitted."""

    def prepare(self) -> None:
        """Do nothing: any type will do."""


@dataclass(frozen=True, repr=False)
class Broadcast(Behavior[P]):
    """A kind that goes to every node, the one that emits it included; or to the one node that `emit` names."""


@dataclass(frozen=True, repr=False)
class Request(Behavior[P], Generic[P, R_co]):
    """A kind that asks one node, which answers with a reply."""

    reply: type[R_co]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_type("reply", self.reply)

    def __repr__(self) -> str:
        return f"Request({self.kind!r}, {_name(self.payload)}, reply={_name(self.reply)})"

    @functools.cached_property
    def reply_decoder(self) -> msgspec.msgpack.Decoder[R_co]:
        """What decodes its reply, checking every field."""
        require_portable(self.reply)
        return msgspec.msgpack.Decoder(self.reply)

    def prepare(self) -> None:
        """Raise an error if its types cannot travel."""
        _ = self.decoder, self.reply_decoder

    @functools.cached_property
    def _reply_class(self) -> Any:
        return _checkable(self.reply)

    def check_reply(self, reply: object) -> None:
        """Raise `TypeError` unless `reply` is of the declared type, as far as `isinstance` can tell."""
        if not isinstance(reply, self._reply_class):
            raise TypeError(f"{self.kind}: the reply must be {_name(self.reply)}, not {type(reply).__name__}")


def _checkable(declared: object) -> Any:
    """Return what `isinstance` can check `declared` by: list for list[int]; object, where nothing can."""
    for candidate in (declared, typing.get_origin(declared)):
        if isinstance(candidate, type) and candidate not in {Any, types.UnionType, typing.Annotated}:
            with contextlib.suppress(TypeError):  # parametrised, or a protocol: not for isinstance
                isinstance(None, candidate)
                return candidate
    return object


def _name(declared: object) -> str:
    return declared.__name__ if isinstance(declared, type) and not typing.get_origin(declared) else str(declared)


def local(kind: str, payload: type[P]) -> Local[P]:
    """Declare a kind that never leaves its node. Its payload may be any class."""
    return Local(kind, payload)


def broadcast(kind: str, payload: type[P]) -> Broadcast[P]:
    """Declare a kind that goes to every node."""
    return Broadcast(kind, payload)


def request(kind: str, payload: type[P], *, reply: type[R]) -> Request[P, R]:
    """Declare a kind that one node is asked with, and answers with a `reply`. Where there is nothing to say: bool."""
    return Request(kind, payload, reply)


@overload
def handles(
    behavior: Request[P, R], /
) -> Callable[
    [Callable[[S, Message[P]], Coroutine[Any, Any, R]]], Callable[[S, Message[P]], Coroutine[Any, Any, R]]
]: ...


@overload
def handles(
    behavior: Local[P] | Broadcast[P], /
) -> Callable[
    [Callable[[S, Message[P]], Coroutine[Any, Any, None]]], Callable[[S, Message[P]], Coroutine[Any, Any, None]]
]: ...


def handles(behavior: Behavior[Any], /) -> Callable[[Any], Any]:
    """Mark an async method of a `Service` as the handler of `behavior`: `async def method(self, msg) -> reply`."""
    if not isinstance(behavior, Behavior):
        raise TypeError(f"@handles needs a behavior, as in @handles(STORE), not {behavior!r}")

    def mark(method: Any) -> Any:
        method._meshkit_handles = (*behaviors_of(method), behavior)
        return method

    return mark


def behaviors_of(method: object) -> tuple[Behavior[Any], ...]:
    """Return the behaviors that `method` was marked to handle."""
    behaviors: object = getattr(method, "_meshkit_handles", ())
    return cast("tuple[Behavior[Any], ...]", behaviors) if isinstance(behaviors, tuple) else ()
