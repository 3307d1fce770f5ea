"""Who is up, as far as their announcements prove it. No sockets, no clock: time is a number of ticks."""

from collections import OrderedDict
from typing import NamedTuple

from meshkit.transports._nats.announcement import Announcement, Says

__all__ = ["Company", "Then"]


class Then(NamedTuple):
    """What follows from an announcement, in this order."""

    lost: bool = False
    """The node that was there is gone: it has left, or this is a new session of it."""
    answer: Says | None = None
    """This is to be said to it, with its session as the echo."""
    found: bool = False
    """The node is up from now on."""
    full: bool = False
    """It would be, but there are as many as there may be."""


class _Peer:
    __slots__ = ("missing", "number", "session")

    def __init__(self, session: bytes, number: int) -> None:
        self.session = session
        self.number = number  # of the last announcement
        self.missing = 0  # ticks since it came


class Company:
    """The core: the nodes that have proved to be up, in one session of this node."""

    PATIENCE = 8
    """Ticks without an announcement, after which a node is lost: two heartbeats."""
    DOUBT = 2
    """The same, when the server has said that nobody takes what is sent to it."""
    MAX_PAST = 10_000
    """Sessions of nodes that were lost which are remembered, with their last number."""

    def __init__(self, session: bytes, max_peers: int) -> None:
        self.session = session
        self.peers: dict[str, _Peer] = {}
        self._max_peers = max_peers
        self._asked: set[tuple[str, bytes]] = set()  # in this tick: nodes and sessions that have proved nothing yet
        self._past: OrderedDict[tuple[str, bytes], int] = OrderedDict()  # else an echo could be used twice

    def heard(self, node: str, told: Announcement) -> Then:
        """Take note of an announcement that `node` has signed, now or at any time."""
        peer = self.peers.get(node)
        if peer is not None and told.session == peer.session:
            return self._heard_again(node, peer, told)
        if told.says is Says.GOODBYE or told.number <= self._past.get((node, told.session), -1):
            return Then()
        full = peer is None and len(self.peers) >= self._max_peers
        if told.echo != self.session:  # it may be a replay: let it prove that it is not
            if full:
                return Then(full=True)
            return Then(answer=Says.HERE_AND_WHO_ARE_YOU) if self.may_ask(node, told.session) else Then()
        if full:
            return Then(answer=Says.GOODBYE, full=True)  # it was asked when there was room
        if peer is not None:
            self._forget(node)
        self.peers[node] = _Peer(told.session, told.number)
        # The answer goes out before anything else does: so it is known there who sends that.
        return Then(lost=peer is not None, answer=_answer(told), found=True)

    def _heard_again(self, node: str, peer: _Peer, told: Announcement) -> Then:
        if told.number <= peer.number:
            return Then()  # a replay
        if told.says is Says.GOODBYE:
            peer.number = told.number
            self._forget(node)
            return Then(lost=True)
        peer.number, peer.missing = told.number, 0
        return Then(answer=_answer(told))

    def may_ask(self, node: str, session: bytes) -> bool:
        """Return whether to ask a node for proof in this session of it: once in a tick, lest others make it ask."""
        if (node, session) in self._asked or len(self._asked) >= self._max_peers:
            return False
        self._asked.add((node, session))
        return True

    def doubt(self, node: str) -> bool:
        """Take note that nobody seems to be there; return whether to ask the node, which is lost if it does not answer.

        Who says so is not proved. So it does no more than this.
        """
        peer = self.peers.get(node)
        if peer is None or peer.missing >= self.PATIENCE - self.DOUBT:
            return False
        peer.missing = self.PATIENCE - self.DOUBT
        return True

    def tick(self) -> list[str]:
        """Let one tick pass; return the nodes that are lost."""
        self._asked.clear()
        lost: list[str] = []
        for node, peer in self.peers.items():
            peer.missing += 1
            if peer.missing >= self.PATIENCE:
                lost.append(node)
        for node in lost:
            self._forget(node)
        return lost

    def _forget(self, node: str) -> None:
        peer = self.peers.pop(node)
        self._past[node, peer.session] = peer.number
        if len(self._past) > self.MAX_PAST:
            self._past.popitem(last=False)


def _answer(told: Announcement) -> Says | None:
    return Says.HERE if told.says is Says.HERE_AND_WHO_ARE_YOU else None
