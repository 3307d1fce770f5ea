"""Dead letters: messages that could not be handled, kept so that somebody can look at them and try again."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshkit.runtime.message import Message

__all__ = ["DeadLetter", "DeadLetters"]


@dataclass(frozen=True, eq=False)
class DeadLetter:
    """A message that was given up. `rt.replay(letter)` tries again."""

    message: Message[Any]
    """As it was when it failed; the payload is raw bytes if a stage before "decode" did."""
    handler: str
    """What should have handled it: the service and the method, or the names of several."""
    stage: str
    """Where it failed: the name of a stage, or "handler"."""
    attempts: int
    """How often it was tried."""
    error: Exception
    """Why it failed."""
    again: Callable[[], bool]
    """Tries again; returns whether there was room for it."""


class DeadLetters:
    """The core: the last `max_letters` of them; older ones are forgotten, and counted."""

    def __init__(self, max_letters: int = 1_000) -> None:
        self.letters: deque[DeadLetter] = deque(maxlen=max_letters)
        self.forgotten = 0

    def add(self, letter: DeadLetter) -> None:
        """Keep a letter."""
        self.forgotten += len(self.letters) == self.letters.maxlen
        self.letters.append(letter)

    def replay(self, letter: DeadLetter) -> bool:
        """Try again, and forget the letter if it could be: if that fails, there is a new one.

        Raises:
            ValueError: It is not here any more.
        """
        if letter not in self.letters:
            raise ValueError(f"the dead letter of message {letter.message.id} is not here any more")
        if not letter.again():
            return False
        self.letters.remove(letter)
        return True
