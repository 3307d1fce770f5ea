"""Dead letters: messages that could not be handled, kept so that somebody can look at them and try again."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meshkit.runtime.message import Message

__all__ = ["DeadLetter", "DeadLetters"]


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
    came: Message[Any] = field(repr=False)
    """What is tried again: the message as it came to the first stage, or to the handler."""
    size: int
    """Bytes of the encoded payload; 0 of a local one."""


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
