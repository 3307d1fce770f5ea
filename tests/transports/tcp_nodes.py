"""Transports over TCP on the loopback device, and what they have heard, for the tests. Nobody sleeps: they are told."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from meshkit.runtime import Identity
from meshkit.runtime.frame import Prover, Trust
from meshkit.transports import TcpLimits, TcpTransport

PATIENCE = 10.0
QUICK = TcpLimits(
    handshake_timeout=0.4, ping_interval=0.1, silence_timeout=0.4, write_timeout=0.4, doubt_timeout=0.2, max_unproved=20
)


@functools.cache
def identity(name: str) -> Identity:
    return Identity.from_seed(name.encode().ljust(32, b"."))


class Node:
    """A transport, and what it told its receiver."""

    def __init__(self, name: str, listen: str | None = "127.0.0.1:0", *, trust: Trust = None, **options: Any) -> None:
        self.identity = identity(name)
        self.id = self.identity.node_id
        self.transport = TcpTransport(listen, **options)
        self.heard: list[tuple[str, bytes]] = []
        self.found_: list[str] = []
        self.gone: list[str] = []
        self.lost_at = 0.0
        self._news = asyncio.Event()
        self._trust = trust

    @property
    def address(self) -> str:
        address = self.transport.address
        assert address is not None
        return address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def received(self, sender: str, frame: bytes) -> None:
        self.heard.append((sender, frame))
        self._news.set()

    def found(self, node: str) -> None:
        self.found_.append(node)
        self._news.set()

    def lost(self, node: str) -> None:
        self.gone.append(node)
        self.lost_at = time.monotonic()
        self._news.set()

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

    async def loses(self, other: "Node") -> None:
        await self.until(lambda: other.id in self.gone)

    async def meets(self, *others: "Node") -> None:
        await self.until(lambda: {other.id for other in others} <= set(self.transport.peers))


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Start these nodes, and close them."""
    try:
        for node in nodes:
            await node.start()
        yield
    finally:
        for node in nodes:
            await node.transport.close()


@asynccontextmanager
async def mesh(*names: str, **options: Any) -> AsyncIterator[list[Node]]:
    """Run nodes that have all been told the address of the first one, and have met."""
    nodes: list[Node] = []
    try:
        for name in names:
            join = [nodes[0].address] if nodes else []
            nodes.append(Node(name, join=join, **options))
            await nodes[-1].start()
        for node in nodes:
            await node.meets(*(other for other in nodes if other is not node))
        yield nodes
    finally:
        for node in nodes:
            await node.transport.close()


class Stranger:
    """A bare connection to a node."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, node: Node) -> "Stranger":
        return cls(*await asyncio.open_connection("127.0.0.1", node.port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """Return what comes until the connection ends."""
        with anyio.fail_after(PATIENCE):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    def close(self) -> None:
        self.writer.transport.abort()
