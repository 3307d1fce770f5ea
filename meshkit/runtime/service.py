"""Services: what a node is made of.

>>> from meshkit.runtime.behavior import handles, local
>>> GREET = local("greeter:greet", str)
>>> class Greeter(Service):
...     name, emoji = "greeter", "👋"
...
...     @handles(GREET)
...     async def greet(self, msg):
...         self.log.info(f"hello {msg.payload}")
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVarTuple, Unpack

from meshkit import _check
from meshkit.errors import MeshkitError
from meshkit.runtime.crew import Crew, Restarts, supervise

if TYPE_CHECKING:
    from meshkit.logger import ServiceLog
    from meshkit.runtime.runtime import Runtime

__all__ = ["Service", "ServiceFailed"]

Ts = TypeVarTuple("Ts")


@dataclass(eq=False, kw_only=True)
class ServiceFailed(MeshkitError):
    """A service could not be started, or one of its background tasks kept failing; `__cause__` says why."""

    node: str
    service: str
    what: str

    def _sentence(self) -> str:
        cause = "" if self.__cause__ is None else f": {type(self.__cause__).__name__}: {self.__cause__}"
        return f"service {self.service!r} of node {self.node!r} failed in {self.what}{cause}"


class Service:
    """The base of services: subclass it, name it, and mark async methods with `@handles(BEHAVIOR)`.

    Its life: `init()` when the runtime starts, before anything runs; `start()`, after which its handlers are called;
    `stop()`, when neither its handlers nor its background tasks run any more. Services start in the order in which the
    runtime was given them, and stop in reverse.
    """

    name: str
    """What it is called, in logs, errors and names of tasks; unique in its runtime."""
    emoji: str = ""
    """What its log lines begin with."""
    max_mailbox: int = 1000
    """Messages that may wait for its handlers. Beyond, calls are refused with `Overloaded`, local emits wait, and
    broadcasts are dropped and counted."""
    max_concurrent: int = 64
    """Handlers of it that may run at the same time. They begin in the order in which the messages came; with 1, each
    ends before the next begins."""
    start_timeout: float = 30.0
    """Seconds that `start()` may take."""
    stop_timeout: float = 10.0
    """Seconds that `stop()` may take."""
    max_restarts: int = 5
    """Restarts of one background task within `restart_window`; one more failure stops the runtime."""
    restart_window: float = 60.0
    """Seconds for `max_restarts`."""

    rt: "Runtime"
    """The runtime it belongs to; there from `init()` on."""
    log: "ServiceLog"
    """Its log; there from `init()` on."""

    _crew: Crew | None = None
    _escalate: Callable[["Service", str, Exception], None]

    def init(self) -> None:
        """Prepare what needs `self.rt`; nothing runs yet."""

    async def start(self) -> None:
        """Acquire what the handlers need, and spawn background tasks. When it returns, the service is ready."""

    async def stop(self) -> None:
        """Release what `start` acquired."""

    def spawn(
        self,
        fn: Callable[[Unpack[Ts]], Coroutine[Any, Any, object]],
        *args: Unpack[Ts],
        name: str | None = None,
    ) -> "asyncio.Task[None]":
        """Run `fn(*args)` in the background, until it returns or the service stops.

        If it raises, that is logged and it is called again, after a delay that doubles (first 0.1 s). If it fails more
        than `max_restarts` times within `restart_window`, the runtime stops, with `ServiceFailed` in its host. The
        returned task may be cancelled to end it early.
        """
        if self._crew is None:
            raise RuntimeError(f"service {self.name!r} is not running: spawn its background tasks in start()")
        what = name or getattr(fn, "__name__", "task")

        def on_failure(error: Exception, delay: float | None) -> None:
            if delay is None:
                self._escalate(self, f"task {what!r}", error)
            else:
                self.log.exception(f"task {what!r} failed and runs again in {delay:.3g} s", exc_info=error)

        restarts = Restarts(
            _check.count("max_restarts", self.max_restarts, minimum=0),
            _check.duration("restart_window", self.restart_window),
        )
        return self._crew.spawn(supervise(lambda: fn(*args), restarts, on_failure), what)
