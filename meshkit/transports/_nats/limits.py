"""The limits of a `NatsTransport`."""

from dataclasses import dataclass

from meshkit import _check

__all__ = ["NatsLimits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NatsLimits:
    """What a `NatsTransport` puts up with. Sizes are in bytes, times in seconds."""

    max_frame: int = 1024 * 1024
    """The largest frame. A server whose `max_payload` is less is not used: what a node may send would not pass."""
    max_buffer: int = 8 * 1024 * 1024
    """What waits to be sent to the server, whoever it is for; more is `Overloaded`."""
    max_peers: int = 1_000
    """Nodes that are peers; more are not let in."""
    heartbeat: float = 2.0
    """A node of which nothing was heard in two heartbeats is lost; a server, in one and a half."""
    connect_timeout: float = 2.0
    """Until a server has let this node in, or the next one is tried."""
    close_timeout: float = 2.0
    """What `close` takes to send what is buffered."""

    def __post_init__(self) -> None:
        _check.limits(self)
