"""Nodes on NATS; and a stranger, who can say anything on the same server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from nats.aio.client import Client
from nats.aio.msg import Msg

from meshkit.runtime.frame import Trust
from meshkit.transports import NatsLimits, NatsTransport
from tests.transports import nodes
from tests.transports.nodes import PATIENCE, all_meet

QUICK = NatsLimits(heartbeat=0.4, connect_timeout=10.0)
SLOW = NatsLimits(heartbeat=1000.0, connect_timeout=10.0)
"""Nodes with it are not missed."""


class Node(nodes.Node[NatsTransport]):
    """A node that can die."""

    def __init__(
        self,
        name: str,
        servers: str | Sequence[str],
        *,
        trust: Trust = None,
        limits: NatsLimits = QUICK,
        **options: Any,
    ) -> None:
        super().__init__(name, NatsTransport(servers, limits=limits, **options), trust=trust)

    def die(self) -> None:
        """Lose the socket and fall silent, as if the process was killed: nobody says goodbye."""
        mesh = self.transport._mesh
        assert mesh is not None
        mesh._closed = True
        assert mesh.link is not None
        mesh.link._socket.abort()


@asynccontextmanager
async def running(*those: Node) -> AsyncIterator[None]:
    """Start these nodes, which have met then, and close them."""
    async with nodes.running(*those):
        await all_meet(*those)
        yield


class Stranger:
    """Somebody with access to the server, who hears all that is said there and can say anything."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heard: list[Msg] = []
        self._news = asyncio.Event()

    async def _take(self, message: Msg) -> None:
        self.heard.append(message)
        self._news.set()

    async def says(self, subject: str, data: bytes, headers: bytes = b"") -> None:
        if headers:
            total = len(headers) + len(data)
            await self.client._send_command(
                f"HPUB {subject} {len(headers)} {total}\r\n".encode() + headers + data + b"\r\n"
            )
        else:
            await self.client.publish(subject, data)
        await self.client.flush()

    async def repeats(self, message: Msg, subject: str = "") -> None:
        await self.says(subject or message.subject, message.data)

    async def until_heard(self, ends: str, count: int = 1) -> list[Msg]:
        """Return what was said on subjects that end so, when there is as much."""
        with anyio.fail_after(PATIENCE):
            while len(found := [message for message in self.heard if message.subject.endswith(ends)]) < count:
                self._news.clear()
                await self._news.wait()
        return found


@asynccontextmanager
async def stranger(url: str, subject: str = ">") -> AsyncIterator[Stranger]:
    client = Client()
    await client.connect(url)
    try:
        one = Stranger(client)
        await client.subscribe(subject, cb=one._take)
        for _ in range(2):  # the ping of the first overtakes the subscription
            await client.flush()
        yield one
    finally:
        await client.close()
