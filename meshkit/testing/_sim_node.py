"""One computer of a `SimCluster`: what runs on it, what it keeps, and its end."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from meshkit.errors import Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.identity import Identity
from meshkit.runtime.runtime import Runtime
from meshkit.runtime.supervisor import was_cancelled
from meshkit.runtime.transport import Receiver
from meshkit.testing._sim_machine import Machine, current
from meshkit.testing._sim_store import SimStore
from meshkit.testing.sim_loop import SimLoop
from meshkit.testing.sim_network import SimNetwork, SimTransport

_T = TypeVar("_T")


class Crashed(RuntimeError):
    """The computer crashed before what ran on it had ended, or is off."""


class _Boot:
    """A computer from when it is switched on until it is off."""

    def __init__(self, machine: Machine, store: SimStore) -> None:
        self.machine = machine
        self.store = store
        self.off = self.crashed = False
        self.rt: Runtime | None = None


class _NodeTransport(SimTransport):
    """Is used by its own computer only, and only while that is on."""

    def __init__(self, network: SimNetwork, boot: _Boot) -> None:
        super().__init__(network)
        self._boot = boot

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        self._require_its_computer(node)
        await super().start(node, receiver, prover)

    def send(self, to: str, frame: bytes) -> None:
        self._require_its_computer(to)
        super().send(to, frame)

    def broadcast(self, frame: bytes) -> None:
        self._require_its_computer("every node")
        super().broadcast(frame)

    def _require_its_computer(self, to: str) -> None:
        if self._boot.off:
            raise Unreachable(node=to, reason="this computer is off")
        if current.get() is not self._boot.machine:
            name = self._boot.machine.name
            raise Unreachable(node=to, reason=f"this runs outside of its computer: `await cluster[{name!r}].run(...)`")


class SimNode:
    """One computer of a `SimCluster`, with one runtime."""

    def __init__(self, name: str, sim: SimLoop, network: SimNetwork) -> None:
        self.name = name
        self.identity = Identity.from_seed(sim.stream(f"identity of {name}").randbytes(32)) if network.proved else None
        """Its keys, the same after each restart; None if the network is not proved."""
        self.id = name if self.identity is None else self.identity.node_id
        """The id of its runtime."""
        self.rate = 1.0
        """How fast its clocks go, from its next start on: 1.0001 gains 8.6 s in a day."""
        self._network = network
        self._sim = sim
        self._disk: dict[str, Any] = {}
        self._wall_offset = 0.0
        self._boot: _Boot | None = None

    def __repr__(self) -> str:
        return f"SimNode({self.name!r}, {self.state})"

    @property
    def up(self) -> bool:
        """Whether it is on: it may still be starting, or be paused."""
        return self._boot is not None and not self._boot.off

    @property
    def paused(self) -> bool:
        """Whether it is paused."""
        return self.up and self.machine in self._sim.paused

    @property
    def state(self) -> str:
        """What it does: "up", "paused" or "off"."""
        return "off" if not self.up else "paused" if self.paused else "up"

    @property
    def rt(self) -> Runtime:
        """Its runtime, or the last one that it had. Look at it from anywhere, but let its verbs `run` on this node."""
        if self._boot is None or self._boot.rt is None:
            raise Crashed(f"node {self.name!r} has not started")
        return self._boot.rt

    @property
    def machine(self) -> Machine:
        """The `Machine` that it is: another one after each start."""
        return self._required().machine

    @property
    def store(self) -> SimStore:
        """Its disk: what it keeps when it is off."""
        return self._required().store

    @property
    def wall_offset(self) -> float:
        """Seconds by which its wall clock is ahead; to set it is a jump of that clock."""
        return self._wall_offset

    @wall_offset.setter
    def wall_offset(self, seconds: float) -> None:
        self._wall_offset = seconds
        if self._boot is not None:
            self._boot.machine.wall_offset = seconds

    def transport(self) -> SimTransport:
        """Return the transport for its runtime."""
        return _NodeTransport(self._network, self._required())

    async def run(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run `coro` on this computer and return its result, or raise what it raises.

        Raises:
            Crashed: The computer crashed before it had ended, or is off.
        """
        try:
            boot = self._required()
        except Crashed:
            coro.close()
            raise
        try:
            result = await boot.machine.create_task(coro)
        except (Exception, asyncio.CancelledError):
            if boot.crashed and not was_cancelled():
                raise Crashed(f"node {self.name!r} crashed") from None
            raise
        if boot.crashed:
            raise Crashed(f"node {self.name!r} crashed")
        return result

    @property
    def has_runtime(self) -> bool:
        """Whether `rt` may be asked for."""
        return self._boot is not None and self._boot.rt is not None

    def known(self) -> set[str]:
        """Return the ids of the nodes that it knows."""
        return set(self.rt.peers) if self.has_runtime else set()

    def _required(self) -> _Boot:
        if self._boot is None or self._boot.off:
            raise Crashed(f"node {self.name!r} is off")
        return self._boot

    # --- for the cluster

    async def start(self, make: "Callable[[SimNode], Runtime]") -> None:
        """Switch it on, and start its runtime."""
        machine = self._sim.machine(self.name, rate=self.rate, wall_offset=self._wall_offset)
        boot = self._boot = _Boot(machine, SimStore(self._disk))

        async def start() -> None:
            rt = boot.rt = make(self)
            if rt.node != self.id:
                raise ValueError(f"the runtime of {self!r} has the id {rt.node!r}: give it node.name and node.identity")
            await rt.start()
            if self.id not in self._network.nodes:
                raise ValueError(f"the runtime of {self!r} is not on the network: give it node.transport()")

        await self.run(start())

    async def stop(self) -> None:
        """Stop its runtime in good order, and switch it off."""
        boot = self._required()
        boot.machine.resume()
        try:
            await self.run(self.rt.stop())
        finally:
            if not boot.off:
                boot.off = True
                boot.store.close()

    def crash(self, rng: random.Random) -> Machine:
        """Cut its links, then switch it off; return what is still on it."""
        boot = self._required()
        if self.id in self._network.nodes:
            self._network.crash(self.id)
        boot.off = boot.crashed = True
        boot.store.crash(rng)
        if boot.rt is not None:
            _mute(boot.rt)
        boot.machine.resume()  # what was held back may end, too
        return boot.machine


def _mute(rt: Runtime) -> None:
    """Let a runtime log nothing more, unless it shares its logger with others."""
    if rt._own_logger:  # pyright: ignore[reportPrivateUsage]
        for name in ["runtime", *(service.name for service in rt.services)]:
            rt.logger.set_service_enabled(name, False)
