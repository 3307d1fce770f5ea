"""Lifecycles: what is started and stopped from any tasks, again and again, and lives one life at a time."""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from meshkit._notes import put
from meshkit._time import running_loop
from meshkit.errors import Closed
from meshkit.runtime.journal import shown
from meshkit.runtime.life import Life
from meshkit.runtime.service import ServiceFailed

__all__ = ["Lifecycle"]


class Lifecycle:
    """The part of a `Runtime` that starts and stops it: `async with`, or `start` and `stop`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._life: Life | None = None  # the present run, or the last one
        self._body: asyncio.Task[object] | None = None  # the task inside `async with`
        self._body_cancelled = False

    def _new_life(self) -> Life:
        raise NotImplementedError

    @property
    def _state(self) -> str:
        life = self._life
        if life is None:
            return "not started"
        if life.ended:
            return "stopped"
        if not life.is_open:
            return "starting"
        return "draining" if life.router.intake.draining else "running"

    def _running(self) -> Life:
        life = self._life
        if life is None:
            raise RuntimeError(f"node {self.name!r} is not running: use `async with`, or `await rt.start()`")
        if life.over:
            raise Closed(name=f"node {self.name!r}") from life.failure
        if running_loop() is not life.loop:
            raise self._on_another_loop()
        return life

    def _on_another_loop(self) -> RuntimeError:
        return RuntimeError(
            f"node {self.name!r} runs on another event loop: await it there; from other threads, "
            "through anyio.from_thread or asyncio.run_coroutine_threadsafe"
        )

    async def start(self) -> None:
        """Start the services in order; return when all are ready. Where one fails, those that had started are stopped.

        Cancelled meanwhile, it undoes what it had done before it passes that on.

        Raises:
            ValueError: Something is declared wrongly; the message names every fault.
            ServiceFailed: A service failed to start, or took too long; `__cause__` says why.
            Exception: What the transport raised.
        """
        if self._life is not None and not self._life.ended:
            raise RuntimeError(f"node {self.name!r} is {self._state} already")
        self._life = self._new_life()
        await self._told(self._life.open())

    async def stop(self) -> None:
        """Stop, and return when everything has ended. Harmless where it does not run.

        The other nodes are told first, and given a second at most to say that they know: so nothing is lost that they
        had just sent. Their requests are refused with `Draining`; handlers have `grace` seconds to finish what was
        accepted, then they are cancelled; services stop in reverse order; calls that still wait fail with `Closed`.

        Cancelled meanwhile, it hurries: what it is doing is cut short, and when everything has ended, the cancellation
        is passed on. Where it would wait for itself it does not wait: called by a handler or task of its own, or by the
        `stop` of a service on a node that this one is stopping.

        Raises:
            ServiceFailed: A background task had failed too often, or the `stop` of a service failed.
        """
        life = self._life
        if life is None or life.need_not_close:
            return
        if running_loop() is not life.loop:
            raise self._on_another_loop()
        if life.waits_for_this():
            life.ask_to_close()
        else:
            await self._told(life.close())

    async def wait(self) -> None:
        """Wait until it has stopped, for whatever reason.

        Raises:
            ServiceFailed: It stopped because a background task failed too often.
            RuntimeError: It was never started.
        """
        if self._life is None:
            raise RuntimeError(f"node {self.name!r} is not running")
        if running_loop() is not self._life.loop:
            raise self._on_another_loop()
        await self._told(self._life.wait())

    async def _told(self, end: Coroutine[Any, Any, None]) -> None:
        """Await `end`; each one who is told about a failure gets an error of their own."""
        failure: ServiceFailed | None = None
        try:
            await end
        except ServiceFailed as error:
            failure = error
        if failure is not None:  # outside of `except`: its context is what the body of `async with` raised
            fresh = ServiceFailed(node=failure.node, service=failure.service, what=failure.what)
            raise fresh from failure.__cause__

    async def __aenter__(self) -> Self:
        await self.start()
        self._body = asyncio.current_task()
        if self._life is not None and self._life.failure is not None:
            asyncio.get_running_loop().call_soon(self._cancel_body)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        cancelled, self._body_cancelled = self._body_cancelled, False
        if cancelled and body is asyncio.current_task() and body is not None:
            body.uncancel()
        failed_before = self._life is not None and self._life.failure is not None
        try:
            await self.stop()
        except ServiceFailed as failure:
            if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit):
                raise
            if failed_before and error.__cause__ is not failure.__cause__:
                put(failure, "the body of `async with` then raised ", shown(error))
                raise
            if not failed_before:  # it is in the log; what the body raised is nowhere else
                put(error, "as the runtime stopped, ", str(failure))

    def _cancel_body(self) -> None:
        """End the body of `async with`, if the task that entered it still runs: its runtime has failed.

        Called by the loop, never by the body: so it is cancelled where it waits, and not in `__aexit__`.
        """
        if self._body is not None and not self._body.done() and not self._body_cancelled:
            self._body_cancelled = self._body.cancel()
