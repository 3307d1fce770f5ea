"""What goes over a TCP connection between two nodes: records, and the handshake with which they begin. No sockets here.

A record is the length of its body (4 bytes, big-endian), its kind (1 byte), and its body. These come in this order:

    HELLO     both    version, public key, 32 random bytes, the address at which the node listens
    PROOF     both    a signature of both hellos, and of who dialled: no other connection ever has the same
    OPEN      arbiter from now on this is the connection between the two
    FRAME, ADDRESSES, PING, PONG in any order
    BYE       the node leaves the mesh; the connection ends
    REFUSED   instead of any of them: why not; the connection ends

The dialler begins; it proves itself when the other has, and a stranger is told nothing. The arbiter is the node with
the smaller id: it alone decides which connection the two use, so they always agree, also when each dials the other at
the same moment, and no connection that carries frames is given up for another one.

The handshake proves who is at the other end, to keep strangers out. It does not protect what follows: frames carry
their own proof, and TLS does the rest where that is wanted.
"""

import re
import struct
from enum import IntEnum
from ipaddress import ip_address
from typing import NamedTuple, Self

import msgspec

__all__ = [
    "MAX_CONTROL",
    "MOST_ADDRESSES",
    "Address",
    "Kind",
    "Refusal",
    "Rejected",
    "Unrecorder",
    "addresses",
    "read_addresses",
    "record",
]

_HEADER = struct.Struct(">IB")
MAX_CONTROL = 16 * 1024
"""Bytes of the body of a record that is no frame."""
MOST_ADDRESSES = 40
"""That are sent in one record: they always fit."""
_ADDRESS = re.compile("[!-~]{1,300}")  # ASCII, as names in the DNS are, of up to 253: a character is a byte


class Kind(IntEnum):
    """What a record is."""

    FRAME = 0
    HELLO = 1
    PROOF = 2
    OPEN = 3
    REFUSED = 4
    ADDRESSES = 5
    PING = 6
    PONG = 7
    BYE = 8


class Refusal(IntEnum):
    """Why a node does not want a connection: the body of a `REFUSED`."""

    VERSION = 1
    STRANGER = 2
    SAME_KEY = 3
    ITSELF = 4
    DUPLICATE = 5
    FULL = 6
    BAD_PROOF = 7

    @property
    def text(self) -> str:
        """The reason, of the node that refuses."""
        return _REASONS[self]


_REASONS = {
    Refusal.VERSION: "it speaks another version of the protocol",
    Refusal.STRANGER: "it does not trust this node: add the id of this node to its trust=",
    Refusal.SAME_KEY: "it has the key of this node: each node needs a key of its own",
    Refusal.ITSELF: "it is this node itself",
    Refusal.DUPLICATE: "the two are connected already",
    Refusal.FULL: "it has as many peers as it may have",
    Refusal.BAD_PROOF: "this node did not prove who it is",
}


class Rejected(Exception):
    """The other side does not follow the protocol, or is not wanted. `refusal` is what it is told, if anything."""

    def __init__(self, reason: str, refusal: Refusal | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal


class Address(NamedTuple):
    """Where a node listens. An empty host means every address of the machine, or the host that is seen anyway."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: object, argument: str, *, host_needed: bool = True) -> Self:
        """Return the address "host:port", "[::1]:port" or, if no host is needed, ":port". It is ASCII.

        Raises:
            ValueError: It is no such text; the message names the `argument`.
        """
        if isinstance(text, str) and _ADDRESS.fullmatch(text):
            host, colon, digits = text.rpartition(":")
            bare = host.removeprefix("[").removesuffix("]")
            bracketed = len(host) - len(bare) == 2
            port = int(digits) if colon and digits.isdigit() and len(digits) <= 5 else 65536
            there = bare and port if host_needed else True
            if port < 65536 and there and bracketed == (":" in bare):
                return cls(bare, port)
        raise ValueError(f'{argument} must be "host:port", such as "127.0.0.1:7001" or "[::1]:7001", not {text!r:.400}')

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_everywhere(self) -> bool:
        """Whether it stands for all addresses of the machine."""
        return self.host in {"", "0.0.0.0", "::"}  # noqa: S104 - it is only recognised here

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host == "localhost"


# --- records ------------------------------------------------------------------------------------------------


def record(kind: Kind, body: bytes = b"") -> bytes:
    """Return a record as it is sent."""
    return _HEADER.pack(len(body), kind) + body


class Unrecorder:
    """The core: the records in a stream of bytes, which may come in any slices.

    It holds what has come of a record, never what its length promises. Its time is linear in the bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes of a body; may be changed between two records
        self._data: bytes | bytearray = b""
        self._at = 0
        self._needed = _HEADER.size  # bytes of `_data` from `_at` on, before it is any use to look again

    @property
    def held(self) -> int:
        """How many bytes wait for others to come, or to be asked for."""
        return len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        if self._at == len(self._data):
            self._data, self._at = data, 0
            return
        if self._at or isinstance(self._data, bytes):
            self._data = bytearray(memoryview(self._data)[self._at :])
            self._at = 0
        self._data += data

    def next(self) -> tuple[int, bytes] | None:
        """Return the kind and the body of the next record, or None if it has not come completely.

        Raises:
            Rejected: It is longer than it may be.
        """
        there = len(self._data) - self._at
        if there < self._needed:
            return None
        size, kind = _HEADER.unpack_from(self._data, self._at)
        if size > self.limit:
            raise Rejected(f"it announced a record of {size} bytes, where {self.limit} are allowed")
        self._needed = _HEADER.size + size
        if there < self._needed:
            return None
        start = self._at + _HEADER.size
        self._at = end = start + size
        self._needed = _HEADER.size
        body = self._data[start:end] if isinstance(self._data, bytes) else bytes(memoryview(self._data)[start:end])
        return kind, body


_addresses = msgspec.msgpack.Decoder(list[tuple[str, str]])


def addresses(known: list[tuple[str, str]]) -> bytes:
    """Return the body of a record of node ids and their addresses."""
    return msgspec.msgpack.encode(known)


def read_addresses(body: bytes) -> list[tuple[str, str]]:
    """Return the ids and addresses in the body of a record; those are read that are needed.

    Raises:
        Rejected: There is something else in it.
    """
    try:
        return _addresses.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise Rejected(f"it sent addresses that are none: {error}") from None
