"""A life: one run of a node, from its start to its stop. `_live` reads from top to bottom.

It has a task of its own. A task group, or a cancel scope, must be left by the task that entered it; but a pytest
fixture, an ASGI lifespan or a REPL may enter in one task and leave in another.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import anyio

from meshkit import _time
from meshkit.runtime.ending import Ending
from meshkit.runtime.frame import Prover
from meshkit.runtime.graph import Graph
from meshkit.runtime.router import Router
from meshkit.runtime.service import Service, ServiceFailed
from meshkit.runtime.supervisor import ENDS_THE_PROCESS, Supervisor, begin, uncancel, was_cancelled, within
from meshkit.runtime.transport import Alone, Transport
from meshkit.runtime.wire import Beat

if TYPE_CHECKING:
    from meshkit.runtime.runtime import Runtime

__all__ = ["Life"]


class Life:
    """One run of a node, which others open and close."""

    CLOSE_TIMEOUT = 10.0
    """Seconds that the transport may take to close."""

    def __init__(
        self,
        runtime: "Runtime",
        graph: Graph,
        transport: Transport,
        prover: Prover | None,
        on_failure: Callable[[], None],
        end_of_log: Callable[[], None],
    ) -> None:
        self.failure: ServiceFailed | None = None
        self.over = False  # whether nothing can be sent any more
        self._name = name = runtime.name
        self._graph = graph
        self._runtime = runtime
        self._transport = transport
        self._prover = prover
        self._log = runtime.log("runtime")
        self._interrupt: BaseException | None = None  # ends the process, which came while this was ending
        self._grace_until = 0.0  # there is none but for a stop that was asked for
        self._on_failure = on_failure
        self._end_of_log = end_of_log
        self._supervisors = supervisors = {
            of.name: Supervisor(f"meshkit:{name}:{of.name}", functools.partial(self._on_task_failure, of))
            for of in graph.services
        }
        self._joined = False
        self._ending = Ending()
        self._started: list[Service] = []
        node, observer, letters = runtime.node, runtime.observer, runtime.letters
        every = None if isinstance(transport, Alone) else runtime.heartbeat
        beat = None if every is None else Beat(name, graph.requests, every)
        self.router = Router(
            node, name, graph, supervisors, transport, prover, beat, self._log, observer, letters, self._escalate
        )
        self.loop = loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[bool] = loop.create_future()  # or whether it ended before that
        self._closing: asyncio.Future[None] = loop.create_future()
        self._task = begin(loop, self._live, f"meshkit:{name}:runtime:life")
        self._task.add_done_callback(self._on_end)

    @property
    def is_open(self) -> bool:
        """Whether it has opened, now or before it ended."""
        return self._opened.done() and self._opened.result()

    @property
    def ended(self) -> bool:
        """Whether it has ended, or its loop was closed under it."""
        return self._task.done() or self.loop.is_closed()

    @property
    def need_not_close(self) -> bool:
        """Whether it ended before it was open (who opened it was told so), or its loop was closed under it."""
        return self.ended and not (self._task.done() and self.is_open)

    def waits_for_this(self) -> bool:
        """Return whether who waits here for its end would wait for itself, as when two nodes stop each other."""
        task = asyncio.current_task()
        return self._ending.waits_for_here() or any(task in of for of in self._supervisors.values())

    # --- from outside; each raises what `_live` raised

    async def open(self) -> None:
        """Wait until it is open; whoever is cancelled here takes it down with them."""
        try:
            await asyncio.wait([self._opened])
        except asyncio.CancelledError:
            await self._hurry()
            raise
        if not self._opened.result():
            await self._task

    def ask_to_close(self) -> None:
        """Let it begin to close, without waiting."""
        if not self._closing.done():
            self._closing.set_result(None)

    async def close(self) -> None:
        """Close it and wait until it has ended; to be cancelled here means: hurry."""
        self.ask_to_close()
        with self._ending.awaited():
            try:
                await self.wait()
            except asyncio.CancelledError:
                await self._hurry()
                raise

    async def wait(self) -> None:
        """Wait until it has ended."""
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    async def _hurry(self) -> None:
        """Wait until it has ended, however often this is cancelled; each time cuts one step of its end short."""
        with anyio.CancelScope(shield=True):
            while not self._task.done():  # to wait for what is done takes a step, in which this may be cancelled again
                self._task.cancel()
                try:
                    await asyncio.wait([self._task])
                except asyncio.CancelledError:
                    continue

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        if not self._opened.done():
            self._opened.set_result(False)
        if not task.cancelled():
            task.exception()  # it is raised by whoever opens, closes or waits

    # --- from inside

    async def _live(self) -> None:
        self._ending.enter()
        failed: BaseException | None = None
        try:
            self._init()
            await self._transport.start(self._runtime.node, self.router.intake, self._prover)
            self._joined = True
            for service in self._graph.services:
                await self._start(service)
            self.router.heartbeat.start()
            self._opened.set_result(True)
            await self._closing
            self.router.intake.draining = True
            self._grace_until = _time.now() + self._runtime.grace
            with anyio.CancelScope(deadline=self._grace_until):
                await self.router.heartbeat.drain()
            await self._drain(*self._graph.services)
        except GeneratorExit:  # the loop was closed under it: there is nothing to wait on any more
            raise
        except BaseException as error:  # noqa: BLE001 - raised again when all has been undone
            failed = error
            if isinstance(error, asyncio.CancelledError) and not was_cancelled():
                failed = RuntimeError(f"the transport of node {self._name!r} awaited something that was cancelled")
            self._cut_short()
        await self._end()
        if self._interrupt is not None:
            raise self._interrupt
        if self.failure is not None and (failed is None or isinstance(failed, asyncio.CancelledError)):
            raise self.failure
        if failed is not None:
            raise failed

    # --- the start

    def _init(self) -> None:
        for service in self._graph.services:
            service.rt = self._runtime
            service.log = self._runtime.logger.service(service.name, emoji=service.emoji or None)
            service.supervisor = self._supervisors[service.name]
        for service in self._graph.services:  # when all have what they need to be stopped
            with self._blaming(service, "init()"):
                service.init()

    async def _start(self, service: Service) -> None:
        with self._blaming(service, "start()"):
            await within(service.start_timeout, service.start)
        self._started.append(service)
        self.router.dispatcher.mailboxes.open(service.name)

    # --- failures

    @contextlib.contextmanager
    def _blaming(self, service: Service, what: str) -> Generator[None, None, None]:
        """Raise what a hook raises as its failure, also a `CancelledError` where nobody has cancelled this task."""
        try:
            yield
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and was_cancelled():
                raise
            raise self._failed(service, what) from error

    def _failed(self, service: Service, what: str) -> ServiceFailed:
        return ServiceFailed(node=self._name, service=service.name, what=what)

    def _on_task_failure(self, service: Service, what: str, error: BaseException, delay: float | None) -> None:
        """Log the failure of a background task; without a `delay` there is no restart, and the node stops."""
        if delay is not None:
            service.log.error("task %r failed, and runs again in %.3g s", what, delay, exc_info=error)
            return
        service.log.error("task %r failed too often: node %r stops", what, self._name, exc_info=error)
        self._escalate(service, f"task {what!r}", error)

    def _escalate(self, service: Service, what: str, error: BaseException) -> None:
        """Stop the node; its host gets `error` as the cause of a `ServiceFailed`."""
        if self.failure is None:
            self.failure = self._failed(service, what)
            self.failure.__cause__ = error
        # The task that fails here may be one that this cancels: then not at its next await, whatever that may be.
        self.loop.call_soon(self._give_up)

    def _give_up(self) -> None:
        if self.is_open:
            self.ask_to_close()
            self._on_failure()
        elif not self.router.intake.draining:  # else it ends already
            self._task.cancel()

    # --- the end; each step is bounded, and a cancellation cuts one step short

    async def _drain(self, *services: Service) -> None:
        """Let handlers finish what their services have accepted, while there is grace."""
        with anyio.CancelScope(deadline=self._grace_until):
            await self.router.dispatcher.mailboxes.quiet([service.name for service in services])

    async def _end(self) -> None:
        self.router.intake.draining = True
        for service in reversed(self._graph.services):
            await self._stop(service)
        self.router.dispatcher.close()
        if self._joined:
            self.router.say_goodbye()
            await self._step(within(self.CLOSE_TIMEOUT, self._transport.close), "closing the transport")
        self.over = True
        self.router.heartbeat.stop()
        self.router.close()
        if self.router.journal.cut:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(self.router.journal.cut.items()))
            self._log.warning("node %r stopped before it had handled: %s", self._name, kinds)
        self._end_of_log()

    async def _stop(self, service: Service) -> None:
        """Let it finish what others asked of it as they stopped; cut the rest, and its tasks; then let it clean up."""
        await self._step(self._drain(service), "the grace", service)
        self.router.dispatcher.close_mailboxes(service.name)
        await self._step(self._end_tasks(service), "ending its tasks", service)
        if service in self._started:
            await self._step(within(service.stop_timeout, service.stop), "stop()", service)
        service.supervisor = None

    async def _end_tasks(self, service: Service) -> None:
        left = await self._supervisors[service.name].end(service.stop_timeout)
        if left:
            service.log.error("tasks that ignored their cancellation are left behind: %s", ", ".join(left))

    async def _step(self, step: Coroutine[Any, Any, None], what: str, service: Service | None = None) -> None:
        log = self._log if service is None else service.log
        try:
            await step
        except asyncio.CancelledError:
            if was_cancelled():
                self._cut_short()
                log.warning("node %r stops: %s was cut short", self._name, what)
            else:  # as in `task.cancel(); await task`, which is meant well
                text = "node %r stops: %s awaited something that was cancelled, and what comes after that has not run"
                log.warning(text, self._name, what)
        except GeneratorExit:
            raise
        except BaseException as error:
            log.exception("node %r stops: %s failed", self._name, what)
            if isinstance(error, ENDS_THE_PROCESS):
                self._interrupt = error  # when all has ended
            elif self.failure is None and service is not None:
                self.failure = self._failed(service, what)
                self.failure.__cause__ = error

    def _cut_short(self) -> None:
        """Go on after a cancellation: it cut short what it hit, and there is no more grace."""
        self._grace_until = 0.0
        uncancel()
