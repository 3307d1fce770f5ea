"""The runtime: services on nodes, and typed messages between them."""

from meshkit.runtime.behavior import Behavior, Broadcast, Local, Reject, Request, broadcast, handles, local, request
from meshkit.runtime.message import Message
from meshkit.runtime.runtime import Runtime
from meshkit.runtime.service import Service, ServiceFailed
from meshkit.runtime.stats import RuntimeStats
from meshkit.runtime.transport import Receiver, Transport

__all__ = [
    "Behavior",
    "Broadcast",
    "Local",
    "Message",
    "Receiver",
    "Reject",
    "Request",
    "Runtime",
    "RuntimeStats",
    "Service",
    "ServiceFailed",
    "Transport",
    "broadcast",
    "handles",
    "local",
    "request",
]
