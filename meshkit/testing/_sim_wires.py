"""What is on its way in a simulated network, and who is connected with whom."""

import asyncio
import contextvars
import enum
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from meshkit import _check
from meshkit.runtime.transport import Receiver
from meshkit.testing.sim_loop import SimLoop

LATE = 10
"""How many times as long again a frame takes, at most, that is to arrive late."""

LATE_OF = 0.001
"""Seconds that count at least in this, or nothing would come late on a link without a delay."""

SILENCE = 15.0
"""Seconds after which a connection with a node that has crashed is given up."""


class Verdict(enum.Enum):
    """What becomes of a frame."""

    DELIVER = "deliver"
    """It arrives, after those that were sent before it."""
    LOSE = "lose"
    """It never arrives, and nobody is told."""
    DUPLICATE = "duplicate"
    """It arrives, and once more later."""
    REORDER = "reorder"
    """It arrives late, and later ones may overtake it."""
    HOLD = "hold"
    """It waits until its link is released."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How frames go from one node to another.

    `delay` and `jitter` are seconds: each frame takes the delay and up to as much as the jitter. The others are
    probabilities, for each frame, of its `Verdict`. A frame that is to arrive late takes up to ten times as long again,
    and up to 10 ms at least.
    """

    delay: float = 0.001
    jitter: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0

    def __post_init__(self) -> None:
        for name in ("delay", "jitter"):
            _check.duration(name, getattr(self, name), zero=True)
        chances = {each.name: getattr(self, each.name) for each in fields(self)[2:]}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"{name} must be a probability, from 0 to 1, not {chance!r}")
        if math.fsum(chances.values()) > 1:
            raise ValueError(f"the probabilities must be 1 at most together, not {chances}")

    def verdict(self, drawn: float) -> Verdict:
        """Return what becomes of a frame; `drawn` is a random number, from 0 on and below 1."""
        for verdict, chance in (
            (Verdict.LOSE, self.loss),
            (Verdict.DUPLICATE, self.duplication),
            (Verdict.REORDER, self.reordering),
        ):
            if drawn < chance:
                return verdict
            drawn -= chance
        return Verdict.DELIVER


@dataclass(eq=False)
class Place:
    """A node, from its start to its end: one that comes back has another place."""

    name: str  # what the network calls it
    node: str  # what nodes call it: its id
    receiver: Receiver
    context: contextvars.Context  # in which the node is called: it says on which machine that is
    peers: "dict[str, Place]" = field(default_factory=dict[str, "Place"])  # by their ids
    crashed: bool = False


@dataclass(eq=False)
class Packet:
    """A frame on its way, or the end of a connection, which is a packet without a frame."""

    sender: Place
    to: Place
    frame: bytes | None

    @property
    def size(self) -> int:
        return 0 if self.frame is None else len(self.frame)


@dataclass(eq=False)
class Pipe:
    """What is on its way from one node to another."""

    last: float = 0.0  # when the last of those that keep their order arrives
    size: int = 0  # bytes
    held: deque[Packet] = field(default_factory=deque[Packet])


class Wires:
    """Carries packets from node to node, and keeps the connections. What is to be lost does not come here.

    Nodes are told apart by their names.
    """

    def __init__(
        self, loop: SimLoop, link_of: Callable[[str, str], Link], blocked: Callable[[str, str], Verdict | None]
    ) -> None:
        """`link_of` says how packets go from one node to another, `blocked` whether the way is cut or held."""
        self.loop = loop
        self.rng: random.Random = loop.stream("network")
        self.places: dict[str, Place] = {}
        self._pipes: dict[tuple[str, str], Pipe] = {}
        self._under_way: dict[int, asyncio.TimerHandle] = {}
        self._numbers = itertools.count()
        self._link_of = link_of
        self._blocked = blocked
        self._outside = contextvars.Context()  # on no machine: the delays are those of the simulation

    # --- packets

    def size(self, sender: Place, to: Place) -> int:
        """Return how many bytes are on their way."""
        return self._pipe(sender, to).size

    def hold(self, packet: Packet) -> None:
        """Let a packet wait until its link is released."""
        pipe = self._pipe(packet.sender, packet.to)
        pipe.size += packet.size
        pipe.held.append(packet)

    def release(self, pair: tuple[str, str]) -> list[Packet]:
        """Return what was held, in order: it waits no more."""
        pipe = self._pipes.get(pair)
        if pipe is None:
            return []
        packets = list(pipe.held)
        pipe.held.clear()
        pipe.size -= sum(packet.size for packet in packets)
        return packets

    def carry(self, packet: Packet, *, late: bool = False) -> None:
        """Let a packet arrive in its time: after those before it, and, if it is `late`, perhaps after later ones."""
        pipe = self._pipe(packet.sender, packet.to)
        link = self._link_of(packet.sender.name, packet.to.name)
        delay = link.delay + link.jitter * self.rng.random()
        arrival = max(pipe.last, self.loop.now + delay)
        if late:
            arrival += LATE * max(delay, LATE_OF) * self.rng.random()
        else:
            pipe.last = arrival
        self._at(arrival, packet)

    def _at(self, arrival: float, packet: Packet) -> None:
        """Let a packet arrive at that time."""
        pipe = self._pipe(packet.sender, packet.to)
        pipe.size += packet.size
        number = next(self._numbers)
        self._under_way[number] = self._outside.run(
            self.loop.call_at, arrival, self._arrive, number, pipe, packet, context=packet.to.context
        )

    def _pipe(self, sender: Place, to: Place) -> Pipe:
        return self._pipes.setdefault((sender.name, to.name), Pipe())

    def _arrive(self, number: int, pipe: Pipe, packet: Packet) -> None:
        del self._under_way[number]
        pipe.size -= packet.size
        sender, place = packet.sender, packet.to
        if place.crashed:
            return
        if not self.has(place):
            if packet.frame is not None:  # there is a computer, but nobody who listens: the sender is told
                self._end(place, sender)
        elif place.peers.get(sender.node) is not sender:
            return  # it belongs to a connection that has ended
        elif packet.frame is None:
            del place.peers[sender.node]
            place.receiver.lost(sender.node)
        else:
            place.receiver.received(sender.node, packet.frame)

    # --- connections

    def has(self, place: Place | None) -> bool:
        """Return whether this is the place of a node that has joined, and is still there."""
        return place is not None and self.places.get(place.name) is place and not self.loop.is_closed()

    def join(self, place: Place) -> None:
        """Let a node join, and connect it with those that it can reach."""
        self.places[place.name] = place
        self.connect(joins=place)

    def leave(self, place: Place) -> None:
        """Let a node leave; the others are told, as far as it can reach them."""
        if self.has(place):
            for peer in place.peers.values():
                self._end(place, peer)
            self._remove(place)

    def crash(self, place: Place) -> None:
        """Let a node be gone, without a word; its peers notice when their connections with it have timed out."""
        place.crashed = True
        for peer in place.peers.values():
            self._at(self.loop.now + SILENCE, Packet(place, peer, None))
        self._remove(place)

    def _remove(self, place: Place) -> None:
        del self.places[place.name]
        place.peers.clear()
        if not self.places:  # nobody is there for whom anything could arrive
            for timer in self._under_way.values():
                timer.cancel()
            self._under_way.clear()
            self._pipes.clear()

    def connect(self, joins: Place | None = None) -> None:
        """Connect those that are not connected, and can be; `joins` is who starts just now, and need not be told."""
        places = list(self.places.values())
        for number, one in enumerate(places):
            for other in places[:number]:
                connected = one.peers.get(other.node) is other and other.peers.get(one.node) is one
                ways = (one.name, other.name), (other.name, one.name)
                if not connected and not any(self._blocked(*way) for way in ways):
                    for place, peer in ((other, one), (one, other)):
                        again = place.peers.pop(peer.node, None) is not None
                        place.peers[peer.node] = peer
                        if place is not joins:
                            self.loop.call_soon(self._tell, place, peer, again, context=place.context)

    def _end(self, place: Place, peer: Place) -> None:
        """Tell `peer` that its connection with `place` has ended."""
        blocked = self._blocked(place.name, peer.name)
        if blocked is Verdict.HOLD:
            self.hold(Packet(place, peer, None))
        elif blocked is None:
            self.carry(Packet(place, peer, None))

    def _tell(self, place: Place, peer: Place, again: bool) -> None:
        """Tell a node that it is connected with another one; before that, that an earlier connection has ended."""
        if again and self.has(place):
            place.receiver.lost(peer.node)
        if self.has(place) and place.peers.get(peer.node) is peer:
            place.receiver.found(peer.node)
