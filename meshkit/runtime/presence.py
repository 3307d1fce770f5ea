"""Presence: which other nodes are up, and what they handle.

Each node that has a heartbeat says so when it starts, every few seconds, when it begins to drain and when it leaves.
One that has been silent for `PATIENCE` of its own intervals (three of its signs of life are missing, then) is gone:
what it waits for is given up. Should it be heard again, it is told so, since it may have noticed nothing.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from meshkit import _time
from meshkit.events import Event, Observer, notify
from meshkit.faults import buggify
from meshkit.runtime.message import is_name
from meshkit.runtime.wire import Beat, Wire

__all__ = ["Heartbeat", "Peer", "PeerGone", "PeerUp", "Presence"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node that is up."""

    node: str
    """Its id."""
    name: str
    """What it calls itself: a label, that others may bear, too."""
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
    """The core: who was heard of, and until when that will do."""

    PATIENCE = 3.5
    """Intervals of silence after which a node is gone. The last one counts from when that was looked at: a loop that
    stood still has heard then what waited for it, and so have others that are on it."""
    LONGEST = 1e6
    """Seconds between two signs of life, at most: a node that claims another number is taken to have said this one."""
    MAX_PEERS = 10_000
    """More are not heard: they can still be called, by their ids."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.silent: dict[str, bool] = {}  # nodes that were up, and of which nothing has been heard for too long
        self.lost: dict[str, bool] = {}  # nodes that the transport has lost, and not found again
        self._until: dict[str, float] = {}  # by node that is up
        self._last: dict[str, float] = {}  # by node that is up: seconds that it has when those until then are over
        self._handling: dict[str, list[Peer]] = {}  # by kind that was looked for, until somebody comes, changes or goes

    def heard(self, node: str, beat: Beat, now: float) -> float:
        """Take note of a sign of life; return when to look whether another came (never, if there is no room)."""
        if node not in self.peers and len(self.peers) >= self.MAX_PEERS:
            return math.inf
        every = beat.every if 0 < beat.every < self.LONGEST else self.LONGEST
        self.silent.pop(node, None)
        peer = Peer(node, beat.name if is_name(beat.name) else node, beat.kinds, beat.draining)
        if self.peers.get(node) != peer:
            self.peers[node] = peer
            self._handling.clear()
        self._last[node] = every
        self._until[node] = now + (self.PATIENCE - 1) * every
        return self._until[node]

    def forget(self, node: str) -> bool:
        """Take note that a node has gone; return whether it was up."""
        self.silent.pop(node, None)
        self._until.pop(node, None)
        self._last.pop(node, None)
        self._handling.clear()
        return self.peers.pop(node, None) is not None

    def fallen_silent(self, now: float) -> list[str]:
        """Return the nodes that have been silent for too long, and forget them but for their silence."""
        overdue = [node for node, until in self._until.items() if until <= now]
        silent = [node for node in overdue if node not in self._last]
        for node in silent:
            self.forget(node)
            self._note(self.silent, node)
        for node in overdue:
            if node in self._last:
                self._until[node] = now + self._last.pop(node)
        return silent

    def lose(self, node: str) -> bool:
        """Take note that the transport has lost a node; return whether it was up."""
        self._note(self.lost, node)
        return self.forget(node)

    def _note(self, nodes: dict[str, bool], node: str) -> None:
        if len(nodes) >= self.MAX_PEERS:
            del nodes[next(iter(nodes))]
        nodes[node] = True

    def wake_at(self) -> float:
        """Return when to look next whether nodes have been silent for too long. Cost: O(nodes)."""
        return min(self._until.values(), default=math.inf)

    def that_handle(self, kind: str) -> Sequence[Peer]:
        """Return the nodes that are up and handle requests of this kind, the draining ones, too.

        Cost: O(1), but O(nodes) after any of them has come, changed or gone, and for a kind that nobody handles.
        """
        found = self._handling.get(kind)
        if found is None:
            found = [peer for peer in self.peers.values() if kind in peer.kinds]
            if found:  # else whoever makes up kinds could fill the memory
                self._handling[kind] = found
        return found


class Heartbeat:
    """What one node lets others hear (`beat`; None: nothing), and what it hears of them. It has timers, and no task.

    `post(to, wire)` sends, to every node if `to` is None. `gone(node)` is called once a node has gone of itself: it has
    fallen silent, or started again.
    """

    DRAIN_TIMEOUT = 1.0
    """Seconds that others have to say that they know that this node is draining."""

    def __init__(
        self,
        presence: Presence,
        beat: Beat | None,
        post: Callable[[str | None, Beat], None],
        gone: Callable[[str], None],
        observer: Observer | None,
    ) -> None:
        self.silent = presence.silent
        self._presence = presence
        self._beat = beat
        self._post = post
        self._gone = gone
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._next_beat: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._unaware: set[str] = set()  # nodes that do not know yet that this one is draining
        self._aware: asyncio.Future[None] = self._loop.create_future()  # when all do
        self._stopped = False

    # --- what others hear

    def start(self) -> None:
        """Greet the others: this node is ready. From now on they hear of it regularly."""
        self._say_on_time(greets=True)

    def _say_on_time(self, *, greets: bool = False) -> None:
        if self._beat is not None:
            self._say(None, greets=greets)
            # At most one in a row, and never the greeting: that leaves others enough to hear within their patience.
            beats = 2 if buggify("heartbeat: one is left out") else 1
            self._next_beat = self._loop.call_later(beats * self._beat.every, self._say_on_time)

    def found(self, node: str) -> None:
        """Let a node that can be reached now hear that this one is up, if it is ready."""
        if self._next_beat is not None:
            self._say(node, greets=self._presence.lost.pop(node, False))

    def _say(self, to: str | None, *, greets: bool = False, answers: bool = False) -> None:
        if self._beat is not None:
            self._post(to, msgspec.structs.replace(self._beat, greets=greets, answers=answers))

    async def drain(self) -> None:
        """Tell the others that this node takes no new work, and wait until they have heard it.

        What they ask arrives in the order in which they sent it. So when each has said that it knows, whatever they
        asked before has arrived, and was answered; nothing is under way to a node that is not there any more.
        """
        if self._next_beat is None or self._beat is None:
            return
        self._beat = msgspec.structs.replace(self._beat, draining=True)
        self._unaware = set(self._presence.peers)
        self._say(None, greets=True)
        if self._unaware:
            await asyncio.wait([self._aware], timeout=self.DRAIN_TIMEOUT)

    def stop(self) -> None:
        """Fall silent, and listen no more."""
        self._stopped = True
        for timer in (self._next_beat, self._watch):
            if timer is not None:
                timer.cancel()
        for node in [*self._presence.peers, *self._presence.silent]:
            self._presence.forget(node)

    # --- what it hears

    def heard_again(self, node: str, wire: Wire) -> None:
        """Take note that a silent node has sent something.

        It may not have noticed that it was given up (its loop stood still; or only one direction was cut), and would
        wait for what will not come: a greeting tells it.
        """
        del self.silent[node]
        if self._next_beat is not None and not (isinstance(wire, Beat) and wire.greets):  # else it waits for nothing
            self._say(node, greets=True)

    def heard(self, node: str, beat: Beat) -> None:
        """Take note of a sign of life."""
        if self._stopped:
            return
        presence, now = self._presence, _time.now()
        if beat.greets and not beat.draining and node in presence.peers:
            self.forget(node, "it has started again, or had given this node up")  # and nobody had noticed
            self._gone(node)
        before = presence.peers.get(node)
        until = presence.heard(node, beat, now)
        if until < (math.inf if self._watch is None else self._watch.when()):
            self._watch_until(until)
        if beat.greets and self._next_beat is not None:
            self._say(node, answers=True)
        if beat.answers:
            self._knows(node)
        peer = presence.peers.get(node)
        if peer is not None and peer != before:
            notify(self._observer, PeerUp(peer))

    def lost(self, node: str) -> None:
        """Take note that the transport has lost a node."""
        self._is_gone(node, "the connection is gone", was_up=self._presence.lose(node))

    def forget(self, node: str, reason: str) -> None:
        """Take note that a node has gone."""
        self._is_gone(node, reason, was_up=self._presence.forget(node))

    def _is_gone(self, node: str, reason: str, *, was_up: bool) -> None:
        self._knows(node)
        if was_up:
            notify(self._observer, PeerGone(node, reason))

    def _knows(self, node: str) -> None:
        if node in self._unaware:
            self._unaware.remove(node)
            if not self._unaware and not self._aware.done():
                self._aware.set_result(None)

    def _watch_until(self, when: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = None if when == math.inf else self._loop.call_at(when, self._look)

    def _look(self) -> None:
        """Take note of the nodes that have been silent for too long."""
        for node in self._presence.fallen_silent(_time.now()):
            self._knows(node)
            self._gone(node)
            notify(self._observer, PeerGone(node, "it has fallen silent"))
        self._watch_until(self._presence.wake_at())
