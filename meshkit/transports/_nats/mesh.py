"""One run of a transport over NATS, from its start to its close: its connection, and who is up."""

import asyncio
import functools
import logging
import ssl
from collections import deque
from dataclasses import dataclass

import anyio

from meshkit._entropy import random_bytes
from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.identity import public_key_of
from meshkit.runtime.transport import Receiver
from meshkit.transports._nats.announcement import NO_ECHO, SESSION_SIZE, Announcement, Says
from meshkit.transports._nats.company import Company
from meshkit.transports._nats.connector import Connector
from meshkit.transports._nats.limits import NatsLimits
from meshkit.transports._nats.link import Link, connect
from meshkit.transports._nats.servers import Server, Servers

__all__ = ["Mesh", "Options"]

_log = logging.getLogger("meshkit.transports.nats")
_ALL, _HERE = b"all", b"here"
_key_of = functools.lru_cache(2_000)(public_key_of)  # it takes 100 µs


@dataclass(frozen=True, slots=True)
class Options:
    """What a `NatsTransport` was given."""

    subject: str
    tls: ssl.SSLContext | None
    credentials: str | None
    limits: NatsLimits


class Mesh:
    """A node on NATS.

    These are its subjects; each begins with that of the mesh:

        <to>.<from>       a frame from one node to another; the reply subject is <from>.<to>
        all.<from>        a frame to every node
        <to>.<from>.here, all.<from>.here: an announcement

    Each connection is a session of its own: when it breaks, what was under way is lost, and so is every peer; those
    that are still there are found again in the next one.
    """

    TICKS = 4
    """In each heartbeat."""
    QUIET = 6
    """Ticks without a sign of life, after which a server is lost."""
    MOST_TOLD = 100
    """Things that are logged once: others could make up more."""

    def __init__(self, receiver: Receiver, prover: Prover, servers: Servers, options: Options) -> None:
        self.company = Company(b"", options.limits.max_peers)
        self.link: Link | None = None
        self._receiver = receiver
        self._prover = prover
        self._options = options
        self._node = prover.identity.node_id.encode()
        self._prefix = options.subject.encode() + b"."
        self._loop = asyncio.get_running_loop()
        self._joined: asyncio.Future[None] = self._loop.create_future()
        self._connector = Connector(servers, self._connect)
        self._keeper = self._loop.create_task(self._keep(), name=f"meshkit:{prover.name}:nats:connection")
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticks = self._quiet = 0
        self._number = 0  # of the announcements of this session
        self._sessions: deque[bytes] = deque(maxlen=16)  # of this node: what is under way of the last ones may come
        self._missed: set[str] = set()  # nodes that were lost, and have not come back
        self._told: set[str] = set()  # what is logged once

    # --- for the transport

    async def join(self) -> None:
        """Return when the node is connected.

        Raises:
            OSError: No server lets it in; the message says why.
            Closed: It was closed meanwhile.
        """
        await asyncio.wait([self._joined, self._keeper], return_when=asyncio.FIRST_COMPLETED)
        if self._closed:
            raise Closed(name="NatsTransport")
        if self._keeper.done():
            self._keeper.result()

    def send(self, to: str, frame: bytes) -> None:
        """Send a frame to one node."""
        if to not in self.company.peers:
            raise Unreachable(node=to, reason=self._connector.trouble or "no node of this id has announced itself")
        target = to.encode()
        self._publish(b"%b.%b" % (target, self._node), frame, b"%b%b.%b" % (self._prefix, self._node, target))

    def broadcast(self, frame: bytes) -> None:
        """Send a frame to every node."""
        if self.company.peers:
            self._publish(b"%b.%b" % (_ALL, self._node), frame)

    def _publish(self, subject: bytes, frame: bytes, reply: bytes = b"") -> None:
        link, limit = self.link, self._options.limits.max_buffer
        if link is not None:  # else there are no peers
            unsent = link.unsent
            if unsent and unsent + len(frame) > limit:
                raise Overloaded(name=f"connection to the NATS server {link.server} (bytes)", limit=limit)
            link.publish_now(self._prefix + subject, frame, reply)

    async def close(self) -> None:
        """Say goodbye, and end. Nothing is received from the moment on at which this is called."""
        self._closed = True
        if self._loop.is_closed():
            return  # it took everything with it
        try:
            if self.link is not None:
                self._say(Says.GOODBYE)
                with anyio.move_on_after(self._options.limits.close_timeout):
                    await self.link.taken_in()
        finally:
            with anyio.CancelScope(shield=True):  # it waits for nobody else
                while not self._keeper.done():  # wait_for(), in the client, swallows a cancellation now and then
                    self._keeper.cancel()
                    await asyncio.wait([self._keeper], timeout=0.05)

    # --- the connection

    async def _keep(self) -> None:
        """Connect, and stay connected, until it is closed."""
        link = await self._connector.first()
        while True:
            self._up(link)
            try:
                await asyncio.wait([link.ended])
            except asyncio.CancelledError:  # by `close`, or by whoever ends the loop
                self._closed = True
                raise
            finally:
                self._down(link)
                with anyio.CancelScope(shield=True):
                    await link.abort()
            if self._closed:
                return
            link = await self._connector.again()

    async def _connect(self, server: Server) -> Link:
        options = self._options
        return await connect(
            server,
            [self._prefix + b"%b.>" % self._node, self._prefix + b"%b.>" % _ALL],
            name=self._node.decode(),
            max_frame=options.limits.max_frame,
            timeout=options.limits.connect_timeout,
            tls=options.tls,
            credentials=options.credentials,
            receive=self._on_message,
            unanswered=self._on_unanswered,
        )

    def _up(self, link: Link) -> None:
        """Use a connection: ask who is there."""
        self.link = link
        self._number = self._ticks = self._quiet = 0
        session = random_bytes(SESSION_SIZE)
        self._sessions.append(session)
        self.company = Company(session, self._options.limits.max_peers)
        self._say(Says.HERE_AND_WHO_ARE_YOU)
        self._timer = self._loop.call_later(self._tick_time, self._tick)
        if not self._joined.done():
            self._joined.set_result(None)

    def _down(self, link: Link) -> None:
        """Do without the connection: nobody can be reached."""
        self.link = None
        if self._timer is not None:
            self._timer.cancel()
        peers, self.company = list(self.company.peers), Company(b"", 0)
        if not self._closed:
            self._connector.lost(link)
            for node in peers:
                self._receiver.lost(node)

    @property
    def _tick_time(self) -> float:
        return self._options.limits.heartbeat / self.TICKS

    def _tick(self) -> None:
        """Look after the nodes and the server. Ticks are counted, not seconds: a node that stood still misses none."""
        link = self.link
        if link is None or self._closed:
            return None
        self._timer = self._loop.call_later(self._tick_time, self._tick)
        self._quiet = 0 if link.was_heard() else self._quiet + 1
        if self._quiet >= self.QUIET:
            return link.end(f"nothing came from it for {self.QUIET * self._tick_time:g} s")
        self._ticks += 1
        if self._ticks % 2 == 0:
            link.ping()
            self._say(Says.HERE)
        for node in self.company.tick():
            self._is_lost(node, "nothing was heard of it in two heartbeats, or nobody takes what is sent to it")
        return None

    # --- announcements

    def _say(self, says: Says, to: str | None = None, echo: bytes = NO_ECHO) -> None:
        if self.link is not None:
            self._number += 1
            target = _ALL if to is None else to.encode()
            subject = self._prefix + b"%b.%b.%b" % (target, self._node, _HERE)
            told = Announcement(says, self.company.session, self._number, echo)
            self.link.publish_now(subject, told.signed(self._prover.identity, subject))

    def _on_message(self, subject: bytes, data: bytes) -> None:
        """Take what was published on a subject of this node, or on one for all."""
        if self._closed or self.link is None:  # it is what a connection had that is not used yet, or not any more
            return
        parts = subject[len(self._prefix) :].split(b".")
        sender = parts[1].decode("ascii", "replace")
        if len(parts) == 2:
            if sender in self.company.peers:
                self._receiver.received(sender, data)
        elif parts[2:] == [_HERE]:
            self._on_announcement(sender, subject, data)

    def _on_announcement(self, node: str, subject: bytes, data: bytes) -> None:
        if node != self._prover.identity.node_id and not self._prover.trusts(node):
            self._tell_once(
                f"node {node!r:.60} is on NATS, and is not trusted: add its id to trust=, if it shall get in"
            )
            return
        try:
            told = Announcement.read(data, subject, _key_of(node))
        except ValueError:
            return  # there is no such node
        if told is None:
            return
        if node == self._prover.identity.node_id:
            if told.echo == self.company.session:
                self._tell_once("another node has the key of this one: each node needs a key of its own")
            elif told.session not in self._sessions and self.company.may_ask(node, told.session):
                self._say(Says.HERE, node, told.session)  # it may be a replay of what this node has said long ago
            return
        then = self.company.heard(node, told)
        if then.lost:
            self._is_lost(node, "" if then.found else "it has left")
        if then.answer is not None:
            self._say(then.answer, node, told.session)
        if then.found:
            if node in self._missed:
                self._missed.discard(node)
                _log.info("node %s is back", node)
            self._receiver.found(node)
        if then.full:
            self._tell_once(f"there are more nodes than the {self._options.limits.max_peers} that may be peers")

    def _on_unanswered(self, subject: bytes) -> None:
        """Take note that the server has nobody who takes what was sent to a node; anybody could have said so."""
        node = subject.rpartition(b".")[2].decode("ascii", "replace")
        if not self._closed and self.company.doubt(node):
            self._say(Says.HERE_AND_WHO_ARE_YOU, node)

    def _is_lost(self, node: str, reason: str) -> None:
        if reason == "it has left":
            _log.info("node %s has left", node)
        elif reason and len(self._missed) < self._options.limits.max_peers:
            self._missed.add(node)
            _log.warning("node %s is lost: %s", node, reason)
        self._receiver.lost(node)

    def _tell_once(self, text: str) -> None:
        if text not in self._told and len(self._told) < self.MOST_TOLD:
            self._told.add(text)
            _log.warning(text)
