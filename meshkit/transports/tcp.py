"""The transport over TCP: what a small mesh runs on, with nothing installed.

>>> import asyncio
>>> from meshkit.runtime import Message, Runtime, Service, handles, request
>>> UPPER = request("text:upper", str, reply=str)
>>> class Text(Service):
...     name = "text"
...
...     @handles(UPPER)
...     async def upper(self, msg: Message[str]) -> str:
...         return msg.payload.upper()
>>> async def main():
...     one = TcpTransport("127.0.0.1:0")
...     async with Runtime("bob", [Text()], transport=one) as bob:
...         async with Runtime("alice", transport=TcpTransport(join=[one.address])) as alice:
...             while bob.node not in alice.peers:
...                 await asyncio.sleep(0.01)
...             return await alice.call(UPPER, "boo", to=bob.node)
>>> asyncio.run(main())
'BOO'

Each node has one connection to each other, whoever made it. They tell each other where they listen, so that one join
address is enough to find everyone. What is sent is sealed by the runtime; TLS also hides who talks to whom.
"""

import ssl
from collections.abc import Collection, Mapping, Sequence

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver
from meshkit.transports._tcp.limits import TcpLimits as TcpLimits
from meshkit.transports._tcp.mesh import Mesh
from meshkit.transports._tcp.wire import Address, Kind, record

__all__ = ["TcpLimits", "TcpTransport"]


class TcpTransport:
    """Connects a runtime to others over TCP.

    The identity of its runtime proves to each peer who is there, before anything else is taken from it. `start` returns
    when it listens; it waits for no other node, which need not be there yet. Addresses in `join`, and those of nodes it
    has met, are dialled for ever, with growing, jittered delays. It logs (logger `meshkit.transports.tcp`) one line
    when a peer is lost, and one when it is back. Frames arrive in order; those that are under way when a connection
    breaks are lost, and none is kept for the next one.

    Args:
        listen: Where it listens: "127.0.0.1:7001", "[::1]:7001", or ":7001" for all addresses of the machine; with port
            0 the system chooses one (see `address`). None: it only dials.
        join: Addresses of nodes of the mesh, in ASCII. One that is up is enough; one may lead to this node itself.
        advertise: Under which address others reach this node, if that is not the one where it listens: say it behind
            a proxy or NAT.
        server_ssl, client_ssl: TLS, for incoming and for outgoing connections. Each node proves its identity inside, so
            certificates need not name hosts (`check_hostname = False` is fine).
        limits: What it puts up with.
    """

    in_process = False

    def __init__(
        self,
        listen: str | None = None,
        *,
        join: Sequence[str] = (),
        advertise: str | None = None,
        server_ssl: ssl.SSLContext | None = None,
        client_ssl: ssl.SSLContext | None = None,
        limits: TcpLimits | None = None,
    ) -> None:
        if isinstance(join, str):
            raise TypeError(f"join must be a sequence of addresses, not one: join=[{join!r}]")
        self._listen = None if listen is None else Address.parse(listen, "listen", host_needed=False)
        self._join = list(dict.fromkeys(Address.parse(address, "an address in join") for address in join))
        self._advertise = None if advertise is None else Address.parse(advertise, "advertise")
        if self._advertise is not None and self._listen is None:
            raise ValueError("advertise says where this node is reached, but it does not listen: give listen=, too")
        if (server_ssl is None) != (client_ssl is None) and (client_ssl is None or self._listen is not None):
            raise ValueError("give server_ssl and client_ssl, or neither: a node that listens also dials")
        self._server_ssl = server_ssl
        self._client_ssl = client_ssl
        self.limits = TcpLimits() if limits is None else limits
        self._mesh: Mesh | None = None  # from start to close

    def __repr__(self) -> str:
        listen = "" if self._listen is None else f"{self.address or self._listen}, "
        return f"TcpTransport({listen}peers={len(self.peers)})"

    @property
    def exposed(self) -> bool:
        """Whether it listens where other machines can reach it, or is to join a mesh beyond this machine."""
        ours = [*([] if self._listen is None else [self._listen]), *self._join]
        return not all(address.is_loopback for address in ours)

    @property
    def address(self) -> str | None:
        """Where others reach it, while it listens; without a host if that is every address of this machine."""
        return None if self._mesh is None else self._mesh.address or None

    @property
    def max_frame(self) -> int:
        """The largest frame that it carries, in bytes: `limits.max_frame`."""
        return self.limits.max_frame

    @property
    def peers(self) -> Collection[str]:
        """The nodes to which there is a connection."""
        return () if self._mesh is None else self._mesh.links.keys()

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        """Listen, and begin to dial; return when it listens.

        Raises:
            ValueError: There is no identity to prove.
            RuntimeError: It is in use.
            OSError: It cannot listen there; the message says why.
            Closed: It was closed meanwhile.
        """
        if self._mesh is not None:
            raise RuntimeError(f"{self!r} is in use: give each runtime a TcpTransport of its own")
        if prover is None:
            raise ValueError(f"node {node!r} needs an identity, to prove to its peers who it is")
        mesh = self._mesh = Mesh(receiver, prover, self.limits, self._client_ssl)
        try:
            if self._listen is not None:
                await mesh.listen(self._listen, self._advertise, self._server_ssl)
            mesh.dialler.join(self._join)
        except BaseException:
            if self._mesh is mesh:  # else it was closed meanwhile, and perhaps started again
                self._mesh = None
            await mesh.close()
            raise

    def send(self, to: str, frame: bytes) -> None:
        """Send `frame` to the node `to`; it waits at most in a buffer.

        Raises:
            Unreachable: There is no connection to it.
            Overloaded: It does not read, and `max_buffer` is full.
            ValueError: The frame is larger than `max_frame`.
        """
        mesh = self._running()
        link = mesh.links.get(to)
        if link is None:
            raise Unreachable(node=to, reason=mesh.dialler.trouble(to))
        link.send(self._record(frame))

    def broadcast(self, frame: bytes) -> Mapping[str, Overloaded]:
        """Send `frame` to every peer; return those that miss it, whose buffers are full.

        Raises:
            ValueError: The frame is larger than `max_frame`.
        """
        return self._running().send_to_all(self._record(frame))

    async def close(self) -> None:
        """Send what is buffered, within `close_timeout`, and end everything; closing twice is harmless.

        Cancelled meanwhile, it does not wait for what is unsent.
        """
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            await mesh.close()

    def _record(self, frame: bytes) -> bytes:
        if len(frame) > self.limits.max_frame:
            raise ValueError(f"a frame must have at most {self.limits.max_frame} bytes, not {len(frame)}")
        return record(Kind.FRAME, frame)

    def _running(self) -> Mesh:
        if self._mesh is None:
            raise Closed(name=repr(self))
        return self._mesh
