"""The journal of a node: what became of its messages, in numbers, and of the latest of them one by one.

>>> journal = Journal()
>>> journal.note(("5f", "sent to", "bob"))
>>> journal.drop("social:tease", "rate_limit", "rate_limited", "5f", "bob")
>>> print(journal.explain("5f"))
message 5f
  sent to node 'bob'
  dropped at rate_limit: rate_limited, from node 'bob'
"""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshkit.events import Event, Observer, notify

__all__ = ["MAX_NOTE", "Journal", "MessageDropped", "MessageSent", "RuntimeStats", "shown"]

MAX_NOTE = 300
"""Characters of what is remembered of a step, or a drop: others, and their errors, may say more than can be kept."""


@dataclass(frozen=True, slots=True)
class MessageDropped(Event):
    """A message, or a frame (without kind and id), went no further than `stage`, and why."""

    kind: str
    stage: str
    reason: str
    message_id: str
    sender: str
    """Of a frame that was refused: who the transport says has sent it. Nothing has proved that."""
    detail: str = ""
    """Of a frame: the error, and whom it claims to be from, if the transport says otherwise."""


@dataclass(frozen=True, slots=True)
class MessageSent(Event):
    """A message was emitted, or a node was asked: by this node, to the node `to`; None is every node, or here only."""

    kind: str
    message_id: str
    to: str | None


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What a runtime has done since it started.

    delivered = handled + failed + cancelled + cut + queued + running, where what waits to be retried is queued.
    """

    sent: int = 0
    """Messages emitted, and calls made."""
    delivered: int = 0
    """Messages that were put into mailboxes; one for two services counts twice."""
    handled: int = 0
    """Handlers that returned."""
    failed: int = 0
    """Handlers that raised, and are not to be called again."""
    retried: int = 0
    """Handlers that raised, and were called again."""
    cancelled: int = 0
    """Messages that were given up: their caller had gone, or a newer one needed their place."""
    cut: int = 0
    """Messages whose handler had not begun, or not ended, when the runtime stopped."""
    queued: int = 0
    """Messages that wait in mailboxes."""
    running: int = 0
    """Messages that are being handled."""
    pending: int = 0
    """Calls that wait for their answer."""
    dropped: Mapping[tuple[str, str, str], int] = field(default_factory=dict[tuple[str, str, str], int])
    """Messages that reached no mailbox, by kind ("" where no service here handles it), stage and reason."""


class Journal:
    """Counts everything; remembers the last `DROPS` drops, and the last `NOTES` steps of any messages.

    Beyond `REASONS` different ones, drops for a new reason are counted under "other".
    """

    DROPS = 1_000
    NOTES = 10_000
    REASONS = 1_000

    def __init__(self, observer: Observer | None = None) -> None:
        self.sent = self.delivered = self.handled = self.failed = self.retried = self.cancelled = 0
        self.cut: Counter[str] = Counter()  # by kind
        self.dropped: Counter[tuple[str, str, str]] = Counter()
        self.drops: deque[MessageDropped] = deque(maxlen=self.DROPS)
        self._notes: deque[tuple[str, str, str]] = deque(maxlen=self.NOTES)
        self.note = self._notes.append
        """Remember a step of a message: (its id, the step, ""), or (its id, "sent to", a node). Most notes are never
        read: they are put into words when somebody asks. Who notes what others say cuts it to `MAX_NOTE`."""
        self._observer = observer

    def send(self, kind: str, message_id: str, to: str | None) -> None:
        """Count a message that has left, and tell the observer."""
        self.sent += 1
        if self._observer is not None:
            notify(self._observer, MessageSent(kind, message_id, to))

    def drop(
        self, kind: str, stage: str, reason: str, message_id: str = "", sender: str = "", detail: str = ""
    ) -> None:
        """Count and remember a message that goes no further; `MAX_NOTE` characters of its reason, and of the detail."""
        reason, detail = reason[:MAX_NOTE], detail[:MAX_NOTE]
        if (kind, stage, reason) not in self.dropped and len(self.dropped) >= self.REASONS:
            reason = "other"  # custom stages make reasons up, perhaps of what a message says
        self.dropped[kind, stage, reason] += 1
        dropped = MessageDropped(kind, stage, reason, message_id, sender, detail)
        self.drops.append(dropped)
        if message_id:
            why = f"dropped at {stage}: {reason}{f' ({detail})' if detail else ''}{', from' if sender else ''}"
            self.note((message_id, why[:MAX_NOTE], sender))
        notify(self._observer, dropped)

    def explain(self, message_id: str) -> str:
        """Tell the story of a message, as far as it is remembered."""
        notes = [(step, node) for of, step, node in self._notes if of == message_id]
        # On a line of its own, what others say could pass for another step.
        steps = [f"{_in_one_line(step)} node {node!r}" if node else _in_one_line(step) for step, node in notes]
        return "\n  ".join([f"message {message_id}", *(steps or ["nothing is remembered of it here"])])

    def stats(self, *, queued: int, running: int, pending: int) -> RuntimeStats:
        """Return the numbers so far."""
        return RuntimeStats(
            sent=self.sent,
            delivered=self.delivered,
            handled=self.handled,
            failed=self.failed,
            retried=self.retried,
            cancelled=self.cancelled,
            cut=self.cut.total(),
            queued=queued,
            running=running,
            pending=pending,
            dropped=dict(self.dropped),
        )


def _in_one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def shown(error: BaseException) -> str:
    """Return `repr(error)`, cut to `MAX_NOTE`; only the name of its type, if that raises an error of its own."""
    try:
        return repr(error)[:MAX_NOTE]
    except (Exception, asyncio.CancelledError):  # noqa: BLE001 - whoever made the error has made its text
        return type(error).__name__
