"""The runtime: services on nodes, and typed messages between them."""

from meshkit.runtime.behavior import (
    Behavior,
    Broadcast,
    Ephemeral,
    Local,
    Request,
    broadcast,
    ephemeral,
    local,
    request,
)
from meshkit.runtime.calls import Replies, TooFewReplies
from meshkit.runtime.failures import DeadLetter
from meshkit.runtime.identity import Identity
from meshkit.runtime.journal import MessageDropped, MessageSent, RuntimeStats
from meshkit.runtime.message import Message
from meshkit.runtime.presence import Peer, PeerGone, PeerUp
from meshkit.runtime.runtime import Runtime
from meshkit.runtime.service import Reject, Service, ServiceFailed, handles
from meshkit.runtime.stages import Continue, Drop, Fail, Stage
from meshkit.runtime.transport import Receiver, Transport

__all__ = [
    "Behavior",
    "Broadcast",
    "Continue",
    "DeadLetter",
    "Drop",
    "Ephemeral",
    "Fail",
    "Identity",
    "Local",
    "Message",
    "MessageDropped",
    "MessageSent",
    "Peer",
    "PeerGone",
    "PeerUp",
    "Receiver",
    "Reject",
    "Replies",
    "Request",
    "Runtime",
    "RuntimeStats",
    "Service",
    "ServiceFailed",
    "Stage",
    "TooFewReplies",
    "Transport",
    "broadcast",
    "ephemeral",
    "handles",
    "local",
    "request",
]
