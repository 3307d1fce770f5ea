"""One TCP connection to another node: bytes in, records out, and when it is given up. The transport owns it."""

import asyncio
import functools
import socket
from collections import deque
from typing import cast

from meshkit import _time
from meshkit.errors import Overloaded
from meshkit.transports._tcp.handshake import Handshake
from meshkit.transports._tcp.owner import Owner
from meshkit.transports._tcp.wire import MAX_CONTROL, Address, Kind, Refusal, Rejected, Unrecorder, record

__all__ = ["Link"]

_PING, _PONG = record(Kind.PING), record(Kind.PONG)


class Link(asyncio.BufferedProtocol):
    """A connection. `opened`, `ended` and `reason` say how far it has come.

    `settled` is set when it has opened, or ended; `gone` when it has ended.

    Records are written when they are sent: what a runtime has for one node in one turn of the loop is one frame, so it
    is one write. While the other side does not read, they wait here, up to a limit, and then leave together.
    """

    CHUNK = 256 * 1024
    """Bytes that are written at once when the other side reads again."""

    LAST_WORDS = 1.0
    """Seconds to send why the connection ends."""

    def __init__(self, owner: Owner, handshake: Handshake) -> None:
        self.handshake = handshake
        self.opened = self.rejected = self.left = self.ended = False
        self.reason = ""
        self.refusal: Refusal | None = None  # what the other side said
        self.settled = asyncio.Event()
        self.gone = asyncio.Event()
        self.began = self.heard_at = self._asked_at = _time.now()
        self.host = ""  # of the other side
        self._owner = owner
        self._limits = owner.limits
        self._in = Unrecorder(MAX_CONTROL)
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._waiting: deque[bytes] = deque()  # while paused
        self._waiting_bytes = 0
        self._heard = False  # since the last look
        self._unsent = 0  # bytes that wait in the kernel's stead, at the last look
        self._sent_at = 0.0  # when there were fewer of them than before
        self._answer_by: float | None = None
        self._ended_at = 0.0

    @property
    def peer(self) -> str:
        """The node at the other end, as soon as it has said so."""
        return self.handshake.peer

    @functools.cached_property
    def address(self) -> Address | None:
        """Where the node at the other end listens, as far as can be seen from here."""
        if not self.handshake.listens:
            return None
        host, port = Address.parse(self.handshake.listens, "an address", host_needed=False)
        host = host or self.host
        return Address(host, port) if host else None

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self.host = (transport.get_extra_info("peername") or ("",))[0]
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._owner.connected(self)
        if self.handshake.dialled and transport.get_extra_info("sockname") == transport.get_extra_info("peername"):
            self.drop("nobody listens there: the connection has met itself")  # TCP can do that
        self._write(self.handshake.begin())
        self._read()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to read to."""
        return self._owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take the bytes that are there now."""
        self.data_received(bytes(self._owner.buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        if self._is_over():
            return
        self._heard = True
        self._in.feed(data)
        if self._transport is not None:  # after TLS, the first bytes may come before connection_made
            self._read()

    def _read(self) -> None:
        unrecorder = self._in
        try:
            while not self._is_over() and (received := unrecorder.next()) is not None:
                kind, body = received
                if kind == 0 and self.opened and len(body) <= self._limits.max_frame:  # a FRAME: nearly all are
                    self._owner.received(self.handshake.peer, body)
                else:
                    self._take(kind, body)
        except Rejected as error:
            self.reject(str(error), error.refusal)

    def eof_received(self) -> None:
        """End: there are no half-closed connections here."""
        self.drop("it closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self.drop("it closed the connection" if exc is None else f"the connection broke: {exc}")
        self._owner.closed(self)

    def pause_writing(self) -> None:
        """Let what is sent wait here."""
        self._paused = True
        self._sent_at, self._unsent = _time.now(), self._buffered()

    def resume_writing(self) -> None:
        """Write what waits, as much as is taken."""
        self._paused = False
        while self._waiting and not self._paused:
            chunk = bytearray()
            while self._waiting and len(chunk) < self.CHUNK:
                chunk += self._waiting.popleft()
            self._waiting_bytes -= len(chunk)
            self._write(bytes(chunk))  # which may pause again

    # --- what the other side sends

    def _take(self, kind: int, body: bytes) -> None:
        if kind == Kind.REFUSED and len(body) == 1:
            try:
                self.refusal = Refusal(body[0])
                self.drop(f"refused: {self.refusal.text}")
            except ValueError:
                self.drop(f"refused for a reason ({body[0]}) that this version does not know")
        elif not self.handshake.proved:
            answer = self.handshake.receive(kind, body)
            self._require_wanted()  # before anything else is said, or the other side could take it for open
            self._write(answer)
            if kind == Kind.PROOF:
                self._on_proof()
        elif not self.opened:
            if kind != Kind.OPEN or self.handshake.is_arbiter:
                raise Rejected(f"it sent a record of kind {kind} before the connection was open")
            self._require_wanted()  # others may have come since
            self._open()
        elif kind == Kind.FRAME or len(body) > MAX_CONTROL:
            raise Rejected(f"it sent a record of {len(body)} bytes and kind {kind}, which is more than it may have")
        elif kind == Kind.PING:
            if self._waiting_bytes < self._limits.max_buffer:
                self._write(_PONG)
        elif kind == Kind.ADDRESSES:
            self._owner.told(body)
        elif kind == Kind.BYE:
            self.left = True
            self.drop("it has left")
        elif kind != Kind.PONG:
            raise Rejected(f"it sent a record of kind {kind} on an open connection")

    def _on_proof(self) -> None:
        if self.handshake.is_arbiter:
            self._write(record(Kind.OPEN))
            self._open()

    def _require_wanted(self) -> None:
        refusal = self._owner.wanted(self)
        if refusal is not None:
            raise Rejected(f"not wanted: {refusal.name.lower()}", refusal)

    def _open(self) -> None:
        self.opened = True
        self._in.limit = max(self._limits.max_frame, MAX_CONTROL)
        self.settled.set()
        self._owner.opened(self)

    # --- what is sent

    def send(self, data: bytes) -> None:
        """Send a record.

        Raises:
            Overloaded: Too many bytes wait.
        """
        if self._paused and self._waiting_bytes + len(data) > self._limits.max_buffer:
            raise Overloaded(name=f"connection to node {self.peer!r} (bytes)", limit=self._limits.max_buffer)
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self.ended or self._transport is None or not data:
            return
        if self._paused:
            self._waiting.append(data)
            self._waiting_bytes += len(data)
        else:
            self._transport.write(data)

    def _buffered(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    # --- time

    def look(self, now: float) -> None:
        """Give the connection up if it has been silent, or stuck, for too long; ask for a sign of life before that."""
        limits = self._limits
        if self.ended:
            if now - self._ended_at >= self.LAST_WORDS:
                self.abort()
            return
        if self._paused:
            buffered = self._buffered()
            if buffered < self._unsent:  # its reading is a sign of life, too: it may be slow, and have nothing to say
                self._sent_at, self._heard = now, True
            self._unsent = buffered
        if self._heard:
            self._heard, self._answer_by, self.heard_at = False, None, now
        if not self.opened:
            if now - self.began >= limits.handshake_timeout:
                self.drop(f"the handshake took longer than {limits.handshake_timeout:g} s")
            return
        if now - self.heard_at >= limits.silence_timeout or (self._answer_by is not None and now >= self._answer_by):
            self.drop(f"it has been silent for {now - self.heard_at:.3g} s")
        elif self._paused:
            if now - self._sent_at >= limits.write_timeout:
                self.drop(f"it has read nothing for {limits.write_timeout:g} s")
        elif now - max(self.heard_at, self._asked_at) >= limits.ping_interval:
            self._asked_at = now
            self._write(_PING)

    def doubt(self) -> None:
        """Ask for a sign of life soon: its peer has made another connection, so it may be gone."""
        if self._answer_by is None:
            self._heard = False
            self._answer_by = _time.now() + self._limits.doubt_timeout
            self._write(_PING)

    # --- the end

    def reject(self, reason: str, refusal: Refusal | None) -> None:
        """End, and tell the other side why."""
        self.rejected = True
        if refusal is not None and not self.ended and self._transport is not None:
            self._transport.write(record(Kind.REFUSED, bytes([refusal])))
            self._end(reason)
            self._transport.close()  # which writes it first
        else:
            self.drop(reason)

    def drop(self, reason: str) -> None:
        """End now."""
        self._end(reason)
        self.abort()

    def abort(self) -> None:
        """Close the socket, whatever is unsent."""
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """End when what is buffered has been sent, and the other side has seen that no more will come."""
        if self._transport is None or not self.opened or self.ended:
            return self.drop("this node is closed")
        self._transport.write(b"".join(self._waiting) + record(Kind.BYE))
        self._end("this node closed the connection")
        try:  # not close(): with bytes unread, that takes back what the other side has not read
            end = self._transport.write_eof if self._transport.can_write_eof() else self._transport.close
            end()
        except OSError:  # the other side was faster
            self.abort()
        return None

    def _is_over(self) -> bool:
        return self.ended

    def _end(self, reason: str) -> None:
        if not self.ended:
            self.ended, self.reason, self._ended_at = True, reason, _time.now()
            self._waiting.clear()
            self._waiting_bytes = 0
            self.settled.set()
            self.gone.set()
            self._owner.disconnected(self)
