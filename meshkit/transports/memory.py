"""The transport within one process: runtimes that are given the same hub form a mesh.

>>> import asyncio
>>> from meshkit.runtime import Runtime
>>> async def main():
...     hub = MemoryHub()
...     async with Runtime("alice", transport=MemoryTransport(hub)) as alice:
...         async with Runtime("bob", transport=MemoryTransport(hub)):
...             return [*alice.peers]
>>> asyncio.run(main())
['bob']
"""

import asyncio
import sys
from collections.abc import Collection

from meshkit.errors import Closed, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver

__all__ = ["MemoryHub", "MemoryTransport"]


class MemoryHub:
    """Where the nodes of a mesh in memory meet; they run on one event loop. It hands every frame over at once.

    For tests, nodes can be cut off: what is sent then vanishes without an error, as in a network.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Receiver] = {}
        self._silent: set[str] = set()
        self._cut: set[frozenset[str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"MemoryHub(nodes={sorted(self.nodes)})"

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that have joined, in that order."""
        gone = self._loop is None or self._loop.is_closed()  # a loop that was closed takes its nodes down with it
        return () if gone else tuple(self._nodes)

    # --- faults

    def silence(self, node: str) -> None:
        """Let everything vanish that `node` sends, or is sent."""
        self._silent.add(node)

    def cut(self, one: str, other: str) -> None:
        """Let everything vanish that is sent between two nodes."""
        self._cut.add(frozenset((one, other)))

    def heal(self) -> None:
        """End all silences and cuts."""
        self._silent.clear()
        self._cut.clear()

    # --- for transports

    def join(self, node: str, receiver: Receiver) -> None:
        """Let `node` join.

        Raises:
            ValueError: A node of that name has joined already.
            RuntimeError: The others run on another event loop.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self.nodes:
                raise RuntimeError(f"node {node!r} cannot join {self!r}, whose nodes run on another event loop")
            self._nodes.clear()
            self._loop = loop
        if node in self._nodes:
            raise ValueError(f"node {node!r} cannot join {self!r}: there is a node of that name")
        self._nodes[node] = receiver

    def leave(self, node: str, receiver: Receiver | None = None) -> None:
        """Let `node` leave, and tell the others; harmless if it has left, or if it is not its `receiver` any more."""
        if node not in self._nodes or self._nodes[node] is not (receiver or self._nodes[node]):
            return
        del self._nodes[node]
        for other in list(self._nodes.values()):
            other.lost(node)

    def send(self, sender: str, to: str, frame: bytes) -> None:
        """Hand `frame` over to the node `to`.

        Raises:
            Unreachable: There is no such node.
        """
        receiver = self._nodes.get(to)
        if receiver is None:
            raise Unreachable(node=to, reason=f"the hub has only {', '.join(sorted(self._nodes))}")
        if not (self._silent or self._cut) or self._carries(sender, to):
            receiver.received(sender, frame)

    def broadcast(self, sender: str, frame: bytes) -> None:
        """Hand `frame` over to every node but its sender."""
        for node in list(self._nodes):
            if node != sender and node in self._nodes:  # what one receives may make another one leave
                self.send(sender, node, frame)

    def _carries(self, sender: str, to: str) -> bool:
        return not self._silent & {sender, to} and frozenset((sender, to)) not in self._cut


class MemoryTransport:
    """Connects one runtime to a `MemoryHub`. Ordered and lossless, but for the faults that the hub is told to have."""

    in_process = True
    exposed = False
    max_frame = sys.maxsize
    """In bytes: there is no limit."""

    def __init__(self, hub: MemoryHub) -> None:
        if not isinstance(hub, MemoryHub):
            raise TypeError(f"hub must be a MemoryHub, which the nodes of a mesh share, not {hub!r}")
        self._hub = hub
        self._node: str | None = None
        self._receiver: Receiver | None = None

    def __repr__(self) -> str:
        return f"MemoryTransport({self._hub!r}, node={self._node!r})"

    @property
    def peers(self) -> Collection[str]:
        """The other nodes on the hub."""
        return [node for node in self._hub.nodes if node != self._node] if self._node is not None else []

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        """Join the hub as `node`."""
        if self._node in self._hub.nodes:
            raise RuntimeError(f"{self!r} is in use: give each runtime a MemoryTransport of its own, on the same hub")
        self._hub.join(node, receiver)
        self._node, self._receiver = node, receiver

    def send(self, to: str, frame: bytes) -> None:
        """Hand `frame` over to the node `to`."""
        self._hub.send(self._joined(), to, frame)

    def broadcast(self, frame: bytes) -> None:
        """Hand `frame` over to every other node."""
        self._hub.broadcast(self._joined(), frame)

    async def close(self) -> None:
        """Leave the hub; closing twice is harmless."""
        node, receiver = self._node, self._receiver
        self._node = self._receiver = None
        if node is not None and receiver is not None:
            self._hub.leave(node, receiver)

    def _joined(self) -> str:
        if self._node is None:
            raise Closed(name=repr(self))
        return self._node
