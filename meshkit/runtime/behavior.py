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

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar, Unpack

import msgspec

from meshkit.retrier import RetryPolicy
from meshkit.runtime.declared import Declared
from meshkit.runtime.message import Message, check_name
from meshkit.runtime.options import OnError, Options, Overflow, check_options
from meshkit.runtime.stages import EMIT, Continue, Outcome, Pipeline, Stage, Step

__all__ = [
    "Behavior",
    "Broadcast",
    "Ephemeral",
    "Local",
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
    remember: float | None = None
    """Seconds (60 by default) for which a message that came into a mailbox is remembered, by its content key or else
    its id, so that it is not handled twice. What is local or ephemeral is remembered by its content key only."""
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
    REMEMBERS_IDS: ClassVar[bool] = False
    """Whether a message without a content key is remembered by its id, for as long as `remember` says."""

    def __post_init__(self) -> None:
        check_name("the kind of a behavior", self.kind)
        _ = self._declared_payload  # which raises if that is no type
        try:
            self._check_options()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.kind}: {error}") from None

    def _check_options(self) -> None:
        """Raise an error for an option that cannot be, or makes no sense here."""
        check_options(self, self.OVERFLOWS)
        if self.overflow is None:
            object.__setattr__(self, "overflow", self.OVERFLOWS[0])
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.remember is not None and self.content_key is None and not self.REMEMBERS_IDS:
            raise ValueError("remember needs a content_key here: nothing is remembered by its id")
        if (self.upgrade or self.older) and type(self.older) is not type(self):
            raise TypeError("a newer version is declared from the one before: OLDER.next(...)")

    @functools.cached_property
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
        return f"{self.kind!r}, {self._declared_payload}" + (f", version={self.version}" if self.older else "")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # decoders do not pickle

    @property
    def ttl(self) -> float:
        """Seconds for which its messages are remembered."""
        return 60.0 if self.remember is None else self.remember

    @functools.cached_property
    def emitting(self) -> Pipeline | None:
        """What a message of this kind goes through on its way out, if that is anything of its own."""
        custom = [stage for stage in self.stages if stage.on == "emit"]
        own = [] if self.content_key is None else [Step("content_key", self._check_content_key)]
        return Pipeline(own, custom, EMIT, self.check) if own or custom else None

    def _check_content_key(self, message: Message[Any]) -> Outcome:
        """Let a key that cannot be one be an error of who emits it, and not of all who receive it."""
        hash(self.content_key and self.content_key(message.payload))
        return Continue(message)

    @functools.cached_property
    def _declared_payload(self) -> Declared[P]:
        return Declared(f"{self.kind}: the payload", self.payload)

    @property
    def decoder(self) -> msgspec.msgpack.Decoder[P]:
        """What decodes its payload, checking every field."""
        return self._declared_payload.decoder

    @functools.cached_property
    def check(self) -> Callable[[object], None]:
        """Raises `TypeError` unless it is given a payload of the declared type, as far as `isinstance` can tell."""
        return self._declared_payload.check

    def prepare(self) -> None:
        """Raise an error if its types cannot travel, and have to."""
        _ = self.decoder


@dataclass(frozen=True, repr=False)
class Local(Behavior[P]):
    """A kind that never leaves its node: handlers get the very object that was emitted."""

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("wait", "refuse", "drop_newest", "drop_oldest")

    def _check_options(self) -> None:
        super()._check_options()
        early = [stage.name for stage in self.stages if stage.before == "decode"]
        if early:
            raise ValueError(f"stage {early[0]!r} cannot come before decode: what is local is not encoded")

    def prepare(self) -> None:
        """Do nothing: any type will do."""


@dataclass(frozen=True, repr=False)
class Broadcast(Behavior[P]):
    """A kind that goes to every node, the one that emits it included; or to the one node that `emit` names."""

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("drop_newest", "drop_oldest")
    REMEMBERS_IDS: ClassVar[bool] = True

    def next(
        self, payload: type[S], *, upgrade: Callable[[P], S] | None = None, **options: Unpack[Options[S]]
    ) -> "Broadcast[S]":
        """Declare the next version, with options of its own. Without `upgrade`, this one must have handlers, too.

        What comes as this version is upgraded, and from then on dealt with as the next one says.
        """
        return type(self)(self.kind, payload, older=self, upgrade=upgrade, **options)  # type: ignore[arg-type,return-value]


@dataclass(frozen=True, repr=False)
class Ephemeral(Broadcast[P]):
    """A broadcast that is of use only while it is fresh: where there is no room for all, the oldest goes."""

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("drop_oldest", "drop_newest")
    REMEMBERS_IDS: ClassVar[bool] = False


@dataclass(frozen=True, repr=False)
class Request(Behavior[P], Generic[P, R_co]):
    """A kind that asks one node, which answers with a reply."""

    reply: type[R_co]

    OVERFLOWS: ClassVar[tuple[Overflow, ...]] = ("refuse",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._declared_reply

    def _check_options(self) -> None:
        super()._check_options()
        if self.content_key is not None:
            raise ValueError("content_key makes no sense for a request: each caller waits for a reply of its own")

    def _signature(self) -> str:
        return f"{super()._signature()}, reply={self._declared_reply}"

    def next(
        self,
        payload: type[S],
        *,
        reply: type[R],
        upgrade: Callable[[P], S] | None = None,
        **options: Unpack[Options[S]],
    ) -> "Request[S, R]":
        """Declare the next version, with options of its own. Without `upgrade`, this one must have a handler, too.

        With `upgrade` the one handler answers both, so that they must have the same `reply`. What comes as this version
        is upgraded, and from then on dealt with as the next one says.
        """
        return Request(self.kind, payload, reply, older=self, upgrade=upgrade, **options)

    @functools.cached_property
    def _declared_reply(self) -> Declared[R_co]:
        return Declared(f"{self.kind}: the reply", self.reply)

    @functools.cached_property
    def check_reply(self) -> Callable[[object], None]:
        """Raises `TypeError` unless it is given a reply of the declared type, as far as `isinstance` can tell."""
        return self._declared_reply.check

    @functools.cached_property
    def reply_decoder(self) -> msgspec.msgpack.Decoder[R_co]:
        """What decodes its reply, checking every field."""
        return self._declared_reply.decoder

    def prepare(self) -> None:
        """Raise an error if its types cannot travel."""
        _ = self.decoder, self.reply_decoder


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
