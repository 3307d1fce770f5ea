"""Failures: what follows when a handler, or a stage, raises: what the behavior of the message says.

First `retry`: the message rests, off the worker, and keeps its place. In the end `on_error`: it is logged, dropped,
kept as a dead letter, or raised in the host of the node. Retries are bounded by the number of attempts, by the deadline
of the caller, and by the life of the mailbox; the `retry_after` of an error is heeded.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meshkit import _time
from meshkit._retry_policy import asked_delay
from meshkit.retrier import Backoff
from meshkit.runtime.delivery import Delivery
from meshkit.runtime.graph import Handler
from meshkit.runtime.journal import Journal, shown
from meshkit.runtime.message import Message
from meshkit.runtime.options import OnError
from meshkit.runtime.service import Service
from meshkit.runtime.wire import Failure

__all__ = ["DeadLetter", "DeadLetters", "Failures", "answer_of", "not_handled"]


@dataclass(frozen=True, eq=False)
class DeadLetter:
    """A message that was given up. `rt.replay(letter)` tries again."""

    message: Message[Any]
    """As it was where it failed; before "decode", the payload is bytes."""
    handler: str
    """What should have handled it: the service and the method, or the names of several."""
    stage: str
    """Where it failed: the name of a stage, "order_by", or "handler"."""
    attempts: int
    """How often it was tried."""
    error: Exception
    """Why it failed."""
    original: Message[Any] = field(repr=False)
    """What is tried again: the message as it came to the first stage, or to the handler."""
    size: int
    """Bytes of the encoded payload; 0 of a local one."""


def not_handled(call_id: str, stage: str, on_error: OnError) -> Failure:
    """Return what the caller of a request is told if a `stage` of it failed: no handler has begun."""
    where = "" if on_error == "drop" else f" (look for {call_id} in its log)"
    return Failure(call_id, "not_accepted", f"its stage {stage!r} failed{where}")


def answer_of(delivery: Delivery) -> Failure:
    """Return what the caller of a request is told if its handler failed, or its `order_by`."""
    if delivery.order_error is not None:
        return not_handled(delivery.message.id, "order_by", delivery.handler.behavior.on_error)
    return Failure(delivery.message.id, "failed", code="internal")


class DeadLetters:
    """The core: the last `max_letters` of them, of no more than `max_bytes`; older ones are forgotten, and counted."""

    def __init__(self, max_letters: int = 1_000, max_bytes: int = 64 * 1024 * 1024) -> None:
        self.letters: deque[DeadLetter] = deque()
        self.forgotten = 0
        self._max_letters = max_letters
        self._max_bytes = max_bytes
        self._bytes = 0
        self._added = 0

    def add(self, letter: DeadLetter) -> None:
        """Keep a letter."""
        self._added += 1
        self._bytes += letter.size
        self.letters.append(letter)
        while len(self.letters) > self._max_letters or (self._bytes > self._max_bytes and len(self.letters) > 1):
            self._bytes -= self.letters.popleft().size
            self.forgotten += 1

    def replay(self, letter: DeadLetter, again: Callable[[DeadLetter], bool]) -> bool:
        """Try `again`, and forget the letter if that did something: if it failed, there is a new one.

        Raises:
            ValueError: It is not here any more.
        """
        if letter not in self.letters:
            raise ValueError(f"the dead letter of message {letter.message.id} is not here any more")
        added = self._added
        done = again(letter) or self._added > added
        if done and letter in self.letters:
            self.letters.remove(letter)
            self._bytes -= letter.size
        return done


class Failures:
    """Deals with the failures of one node. `escalate(service, what, error)` stops the node."""

    def __init__(
        self, journal: Journal, letters: DeadLetters, escalate: Callable[[Service, str, BaseException], None]
    ) -> None:
        self._journal = journal
        self._letters = letters
        self._escalate = escalate

    def failed(self, delivery: Delivery, error: Exception) -> float | None:
        """Deal with what a handler raised; return the seconds after which it is to be called again, or None."""
        delay = self._delay(delivery, error)
        if delay is None:
            self.give_up(delivery, error, error)
        else:
            delivery.attempts += 1
            self._journal.retried += 1
            step = f"{delivery.handler.name} raised {shown(error)}: again in {delay:.3g} s"
            self._journal.note((delivery.message.id, step, ""))
        return delay

    def _delay(self, delivery: Delivery, error: Exception) -> float | None:
        policy = delivery.handler.behavior.retry
        if policy is None or delivery.attempts > policy.max_retries or delivery.order_error is not None:
            return None
        if delivery.handler.mailbox.closed or not delivery.caller_waits:
            return None
        asked = asked_delay(error)
        if asked > policy.max_retry_after:
            return None
        backoff = Backoff(base_delay=policy.base_delay, max_delay=policy.max_delay, jitter=policy.jitter)
        delay = max(asked, backoff.delay(delivery.attempts, random.random))
        return delay if _time.now() + delay < delivery.message.deadline else None

    def give_up(self, delivery: Delivery, error: Exception, raised: BaseException) -> None:
        """Deal with a message that is not to be handled again."""
        self._journal.failed += 1
        stage = "handler" if delivery.order_error is None else "order_by"
        message, name = delivery.message, delivery.handler.name
        letter = DeadLetter(message, name, stage, delivery.attempts, error, message, delivery.size)
        self.end(delivery.handler, letter, raised)

    def end(self, handler: Handler, letter: DeadLetter, raised: BaseException) -> None:
        """Do with a message that failed, in a handler or a stage, what its behavior says."""
        message, where = letter.message, "" if letter.stage == "handler" else f" at {letter.stage}"
        self._journal.note((message.id, f"{letter.handler} failed{where}: {shown(raised)}", ""))
        if handler.behavior.on_error == "drop":
            return
        handler.service.log.error(
            "%s failed%s on %r from node %r",
            letter.handler,
            where,
            message.kind,
            message.sender,
            message_id=message.id,
            exc_info=raised,
        )
        if handler.behavior.on_error == "dead_letter":
            self._letters.add(letter)
        elif handler.behavior.on_error == "raise":
            self._escalate(handler.service, f"handler {letter.handler!r}{where}", raised)
