"""Announcements: what a node says of itself on NATS, where whoever may publish can say anything. No sockets here.

An announcement is an Ed25519 signature (64 bytes) of a domain tag, the subject on which it is published, and what
follows: what it is (1 byte), the session (16), a number (8, big-endian), and an echo (16; zeros: none).

    session  random, new with each connection to a server: the challenge that this node sets to the others
    number   grows with each announcement of a session
    echo     the session of the node to which it is sent: only the key's owner can have signed it, and only now

A node is believed to be up when it has echoed the session of this node; from then on as long as it announces itself in
the same session with a greater number. So neither forging nor replaying announcements lets anybody in, keeps a dead
node alive, or makes one leave that is up; and no clocks are compared.
"""

import struct
from enum import IntEnum
from typing import NamedTuple, Self

from meshkit.runtime.identity import SIGNATURE_SIZE, Identity, verify

__all__ = ["NO_ECHO", "SESSION_SIZE", "Announcement", "Says"]

SESSION_SIZE = 16
"""Bytes."""
NO_ECHO = bytes(SESSION_SIZE)
_TAG = b"meshkit nats announcement 1\0"
_LAYOUT = struct.Struct(f">B{SESSION_SIZE}sQ{SESSION_SIZE}s")


class Says(IntEnum):
    """What an announcement says."""

    HERE = 1
    HERE_AND_WHO_ARE_YOU = 2
    """An answer is asked for, with an echo."""
    GOODBYE = 3


class Announcement(NamedTuple):
    """What a node says of itself."""

    says: Says
    session: bytes
    number: int
    echo: bytes = NO_ECHO

    def signed(self, identity: Identity, subject: bytes) -> bytes:
        """Return the bytes to publish on this subject, and on no other. About 20 µs."""
        body = _LAYOUT.pack(*self)
        return identity.sign(_signed(subject, body)) + body

    @classmethod
    def read(cls, data: bytes, subject: bytes, public_key: bytes) -> Self | None:
        """Return what the owner of this key has published on this subject; None if it has not. About 50 µs."""
        signature, body = data[:SIGNATURE_SIZE], data[SIGNATURE_SIZE:]
        if len(body) != _LAYOUT.size or not verify(public_key, signature, _signed(subject, body)):
            return None
        says, session, number, echo = _LAYOUT.unpack(body)
        try:
            return cls(Says(says), session, number, echo)
        except ValueError:
            return None  # of a later version


def _signed(subject: bytes, body: bytes) -> bytes:
    return b"".join((_TAG, subject, b"\0", body))
