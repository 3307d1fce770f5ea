"""Presence: nodes verify that others are there, and spread the news of those who are not.

Who hears such news verifies it. Verifying is limited to one ping per peer and window: whoever asks more often gets the
last answer, so that news does not become a storm of pings. News that comes from several nodes at once is heard once.

A runtime notices by itself who has fallen silent, some seconds later than this, and does not ask anybody else.
"""

import anyio
import msgspec

from examples.mesh.names import name_of
from meshkit import DedupCache, MeshkitError, Message, RateLimiter, Service, broadcast, handles, request


class Ping(msgspec.Struct, frozen=True):
    """Asks whether somebody is there."""


class News(msgspec.Struct, frozen=True):
    """Somebody has gone silent, or is back."""

    about: str
    present: bool


PING = request("presence:ping", Ping, reply=bool)
NEWS = broadcast("presence:news", News)


class Presence(Service):
    """Knows who is there."""

    name, emoji = "presence", "👋"

    def __init__(self, *, every: float = 1.0) -> None:
        self.every = every
        self.pings = RateLimiter(max_count=1, window=every, name="pings per peer")
        self.gossip = DedupCache(ttl=5 * every, name="news")
        self.silent: set[str] = set()  # who does not answer this node
        self.repeated = 0

    async def start(self) -> None:
        """Look around for as long as this node is up."""
        self.spawn(self.look_around)

    async def look_around(self) -> None:
        """Verify every peer in turn, and tell the others of any change."""
        while True:
            for peer in sorted(self.rt.peers):
                present = await self.verify(peer)
                known = self.rt.peers.get(peer)
                if known is None or known.draining:
                    continue  # it leaves the mesh, or is gone for the runtime too: that is no news
                if self.note(peer, present=present):
                    await self.rt.emit(NEWS, News(peer, present))
            await anyio.sleep(self.every)

    def note(self, peer: str, *, present: bool) -> bool:
        """Remember whether `peer` is there; return whether that is new."""
        if present is (peer not in self.silent):
            return False
        (self.silent.discard if present else self.silent.add)(peer)
        return True

    async def verify(self, peer: str) -> bool:
        """Say whether `peer` answers: by asking it, or from the last answer if it was asked a moment ago."""
        return await self.pings.call_or_cached(peer, self.ping, peer)

    async def ping(self, peer: str) -> bool:
        """Ask `peer` for an answer."""
        try:
            return await self.rt.call(PING, Ping(), to=peer, timeout=0.5)
        except MeshkitError:
            return False

    @handles(PING)
    async def pong(self, msg: Message[Ping]) -> bool:
        """Answer."""
        return True

    @handles(NEWS)
    async def hear(self, msg: Message[News]) -> None:
        """Take note of news, the first time that it is heard; believe it if this node finds the same."""
        news = msg.payload
        if not self.gossip.check(f"{news.about} {news.present}"):
            self.repeated += 1
            return
        self.gossip.forget(f"{news.about} {not news.present}")
        if news.about == self.rt.node:
            return
        found = await self.verify(news.about)
        self.note(news.about, present=found)
        doubt = "" if found is news.present else ", but not to me"
        about, sender = name_of(self.rt, news.about), name_of(self.rt, msg.sender)
        self.log.info("%s is %s, says %s%s", about, "back" if news.present else "silent", sender, doubt)
