"""Social: nodes tease one another. Each tease is one event; the log makes a sentence of those that belong together."""

import msgspec

from examples.mesh.names import name_of
from meshkit import Message, Service, broadcast, handles


class Tease(msgspec.Struct, frozen=True):
    """A tease of one node, for all to hear."""

    target: str


TEASE = broadcast("social:tease", Tease)


class Social(Service):
    """Teases, and is teased."""

    name, emoji = "social", "😏"

    def __init__(self) -> None:
        self.heard = 0

    async def tease(self, target: str) -> None:
        """Tease `target`, so that every node hears it."""
        await self.rt.emit(TEASE, Tease(target))

    @handles(TEASE)
    async def hear(self, msg: Message[Tease]) -> None:
        """Log a tease on the node that it is about: once is enough, as all nodes share one terminal."""
        self.heard += 1
        if msg.payload.target == self.rt.node:
            self.log.event("tease", name_of(self.rt, msg.sender), target=self.rt.name)
