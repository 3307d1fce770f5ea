"""A network that is as bad as you want, within a simulation: frames are late, lost, doubled, out of order, held back.

Whether a frame arrives is a `Verdict`. For each frame it is drawn from the seed of the `SimLoop`, as the `Link` says
that the frame goes over; unless a link was cut or is held, or a rule of the test knows better.

>>> from meshkit import Runtime
>>> from meshkit.testing import simulated
>>> async def main(sim):
...     network = SimNetwork(Link(delay=0.05))
...     async with Runtime("alice", transport=network.transport()) as alice:
...         async with Runtime("bob", transport=network.transport()):
...             return [*alice.peers]
>>> simulated(1, main)
['bob']
"""

import asyncio
import contextlib
import contextvars
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from itertools import permutations
from typing import TypeAlias

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver
from meshkit.testing._sim_wires import Link as Link, Packet, Place, Verdict as Verdict, Wires
from meshkit.testing.sim_loop import SimLoop

__all__ = ["Link", "Nodes", "Rule", "SimNetwork", "SimTransport", "Verdict"]

Rule: TypeAlias = Callable[[str, str, bytes], Verdict | None]
"""Says what becomes of a frame, given its sender, the node that it is sent to, and itself; None: it does not know."""

Nodes: TypeAlias = str | Iterable[str]
"""The id of a node, or those of several."""


class SimNetwork:
    """Connects the nodes of a simulation: give each a `transport()`, and tell the network what goes wrong.

    Verbs take the ids of one node or of several, and go both ways but for `one_way=True`; `other=None` means all others
    that have ever joined. Faults concern what is sent from then on, not what is under way.

    `link` is how frames go where `links[sender, to]` says nothing else; both can be changed at any time. Each of
    `rules` is asked about each frame, before chance is; the first answer counts. `verdicts` counts what became of
    frames. With `proved`, frames are sealed and signed as between machines, and each node needs an identity and trust.
    """

    MAX_BUFFER = 16 * 1024 * 1024
    """Bytes that may be on their way from one node to another; beyond, a frame is `Overloaded`."""

    def __init__(self, link: Link | None = None, *, proved: bool = False) -> None:
        self.link = Link() if link is None else link
        self.links: dict[tuple[str, str], Link] = {}
        self.rules: list[Rule] = []
        self.verdicts: Counter[Verdict] = Counter()
        self.proved = proved
        self._cut: set[tuple[str, str]] = set()
        self._held: set[tuple[str, str]] = set()
        self._known: dict[str, None] = {}  # every node that has ever joined
        self._wires: Wires | None = None

    def __repr__(self) -> str:
        cut, held = sorted(self._cut), sorted(self._held)
        return f"SimNetwork({self.link!r}, nodes={list(self.nodes)}, cut={cut}, held={held})"

    def transport(self) -> "SimTransport":
        """Return the transport of one more node."""
        return SimTransport(self)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that are there, in the order in which they joined."""
        gone = self._wires is None or self._wires.loop.is_closed()
        return () if gone or self._wires is None else tuple(self._wires.places)

    # --- what goes wrong

    def cut(self, one: Nodes, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """Lose all that is sent from `one` to `other`, and back. Nobody is told."""
        self._cut.update(self._pairs(one, other, one_way))

    def heal(self, one: Nodes | None = None, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """End cuts: between these nodes, or all of them. Who could not connect, does now."""
        self._cut.difference_update(self._cut.copy() if one is None else self._pairs(one, other, one_way))
        if self._wires is not None and self.nodes:
            self._wires.connect()

    def hold(self, one: Nodes, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """Let all wait that is sent from `one` to `other`, and back."""
        self._held.update(self._pairs(one, other, one_way))

    def release(self, one: Nodes | None = None, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """End holds: between these nodes, or all of them. What waited arrives, in order, as if it was sent now."""
        pairs = list(permutations(self._known, 2)) if one is None else self._pairs(one, other, one_way)
        self._held.difference_update(self._held.copy() if one is None else pairs)
        if self._wires is not None and self.nodes:
            for pair in pairs:
                self._wires.release(pair)
            self._wires.connect()

    def crash(self, node: str) -> None:
        """Let `node` be gone, without a word to anybody; what is sent to it vanishes, until it has joined again.

        Raises:
            ValueError: It is not there.
        """
        if self._wires is None or node not in self.nodes:
            raise ValueError(f"there is no node {node!r} to crash in {self!r}")
        self._wires.crash(self._wires.places[node])

    def _pairs(self, one: Nodes, other: Nodes | None, one_way: bool) -> list[tuple[str, str]]:
        """Return who sends, and who receives."""
        ones = [one] if isinstance(one, str) else list(one)
        if other is None:
            others = [node for node in self._known if node not in ones]
        else:
            others = [other] if isinstance(other, str) else list(other)
        there = [(a, b) for a in ones for b in others if a != b]
        if not there:
            raise ValueError(
                f"there are no links from {ones} to {others}; the nodes that have joined: {[*self._known]}"
            )
        return list(dict.fromkeys(there if one_way else [*there, *((b, a) for a, b in there)]))

    # --- for transports

    def join(self, node: str, receiver: Receiver) -> Place:
        """Let `node` join.

        Raises:
            ValueError: A node of that name has joined already.
            RuntimeError: This is no simulation.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(loop, SimLoop):
            raise RuntimeError(  # noqa: TRY004 - the loop is no argument
                f"a SimNetwork needs a SimLoop (see meshkit.testing.simulate), not {loop!r}"
            )
        if self._wires is None or self._wires.loop is not loop:
            self._wires = Wires(loop, self._link_of, self._blocked)
        if node in self._wires.places:
            raise ValueError(f"node {node!r} cannot join {self!r}: there is a node of that name")
        place = Place(node, receiver, contextvars.copy_context())
        self._known[node] = None
        self._wires.join(place)
        return place

    def leave(self, place: Place) -> None:
        """Let a node leave; the others are told."""
        if self._wires is not None:
            self._wires.leave(place)

    def has(self, place: Place | None) -> bool:
        """Return whether this is the place of a node that is there."""
        return self._wires is not None and self._wires.has(place)

    def send(self, place: Place, to: str, frame: bytes) -> None:
        """Send a frame from a node to one of its peers.

        Raises:
            Unreachable: That is none.
            Overloaded: Too much is on its way to it.
        """
        peer = place.peers.get(to)
        if peer is None or self._wires is None:
            raise Unreachable(node=to, reason="there is no connection to it")
        if self._wires.size(place, peer) + len(frame) > self.MAX_BUFFER:
            raise Overloaded(name=f"link from node {place.node!r} to {to!r} (bytes)", limit=self.MAX_BUFFER)
        verdict = self._verdict(place.node, to, frame)
        self.verdicts[verdict] += 1
        self._wires.loop.note(f"{place.node} > {to}: {len(frame)} bytes, {verdict.value}")
        packet = Packet(place, peer, frame)
        if verdict is Verdict.HOLD:
            self._wires.hold(packet)
        elif verdict is not Verdict.LOSE:
            self._wires.carry(packet, late=verdict is Verdict.REORDER)
            if verdict is Verdict.DUPLICATE:
                self._wires.carry(packet, late=True)

    def _link_of(self, sender: str, to: str) -> Link:
        return self.links.get((sender, to), self.link)

    def _blocked(self, sender: str, to: str) -> Verdict | None:
        if (sender, to) in self._cut:
            return Verdict.LOSE
        return Verdict.HOLD if (sender, to) in self._held else None

    def _verdict(self, sender: str, to: str, frame: bytes) -> Verdict:
        verdict = self._blocked(sender, to)
        rules = iter(self.rules)
        while verdict is None and (rule := next(rules, None)) is not None:
            verdict = rule(sender, to, frame)
        if verdict is not None or self._wires is None:
            return verdict or Verdict.LOSE
        return self._link_of(sender, to).verdict(self._wires.rng.random())


class SimTransport:
    """Connects one runtime to a `SimNetwork`. Ordered and lossless, but for the faults of the network."""

    exposed = False

    def __init__(self, network: SimNetwork) -> None:
        self._network = network
        self._place: Place | None = None

    def __repr__(self) -> str:
        return f"SimTransport({self._network!r}, node={self._place.node if self._place else None!r})"

    @property
    def in_process(self) -> bool:
        """Whether frames need no proof: unless the network wants it."""
        return not self._network.proved

    @property
    def peers(self) -> Collection[str]:
        """The nodes that it is connected with."""
        return list(self._place.peers) if self._place is not None and self._network.has(self._place) else []

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        """Join the network as `node`."""
        if self._network.has(self._place):
            raise RuntimeError(f"{self!r} is in use: give each runtime a transport of its own")
        self._place = self._network.join(node, receiver)

    def send(self, to: str, frame: bytes) -> None:
        """Send `frame` to the node `to`."""
        self._network.send(self._joined(), to, frame)

    def broadcast(self, frame: bytes) -> None:
        """Send `frame` to every node that it is connected with; those to whom too much is on its way miss it."""
        place = self._joined()
        for peer in list(place.peers):
            with contextlib.suppress(Overloaded):
                self._network.send(place, peer, frame)

    async def close(self) -> None:
        """Leave the network; closing twice is harmless."""
        place, self._place = self._place, None
        if place is not None:
            self._network.leave(place)

    def _joined(self) -> Place:
        if self._place is None:
            raise Closed(name=repr(self))
        return self._place
