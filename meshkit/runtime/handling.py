"""Handlers: which method of a service handles which behavior, and how it refuses.

>>> from meshkit.runtime.behavior import request
>>> SIZE = request("stash:size", bytes, reply=int)
>>> class Stash:
...     @handles(SIZE)
...     async def size(self, msg):
...         if not msg.payload:
...             raise Reject("empty", "there is nothing in it")
...         return len(msg.payload)
>>> behaviors_of(Stash.size)
(Request('stash:size', bytes, reply=int),)
"""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast, overload

from meshkit.runtime.behavior import Behavior, Broadcast, Local, Request
from meshkit.runtime.message import Message, check_name

__all__ = ["MAX_DETAIL", "Reject", "behaviors_of", "handles"]

P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S")

MAX_DETAIL = 4096
"""Characters that a handler may say about why it rejects a call."""


class Reject(Exception):
    """Raised by a handler to fail a call on purpose, with a `code` that its caller can act upon.

    The caller gets a `RemoteError` with this `code`, `detail` (its first 4,096 characters) and `retryable`, and nothing
    is logged. Of any other exception the caller learns no more than the code "internal", and the id to look for in the
    log.
    """

    def __init__(self, code: str, detail: str = "", *, retryable: bool = False) -> None:
        super().__init__(code, detail)
        self.code = check_name("the code of a Reject", code)
        if code in {"internal", "bad_reply"}:
            raise ValueError(f"the code of a Reject cannot be {code!r}, which says that nobody chose to fail")
        self.detail = (
            str(detail)[:MAX_DETAIL].encode("utf-8", "backslashreplace").decode()
        )  # a file's name may hold anything
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
