"""One life of a computer of a `SimCluster`: from when it is switched on until it is off, in good order or not."""

import asyncio
import contextvars
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from meshkit.errors import Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.runtime import Runtime
from meshkit.runtime.transport import Receiver
from meshkit.testing._sim_machine import Machine, current
from meshkit.testing._sim_store import SimStore
from meshkit.testing._sim_wires import Wires
from meshkit.testing.sim_loop import SimLoop
from meshkit.testing.sim_network import SimNetwork, SimTransport


class Life:
    """What there is of a computer while it is on."""

    def __init__(self, sim: SimLoop, machine: Machine, store: SimStore) -> None:
        self.machine = machine
        self.store = store
        self.off = self.crashed = False
        self.rt: Runtime | None = None
        self._sim = sim
        self._burial: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Switch it off, after a stop in good order; harmless if it is off."""
        if not self.off:
            self.off = True
            self.store.close()

    def crash(self, rng: random.Random, patience: int) -> None:
        """Switch it off, and let what is still on it end."""
        self.off = self.crashed = True
        self.store.crash(rng)
        if self.rt is not None:
            _mute(self.rt)
        self.machine.resume()  # what was held back may end, too
        _kill(self.machine.tasks)
        self._burial = contextvars.Context().run(self._sim.create_task, self._bury(patience))

    async def over(self) -> None:
        """Return when nothing is left on it after a crash.

        Raises:
            RuntimeError: Tasks on it refuse to end.
        """
        if self._burial is not None:
            await asyncio.wait([self._burial])  # to cancel this does not cancel that
            self._burial.result()

    async def _bury(self, patience: int) -> None:
        """Let its tasks end: wherever they wait, they are cancelled again."""
        for _ in range(patience):
            await self._sim.settle()
            tasks = self.machine.tasks
            if not tasks:
                break
            _kill(tasks)
        else:
            left = ", ".join(task.get_name() for task in self.machine.tasks)
            raise RuntimeError(f"{self.machine.name!r} has crashed, but these tasks refuse to end: {left}")
        for timer in self._sim.live_timers():
            mine = timer._context.get(current) is self.machine  # type: ignore[attr-defined]
            if mine and not isinstance(getattr(timer._callback, "__self__", None), Wires):  # type: ignore[attr-defined]
                timer.cancel()


class LifeTransport(SimTransport):
    """Is used by its own computer only, and only while that is on.

    To use it from outside is a mistake of the test, and fails it: where nobody waits for a reply, the runtime hides the
    error.
    """

    def __init__(self, network: SimNetwork, life: Life) -> None:
        super().__init__(network, life.machine.name)
        self._life = life

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        self._require_its_computer(node)
        await super().start(node, receiver, prover)

    def send(self, to: str, frame: bytes) -> None:
        self._require_its_computer(to)
        super().send(to, frame)

    def broadcast(self, frame: bytes) -> Mapping[str, Overloaded]:
        self._require_its_computer("every node")
        return super().broadcast(frame)

    def _require_its_computer(self, to: str) -> None:
        if self._life.off:
            raise Unreachable(node=to, reason="this computer is off")
        if current.get() is not self._life.machine:
            name = self._life.machine.name
            error = Unreachable(
                node=to, reason=f"this runs outside of its computer: `await cluster[{name!r}].run(...)`"
            )
            asyncio.get_running_loop().call_exception_handler({"message": "nothing is sent", "exception": error})
            raise error


async def ended(tasks: "Collection[asyncio.Task[Any]]", *, unless: Callable[[], bool] = lambda: False) -> None:
    """Return when all of `tasks` have ended. Cancelled, cancel them and wait for that, too, `unless` it would not end.

    Unlike `asyncio.gather`, it raises the cancellation that it got: anyio knows its own by what is written on it.
    """
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
            for task in tasks:
                task.cancel()
            if unless():
                raise
    failed = [task for task in tasks if task.cancelled() or task.exception() is not None]  # so all errors are looked at
    if cancelled is not None and any(task.cancelled() for task in failed):
        raise cancelled


def _kill(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    """Cancel tasks, and let nobody hear of errors that they end with."""
    for task in tasks:
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        task.cancel()


def _mute(rt: Runtime) -> None:
    """Let a runtime log nothing more, unless it shares its logger with others."""
    if rt._own_logger:  # pyright: ignore[reportPrivateUsage]
        for name in ["runtime", *(service.name for service in rt.services)]:
            rt.logger.set_service_enabled(name, False)
