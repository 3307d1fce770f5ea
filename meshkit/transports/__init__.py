"""Transports: what carries messages from node to node."""

from meshkit.transports._nats.limits import NatsLimits
from meshkit.transports._tcp.limits import TcpLimits
from meshkit.transports.memory import MemoryHub, MemoryTransport
from meshkit.transports.nats import NatsTransport
from meshkit.transports.tcp import TcpTransport

__all__ = ["MemoryHub", "MemoryTransport", "NatsLimits", "NatsTransport", "TcpLimits", "TcpTransport"]
