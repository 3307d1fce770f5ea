"""The transport over NATS, an engine that many machines share: where a mesh goes that has outgrown TCP.

Needs nats-py: `pip install "meshkit[nats]"`; and a NATS server (see docs/nats.md).

>>> NatsTransport(["nats://10.0.0.1", "nats://user:password@10.0.0.2:4333"], subject="shop")
NatsTransport(not connected, 'shop', peers=0)

A node connects to one server of a cluster, and to another when that one is lost. It announces itself, and proves to
each other node that it is there, and who it is; so each knows who is up. What is sent is sealed by the runtime.
"""

import random
import re
import ssl
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from meshkit.errors import Closed
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver
from meshkit.transports._nats.limits import NatsLimits as NatsLimits
from meshkit.transports._nats.servers import Server, Servers

if TYPE_CHECKING:
    from meshkit.transports._nats.mesh import Mesh

__all__ = ["NatsLimits", "NatsTransport"]

_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class NatsTransport:
    """Connects a runtime to others over NATS.

    It needs an identity, with which it proves to each other node that it is there. `start` returns when a server has
    let it in; it waits for no other node. When the connection breaks, all peers are lost at once, and found again when
    a server, this one or another, is there: it is looked for, for ever, with jittered delays. It logs (logger
    `meshkit.transports.nats`) one line when a server is lost, and one when there is one again; the same for a node.
    Frames arrive in order; those that are under way when a connection breaks are lost, and none is kept for the next.

    Args:
        servers: URLs of servers of one cluster: "nats://127.0.0.1:4222", "tls://user:password@host:4222",
            "nats://token@host". One that is up is enough to find the others.
        subject: What all subjects of the mesh begin with; nodes with another one do not meet.
        credentials: The path of a credentials file, if the server wants one (it is read at each connection).
        tls: TLS with this context; for a tls:// URL there is a default one, which trusts what the system does.
        limits: What it puts up with.
    """

    in_process = False
    exposed = True
    """Whoever may use the server can reach it: say with `trust=` who may get in."""

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        subject: str = "meshkit",
        credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        limits: NatsLimits | None = None,
    ) -> None:
        for package, needed in (("nats", True), ("nkeys", credentials is not None)):
            if needed and find_spec(package) is None:
                name = "nats-py" if package == "nats" else "nkeys, for credentials="
                raise ModuleNotFoundError(f'NatsTransport needs {name}: pip install "meshkit[nats]"', name=package)
        self._servers = [Server.parse(url) for url in ([servers] if isinstance(servers, str) else servers)]
        if not self._servers:
            raise ValueError("servers must name a NATS server, at least one")
        if not _SUBJECT.fullmatch(subject) or len(subject) > 100:
            raise ValueError(
                f"subject must be words of A-Z, a-z, 0-9, _ and -, with dots between them, not {subject!r}"
            )
        if tls is not None:
            self._servers = [replace(server, tls=True) for server in self._servers]
        self._subject = subject
        self._credentials = credentials
        self._tls = tls
        self.limits = NatsLimits() if limits is None else limits
        self._mesh: Mesh | None = None  # from start to close

    def __repr__(self) -> str:
        link = None if self._mesh is None else self._mesh.link
        server = "not connected" if link is None else str(link.server)
        return f"NatsTransport({server}, {self._subject!r}, peers={len(self.peers)})"

    @property
    def server(self) -> str | None:
        """The host and port of the server to which it is connected now."""
        link = None if self._mesh is None else self._mesh.link
        return None if link is None else str(link.server)

    @property
    def max_frame(self) -> int:
        """The largest frame that it carries, in bytes: `limits.max_frame`."""
        return self.limits.max_frame

    @property
    def peers(self) -> Collection[str]:
        """The nodes that have proved to be there."""
        return () if self._mesh is None else self._mesh.company.peers.keys()

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        """Connect to a server, and announce this node; each server is tried once, for `connect_timeout` seconds.

        Raises:
            ValueError: There is no identity to prove.
            RuntimeError: It is in use.
            PermissionError: No server lets this node in.
            ConnectionError: No server can be used; the message says why.
            Closed: It was closed meanwhile.
        """
        from meshkit.transports._nats.mesh import Mesh, Options  # nats-py is imported where it is used

        if self._mesh is not None:
            raise RuntimeError(f"{self!r} is in use: give each runtime a NatsTransport of its own")
        if prover is None:
            raise ValueError(f"node {node!r} needs an identity, to prove to its peers who it is")
        servers = Servers(random.sample(self._servers, len(self._servers)))  # each server has its share of the nodes
        options = Options(self._subject, self._tls, self._credentials, self.limits)
        mesh = self._mesh = Mesh(receiver, prover, servers, options)
        try:
            await mesh.join()
        except BaseException:
            if self._mesh is mesh:  # else it was closed meanwhile, and perhaps started again
                self._mesh = None
            await mesh.close()
            raise

    def send(self, to: str, frame: bytes) -> None:
        """Send `frame` to the node `to`; it waits at most in a buffer.

        Raises:
            Unreachable: It has not announced itself, or there is no server.
            Overloaded: The server does not read, and `max_buffer` is full.
            ValueError: The frame is larger than `max_frame`.
        """
        self._running(frame).send(to, frame)

    def broadcast(self, frame: bytes) -> None:
        """Send `frame` to every peer: to all of them or to none.

        Raises:
            Overloaded: The server does not read, and `max_buffer` is full.
            ValueError: The frame is larger than `max_frame`.
        """
        self._running(frame).broadcast(frame)

    async def close(self) -> None:
        """Say goodbye, send what is buffered, within `close_timeout`, and end; closing twice is harmless.

        Cancelled meanwhile, it does not wait for what is unsent.
        """
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            await mesh.close()

    def _running(self, frame: bytes) -> "Mesh":
        if self._mesh is None:
            raise Closed(name=repr(self))
        if len(frame) > self.limits.max_frame:
            raise ValueError(f"a frame must have at most {self.limits.max_frame} bytes, not {len(frame)}")
        return self._mesh
