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
import contextvars
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import permutations
from typing import TypeAlias

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver
from meshkit.testing._sim_wires import Link as Link, Packet, Place, Verdict as Verdict, Wires
from meshkit.testing.sim_loop import SimLoop

__all__ = ["Link", "Nodes", "Rule", "SimNetwork", "SimTransport", "Verdict"]

Rule: TypeAlias = Callable[[str, str, bytes], Verdict | None]
"""Says what becomes of a frame, given who sends it, to whom, and itself; None: it does not know."""

Nodes: TypeAlias = str | Iterable[str]
"""The name of a node, or those of several."""


class SimNetwork:
    """Connects the nodes of a simulation: give each a `transport()`, and tell the network what goes wrong.

    Nodes go by the name that `transport(name)` was given, else by their ids: in verbs, `links`, `rules` and the trace.

    Verbs take the names of one node or of several, and go both ways but for `one_way=True`; `other=None` means all
    others that are known: those that were named, and those that have ever joined. Faults concern what is sent from
    then on, not what is under way. The way from one node to another is cut or it is not, however often it was cut:
    so `heal` ends all cuts of it at once. The same goes for `hold` and `release`. What is cut and held is lost.

    `link` is how frames go where `links[sender, to]` says nothing else; both can be changed at any time. Each of
    `rules` is asked about each frame, before chance is; the first answer counts, and what it raises fails the test.
    `verdicts` counts what became of frames. With `proved`, frames are sealed and signed as between machines, and each
    node needs an identity and trust.
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
        self._known: dict[str, None] = {}  # the names of nodes that were given one, or have ever joined
        self._wires: Wires | None = None

    def __repr__(self) -> str:
        return f"SimNetwork({self.link!r}, nodes={[*self.nodes]}, cut={sorted(self._cut)}, held={sorted(self._held)})"

    def transport(self, name: str | None = None) -> "SimTransport":
        """Return the transport of one more node. It will be called `name`, or by its id."""
        return SimTransport(self, name)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that are there, in the order in which they joined."""
        wires = self._live()
        return () if wires is None else tuple(wires.places)

    # --- what goes wrong

    def cut(self, one: Nodes, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """Lose all that is sent from `one` to `other`, and back. Nobody is told.

        Raises:
            KeyError: A name is not known.
            ValueError: There is no link between them.
        """
        self._cut.update(self._pairs("cut", one, other, one_way))

    def heal(self, one: Nodes | None = None, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """End cuts: between these nodes, or all of them. Who could not connect, does now."""
        self._cut.difference_update(self._pairs("heal", one, other, one_way))
        if (wires := self._live()) is not None:
            wires.connect()

    def hold(self, one: Nodes, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """Let all wait that is sent from `one` to `other`, and back."""
        self._held.update(self._pairs("hold", one, other, one_way))

    def release(self, one: Nodes | None = None, other: Nodes | None = None, *, one_way: bool = False) -> None:
        """End holds: between these nodes, or all of them. What waited arrives now, in order; over a cut it is lost."""
        pairs = self._pairs("release", one, other, one_way)
        self._held.difference_update(pairs)
        if (wires := self._live()) is not None:
            for pair in pairs:
                for packet in wires.release(pair):
                    if pair not in self._cut:
                        wires.carry(packet)
                    elif packet.frame is not None:
                        self.verdicts[Verdict.LOSE] += 1
            wires.connect()

    def crash(self, node: str) -> None:
        """Let `node` be gone, without a word to anybody; what is sent to it vanishes, until it has joined again.

        Raises:
            ValueError: It is not there.
        """
        wires = self._live()
        if wires is None or node not in wires.places:
            raise ValueError(f"there is no node {node!r} to crash in {self!r}")
        wires.loop.note(f"{node} is gone from the network")
        wires.crash(wires.places[node])

    def _pairs(self, verb: str, one: Nodes | None, other: Nodes | None, one_way: bool) -> list[tuple[str, str]]:
        """Return who sends, and who receives; without names, all."""
        if one is None:
            if other is not None:
                raise ValueError(f"{verb} needs the nodes on this side, too, when it is given the other one")
            pairs, which = list(permutations(self._known, 2)), ["all"]
        else:
            ones = self._names(one)
            others = [name for name in self._known if name not in ones] if other is None else self._names(other)
            pairs = [(a, b) for a in ones for b in others if a != b]
            if not pairs:
                raise ValueError(
                    f"there are no links from {ones} to {others}; the nodes that there are: {[*self._known]}"
                )
            if not one_way:
                pairs = list(dict.fromkeys([*pairs, *((b, a) for a, b in pairs)]))
            which = [f"{a} > {b}" for a, b in pairs]
        if (wires := self._live()) is not None:
            wires.loop.note(f"{verb} {', '.join(which)}")
        return pairs

    def _names(self, nodes: Nodes) -> list[str]:
        names = [nodes] if isinstance(nodes, str) else list(nodes)
        for name in names:
            if name not in self._known:
                raise KeyError(f"there is no node {name!r}; there are {', '.join(self._known) or 'none'}")
        return names

    def _live(self) -> Wires | None:
        """Return the wires, unless nobody has joined in this simulation."""
        return None if self._wires is None or self._wires.loop.is_closed() else self._wires

    # --- for transports

    def know(self, name: str) -> None:
        """Take note that there is, or will be, a node of that name."""
        self._known[name] = None

    def join(self, name: str, node: str, receiver: Receiver) -> Place:
        """Let `node` join, which is called `name` here.

        Raises:
            ValueError: A node of that name or id has joined already.
            RuntimeError: This is no simulation.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(loop, SimLoop):
            raise RuntimeError(  # noqa: TRY004 - the loop is no argument
                f"a SimNetwork needs a SimLoop (see meshkit.testing.simulate), not {loop!r}"
            )
        if self._wires is None or self._wires.loop is not loop:
            self._wires = Wires(loop, self._link_of, self._blocked)
        if any(name == place.name or node == place.node for place in self._wires.places.values()):
            raise ValueError(f"node {name!r} cannot join {self!r}: there is a node of that name, or of its id")
        place = Place(name, node, receiver, contextvars.copy_context())
        self.know(name)
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
            raise Overloaded(name=f"link from node {place.name!r} to {peer.name!r} (bytes)", limit=self.MAX_BUFFER)
        verdict = self._verdict(self._wires, place.name, peer.name, frame)
        self.verdicts[verdict] += 1
        self._wires.loop.note(f"{place.name} > {peer.name}: {len(frame)} bytes, {verdict.value}")
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

    def _verdict(self, wires: Wires, sender: str, to: str, frame: bytes) -> Verdict:
        """Return what becomes of a frame; the sender would hide what a rule raises."""
        try:
            verdict = self._blocked(sender, to) or self._ruling(sender, to, frame)
            return verdict or self._link_of(sender, to).verdict(wires.rng.random())
        except Exception as error:  # noqa: BLE001 - it is passed on
            wires.loop.call_exception_handler({"message": f"a frame from {sender} to {to} is lost", "exception": error})
            return Verdict.LOSE

    def _ruling(self, sender: str, to: str, frame: bytes) -> Verdict | None:
        for rule in list(self.rules):
            verdict: object = rule(sender, to, frame)
            if isinstance(verdict, Verdict):
                return verdict
            if verdict is not None:
                raise TypeError(f"the rule {rule!r} must return a Verdict or None, not {verdict!r}")
        return None


class SimTransport:
    """Connects one runtime to a `SimNetwork`. Ordered and lossless, but for the faults of the network."""

    exposed, max_frame = False, 1024 * 1024

    def __init__(self, network: SimNetwork, name: str | None = None) -> None:
        self._network, self._name = network, name
        if name is not None:
            network.know(name)
        self._place: Place | None = None

    def __repr__(self) -> str:
        return f"SimTransport({self._network!r}, node={self._place.name if self._place else self._name!r})"

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
        self._place = self._network.join(node if self._name is None else self._name, node, receiver)

    def send(self, to: str, frame: bytes) -> None:
        """Send `frame` to the node `to`."""
        self._network.send(self._joined(), to, frame)

    def broadcast(self, frame: bytes) -> Mapping[str, Overloaded]:
        """Send `frame` to every node that it is connected with; return those to whom too much is on its way."""
        place, missed = self._joined(), dict[str, Overloaded]()
        for peer in list(place.peers):
            try:
                self._network.send(place, peer, frame)
            except (Overloaded, Unreachable) as error:  # a rule may have let somebody crash meanwhile
                if isinstance(error, Overloaded):
                    missed[peer] = error
        return missed

    async def close(self) -> None:
        """Leave the network; closing twice is harmless."""
        place, self._place = self._place, None
        if place is not None:
            self._network.leave(place)

    def _joined(self) -> Place:
        if self._place is None:
            raise Closed(name=repr(self))
        return self._place
