import itertools
import os
from collections.abc import Sequence

from meshkit.testing import TransportConformance
from meshkit.transports.nats import NatsLimits, NatsTransport
from tests.transports.nats_servers import any_url, needs_a_server

_numbers = itertools.count()


@needs_a_server
class TestNats(TransportConformance[NatsTransport]):
    real_time = True
    authenticated = True
    limits = NatsLimits(heartbeat=1.0, connect_timeout=10.0)
    subject = ""
    max_frame = limits.max_frame
    max_buffer = limits.max_buffer

    def transport(self, others: Sequence[NatsTransport]) -> NatsTransport:
        self.subject = self.subject if others else f"conformance.{os.getpid()}.{next(_numbers)}"
        return NatsTransport(any_url(), subject=self.subject, limits=self.limits)
