"""The connections of a `ChaosProxy`, with sockets as they are: so a reset is a reset, and no task is left."""

import asyncio
import contextlib
import errno
import math
import socket
import struct
from collections.abc import Callable, Mapping, Set as AbstractSet
from typing import Any

from meshkit import _time
from meshkit.testing._chaos import Chaos, End, Reset

MAX_BUFFER = 256 * 1024  # bytes that wait in each direction of a connection, at most; beyond, it reads no more


class Link:
    """One connection: two sockets, and a way in each direction."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: socket.socket,
        upstream: socket.socket,
        chaos: Mapping[str, Chaos],
        swallowed: AbstractSet[str],
        on_end: Callable[[], object],
    ) -> None:
        self.loop = loop
        self.over = False
        self._sockets = client, upstream
        self._upstream = upstream
        self._swallowed = swallowed
        self._on_end = on_end
        self._broken = False
        for end in self._sockets:
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ways = [
            _Way(self, "up", client, upstream, chaos["up"]),
            _Way(self, "down", upstream, client, chaos["down"]),
        ]

    def connect(self, target: Any) -> None:
        """Connect to `upstream`."""
        result = self._upstream.connect_ex(target)
        if result not in {0, errno.EINPROGRESS}:
            self.reset()
        else:
            self.loop.add_writer(self._upstream, self._connected)

    def _connected(self) -> None:
        self.loop.remove_writer(self._upstream)
        if self._upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return self.reset()
        for way in self._ways:
            way.read()
        return None

    def swallows(self, direction: str) -> bool:
        """Return whether nothing passes in this direction."""
        return direction in self._swallowed

    def resume(self) -> None:
        """Let pass what was held back."""
        if self._broken:
            self.reset()
        for way in self._ways:
            way.pump()

    def broke(self) -> None:
        """Take note that one end is gone: the other one is told so, unless nothing passes."""
        self._broken = True
        self._forget()
        if not self._swallowed:
            self.reset()

    def ended(self) -> None:
        """Close, if both directions have come to their end."""
        if all(way.done for way in self._ways):
            self._forget()
            self._close()

    def reset(self) -> None:
        """Reset both ends."""
        if not self.over:
            self._forget()
            for end in self._sockets:
                _linger_not(end)
            self._close()

    def _close(self) -> None:
        self.over = True
        for end in self._sockets:
            end.close()
        self._on_end()

    def _forget(self) -> None:
        """Do nothing any more with the sockets."""
        for way in self._ways:
            way.stop()
        for end in self._sockets:
            self.loop.remove_reader(end)
            self.loop.remove_writer(end)


class _Way:
    """One direction of a connection: reads from `source`, asks the core, writes to `target`."""

    def __init__(self, link: Link, direction: str, source: socket.socket, target: socket.socket, chaos: Chaos) -> None:
        self.done = False
        self._link, self._direction = link, direction
        self._source, self._target = source, target
        self._chaos = chaos
        self._unsent = b""
        self._reading = self._ended = self._stopped = False
        self._next: asyncio.Handle | None = None

    def stop(self) -> None:
        """Do nothing any more."""
        self._stopped = True
        if self._next is not None:
            self._next.cancel()

    def read(self) -> None:
        """Read on, if there is room for more; else do not."""
        room = MAX_BUFFER - self._chaos.waiting - len(self._unsent)
        reading = room > 0 and not self._ended and not self._stopped
        if reading and not self._reading:
            self._link.loop.add_reader(self._source, self._readable)
        elif self._reading and not reading:
            self._link.loop.remove_reader(self._source)
        self._reading = reading

    def _readable(self) -> None:
        room = MAX_BUFFER - self._chaos.waiting - len(self._unsent)
        try:
            data = self._source.recv(min(room, 65_536))
        except BlockingIOError:
            return None
        except OSError:
            return self._link.broke()
        if data:
            self._chaos.feed(data, _time.now())
        else:
            self._ended = True
            self._chaos.end(_time.now())
        self.read()
        self.pump()
        return None

    def pump(self) -> None:
        """Do the next thing that is due, one in a pass of the loop: so a piece is not sent together with the next."""
        if self._stopped or self.done or self._link.swallows(self._direction):
            return None
        if self._next is not None:
            self._next.cancel()
        if self._unsent:
            return self._write()
        action = self._chaos.next(_time.now())
        if isinstance(action, bytes):
            self._unsent = action
            self._write()
        elif isinstance(action, Reset):
            self._link.reset()
        elif isinstance(action, End):
            self.done = True
            with contextlib.suppress(OSError):
                self._target.shutdown(socket.SHUT_WR)
            self._link.ended()
        elif self._chaos.when < math.inf:
            self._next = self._link.loop.call_at(self._chaos.when, self.pump)
        return None

    def _write(self) -> None:
        try:
            sent = self._target.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return self._link.broke()
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._link.loop.add_writer(self._target, self._writable)
        else:
            self._next = self._link.loop.call_soon(self.pump)
            self.read()
        return None

    def _writable(self) -> None:
        self._link.loop.remove_writer(self._target)
        self.pump()


def _linger_not(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so that close() sends a RST


def reset(end: socket.socket) -> None:
    """Close a connection, so that the other end gets a RST."""
    _linger_not(end)
    end.close()
