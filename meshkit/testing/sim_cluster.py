"""A whole mesh in a simulation: computers that crash and restart, pause, and have clocks that are wrong.

>>> from meshkit import Runtime
>>> from meshkit.testing import simulated
>>> def make(node):
...     return Runtime(node.name, transport=node.transport(), identity=node.identity)
>>> async def main(sim):
...     async with SimCluster(make, ["alice", "bob", "carol"]) as cluster:
...         await cluster.until(cluster.connected, timeout=1)
...         cluster.crash("bob")
...         await cluster.until(cluster.connected, timeout=10)
...         return [peer.name for peer in cluster["alice"].rt.peers.values()]
>>> simulated(1, main)
['carol']
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from meshkit import _check
from meshkit.runtime.runtime import Runtime
from meshkit.testing._sim_machine import Machine, current
from meshkit.testing._sim_node import Crashed as Crashed, SimNode as SimNode
from meshkit.testing._sim_store import SimStore as SimStore
from meshkit.testing._sim_wires import Wires
from meshkit.testing.sim_loop import SimLoop
from meshkit.testing.sim_network import Nodes, SimNetwork

__all__ = ["Crashed", "SimCluster", "SimNode", "SimStore"]


class SimCluster:
    """Computers on one `SimNetwork`, each with a runtime that `make(node)` makes whenever the computer starts.

    `async with` it, in a simulation: all start at once, and stop in the end; if the block fails, they crash instead.
    `cluster["alice"]` is a `SimNode`, which `make` and the test have what they need from.

    Verbs take the name of one node, or several. `cut`, `heal`, `hold` and `release` are those of the network, which are
    given names of this cluster instead of ids; without names, `heal` and `release` mean all, and `other=None` is all
    others.

    Args:
        make: Returns a new runtime for a node: `Runtime(node.name, [...], transport=node.transport(),
            identity=node.identity)`. It runs on that computer; what it keeps must be in `node.store`.
        nodes: The names of the nodes.
        network: By default one without faults, and proved: as between machines, frames are sealed and signed.
    """

    POLL = 0.05
    """Seconds between two looks at a condition."""
    PATIENCE = 1_000
    """How often the tasks of a computer that has crashed are cancelled until they end."""

    def __init__(
        self, make: Callable[[SimNode], Runtime], nodes: Iterable[str], *, network: SimNetwork | None = None
    ) -> None:
        sim = asyncio.get_running_loop()
        if not isinstance(sim, SimLoop):
            raise RuntimeError(f"a SimCluster needs a SimLoop (see meshkit.testing.simulate), not {sim!r}")  # noqa: TRY004
        self.network = SimNetwork(proved=True) if network is None else network
        self._make = make
        self._sim = sim
        self._rng = sim.stream("cluster")
        self._nodes = {name: SimNode(name, sim, self.network) for name in nodes}
        self._ends: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"SimCluster({', '.join(f'{node.name} {node.state}' for node in self)})"

    def __getitem__(self, name: str) -> SimNode:
        try:
            return self._nodes[name]
        except KeyError:
            raise KeyError(f"there is no node {name!r}; there are {', '.join(self._nodes)}") from None

    def __iter__(self) -> Iterator[SimNode]:
        return iter(self._nodes.values())

    # --- the whole

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.stop()
        finally:
            await self._end()

    async def _end(self) -> None:
        self.crash(*(node.name for node in self if node.up))
        for end in self._ends:
            await end

    async def until(self, condition: Callable[[], object], timeout: float) -> None:
        """Return as soon as `condition()` is true.

        Raises:
            AssertionError: After `timeout` seconds of the simulation it is not; the message shows the state of all.
        """
        deadline = self._sim.now + _check.duration("timeout", timeout, zero=True)
        while not condition():
            if self._sim.now >= deadline:
                raise AssertionError(f"after {timeout:g} s it is not so: {_named(condition)}\n{self.describe()}")
            await asyncio.sleep(self.POLL)

    def connected(self) -> bool:
        """Return whether each node that is up knows every other that is up, and no other: for `until`."""
        up = {node.id: node for node in self if node.up}
        return all(node.known() == up.keys() - {node.id} for node in up.values())

    def describe(self) -> str:
        """Return the state of each node, one in a line, and that of the network."""
        names = {node.id: node.name for node in self}
        lines = [f"at {self._sim.now:.3f} s, {self._named_links()}"]
        for node in self:
            lines.append(f"  {node.name}: {node.state}")
            if node.up and node.has_runtime:
                stats = node.rt.stats()
                peers = ", ".join(sorted(names.get(peer, peer) for peer in node.known())) or "nobody"
                lines[-1] += (
                    f", knows {peers}; {stats.pending} calls pending, {stats.queued} messages queued, "
                    f"{stats.running} being handled"
                )
        return "\n".join(lines)

    def _named_links(self) -> str:
        text = repr(self.network)
        for node in self:
            text = text.replace(node.id, node.name)
        return text

    # --- what nodes do

    async def start(self, *names: str) -> None:
        """Start nodes that are off (by default all of them), at once; return when their runtimes have started.

        Raises:
            Crashed: One has crashed meanwhile.
            Exception: What `make`, or the start of a runtime, raised first.
        """
        nodes = self._chosen(names) if names else [node for node in self if not node.up]
        await self._at_once("start", [(node, self._start(node)) for node in nodes])

    async def stop(self, *names: str) -> None:
        """Stop nodes in good order (by default all that are up), at once; those that are paused are resumed first."""
        nodes = self._chosen(names) if names else [node for node in self if node.up]
        await self._at_once("stop", [(node, node.stop()) for node in nodes])

    def crash(self, *names: str) -> None:
        """Let nodes crash, now: links first, so that nothing that they still do reaches anybody; then their tasks."""
        for node in self._chosen(names):
            self._sim.note(f"crash {node.name}")
            machine = node.crash(self._rng)
            for task in machine.tasks:
                task.cancel()
            bury = contextvars.Context().run(self._sim.create_task, self._bury(machine))
            self._ends.append(bury)

    async def restart(self, *names: str) -> None:
        """Start nodes again, after a crash of those that are up. Nothing is left to them but their `store`."""
        nodes = self._chosen(names)
        self.crash(*(node.name for node in nodes if node.up))
        await self.start(*names)

    def pause(self, *names: str) -> None:
        """Stop all that runs on nodes, while their clocks go on; twice is harmless."""
        for node in self._chosen(names):
            self._sim.note(f"pause {node.name}")
            node.machine.pause()

    def resume(self, *names: str) -> None:
        """Let nodes go on, with all that has become due meanwhile; harmless if they are not paused."""
        for node in self._chosen(names):
            self._sim.note(f"resume {node.name}")
            node.machine.resume()

    # --- what the network does

    def cut(self, one: Nodes, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """Lose all that is sent from `one` to `other`, and back. Nobody is told."""
        self.network.cut(*self._sides(one, other), one_way=one_way)

    def heal(self, one: Nodes | None = None, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """End cuts: between these nodes, or all of them. Who could not connect, does now."""
        self.network.heal(*((None, None) if one is None else self._sides(one, other)), one_way=one_way)

    def hold(self, one: Nodes, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """Let all wait that is sent from `one` to `other`, and back."""
        self.network.hold(*self._sides(one, other), one_way=one_way)

    def release(self, one: Nodes | None = None, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """End holds: between these nodes, or all of them. What waited arrives, in order, as if it was sent now."""
        self.network.release(*((None, None) if one is None else self._sides(one, other)), one_way=one_way)

    def _sides(self, one: Nodes, other: Nodes | None) -> tuple[list[str], list[str]]:
        """Return the ids of the nodes on both sides."""
        ones = self._chosen([one] if isinstance(one, str) else one)
        others = [node for node in self if node not in ones]
        if other is not None:
            others = self._chosen([other] if isinstance(other, str) else other)
        return [node.id for node in ones], [node.id for node in others]

    # --- how

    def _chosen(self, names: Iterable[str]) -> list[SimNode]:
        return [self[name] for name in names]

    async def _start(self, node: SimNode) -> None:
        if node.up:
            raise RuntimeError(f"node {node.name!r} is up already")
        try:
            await node.start(self._make)
        except BaseException:
            self.crash(*(each.name for each in [node] if each.up))
            raise

    async def _at_once(self, verb: str, work: "list[tuple[SimNode, Coroutine[Any, Any, None]]]") -> None:
        """Do all of it; raise the first error when all has ended."""
        for node, _ in work:
            self._sim.note(f"{verb} {node.name}")
        results = await asyncio.gather(*(coro for _, coro in work), return_exceptions=True)
        for error in results:
            if error is not None:
                raise error

    async def _bury(self, machine: Machine) -> None:
        """Let the tasks of a computer that has crashed end: wherever they wait, they are cancelled again."""
        for _ in range(self.PATIENCE):
            await self._sim.settle()
            tasks = machine.tasks
            if not tasks:
                break
            for task in tasks:
                task.cancel()
        else:
            left = ", ".join(task.get_name() for task in machine.tasks)
            raise RuntimeError(f"{machine.name!r} has crashed, but these tasks refuse to end: {left}")
        for timer in self._sim.live_timers():
            mine = timer._context.get(current) is machine  # type: ignore[attr-defined]
            if mine and not isinstance(getattr(timer._callback, "__self__", None), Wires):  # type: ignore[attr-defined]
                timer.cancel()


def _named(condition: Callable[[], object]) -> str:
    code = getattr(condition, "__code__", None)
    name = getattr(condition, "__qualname__", repr(condition))
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"
