"""Messages: what a handler is given.

>>> Message(id="5f", kind="social:tease", sender="alice", payload="boo", time=0.0).sender
'alice'
"""

import math
import os
from typing import Generic, TypeVar

import msgspec

__all__ = ["Message", "check_name", "new_id"]

T_co = TypeVar("T_co", covariant=True)


class Message(msgspec.Struct, Generic[T_co], frozen=True):
    """One message, as its handler sees it: the payload, and who sent it when. Frozen."""

    id: str
    """128 random bits as text. For a call it is the request's id, and the correlation id of its errors."""
    kind: str
    """The kind of its behavior, such as "stash:store"."""
    sender: str
    """The node that sent it; this node's own name for what it sent to itself."""
    payload: T_co
    """The payload, of the type that the behavior declares."""
    time: float
    """When it was sent, in seconds since the Unix epoch by the sender's clock."""
    deadline: float = math.inf
    """When its caller gives up and the handler is cancelled, on this loop's clock; infinite where nobody waits."""


def check_name(what: str, name: object) -> str:
    """Return `name`, which must be text without spaces, since it becomes part of task names, errors and log lines."""
    if not isinstance(name, str) or not name or any(character.isspace() for character in name):
        raise ValueError(f"{what} must be text without spaces, not {name!r}")
    return name


def new_id() -> str:
    """Return a fresh unguessable id: 128 random bits, as 32 hexadecimal digits."""
    return os.urandom(16).hex()
