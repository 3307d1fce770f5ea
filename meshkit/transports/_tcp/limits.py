"""The limits of a `TcpTransport`."""

from dataclasses import dataclass

from meshkit import _check

__all__ = ["TcpLimits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TcpLimits:
    """What a `TcpTransport` puts up with. Sizes are in bytes, times in seconds."""

    max_frame: int = 1024 * 1024
    """The largest frame: it takes memory only as it comes."""
    max_buffer: int = 8 * 1024 * 1024
    """What waits for a peer that does not read, beyond a frame or two; more is `Overloaded`."""
    max_peers: int = 1_000
    """Connections to nodes that have proved who they are, and addresses that are remembered."""
    max_unproved: int = 100
    """Incoming connections that have proved nothing yet; one more ends the oldest of them."""
    handshake_timeout: float = 5.0
    """Until a new connection has proved who is there."""
    ping_interval: float = 5.0
    """After this silence, a peer is asked for a sign of life."""
    silence_timeout: float = 15.0
    """After this silence, a peer is lost."""
    write_timeout: float = 10.0
    """A peer that has read nothing of what waits for it for so long is lost."""
    doubt_timeout: float = 2.0
    """Until a peer must give a sign of life that has made a second connection, and so may have lost the first."""
    close_timeout: float = 2.0
    """What `close` takes to send what is buffered."""

    def __post_init__(self) -> None:
        _check.limits(self)
