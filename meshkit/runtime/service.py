"""Services: what a node is made of.

>>> from meshkit.runtime.behavior import local
>>> from meshkit.runtime.handling import handles
>>> from meshkit.runtime.message import Message
>>> GREET = local("greeter:greet", str)
>>> class Greeter(Service):
...     name, emoji = "greeter", "👋"
...
...     @handles(GREET)
...     async def greet(self, msg: Message[str]) -> None:
...         self.log.info("hello %s", msg.payload)
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVarTuple

from meshkit.errors import MeshkitError
from meshkit.runtime.crew import Crew, Restarts

if TYPE_CHECKING:
    from meshkit.logger import ServiceLog
    from meshkit.runtime.runtime import Runtime

__all__ = ["Service", "ServiceFailed"]

Ts = TypeVarTuple("Ts")


@dataclass(eq=False, kw_only=True)
class ServiceFailed(MeshkitError):
    """A service could not start or stop, or one of its background tasks kept failing; `__cause__` says why."""

    node: str
    service: str
    what: str

    def _sentence(self) -> str:
        cause = "" if self.__cause__ is None else f": {type(self.__cause__).__name__}: {self.__cause__}"
        return f"{self.what} of service {self.service!r} on node {self.node!r} failed{cause}"


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
    crew: Crew | None = None
    """Its tasks, while it runs; `spawn` adds to them."""

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
        if self.crew is None:
            raise RuntimeError(f"{type(self).__name__} does not run: spawn its background tasks in start()")
        what = name or str(getattr(fn, "__name__", "task"))
        return self.crew.supervise(functools.partial(fn, *args), what, Restarts(self.max_restarts, self.restart_window))
