"""One computer of a `SimCluster`: what it keeps through all its lives, and what it is told to do."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from meshkit import _check
from meshkit.runtime.identity import Identity
from meshkit.runtime.runtime import Runtime
from meshkit.runtime.supervisor import was_cancelled
from meshkit.testing._sim_life import Life, LifeTransport, ended
from meshkit.testing._sim_machine import Machine, current
from meshkit.testing._sim_store import SimStore
from meshkit.testing.sim_loop import SimLoop
from meshkit.testing.sim_network import SimNetwork, SimTransport

_T = TypeVar("_T")


class Crashed(RuntimeError):
    """The computer crashed before what ran on it had ended, or is off."""


class SimNode:
    """One computer of a `SimCluster`, with one runtime."""

    PATIENCE = 1_000
    """How often the tasks of a computer that has crashed are cancelled until they end."""

    def __init__(self, name: str, sim: SimLoop, network: SimNetwork) -> None:
        self.name = name
        self.identity = Identity.from_seed(sim.stream(f"identity of {name}").randbytes(32)) if network.proved else None
        """Its keys, the same after each restart; None if the network is not proved."""
        self.id = name if self.identity is None else self.identity.node_id
        """The id of its runtime."""
        network.know(name)
        self._network = network
        self._rng = sim.stream(f"disk of {name}")
        self._sim = sim
        self._disk: dict[str, Any] = {}
        self._rate = 1.0
        self._wall_offset = 0.0
        self._changing = asyncio.Lock()  # it starts or stops
        self._life: Life | None = None

    def __repr__(self) -> str:
        return f"SimNode({self.name!r}, {self.state})"

    @property
    def up(self) -> bool:
        """Whether it is on: it may still be starting, or be paused."""
        return self._life is not None and not self._life.off

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
        if self._life is None or self._life.rt is None:
            raise Crashed(f"node {self.name!r} has not started")
        return self._life.rt

    @property
    def machine(self) -> Machine:
        """The `Machine` that it is: another one after each start."""
        return self._required().machine

    @property
    def store(self) -> SimStore:
        """Its disk: what it keeps when it is off. It is for what runs on this computer now, and for the test."""
        life, here = self._required(), current.get()
        if here not in {None, life.machine}:
            raise RuntimeError(f"the store of {self!r} is not for what runs on another computer, or before its restart")
        return life.store

    @property
    def rate(self) -> float:
        """How fast its clocks go, from its next start on: 1.0001 gains 8.6 s in a day."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = _check.duration("rate", rate)

    @property
    def wall_offset(self) -> float:
        """Seconds by which its wall clock is ahead; to set it is a jump of that clock."""
        return self._wall_offset

    @wall_offset.setter
    def wall_offset(self, seconds: float) -> None:
        if not math.isfinite(seconds):
            raise ValueError(f"wall_offset must be finite, not {seconds!r}")
        self._sim.note(f"wall clock of {self.name} {seconds:+g} s")
        self._wall_offset = seconds
        if self._life is not None:
            self._life.machine.wall_offset = seconds

    def transport(self) -> SimTransport:
        """Return the transport for its runtime."""
        return LifeTransport(self._network, self._required())

    async def run(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run `coro` on this computer and return its result, or raise what it raises. To cancel this cancels it.

        Raises:
            Crashed: The computer crashed before it had ended, or is off.
        """
        try:
            life = self._required()
        except Crashed:
            coro.close()
            raise
        task = life.machine.create_task(coro)
        try:
            # What is paused will end when it is resumed, but who waits for it need not.
            await ended([task], unless=lambda: life.machine in self._sim.paused)
            result = task.result()
        except (Exception, asyncio.CancelledError):
            if life.crashed and not was_cancelled():
                raise Crashed(f"node {self.name!r} crashed") from None
            raise
        if life.crashed:
            raise Crashed(f"node {self.name!r} crashed")
        return result

    @property
    def has_runtime(self) -> bool:
        """Whether `rt` may be asked for."""
        return self._life is not None and self._life.rt is not None

    def known(self) -> set[str]:
        """Return the ids of the nodes that it knows."""
        return set(self.rt.peers) if self.has_runtime else set()

    def _required(self) -> Life:
        if self._life is None or self._life.off:
            raise Crashed(f"node {self.name!r} is off")
        return self._life

    # --- for the cluster

    async def start(self, make: "Callable[[SimNode], Runtime]") -> None:
        """Switch it on, as soon as its last life is over, and start its runtime."""
        async with self._changing:
            if self.up:
                raise RuntimeError(f"node {self.name!r} is up already")
            await self.over()
            machine = self._sim.machine(self.name, rate=self.rate, wall_offset=self._wall_offset)
            before, life = self._life, Life(self._sim, machine, SimStore(self._disk))
            self._life = life

            async def start() -> None:
                life.rt = self._made(make, before.rt if before else None)
                await life.rt.start()
                if self.name not in self._network.nodes:
                    raise ValueError(f"the runtime of {self!r} is not on the network: give it node.transport()")

            try:
                await self.run(start())
            except BaseException:
                if not life.off:
                    self.crash()
                raise

    def require_up(self) -> None:
        """Raise `Crashed` if it is off."""
        self._required()

    def _made(self, make: "Callable[[SimNode], Runtime]", before: Runtime | None) -> Runtime:
        """Return a new runtime; `before` is the one of its last life."""
        rt: object = make(self)
        if not isinstance(rt, Runtime):
            if asyncio.iscoroutine(rt):
                rt.close()
            raise TypeError(f"make must return a Runtime, not {rt!r}")
        if rt.node != self.id:
            raise ValueError(f"the runtime of {self!r} has the id {rt.node!r}: give it node.name and node.identity")
        if before is not None and {*map(id, [rt, *rt.services])} & {*map(id, [before, *before.services])}:
            raise ValueError(
                f"the runtime of {self!r}, or a service of it, has been used before its restart: make new ones, "
                "since all that a computer keeps is in its store"
            )
        return rt

    async def stop(self) -> None:
        """Stop its runtime in good order, and switch it off; if it is just starting, after that."""
        life = self._required()
        life.machine.resume()
        async with self._changing:
            if life.crashed:
                raise Crashed(f"node {self.name!r} crashed")
            if life.off:
                return
            try:
                await self.run(self.rt.stop())
            except asyncio.CancelledError:
                if not life.off:  # it is no longer up, and will not be down
                    self.crash()
                raise
            finally:
                life.stop()

    def crash(self) -> None:
        """Cut its links, then switch it off, and let what is still on it end."""
        life = self._required()
        self._sim.note(f"crash {self.name}")
        if self.name in self._network.nodes:
            self._network.crash(self.name)
        life.crash(self._rng, self.PATIENCE)

    async def over(self) -> None:
        """Return when nothing is left of its last life, if that has ended in a crash."""
        if self._life is not None:
            await self._life.over()
