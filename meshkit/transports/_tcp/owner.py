"""The transport, as its connections see it."""

from typing import TYPE_CHECKING, Protocol

from meshkit.transports._tcp.limits import TcpLimits
from meshkit.transports._tcp.wire import Refusal

if TYPE_CHECKING:
    from meshkit.transports._tcp.link import Link

__all__ = ["Owner"]


class Owner(Protocol):
    """Whose connections they are. `told` may raise `Rejected`; nothing else raises."""

    limits: TcpLimits
    buffer: memoryview
    """What any connection reads into: each takes its bytes out at once, so one is enough for all."""

    def connected(self, link: "Link") -> None:
        """Take note of a connection; whoever is at the other end has proved nothing yet."""
        ...

    def wanted(self, link: "Link") -> Refusal | None:
        """Return what speaks against a connection, as soon as its other end has said who it is."""
        ...

    def opened(self, link: "Link") -> None:
        """Use the connection from now on."""
        ...

    def received(self, node: str, frame: bytes) -> None:
        """Take a frame."""
        ...

    def told(self, body: bytes) -> None:
        """Take the addresses that another node knows (the body of a record); raise `Rejected` if one is none."""
        ...

    def disconnected(self, link: "Link") -> None:
        """Do without the connection from now on; its socket may have last words to send."""
        ...

    def closed(self, link: "Link") -> None:
        """Forget the connection: its socket is closed."""
        ...
