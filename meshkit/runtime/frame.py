"""The proof of frames: who sent these bytes, to whom, when, and that they were not here before.

A frame is a header of 90 bytes and a body. The header is: version (1 byte), proof (1), the sender's key (32), the
recipient's key (32; zeros: every node), a random id (16), and a time stamp in µs since the epoch (8, big-endian).

    sealed   to one node: XChaCha20-Poly1305 under a key that only the two can derive, and which is another one for the
             way back; the header is its associated data. The body is nonce || ciphertext.
    signed   to every node: the sender's Ed25519 signature of a domain tag, the header and the bundle, as they are sent.
             The body is signature || bundle.

The keys are those of the identities: there is no forward secrecy, and none of this hides who talks to whom, or when.

>>> from meshkit.runtime.identity import Identity
>>> alice, bob = (Prover(Identity.from_seed(seed * 32), started=1000.0) for seed in (b"a", b"b"))
>>> frame = alice.seal(bob.identity.node_id, b"the map", 1000.5)
>>> opened = bob.open(frame, 1000.6)
>>> opened.bundle, opened.sender == alice.identity.node_id, opened.to_all
(b'the map', True, False)
>>> bob.open(frame, 1000.7)
Traceback (most recent call last):
    ...
meshkit.errors.Replayed: The message was seen before.
"""

import functools
import inspect
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from meshkit._entropy import random_bytes
from meshkit.encryptor import Encryptor
from meshkit.errors import BadSignature, MalformedFrame, Replayed, Stale, UnknownSender
from meshkit.runtime.identity import SIGNATURE_SIZE, Identity, node_id_of, public_key_of, verify
from meshkit.runtime.replay import MICRO, ReplayWindow

__all__ = ["Opened", "Prover", "Trust", "claimed_sender"]

Trust: TypeAlias = Collection[str] | Callable[[str], bool] | None
"""Whom a node listens to: these node ids, or those for which the predicate returns True, or (None) anyone."""

_HEADER = struct.Struct(">BB32s32s16sq")
_VERSION, _SEALED, _SIGNED = 1, 1, 2
_LEAST_BODY = {_SEALED: 24 + 16, _SIGNED: SIGNATURE_SIZE}  # bytes: nonce and tag of a seal; a signature
_OVERHEAD = _HEADER.size + SIGNATURE_SIZE  # bytes, at most
_EVERY_NODE = bytes(32)  # is no node's key: as a point of the curve it has small order
_CONTEXT = "meshkit sealed frame 1 from {} to {}"
_SIGNED_TAG = b"meshkit signed frame 1\0"
_SKEW = 2.0  # seconds by which a stamp may be older than the start of the node
_MAX_PEERS = 2_000  # whose derived keys are kept: it takes 300 µs to derive them


@dataclass(frozen=True, slots=True)
class Opened:
    """What was in a frame: node `sender` said so, at `time` by its clock (seconds since the epoch). That is proved.

    If `stale` is not None, it came too late, and perhaps not for the first time: it will never be accepted. `forgotten`
    says that it may have been accepted before, and nothing is remembered of that: by the life of this node before, or
    because its sender has sent more since than is remembered.
    """

    sender: str
    bundle: bytes
    to_all: bool
    time: float
    stale: Stale | None
    forgotten: bool = False


class _Peer(NamedTuple):
    """A node from which, or to which, frames go."""

    node_id: str
    key: bytes
    encryptor: Encryptor


class Prover:
    """Seals and signs what one node sends, and opens what is sent to it. Times are wall-clock seconds.

    Args:
        identity: That of the node.
        name: What the node is called; its transport names tasks by it. By default its id.
        trust: Whom it listens to. Node ids are copied. A predicate is asked for every frame and must return a bool; one
            that raises does not trust, and its error is the `__cause__` of the `UnknownSender`.
        window: By how many seconds the stamp of a frame may be off, either way.
        started: When the node started, which remembers nothing of what it accepted before. In the first 4 s a stamp may
            be up to 2 s older, because clocks differ: what was accepted before a restart, and is stamped so, could then
            be accepted once more.
        max_frame: How many bytes a frame may have. `max_bundle`, what then remains for a bundle, is an attribute.
        max_remembered: How many accepted frames it can remember, each until its stamp is out of the window; 170 bytes.
            Beyond, what came first of the sender that has most is forgotten: what it stamped before that is stale.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        name: str = "",
        trust: Trust = None,
        window: float = 30.0,
        started: float,
        max_frame: int = 1024 * 1024,
        max_remembered: int = 250_000,
    ) -> None:
        self.identity = identity
        self.name = name or identity.node_id
        self._started = round(started * MICRO)
        self._settles: float = round((started + 2 * _SKEW) * MICRO)
        self._trust: Callable[[str], object] = _predicate(trust)
        self._max_frame = max_frame
        self.max_bundle = max_frame - _OVERHEAD
        self.seen = ReplayWindow(
            window=round(window * MICRO), floor=round((started - _SKEW) * MICRO), max_keys=max_remembered
        )
        self._recipient = functools.lru_cache(_MAX_PEERS)(functools.partial(_recipient, identity))
        self._senders: OrderedDict[bytes, _Peer] = OrderedDict()  # those that were used last

    def trusts(self, node_id: str) -> bool:
        """Return whether frames of this node are taken; a predicate that raises does not trust."""
        try:
            self._require_trusted(node_id)
        except UnknownSender:
            return False
        return True

    def seal(self, recipient: str, bundle: bytes | bytearray, now: float) -> bytes:
        """Return the frame that takes `bundle` to one node, which alone can read it.

        Raises:
            ValueError: `recipient` is not a node id, or is this node; or `bundle` is larger than `max_bundle`.
        """
        self._require_room(bundle)
        peer = self._recipient(recipient)
        header = self._header(_SEALED, peer.key, now)
        return header + peer.encryptor.seal_combined(bundle, aad=header)

    def sign(self, bundle: bytes | bytearray, now: float) -> bytes:
        """Return the frame that takes `bundle` to every node; `ValueError` if it is larger than `max_bundle`."""
        self._require_room(bundle)
        header = self._header(_SIGNED, _EVERY_NODE, now)
        return b"".join((header, self.identity.sign(_SIGNED_TAG + header + bundle), bundle))

    def open(self, frame: bytes, now: float) -> Opened:
        """Return what is in the frame, the cheapest checks first; nothing is remembered of one that is not proved.

        One that is proved, but came too late, is returned with `stale` set, so that it can be answered. One that is
        stamped in the future is not: it could come again when its time has come, and nobody may be told before that it
        was refused.

        Raises:
            MalformedFrame: It is not a frame, or not one for this node from another.
            UnknownSender: Its sender is not trusted.
            BadSeal, BadSignature: Its sender did not make it so.
            Stale: It is proved, but stamped in the future.
            Replayed: It was opened before.
            Overloaded: It is proved, but frames of too many senders were opened lately to remember one more.
        """
        size = len(frame)
        if not _HEADER.size <= size <= self._max_frame:
            raise MalformedFrame(reason=f"a frame of {size} bytes")
        version, proof, sender, recipient, frame_id, stamp = _HEADER.unpack_from(frame)
        if version != _VERSION:
            raise MalformedFrame(reason=f"a frame of version {version}, and only {_VERSION} is understood")
        if size < _HEADER.size + _LEAST_BODY.get(proof, size):
            raise MalformedFrame(reason="a frame without a whole proof")
        if sender == self.identity.public_key:
            raise MalformedFrame(reason="a frame from this node itself")
        if recipient != (self.identity.public_key if proof == _SEALED else _EVERY_NODE):
            raise MalformedFrame(reason="a frame for another node")

        known = self._senders.get(sender)
        node_id = known.node_id if known else node_id_of(sender)
        self._require_trusted(node_id)
        header, body = frame[: _HEADER.size], frame[_HEADER.size :]
        if proof == _SEALED:
            peer = known or self._sender(node_id, sender)
            bundle = peer.encryptor.open_combined(body, aad=header)
        else:
            signature, bundle = body[:SIGNATURE_SIZE], body[SIGNATURE_SIZE:]
            if not verify(sender, signature, _SIGNED_TAG + header + bundle):
                raise BadSignature
            peer = known or self._sender(node_id, sender)  # after the signature, which is cheaper

        self._senders[sender] = peer  # it is proved: from here on things may be remembered
        self._senders.move_to_end(sender)
        if len(self._senders) > _MAX_PEERS:
            self._senders.popitem(last=False)
        time, seen, stale, forgotten = round(now * MICRO), self.seen, None, False
        if time > self._settles:  # by now a clock that is behind has passed the start, too
            seen.floor, self._settles = max(seen.floor, self._started), math.inf
        if seen.accepts(node_id, stamp, time):
            # Ids are public: only with its sender does one say which frame it is, or another could take it.
            if not seen.add(node_id, frame_id, stamp, time):
                raise Replayed
        elif stamp > time and stamp >= seen.floor_of(node_id, stamp):
            raise Stale
        else:
            seen.refuse(stamp, time)
            stale, forgotten = Stale(), stamp < self._started or time - stamp <= seen.window
        return Opened(node_id, bundle, proof == _SIGNED, stamp / MICRO, stale, forgotten)

    def _require_room(self, bundle: bytes | bytearray) -> None:
        if len(bundle) > self.max_bundle:
            raise ValueError(f"bundle must be at most {self.max_bundle} bytes, not {len(bundle)}")

    def _header(self, proof: int, recipient: bytes, now: float) -> bytes:
        return _HEADER.pack(_VERSION, proof, self.identity.public_key, recipient, random_bytes(16), round(now * MICRO))

    def _sender(self, node_id: str, key: bytes) -> _Peer:
        try:
            context = _CONTEXT.format(node_id, self.identity.node_id)
            return _Peer(node_id, key, self.identity.shared_with(node_id, context))
        except ValueError:
            raise MalformedFrame(reason="a frame whose sender is not a key") from None

    def _require_trusted(self, node_id: str) -> None:
        try:
            trusted = self._trust(node_id)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise UnknownSender from error
        if trusted is True:
            return
        # What is no bool may count as true and say nothing, as a coroutine does.
        cause = None if trusted is False else TypeError(f"trust must return a bool, not {type(trusted).__name__}")
        raise UnknownSender from cause


def claimed_sender(frame: object) -> str:
    """Return the node that a frame says it is from, which nothing proves; "" if it says nothing of that."""
    if not isinstance(frame, bytes) or len(frame) < _HEADER.size or frame[0] != _VERSION or frame[1] not in _LEAST_BODY:
        return ""
    return node_id_of(frame[2:34])


def _predicate(trust: Trust) -> Callable[[str], bool]:
    if trust is None:
        return lambda _: True
    if inspect.iscoroutinefunction(trust):
        raise TypeError("trust must answer at once: an async function cannot")
    if callable(trust):
        return trust
    node_ids = frozenset(trust)
    for node_id in node_ids:
        public_key_of(node_id)
    return node_ids.__contains__


def _recipient(identity: Identity, node_id: str) -> _Peer:
    if node_id == identity.node_id:
        raise ValueError("a node does not send frames to itself")
    context = _CONTEXT.format(identity.node_id, node_id)
    return _Peer(node_id, public_key_of(node_id), identity.shared_with(node_id, context))
