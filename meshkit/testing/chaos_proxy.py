"""A bad network for real connections: a TCP proxy that delays, slices, throttles, resets and swallows; by a seed.

>>> import asyncio
>>> from meshkit.testing import ChaosProxy
>>> async def main():
...     async def echo(reader, writer):
...         writer.write(await reader.readexactly(4))
...         writer.close()
...     async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
...         upstream = server.sockets[0].getsockname()
...         async with ChaosProxy(upstream, seed=7, jitter=0.002, slice=1) as proxy:
...             reader, writer = await asyncio.open_connection(*proxy.address)
...             writer.write(b"boo!")
...             answer = await reader.read()
...             writer.close()
...             return answer
>>> asyncio.run(main())
b'boo!'

What it decides (where it cuts, how long a piece takes, at which byte it resets) depends on the seed, the number of the
connection, the direction and the position in the stream, and on nothing else: the same bytes meet the same fate,
however they come in. What passes is never altered, and never out of order: this is what TCP does on a bad network.
"""

import asyncio
import socket
from collections.abc import Sequence
from random import Random
from typing import Any, Literal, Self

from meshkit import _check
from meshkit.testing._chaos import Chaos
from meshkit.testing._chaos_link import Link, reset

__all__ = ["ChaosProxy"]


class ChaosProxy:
    """Passes TCP connections on to `upstream`, as a bad network would. `async with` it, and connect to its `address`.

    Args:
        upstream: Where it connects to, for each connection that it accepts: (host, port) or "host:port".
        seed: Of all that is random here. The same seed does the same to the same bytes.
        latency: Seconds that each byte is under way, at least, in each direction.
        jitter: Seconds, at most, that come on top of it, drawn for each slice. Nothing overtakes.
        rate: Bytes per second of each direction of each connection; None: as fast as it goes.
        slice: Bytes, at most, that are passed on in one piece; the sizes are drawn. 1: each byte is a piece.
        reset_rate: The probability with which a connection is reset, for each KiB that goes in one direction.

    "up" is the direction to `upstream`, "down" the way back. In each direction of a connection up to 256 KiB wait; then
    it reads no more. It uses sockets without asyncio's transports, on selector
    loops and on uvloop; it has no tasks, and leaving it awaits nothing: no socket is left, however it ends.
    """

    def __init__(
        self,
        upstream: str | Sequence[Any],
        *,
        seed: int = 0,
        latency: float = 0.0,
        jitter: float = 0.0,
        rate: int | None = None,
        slice: int = 1460,  # noqa: A002 - the word for it; about a packet of a TCP connection
        reset_rate: float = 0.0,
    ) -> None:
        self._upstream = _host_and_port(upstream)
        self._seed = seed
        latency = _check.duration("latency", latency, zero=True)
        jitter = _check.duration("jitter", jitter, zero=True)
        rate = None if rate is None else _check.count("rate", rate)
        max_slice = _check.count("slice", slice)
        reset_rate = 0.0 if reset_rate == 0 else _check.ratio("reset_rate", reset_rate)

        def chaos(number: int, direction: str) -> Chaos:
            rng = Random(f"{seed}:{number}:{direction}")
            return Chaos(rng, latency=latency, jitter=jitter, rate=rate, max_slice=max_slice, reset_rate=reset_rate)

        self._chaos = chaos
        self._listener: socket.socket | None = None
        self._links: dict[int, Link] = {}  # by number, so that they are walked through in order
        self._loop: asyncio.AbstractEventLoop
        self._family: int
        self._target: Any
        self._accepted = 0
        self._cut = False
        self._swallowed: set[str] = set()  # the directions in which nothing passes

    def __repr__(self) -> str:
        state = "closed" if self._listener is None else "cut" if self._cut else f"connections={len(self._links)}"
        return f"ChaosProxy({self._upstream!r}, seed={self._seed}, {state})"

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port at which it accepts connections."""
        if self._listener is None:
            raise RuntimeError(f"{self!r} has no address: use `async with`")
        host, port = self._listener.getsockname()
        return host, port

    # --- faults

    def reset_all(self) -> None:
        """Reset all connections (RST); new ones are accepted."""
        for link in list(self._links.values()):
            link.reset()

    def cut(self) -> None:
        """Reset all connections, and each new one, until `heal`."""
        self._cut = True
        self.reset_all()

    def blackhole(self, direction: Literal["up", "down", "both"] = "both") -> None:
        """Let nothing pass any more in this direction, not even the end of a connection, until `heal`.

        As behind a router that died: connections stay open, and whoever sends notices nothing until buffers are full.
        As with TCP, what was sent meanwhile arrives when it has healed.
        """
        if direction not in {"up", "down", "both"}:
            raise ValueError(f'direction must be "up", "down" or "both", not {direction!r}')
        self._swallowed |= {"up", "down"} if direction == "both" else {direction}

    def heal(self) -> None:
        """End what `cut` and `blackhole` began."""
        self._cut = False
        self._swallowed.clear()
        for link in list(self._links.values()):
            link.resume()

    # --- its life

    async def __aenter__(self) -> Self:
        """Begin to accept connections."""
        if self._listener is not None:
            raise RuntimeError(f"{self!r} is in use already")
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(*self._upstream, type=socket.SOCK_STREAM)
        self._family, self._target = found[0][0], found[0][4]
        self._loop, self._accepted, self._cut = loop, 0, False
        self._swallowed.clear()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything at once."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener)
            listener.close()
        self.reset_all()

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            client, _ = self._listener.accept()
        except OSError:  # whoever came has gone already
            return
        if self._cut:
            reset(client)
            return
        number, self._accepted = self._accepted, self._accepted + 1
        self._links[number] = link = Link(
            self._loop,
            client,
            socket.socket(self._family, socket.SOCK_STREAM),
            {direction: self._chaos(number, direction) for direction in ("up", "down")},
            self._swallowed,
            lambda: self._links.pop(number, None),
        )
        link.connect(self._target)


def _host_and_port(upstream: str | Sequence[Any]) -> tuple[str, int]:
    if isinstance(upstream, str):
        host, _, port = upstream.rpartition(":")
        upstream = (host.strip("[]"), int(port) if port.isdecimal() else None)
    host, port = [*upstream, None, None][:2]
    if not isinstance(host, str) or not host or not isinstance(port, int):
        raise ValueError(f'upstream must be (host, port) or "host:port", not {upstream!r}')
    return host, port
