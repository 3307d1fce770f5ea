"""Messages: what a handler is given.

>>> Message(id="5f", kind="social:tease", sender="alice", payload="boo", time=0.0).sender
'alice'
"""

import math
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from meshkit._entropy import random_bytes

__all__ = ["MAX_DETAIL", "MAX_ID", "MAX_NAME", "Message", "check_id", "check_name", "is_name", "new_ids"]

T_co = TypeVar("T_co", covariant=True)

MAX_ID = 128
"""Characters of an id."""
MAX_NAME = 255
"""Characters of a name: of a node, a service, a kind."""
MAX_DETAIL = 4096
"""Characters that a node may say about why there is no reply."""


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
    version: int = 1
    """The version of the behavior that the payload is of; after an upgrade, the one that the handler takes."""
    deadline: float = math.inf
    """When its caller gives up and the handler is cancelled, on this loop's clock; infinite where nobody waits."""


def is_name(name: object) -> bool:
    """Return whether `name` is printable text without spaces: shown to people, it passes for nothing else."""
    return isinstance(name, str) and name != "" and name.isprintable() and " " not in name


def check_name(what: str, name: object) -> str:
    """Return `name`, which must be a short name: task names, errors and log lines show it."""
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"{what} must be text without spaces, not {name!r}")
    if len(name) > MAX_NAME:
        raise ValueError(f"{what} must have at most {MAX_NAME} characters, not {len(name)}")
    return name


def check_id(message_id: object) -> str:
    """Return the id of a request, which must be short text: ids are remembered."""
    if not isinstance(message_id, str) or not 0 < len(message_id) <= MAX_ID:
        raise ValueError(f"id must be text of 1 to {MAX_ID} characters, not {message_id!r:.80}")
    message_id.encode()  # lone surrogates cannot travel
    return message_id


def new_ids() -> Iterator[str]:
    """Yield ids that nobody can guess: 128 bits from the operating system, as 32 hexadecimal digits.

    They are drawn 256 at a time, which costs a third of drawing each.
    """
    while True:
        drawn = random_bytes(16 * 256).hex()
        for at in range(0, len(drawn), 32):
            yield drawn[at : at + 32]
