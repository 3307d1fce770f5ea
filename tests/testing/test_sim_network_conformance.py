from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from meshkit.testing import Link, SimNetwork, SimTransport, TransportConformance, simulated


class Conformance(TransportConformance[SimTransport]):
    network: SimNetwork
    max_buffer = SimNetwork.MAX_BUFFER

    def make(self) -> SimNetwork:
        return SimNetwork()

    def transport(self, others: Sequence[SimTransport]) -> SimTransport:
        self.network = self.network if others else self.make()
        return self.network.transport()

    def run_scenario(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        simulated(1, lambda _: main())


class TestSimNetwork(Conformance):
    _calls = 2000


class TestSimNetworkThatIsSlow(Conformance):
    _calls = 500

    def make(self) -> SimNetwork:
        return SimNetwork(Link(delay=0.02, jitter=0.02))


class TestSimNetworkWithProofs(Conformance):
    _calls = 500

    def make(self) -> SimNetwork:
        return SimNetwork(proved=True)


class TestSimNetworkThatLosesFrames(Conformance):
    _calls = 500
    lossless = False

    def make(self) -> SimNetwork:
        return SimNetwork(Link(loss=0.1, jitter=0.01))
