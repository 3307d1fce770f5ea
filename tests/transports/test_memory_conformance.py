from collections.abc import Sequence

from meshkit.testing import TransportConformance
from meshkit.transports import MemoryHub, MemoryTransport


class TestMemory(TransportConformance[MemoryTransport]):
    hub: MemoryHub

    def transport(self, others: Sequence[MemoryTransport]) -> MemoryTransport:
        self.hub = self.hub if others else MemoryHub()
        return MemoryTransport(self.hub)
