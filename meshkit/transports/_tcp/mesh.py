"""One run of a transport over TCP, from its start to its close: who is connected to this node, and who is told what."""

import asyncio
import logging
import math
import ssl
from collections.abc import Mapping

from meshkit import _time
from meshkit._entropy import random_bytes
from meshkit.errors import Closed, Overloaded
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver
from meshkit.transports._tcp.dial import Dialler
from meshkit.transports._tcp.handshake import Handshake
from meshkit.transports._tcp.limits import TcpLimits
from meshkit.transports._tcp.link import Link
from meshkit.transports._tcp.listen import Door, serve
from meshkit.transports._tcp.sockets import Sockets
from meshkit.transports._tcp.wire import (
    MOST_ADDRESSES,
    Address,
    Kind,
    Refusal,
    Rejected,
    addresses,
    read_addresses,
    record,
)

__all__ = ["Mesh"]

_log = logging.getLogger("meshkit.transports.tcp")


class Mesh:
    """The connections of one node. `links` are those that are open, by the node at the other end."""

    BUFFER = 256 * 1024
    """Bytes that are read at once."""
    REFUSALS_EVERY = 10.0
    """Seconds between two log lines about connections that came to nothing."""

    def __init__(
        self, receiver: Receiver, prover: Prover, limits: TcpLimits, client_ssl: ssl.SSLContext | None
    ) -> None:
        self.limits = limits
        self.links: dict[str, Link] = {}
        self.client_ssl = client_ssl
        self.buffer = memoryview(bytearray(self.BUFFER))
        self.address = ""  # where others reach this node, if it listens
        self.dialler = Dialler(self, prover.identity.node_id, prover.name)
        self._receiver = receiver
        self._prover = prover
        self._sockets = Sockets(limits)
        self._server: asyncio.Server | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._lost: set[str] = set()  # the nodes that were connected, and have not come back
        self._refused = 0  # connections, since the last line about them
        self._refused_at = -math.inf

    async def listen(self, address: Address, advertise: Address | None, context: ssl.SSLContext | None) -> None:
        """Take connections at this address.

        Raises:
            OSError: It cannot listen there; the message says why, and what to do.
            Closed: It was closed meanwhile.
        """

        def accept() -> Link | Door:
            link = self._link(dialled=False)
            return link if context is None else Door(self, link, context, f"meshkit:{self._prover.name}:tcp:tls")

        server = await serve(accept, address)
        if self._closed:
            server.close()
            raise Closed(name=f"TcpTransport({address})")
        self._server = server
        port = server.sockets[0].getsockname()[1]
        self.address = str(advertise or Address("" if address.is_everywhere else address.host, port))

    async def close(self) -> None:
        """End everything. Nothing is received from the moment on at which this is called."""
        self._closed = True
        if self._loop.is_closed():
            return  # it took everything with it
        if self._server is not None:
            self._server.close()  # not wait_closed(): it would wait for the connections
        self._sockets.stop()
        try:
            await self.dialler.close()
        finally:
            await self._sockets.close()

    def send_to_all(self, data: bytes) -> Mapping[str, Overloaded]:
        """Send a record to every peer; return those that miss it, whose buffers are full."""
        missed: dict[str, Overloaded] = {}
        for peer, link in self.links.items():
            try:
                link.send(data)
            except Overloaded as error:
                missed[peer] = error
        return missed

    # --- for its parts

    def outgoing(self) -> Link:
        """Return the protocol of a connection that this node makes."""
        return self._link(dialled=True)

    def _link(self, *, dialled: bool) -> Link:
        prover = self._prover
        return Link(
            self,
            Handshake(
                prover.identity,
                dialled=dialled,
                listens=self.address,
                trusts=prover.trusts,
                challenge=random_bytes(32),
                dialling=self.dialler.is_own,
            ),
        )

    def connected(self, link: Link | Door) -> None:
        """Take note of a connection; whoever is at the other end has proved nothing yet."""
        if self._closed:
            link.drop("this node is closed")
        else:
            self._sockets.add(link, incoming=isinstance(link, Door) or not link.handshake.dialled)

    def wanted(self, link: Link) -> Refusal | None:
        """Return what speaks against a connection, as soon as its other end has said who it is."""
        old = self.links.get(link.peer)
        if old is None:
            return Refusal.FULL if len(self.links) >= self.limits.max_peers else None
        if not (link.handshake.is_arbiter and link.handshake.proved):
            return None  # the other side will say, or it may not be true
        old.doubt()
        return Refusal.DUPLICATE

    def opened(self, link: Link) -> None:
        """Use the connection from now on; tell its peer who else is here, and the others about it."""
        node, address = link.peer, link.address
        if node in self.links:
            self.links[node].drop("it made another connection")
        self._sockets.proved(link)
        known = [(peer, str(other.address)) for peer, other in self.links.items() if other.address]
        for start in range(0, len(known), MOST_ADDRESSES):
            link.send(record(Kind.ADDRESSES, addresses(known[start : start + MOST_ADDRESSES])))
        if address is not None:
            self.send_to_all(record(Kind.ADDRESSES, addresses([(node, str(address))])))
        self.links[node] = link
        self.dialler.met(node, address)
        if node in self._lost:
            self._lost.discard(node)
            _log.info("node %s is back", node)
        self._receiver.found(node)

    def received(self, node: str, frame: bytes) -> None:
        """Take a frame."""
        if not self._closed:
            self._receiver.received(node, frame)

    def told(self, body: bytes) -> None:
        """Take the addresses that another node knows; raise `Rejected` if one is none."""
        own = self._prover.identity.node_id
        for node, text in read_addresses(body):
            if node != own and node not in self.links and self._prover.trusts(node):
                try:
                    address = Address.parse(text, "what a peer says where others listen")
                except ValueError as error:
                    raise Rejected(str(error)) from None
                self.dialler.know(node, address)

    def disconnected(self, link: Link) -> None:
        """Do without the connection from now on."""
        self._sockets.proved(link)
        if self._closed:
            return
        if self.links.get(link.peer) is link:
            del self.links[link.peer]
            if link.left:
                _log.info("node %s has left", link.peer)
            elif link.peer not in self._lost and len(self._lost) < self.limits.max_peers:
                self._lost.add(link.peer)
                _log.warning("node %s is lost: %s", link.peer, link.reason)
            self._receiver.lost(link.peer)
        elif not (
            link.handshake.dialled or link.handshake.proved or link.refusal or link.reason == Refusal.ITSELF.text
        ):
            self._on_refusal(link)  # else it is a second one, of this node, or not wanted there, which is nothing

    def _on_refusal(self, link: Link) -> None:
        """Log it, but not so often that strangers could fill the log."""
        now = _time.now()
        self._refused += 1
        if now - self._refused_at >= self.REFUSALS_EVERY:
            more = f", as did {self._refused - 1} others before" if self._refused > 1 else ""
            _log.warning("a connection from %s came to nothing: %s%s", link.host, link.reason, more)
            self._refused, self._refused_at = 0, now

    def closed(self, link: Link | Door) -> None:
        """Forget the connection: its socket is closed."""
        self._sockets.discard(link)
