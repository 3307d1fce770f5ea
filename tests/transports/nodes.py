"""A transport, and what it has told its receiver, for the tests. Nobody sleeps: they are told."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio

from meshkit.runtime import Identity
from meshkit.runtime.frame import Prover, Trust
from meshkit.runtime.transport import Transport

PATIENCE = 15.0

TransportT = TypeVar("TransportT", bound=Transport)


@functools.cache
def identity(name: str) -> Identity:
    return Identity.from_seed(name.encode().ljust(32, b"."))


class Node(Generic[TransportT]):
    """A transport, and what it told its receiver; `story` is all of it, in order."""

    def __init__(self, name: str, transport: TransportT, *, trust: Trust = None) -> None:
        self.identity = identity(name)
        self.id = self.identity.node_id
        self.transport = transport
        self.heard: list[tuple[str, bytes]] = []
        self.met: list[str] = []
        self.gone: list[str] = []
        self.story: list[tuple[str, str, bytes]] = []
        self._news = asyncio.Event()
        self._trust = trust

    def received(self, sender: str, frame: bytes) -> None:
        self.heard.append((sender, frame))
        self._tell("frame", sender, frame)

    def found(self, node: str) -> None:
        self.met.append(node)
        self._tell("found", node)

    def lost(self, node: str) -> None:
        self.gone.append(node)
        self._tell("lost", node)

    def _tell(self, what: str, node: str, frame: bytes = b"") -> None:
        self.story.append((what, node, frame))
        self._news.set()

    @property
    def frames(self) -> list[bytes]:
        return [frame for _, frame in self.heard]

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

    async def loses(self, other: "Node[TransportT]", times: int = 1) -> None:
        await self.until(lambda: self.gone.count(other.id) >= times)

    async def meets(self, *others: "Node[TransportT]") -> None:
        await self.until(lambda: {other.id for other in others} <= set(self.transport.peers))


async def all_meet(*nodes: Node[TransportT]) -> None:
    for node in nodes:
        await node.meets(*(other for other in nodes if other is not node))


@asynccontextmanager
async def running(*nodes: Node[TransportT]) -> AsyncIterator[None]:
    """Start these nodes, and close them."""
    try:
        for node in nodes:
            await node.start()
        yield
    finally:
        for node in nodes:
            await node.transport.close()
