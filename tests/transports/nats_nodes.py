"""Nodes on NATS, and what they have heard; and a stranger, who can say anything on the same server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from nats.aio.client import Client
from nats.aio.msg import Msg

from meshkit.runtime.frame import Prover, Trust
from meshkit.transports import NatsLimits, NatsTransport
from tests.transports.tcp_nodes import identity

PATIENCE = 15.0
QUICK = NatsLimits(heartbeat=0.4, connect_timeout=10.0)
SLOW = NatsLimits(heartbeat=1000.0, connect_timeout=10.0)
"""Nodes with it are not missed."""


class Node:
    """A transport, and what it told its receiver, in `story`: in order."""

    def __init__(
        self,
        name: str,
        servers: str | Sequence[str],
        *,
        trust: Trust = None,
        limits: NatsLimits = QUICK,
        **options: Any,
    ) -> None:
        self.identity = identity(name)
        self.id = self.identity.node_id
        self.transport = NatsTransport(servers, limits=limits, **options)
        self.story: list[tuple[str, str, bytes]] = []
        self._news = asyncio.Event()
        self._trust = trust

    def received(self, sender: str, frame: bytes) -> None:
        self._on("frame", sender, frame)

    def found(self, node: str) -> None:
        self._on("found", node)

    def lost(self, node: str) -> None:
        self._on("lost", node)

    def _on(self, what: str, node: str, frame: bytes = b"") -> None:
        self.story.append((what, node, frame))
        self._news.set()

    @property
    def heard(self) -> list[bytes]:
        return [frame for what, _, frame in self.story if what == "frame"]

    def told(self, what: str, other: "Node") -> int:
        return sum(1 for told, node, _ in self.story if (told, node) == (what, other.id))

    async def start(self) -> None:
        await self.transport.start(self.id, self, Prover(self.identity, trust=self._trust, started=time.time()))

    async def until(self, happened: Callable[[], object]) -> None:
        """Wait until it is told something after which this has happened."""
        with anyio.fail_after(PATIENCE):
            while not happened():
                self._news.clear()
                await self._news.wait()

    async def hears(self, count: int) -> None:
        await self.until(lambda: len(self.heard) >= count)

    async def loses(self, other: "Node", times: int = 1) -> None:
        await self.until(lambda: self.told("lost", other) >= times)

    async def meets(self, *others: "Node") -> None:
        await self.until(lambda: {other.id for other in others} <= set(self.transport.peers))

    def die(self) -> None:
        """Lose the socket and fall silent, as if the process was killed: nobody says goodbye."""
        mesh = self.transport._mesh
        assert mesh is not None
        mesh._closed = True
        assert mesh.link is not None
        mesh.link._socket.abort()


async def all_meet(*nodes: Node) -> None:
    for node in nodes:
        await node.meets(*(other for other in nodes if other is not node))


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Start these nodes, which have met then, and close them."""
    try:
        for node in nodes:
            await node.start()
        await all_meet(*nodes)
        yield
    finally:
        for node in nodes:
            await node.transport.close()


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
