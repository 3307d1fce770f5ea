"""Transports: what carries messages from node to node."""

from meshkit.transports.memory import MemoryHub, MemoryTransport

__all__ = ["MemoryHub", "MemoryTransport"]
