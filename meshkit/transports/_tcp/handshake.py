"""The handshake: who is at the other end of a connection. No sockets here; `wire` tells what follows what."""

import struct
from collections.abc import Callable

from meshkit.runtime.identity import SIGNATURE_SIZE, Identity, node_id_of, verify
from meshkit.transports._tcp.wire import Address, Kind, Refusal, Rejected, record

__all__ = ["Handshake"]

_VERSION = 1
_HELLO = struct.Struct(">B32s32s")  # and the address
_TAG = b"meshkit tcp handshake 1\0"


class Handshake:
    """The core: one side of the handshake. When it is `proved`, `peer` is the id of the node at the other end.

    Args:
        identity: That of this node.
        dialled: Whether this side made the connection.
        listens: The address at which this node listens, or "".
        trusts: Says whether a node may come in.
        challenge: 32 bytes that nobody could foresee.
        dialling: Says whether a challenge is that of a connection which this node is making now.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        dialled: bool,
        listens: str,
        trusts: Callable[[str], bool],
        challenge: bytes,
        dialling: Callable[[bytes], bool],
    ) -> None:
        self.dialled = dialled
        self.challenge = challenge
        self.peer = ""  # who the other side says it is
        self.listens = ""  # and where it listens
        self.proved = False
        self._identity = identity
        self._trusts = trusts
        self._dialling = dialling
        self._hello = _HELLO.pack(_VERSION, identity.public_key, self.challenge) + listens.encode()
        self._key = self._theirs = b""

    @property
    def is_arbiter(self) -> bool:
        """Whether this side decides which connection the two nodes use."""
        return self._identity.node_id < self.peer

    def begin(self) -> bytes:
        """Return what this side sends when it is connected."""
        return record(Kind.HELLO, self._hello) if self.dialled else b""

    def receive(self, kind: int, body: bytes) -> bytes:
        """Take a record of the other side, and return what to answer.

        Raises:
            Rejected: The connection must end.
        """
        if not self.peer and kind == Kind.HELLO:
            self._read_hello(body)
            if self.dialled:
                return b""
            return record(Kind.HELLO, self._hello) + record(Kind.PROOF, self._proof())
        if self.peer and not self.proved and kind == Kind.PROOF:
            signed = self._signed(by_dialler=not self.dialled)
            if len(body) != SIGNATURE_SIZE or not verify(self._key, body, signed):
                raise Rejected("it did not prove who it is", Refusal.BAD_PROOF)
            self.proved = True
            return record(Kind.PROOF, self._proof()) if self.dialled else b""
        raise Rejected(f"it sent a record of kind {kind} in the handshake")

    def _read_hello(self, body: bytes) -> None:
        if len(body) < _HELLO.size:
            raise Rejected("its hello is too short")
        version, key, challenge = _HELLO.unpack_from(body)
        if version != _VERSION:
            raise Rejected(f"it speaks version {version} of the protocol, and not {_VERSION}", Refusal.VERSION)
        if key == self._identity.public_key:
            itself = not self.dialled and self._dialling(challenge)
            reason = Refusal.ITSELF.text if itself else "it has the key of this node"
            raise Rejected(reason, Refusal.ITSELF if itself else Refusal.SAME_KEY)
        node = node_id_of(key)
        if not self._trusts(node):
            raise Rejected(f"it is node {node!r}, which is not trusted", Refusal.STRANGER)
        try:
            listens = body[_HELLO.size :].decode()
            port = Address.parse(listens, "its address", host_needed=False).port if listens else None
        except ValueError:
            raise Rejected("it listens at no address that is one") from None
        if port == 0:  # those who are told of it would reject it
            raise Rejected("it listens at no port that is one")
        self.peer, self.listens, self._key, self._theirs = node, listens, key, body

    def _proof(self) -> bytes:
        return self._identity.sign(self._signed(by_dialler=self.dialled))

    def _signed(self, *, by_dialler: bool) -> bytes:
        """Return what is signed: who says so, and what both have said. The lengths keep the two hellos apart."""
        dialler, other = (self._hello, self._theirs) if self.dialled else (self._theirs, self._hello)
        return b"".join((_TAG, b"D" if by_dialler else b"A", struct.pack(">I", len(dialler)), dialler, other))
