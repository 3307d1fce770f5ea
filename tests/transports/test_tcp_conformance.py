from collections.abc import Sequence

from meshkit.testing import TransportConformance
from meshkit.transports.tcp import TcpLimits, TcpTransport


class TestTcp(TransportConformance[TcpTransport]):
    real_time = True
    authenticated = True
    limits = TcpLimits(handshake_timeout=0.3)
    max_frame = limits.max_frame
    max_buffer = limits.max_buffer

    def transport(self, others: Sequence[TcpTransport]) -> TcpTransport:
        return TcpTransport("127.0.0.1:0", join=[str(other.address) for other in others[:1]], limits=self.limits)

    def address(self, transport: TcpTransport) -> tuple[str, int]:
        host, _, port = str(transport.address).rpartition(":")
        return host, int(port)
