"""Where a node listens, and what comes in there before TLS, where there is TLS."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Protocol, cast

from meshkit.transports._tcp.limits import TcpLimits
from meshkit.transports._tcp.link import Link
from meshkit.transports._tcp.wire import Address

__all__ = ["Door", "serve"]


async def serve(accept: Callable[[], asyncio.BaseProtocol], address: Address) -> asyncio.Server:
    """Listen; `accept` makes the protocol of each connection.

    Raises:
        OSError: It cannot listen there; the message says why, and what to do.
    """
    # Without a host it listens on IPv4 and IPv6; a port that the system chooses would be another one on each.
    host = address.host or (None if address.port else "0.0.0.0")  # noqa: S104 - that is what was asked for
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(accept, host, address.port, backlog=512, start_serving=False)
        try:
            await server.start_serving()
        except BaseException:
            server.close()  # which asyncio does not do when this is cancelled
            raise
        return server
    except OSError as error:
        raise _explained(error, address) from error


def _explained(error: OSError, address: Address) -> OSError:
    """Return an error of the same kind that says what to do."""
    code, why = error.errno, error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        code, why = errno.EADDRNOTAVAIL, "there is no such host"
    elif code is None or code == errno.EADDRNOTAVAIL:  # since Python 3.13, asyncio tells it without a code
        code, why = errno.EADDRNOTAVAIL, "this machine has no such address"
    elif code == errno.EADDRINUSE:
        why = "another process listens there: choose another port, or stop it"
    elif code == errno.EACCES:
        why = "this user may not: ports below 1024 are for the system, choose another one"
    return OSError(code, f"cannot listen on {address}: {why}")


class Owner(Protocol):
    """The transport, as a door sees it."""

    limits: TcpLimits

    def connected(self, link: "Door") -> None:
        """Take note of a connection."""
        ...

    def closed(self, link: "Door") -> None:
        """Forget it."""
        ...


class Door(asyncio.Protocol):
    """An incoming connection until TLS is established; then `link` takes over. Until then it has proved nothing."""

    def __init__(self, owner: Owner, link: Link, context: ssl.SSLContext, task: str) -> None:
        self._owner = owner
        self._link = link
        self._context = context
        self._task_name = task
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._owner.connected(self)
        if not transport.is_closing():
            self._task = asyncio.get_running_loop().create_task(self._establish(self._transport), name=self._task_name)

    def connection_lost(self, exc: Exception | None) -> None:
        """End before TLS began."""
        self._owner.closed(self)

    async def _establish(self, transport: asyncio.Transport) -> None:
        loop, limit = asyncio.get_running_loop(), self._owner.limits.handshake_timeout
        try:
            tls = await loop.start_tls(
                transport, self._link, self._context, server_side=True, ssl_handshake_timeout=limit
            )
        except OSError:  # which all errors of TLS are
            tls = None
            transport.abort()
        finally:
            self._owner.closed(self)
        if tls is not None:
            self._link.connection_made(tls)

    def look(self, now: float) -> None:
        """Do nothing: TLS has its own limit of time."""

    def drop(self, reason: str) -> None:
        """End now."""
        self.abort()

    def finish(self) -> None:
        """End now: there is nothing to send yet."""
        self.abort()

    def abort(self) -> None:
        """Close the socket."""
        if self._transport is not None:
            self._transport.abort()
