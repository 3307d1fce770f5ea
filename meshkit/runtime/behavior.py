"""Behaviors: what kinds of messages there are, and how each kind is dealt with.

A behavior declares a kind once, for those who send it and for those who handle it:

>>> import msgspec
>>> class Store(msgspec.Struct, frozen=True):
...     data: bytes
>>> class StoreAck(msgspec.Struct, frozen=True):
...     size: int
>>> STORE = request("stash:store", Store, reply=StoreAck)  # one node is asked, and answers
>>> TEASE = broadcast("social:tease", str, rate_limit=(10, 60.0))  # goes to every node
>>> STORED = local("stash:stored", str)  # never leaves this node

A newer version is declared from the one before, with what makes one from the other:

>>> class Stored(msgspec.Struct, frozen=True):
...     name: str
...     data: bytes
>>> STORE.next(Stored, reply=StoreAck, upgrade=lambda old: Stored("unnamed", old.data))
Request('stash:store', Stored, version=2, reply=StoreAck)
"""

import contextlib
import functools
import types
import typing
from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypedDict, TypeVar, Unpack, get_args

import msgspec

from meshkit import _check
from meshkit.retrier import RetryPolicy
from meshkit.runtime.message import Message, check_name
from meshkit.runtime.stages import EMIT, Continue, Outcome, Pipeline, Stage
from meshkit.runtime.wire import require_portable

__all__ = [
    "Behavior",
    "Broadcast",
    "Ephemeral",
    "Local",
    "OnError",
    "Options",
    "Overflow",
    "Request",
    "broadcast",
    "ephemeral",
    "local",
    "request",
]

P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")


OnError: TypeAlias = Literal["log", "drop", "dead_letter", "raise"]
Overflow: TypeAlias = Literal["refuse", "wait", "drop_newest", "drop_oldest"]


class Options(TypedDict, Generic[P], total=False):
    """What a behavior may declare beside its types. `Behavior` says what each means."""

    content_key: Callable[[P], Hashable] | None
    remember: float
    rate_limit: tuple[int, float] | None
    filter: Callable[[Message[P]], bool] | None
    order_by: Literal["sender"] | Callable[[Message[P]], Hashable] | None
    max_mailbox: int | None
    max_concurrent: int | None
    overflow: Overflow
    retry: RetryPolicy | None
    on_error: OnError
    stages: Sequence[Stage]


@dataclass(frozen=True, repr=False)
class Behavior(Generic[P]):
    """The declaration of one kind of message: its name, the type of its payload, and how it is dealt with.

    Made by `local`, `broadcast`, `ephemeral` or `request`, and `next` for a newer version. Equal declarations are the
    same behavior.
    """

    kind: str
    payload: type[P]
    _: KW_ONLY
    content_key: Callable[[P], Hashable] | None = None
    """Messages with the same key are the same message, whoever sends them: only the first is handled."""
    remember: float = 60.0
    """Seconds for which a message is remembered, by its content key or else its id, so that it is not handled twice."""
    rate_limit: tuple[int, float] | None = None
    """(10, 60.0): from each sender, no more than 10 messages in any 60 s. More are refused."""
    filter: Callable[[Message[P]], bool] | None = None
    """Whether to take this message."""
    order_by: Literal["sender"] | Callable[[Message[P]], Hashable] | None = None
    """Messages from the same sender, or with the same key, are handled one after the other, in order of arrival."""
    max_mailbox: int | None = None
    """Messages that may wait, in a mailbox of their own; else they share that of their service."""
    max_concurrent: int | None = None
    """Handlers that may run at a time, taking from a mailbox of their own."""
    overflow: Overflow | None = None
    """What becomes of a message for which the mailbox has no room."""
    retry: RetryPolicy | None = None
    """How often, and after which delays, a message is handled again when its handler raises."""
    on_error: OnError = "log"
    """What becomes of a message whose handler raises (in the end): it is logged; dropped without a line; logged and
    kept as a dead letter; or the runtime stops, and raises the error in its host."""
    stages: Sequence[Stage] = ()
    """Stages of one's own."""
    older: "Behavior[Any] | None" = None
    """The version before this one."""
    upgrade: Callable[[Any], P] | None = None
    """Makes a payload of this version from one of the version before."""

    OVERFLOWS: ClassVar[tuple[Overflow, ...]]
    """The rules for overflow that make sense for this kind; the first is the default."""

    def __post_init__(self) -> None:
        check_name("the kind of a behavior", self.kind)
        self._require_type("payload", self.payload)
        try:
            self._check_options()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.kind}: {error}") from None

    def _check_options(self) -> None:
        _check.duration("remember", self.remember)
        if self.rate_limit is not None:
            max_count, window = self.rate_limit
            _check.count("max_count of rate_limit", max_count)
            _check.duration("window of rate_limit", window)
        for name in ("max_mailbox", "max_concurrent"):
            if getattr(self, name) is not None:
                _check.count(name, getattr(self, name))
        for name in ("content_key", "filter", "upgrade"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, not {getattr(self, name)!r}")
        if not (self.order_by is None or self.order_by == "sender" or callable(self.order_by)):
            raise ValueError(f"order_by must be 'sender' or a function of the message, not {self.order_by!r}")
        if self.overflow is None:
            object.__setattr__(self, "overflow", self.OVERFLOWS[0])
        elif self.overflow not in self.OVERFLOWS:
            raise ValueError(f"overflow must be one of {', '.join(self.OVERFLOWS)} here, not {self.overflow!r}")
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy, not {self.retry!r}")
        if self.retry is not None and (self.retry.timeout or self.retry.attempt_timeout):
            raise ValueError("retry is bounded by max_retries and the caller's deadline: it takes no timeouts")
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}, not {self.on_error!r}")
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"stages must be of Stage(name, run), not {stage!r}")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages of the same name: {', '.join(names)}")

    def _require_type(self, what: str, declared: object) -> None:
        if isinstance(declared, type) or typing.get_origin(declared) is not None or declared is Any:
            return
        raise TypeError(f"{self.kind}: {what} must be a type, not {declared!r}")

    @property
    def version(self) -> int:
        """1, or one more than that of the version before."""
        return 1 if self.older is None else self.older.version + 1

    @property
    def versions(self) -> "tuple[Behavior[Any], ...]":
        """All versions up to this one, the oldest first."""
        return (*(self.older.versions if self.older else ()), self)

    @property
    def own_mailbox(self) -> bool:
        """Whether its messages wait in a mailbox of their own."""
        declared = (self.max_mailbox, self.max_concurrent, self.order_by)
        return self.overflow == "drop_oldest" or any(option is not None for option in declared)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._signature()})"

    def _signature(self) -> str:
        return f"{self.kind!r}, {_name(self.payload)}" + (f", version={self.version}" if self.older else "")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # decoders do not pickle

    @functools.cached_property
    def emitting(self) -> Pipeline | None:
        """What a message of this kind goes through on its way out, if that is anything of its own."""
        custom = [stage for stage in self.stages if stage.on == "emit"]
        own = [] if self.content_key is None else [("content_key", self._check_content_key)]
        return Pipeline(own, custom, EMIT) if own or custom else None

    def _check_content_key(self, message: Message[Any]) -> Outcome:
        """Let a key that cannot be one be an error of who emits it, and not of all who receive it."""
        hash(self.content_key and self.content_key(message.payload))
        return Continue(message)

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

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("wait", "refuse", "drop_newest", "drop_oldest")

    def prepare(self) -> None:
        """Do nothing: any type will do."""


@dataclass(frozen=True, repr=False)
class Broadcast(Behavior[P]):
    """A kind that goes to every node, the one that emits it included; or to the one node that `emit` names."""

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("drop_newest", "drop_oldest")

    def next(
        self, payload: type[S], *, upgrade: Callable[[P], S] | None = None, **options: Unpack[Options[S]]
    ) -> "Broadcast[S]":
        """Declare the next version. Without `upgrade`, there must be handlers of this version, too."""
        return type(self)(self.kind, payload, older=self, upgrade=upgrade, **options)  # type: ignore[arg-type,return-value]


@dataclass(frozen=True, repr=False)
class Ephemeral(Broadcast[P]):
    """A broadcast that is of use only while it is fresh: where there is no room for all, the oldest goes."""

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("drop_oldest", "drop_newest")


@dataclass(frozen=True, repr=False)
class Request(Behavior[P], Generic[P, R_co]):
    """A kind that asks one node, which answers with a reply."""

    reply: type[R_co]

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("refuse",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_type("reply", self.reply)

    def _signature(self) -> str:
        return f"{super()._signature()}, reply={_name(self.reply)}"

    def next(
        self,
        payload: type[S],
        *,
        reply: type[R],
        upgrade: Callable[[P], S] | None = None,
        **options: Unpack[Options[S]],
    ) -> "Request[S, R]":
        """Declare the next version. Without `upgrade`, there must be a handler of this version, too.

        With `upgrade` the one handler answers both, so that they must have the same `reply`.
        """
        return Request(self.kind, payload, reply, older=self, upgrade=upgrade, **options)

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


def local(kind: str, payload: type[P], **options: Unpack[Options[P]]) -> Local[P]:
    """Declare a kind that never leaves its node. Its payload may be any class."""
    return Local(kind, payload, **options)


def broadcast(kind: str, payload: type[P], **options: Unpack[Options[P]]) -> Broadcast[P]:
    """Declare a kind that goes to every node."""
    return Broadcast(kind, payload, **options)


def ephemeral(kind: str, payload: type[P], **options: Unpack[Options[P]]) -> Ephemeral[P]:
    """Declare a kind that goes to every node and soon is of no use: where there is no room, the oldest goes."""
    return Ephemeral(kind, payload, **options)


def request(kind: str, payload: type[P], *, reply: type[R], **options: Unpack[Options[P]]) -> Request[P, R]:
    """Declare a kind that one node is asked with, and answers with a `reply`. Where there is nothing to say: bool."""
    return Request(kind, payload, reply, **options)
