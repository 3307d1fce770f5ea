"""Services: what a node is made of, which of their methods handles which behavior, and how one refuses.

>>> from meshkit.runtime.behavior import request
>>> from meshkit.runtime.message import Message
>>> SIZE = request("stash:size", bytes, reply=int)
>>> class Stash(Service):
...     name, emoji = "stash", "📦"
...
...     @handles(SIZE)
...     async def size(self, msg: Message[bytes]) -> int:
...         if not msg.payload:
...             raise Reject("empty", "there is nothing in it")
...         return len(msg.payload)
>>> behaviors_of(Stash.size)
(Request('stash:size', bytes, reply=int),)
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast, overload

from meshkit import _check
from meshkit.errors import MeshkitError
from meshkit.runtime.behavior import Behavior, Broadcast, Local, Request
from meshkit.runtime.message import MAX_DETAIL, Message, check_name
from meshkit.runtime.supervisor import Restarts, Supervisor

if TYPE_CHECKING:
    from meshkit.logger import ServiceLog
    from meshkit.runtime.runtime import Runtime

__all__ = ["Reject", "Service", "ServiceFailed", "behaviors_of", "handles"]

P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S")
Ts = TypeVarTuple("Ts")


@dataclass(eq=False, kw_only=True)
class ServiceFailed(MeshkitError):
    """A service could not start or stop, or one of its background tasks kept failing; `__cause__` says why."""

    node: str
    service: str
    what: str

    def _sentence(self) -> str:
        cause = self.__cause__
        why = [] if cause is None else [type(cause).__name__, str(cause)]
        return ": ".join([f"{self.what} of service {self.service!r} on node {self.node!r} failed", *filter(None, why)])


class Service:
    """The base of services: subclass it, name it, and mark async methods with `@handles(BEHAVIOR)`.

    Its life: `init()` when the runtime starts, before anything runs; `start()`, after which its handlers are called;
    `stop()`, when neither its handlers nor its background tasks run any more. Services start in the order in which the
    runtime was given them, and stop in reverse.
    """

    name: str
    """What it is called in logs, errors and names of tasks; unique in its runtime."""
    emoji: str = ""
    """What its log lines begin with."""
    max_mailbox: int = 1000
    """Messages that may wait for its handlers. Beyond: calls are refused with `Overloaded`, local emits wait,
    broadcasts are dropped and counted."""
    max_mailbox_bytes: int = 16 * 1024 * 1024
    """Bytes of encoded payloads that may wait, by the same rules."""
    max_concurrent: int = 64
    """Handlers of it that may run at a time. They begin in the order in which messages came; with 1, each ends before
    the next one begins."""
    start_timeout: float = 30.0
    """Seconds that `start()` may take."""
    stop_timeout: float = 10.0
    """Seconds that its tasks have to end when they are cancelled, and then `stop()`."""
    max_restarts: int = 5
    """Restarts of a background task within `restart_window`; one failure more, and the runtime stops."""
    restart_window: float = 60.0
    """Seconds for `max_restarts`."""

    rt: "Runtime"
    """The runtime that it belongs to; there from `init()` on."""
    log: "ServiceLog"
    """Its log; there from `init()` on."""
    supervisor: Supervisor | None = None
    """Its tasks, while it runs; `spawn` adds to them."""

    if not TYPE_CHECKING:  # to type checkers a __getattr__ would mean that every name exists

        def __getattr__(self, name: str) -> Any:
            if name in {"rt", "log"}:
                what = f"self.{name} of {type(self).__name__} is there from init() on, when its runtime starts"
                raise AttributeError(f"{what}: use it there, in start() or in handlers", name=name, obj=self)
            return object.__getattribute__(self, name)  # raises as ever

    def init(self) -> None:
        """Prepare what needs `self.rt` or `self.log`; nothing runs yet."""

    async def start(self) -> None:
        """Acquire what the handlers need, and spawn background tasks. When it returns, the service is ready."""

    async def stop(self) -> None:
        """Release what `start` acquired. It is not called if `start` failed."""

    def spawn(
        self, fn: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts, name: str | None = None
    ) -> "asyncio.Task[None]":
        """Run `fn(*args)` in the background, until it returns or the service stops.

        When it raises, that is logged and it is called again, after a delay that doubles (at first 0.1 s). If it fails
        once more after `max_restarts` restarts within `restart_window`, the runtime stops, with `ServiceFailed` in its
        host. To end it early, cancel the task that is returned.
        """
        if self.supervisor is None:
            raise RuntimeError(f"{type(self).__name__} does not run: spawn its background tasks in start()")
        if not callable(fn):
            raise _check.not_a_function(fn)
        what = name or str(getattr(fn, "__name__", "task"))
        return self.supervisor.supervise(
            functools.partial(fn, *args), what, Restarts(self.max_restarts, self.restart_window)
        )


class Reject(Exception):
    """Raised by a handler to fail a call on purpose, with a `code` that its caller can act upon.

    The caller gets a `RemoteError` with this `code`, `detail` (its first 4,096 characters) and `retryable`, and nothing
    is logged. Of any other exception the caller learns no more than the code "internal", and the id to look for in the
    log.
    """

    def __init__(self, code: str, detail: str = "", *, retryable: bool = False) -> None:
        super().__init__(code, detail)
        self.code = check_name("the code of a Reject", code)
        if code in {"internal", "bad_reply", "reply_forgotten"}:
            raise ValueError(f"the code of a Reject cannot be {code!r}, which says that nobody chose to fail")
        # A file's name may hold what is not Unicode.
        self.detail = str(detail)[:MAX_DETAIL].encode("utf-8", "backslashreplace").decode()[:MAX_DETAIL]
        self.retryable = bool(retryable)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


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
