"""Transports: what carries messages from node to node."""

from meshkit.transports._tcp.limits import TcpLimits
from meshkit.transports.memory import MemoryHub, MemoryTransport
from meshkit.transports.tcp import TcpTransport

__all__ = ["MemoryHub", "MemoryTransport", "TcpLimits", "TcpTransport"]
