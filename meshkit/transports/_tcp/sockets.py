"""All connections of a transport that have a socket: they are bounded, looked after, and end together."""

import asyncio
from typing import Protocol

import anyio

from meshkit import _time
from meshkit.transports._tcp.limits import TcpLimits

__all__ = ["Connection", "Sockets"]


class Connection(Protocol):
    """A connection, as far as this is about its socket."""

    def look(self, now: float) -> None:
        """Give it up, if it is time to."""
        ...

    def drop(self, reason: str) -> None:
        """End now, for this reason."""
        ...

    def finish(self) -> None:
        """End when what is buffered has been sent."""
        ...

    def abort(self) -> None:
        """Close the socket now."""
        ...


class Sockets:
    """The connections from when their socket opens until it is closed. One timer looks after all of them."""

    def __init__(self, limits: TcpLimits) -> None:
        self._limits = limits
        self._all: dict[Connection, None] = {}  # the oldest first, as are
        self._unproved: dict[Connection, None] = {}  # the incoming ones, as long as they have proved nothing
        self._none_left = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_soon(self._look)

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: Connection, *, incoming: bool) -> None:
        """Take a connection in. If that makes too many which have proved nothing, the oldest of them ends.

        An honest one is through in milliseconds; to refuse the newest would keep it out for as long as others stall.
        """
        self._all[connection] = None
        if incoming:
            if len(self._unproved) >= self._limits.max_unproved:
                oldest = next(iter(self._unproved))
                del self._unproved[oldest]
                oldest.drop("there were too many connections that had proved nothing")
            self._unproved[connection] = None

    def proved(self, connection: Connection) -> None:
        """Take note that a connection has proved who is there, or has ended."""
        self._unproved.pop(connection, None)

    def discard(self, connection: Connection) -> None:
        """Forget a connection: its socket is closed."""
        self._all.pop(connection, None)
        self._unproved.pop(connection, None)
        if not self._all:
            self._none_left.set()

    def _look(self) -> None:
        limits = self._limits
        times = (limits.handshake_timeout, limits.ping_interval, limits.silence_timeout, limits.write_timeout)
        self._timer = self._loop.call_later(min(*times, limits.doubt_timeout) / 8, self._look)
        now = _time.now()
        for connection in list(self._all):
            connection.look(now)

    def stop(self) -> None:
        """End all when they have sent what is buffered; what is added from now on is not looked after."""
        self._timer.cancel()
        for connection in list(self._all):
            connection.finish()

    async def close(self) -> None:
        """Return when all have ended, within `close_timeout`. Cancelled, it ends them now."""
        try:
            with anyio.move_on_after(self._limits.close_timeout):
                await self._wait()
        finally:
            for connection in list(self._all):
                connection.abort()
        await self._wait()

    async def _wait(self) -> None:
        if self._all:
            self._none_left.clear()
            await self._none_left.wait()
