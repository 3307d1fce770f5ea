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
import inspect
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from meshkit import _check
from meshkit.runtime.runtime import Runtime
from meshkit.testing._sim_life import ended
from meshkit.testing._sim_node import Crashed as Crashed, SimNode as SimNode
from meshkit.testing._sim_store import SimStore as SimStore
from meshkit.testing.sim_loop import SimLoop
from meshkit.testing.sim_network import SimNetwork

__all__ = ["Crashed", "SimCluster", "SimNode", "SimStore"]


class SimCluster:
    """Computers on one `SimNetwork`, each with a runtime that `make(node)` makes whenever the computer starts.

    `async with` it, in a simulation: all start at once, and stop in the end; if the block fails, they crash instead.
    `cluster["alice"]` is a `SimNode`, which `make` and the test have what they need from.

    Verbs take the names of one node or of several; without, they mean all. `cut`, `heal`, `hold` and `release` are
    those of the network, on which nodes go by their names, too.

    Args:
        make: Returns a new runtime for a node: `Runtime(node.name, [...], transport=node.transport(),
            identity=node.identity)`. It runs on that computer; what it keeps must be in `node.store`.
        nodes: The names of the nodes.
        network: By default one without faults, and proved: as between machines, frames are sealed and signed.
    """

    POLL = 0.05
    """Seconds between two looks at a condition."""

    def __init__(
        self, make: Callable[[SimNode], Runtime], nodes: Iterable[str], *, network: SimNetwork | None = None
    ) -> None:
        sim = asyncio.get_running_loop()
        if not isinstance(sim, SimLoop):
            raise RuntimeError(f"a SimCluster needs a SimLoop (see meshkit.testing.simulate), not {sim!r}")  # noqa: TRY004
        self.network = SimNetwork(proved=True) if network is None else network
        self._make = make
        self._sim = sim
        self.cut, self.heal = self.network.cut, self.network.heal
        self.hold, self.release = self.network.hold, self.network.release
        self._nodes = {name: SimNode(name, sim, self.network) for name in _checked(nodes)}

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
        self.crash()
        for node in self:
            await node.over()

    async def until(self, condition: Callable[[], object], timeout: float) -> None:
        """Return as soon as `condition()` is true.

        Raises:
            AssertionError: After `timeout` seconds of the simulation it is not; the message shows the state of all.
        """
        deadline = self._sim.now + _check.duration("timeout", timeout, zero=True)
        while not _answer(condition):
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
        lines = [f"at {self._sim.now:.3f} s, {self.network!r}"]
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

    # --- what nodes do

    async def start(self, *names: str) -> None:
        """Start nodes that are off (by default all of them), at once; return when their runtimes have started.

        Raises:
            Crashed: One has crashed meanwhile.
            Exception: What `make`, or the start of a runtime, raised first.
        """
        nodes = self._chosen(names) if names else [node for node in self if not node.up]
        await self._at_once("start", nodes, lambda node: node.start(self._make))

    async def stop(self, *names: str) -> None:
        """Stop nodes in good order (by default all that are up), at once; those that are paused are resumed first.

        What they leave running is reported as a `Leak` when the simulation ends.

        Raises:
            Crashed: One has crashed meanwhile, or was off.
        """
        await self._at_once("stop", self._up(names), SimNode.stop)

    def crash(self, *names: str) -> None:
        """Let nodes crash, now: links first, so that nothing that they still do reaches anybody; then their tasks.

        Raises:
            Crashed: One is off already; then none crashes. This goes for `pause` and `resume`, too.
        """
        for node in self._up(names):
            node.crash()

    async def restart(self, *names: str) -> None:
        """Start nodes again, after a crash of those that are up. Nothing is left to them but their `store`."""
        nodes = self._chosen(names) if names else list(self)
        for node in nodes:
            if node.up:
                node.crash()
        await self._at_once("start", nodes, lambda node: node.start(self._make))

    def pause(self, *names: str) -> None:
        """Stop all that runs on nodes, while their clocks go on; twice is harmless."""
        for node in self._up(names):
            self._sim.note(f"pause {node.name}")
            node.machine.pause()

    def resume(self, *names: str) -> None:
        """Let nodes go on, with all that has become due meanwhile; harmless if they are not paused."""
        for node in self._up(names):
            self._sim.note(f"resume {node.name}")
            node.machine.resume()

    # --- how

    def _chosen(self, names: Iterable[str]) -> list[SimNode]:
        return [self[name] for name in dict.fromkeys(names)]

    def _up(self, names: Iterable[str]) -> list[SimNode]:
        """Return the nodes of these names, all of which must be up; without names, all that are."""
        nodes = self._chosen(names) if names else [node for node in self if node.up]
        for node in nodes:
            node.require_up()
        return nodes

    async def _at_once(
        self, verb: str, nodes: Iterable[SimNode], work: Callable[[SimNode], Coroutine[Any, Any, None]]
    ) -> None:
        """Do it with all nodes; raise the first error when all has ended."""
        for node in nodes:
            self._sim.note(f"{verb} {node.name}")
        tasks = [self._sim.create_task(work(node)) for node in nodes]
        await ended(tasks)
        for task in tasks:
            task.result()


def _checked(names: Iterable[str]) -> list[str]:
    """Return the names of the nodes of a cluster."""
    checked = list(names)
    if isinstance(names, str) or not checked or len({*checked}) < len(checked):
        raise ValueError(f"nodes must be one name or more, each once, like ['alice', 'bob'], and not {names!r}")
    return checked


def _answer(condition: Callable[[], object]) -> object:
    answer = condition()
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(f"a condition must answer at once, and not be async: {_named(condition)}")
    return answer


def _named(condition: Callable[[], object]) -> str:
    code = getattr(condition, "__code__", None)
    name = getattr(condition, "__qualname__", repr(condition))
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"
