"""What a runtime tells about itself."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Counts", "RuntimeStats"]


class Counts:
    """What has happened on a node so far; `RuntimeStats` says what each means."""

    def __init__(self) -> None:
        self.sent = 0
        self.delivered = 0
        self.handled = 0
        self.failed = 0
        self.cancelled = 0
        self.cut: Counter[str] = Counter()  # by kind
        self.dropped: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What a runtime has done since it started. delivered = handled + failed + cancelled + cut + queued + running."""

    sent: int = 0
    """Messages emitted, and calls made."""
    delivered: int = 0
    """Messages that were put into mailboxes; one for two services counts twice."""
    handled: int = 0
    """Handlers that returned."""
    failed: int = 0
    """Handlers that raised."""
    cancelled: int = 0
    """Calls whose caller gave up before their handler had ended."""
    cut: int = 0
    """Messages whose handler had not begun, or not ended, when the runtime stopped."""
    queued: int = 0
    """Messages that wait in mailboxes."""
    running: int = 0
    """Messages that are being handled."""
    pending: int = 0
    """Calls that wait for their answer."""
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """Messages that reached no mailbox, by kind ("" where no service here handles it) and reason."""
