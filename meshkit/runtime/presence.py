"""Presence: which other nodes are up, and what they handle.

Each node announces itself when it joins, and every few seconds; one that has been silent for `PATIENCE` of its own
intervals (three of its signs of life are missing, then), or says goodbye, is gone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from meshkit.events import Event
from meshkit.runtime.wire import Beat

__all__ = ["Peer", "PeerGone", "PeerUp", "Presence"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node that is up."""

    node: str
    """Its id."""
    name: str
    """What it calls itself."""
    kinds: tuple[str, ...] = ()
    """The kinds of requests that it handles."""
    draining: bool = False
    """Whether it is about to stop, and takes no new requests."""


@dataclass(frozen=True, slots=True)
class PeerUp(Event):
    """A node is up that was not, or has other things to say of itself."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerGone(Event):
    """A node is gone."""

    node: str
    reason: str


class Presence:
    """The core: who was heard of, when, and until when that will do."""

    PATIENCE = 3.5
    MAX_PEERS = 10_000
    """More are not heard: they can still be called, by their ids."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self._until: dict[str, float] = {}  # by node that is up
        self.silent: dict[str, bool] = {}  # nodes that were up, and then were silent for too long

    def heard(self, node: str, beat: Beat, now: float) -> PeerUp | None:
        """Take note of a sign of life; return what is new."""
        if node not in self.peers and len(self.peers) >= self.MAX_PEERS:
            return None
        peer = Peer(node, beat.name, beat.kinds, beat.draining)
        self._until[node] = now + self.PATIENCE * max(0.0, beat.every)
        self.silent.pop(node, None)
        if self.peers.get(node) == peer:
            return None
        self.peers[node] = peer
        return PeerUp(peer)

    def forget(self, node: str) -> bool:
        """Take note that a node has gone; return whether it was up."""
        self.silent.pop(node, None)
        self._until.pop(node, None)
        return self.peers.pop(node, None) is not None

    def fallen_silent(self, now: float) -> list[str]:
        """Return the nodes that have been silent for too long, and forget them but for their silence."""
        silent = [node for node, until in self._until.items() if until <= now]
        for node in silent:
            self.forget(node)
            if len(self.silent) >= self.MAX_PEERS:
                del self.silent[next(iter(self.silent))]
            self.silent[node] = True
        return silent

    def that_handle(self, kind: str) -> Iterable[str]:
        """Return the nodes that are up and take requests of this kind."""
        return (node for node, peer in self.peers.items() if kind in peer.kinds and not peer.draining)
