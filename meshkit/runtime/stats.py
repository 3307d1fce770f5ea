"""What a runtime tells about itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["RuntimeStats"]


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What a runtime has done since it started. delivered = handled + failed + cancelled + cut + queued + running."""

    sent: int = 0
    """Messages emitted, and calls made."""
    delivered: int = 0
    """Messages put into mailboxes; one for two services counts twice."""
    handled: int = 0
    """Handlers that returned."""
    failed: int = 0
    """Handlers that raised."""
    cancelled: int = 0
    """Calls given up by their caller, or past their deadline, before a handler had ended."""
    cut: int = 0
    """Messages whose handler had not begun or ended when the runtime stopped."""
    queued: int = 0
    """Messages that wait in mailboxes."""
    running: int = 0
    """Messages that are being handled."""
    pending: int = 0
    """Calls that wait for their answer."""
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Messages that reached no handler, by kind ("" where no service here knows it) and reason."""
