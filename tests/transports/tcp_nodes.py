"""Nodes on TCP, on the loopback device; and a stranger, who can say anything to one of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from meshkit.runtime.frame import Trust
from meshkit.transports import TcpLimits, TcpTransport
from tests.transports import nodes
from tests.transports.nodes import PATIENCE, all_meet

QUICK = TcpLimits(
    handshake_timeout=0.4, ping_interval=0.1, silence_timeout=0.4, write_timeout=0.4, doubt_timeout=0.2, max_unproved=20
)


class Node(nodes.Node[TcpTransport]):
    """A node that listens on a free port."""

    def __init__(self, name: str, listen: str | None = "127.0.0.1:0", *, trust: Trust = None, **options: Any) -> None:
        super().__init__(name, TcpTransport(listen, **options), trust=trust)

    @property
    def address(self) -> str:
        address = self.transport.address
        assert address is not None
        return address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@asynccontextmanager
async def mesh(*names: str, **options: Any) -> AsyncIterator[list[Node]]:
    """Run nodes that have all been told the address of the first one, and have met."""
    nodes: list[Node] = []
    try:
        for name in names:
            join = [nodes[0].address] if nodes else []
            nodes.append(Node(name, join=join, **options))
            await nodes[-1].start()
        await all_meet(*nodes)
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
