"""The outbox: what one node has for others in one turn of its loop leaves in as few frames as possible.

A frame is proved once, for all that is in it:

    plain    between runtimes of one process, which have no identity
    sealed   to one node: confidential, and proved to come from this one
    signed   to every node: proved to come from this one

What is posted for one destination arrives in that order. "Every node" is a destination of its own: within one turn, a
broadcast may overtake what was posted to one node, or be overtaken.
"""

import asyncio
import struct
from collections.abc import Callable, Mapping, Sequence

from meshkit import _time
from meshkit.errors import Overloaded, Unreachable
from meshkit.faults import buggify
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Transport
from meshkit.runtime.wire import MAX_BUNDLE, Wire, encode_into

__all__ = ["PLAIN", "Outbox"]

PLAIN = b"\x01\x00"
"""The header of a frame that proves nothing: version 1, proof 0."""
_ARRAY = struct.Struct(">BH")  # how an array of up to 65,535 items begins in MessagePack: 0xdc, and how many
_ARRAY_TAG = 0xDC


class _Bundle:
    """Messages for one destination, encoded one behind the other: so its size is known, and no one spoils the rest."""

    __slots__ = ("data", "wires")

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.data = bytearray(_ARRAY.size)

    def add(self, wire: Wire, encoded: bytes | bytearray) -> None:
        self.wires.append(wire)
        self.data += encoded

    def complete(self) -> bytearray:
        _ARRAY.pack_into(self.data, 0, _ARRAY_TAG, len(self.wires))
        return self.data


class Outbox:
    """Bundles what is posted, by destination, and sends it when the present turn of the loop is over, or it is full.

    `on_unsent(to, wires, error)` is told what could not be sent; `to` is None for every node.
    """

    MAX_BYTES = 256 * 1024
    """Bytes in a bundle; a message that is larger has one for itself."""
    LEAST_FRAME = 32 * 1024
    """Bytes into which fits all that has no payload, also an error with the longest detail."""
    LATE = 0.05
    """Seconds by which bundles leave late, where a simulation asks for it."""

    def __init__(
        self,
        transport: Transport,
        prover: Prover | None,
        on_unsent: Callable[[str | None, Sequence[Wire], Exception], None],
    ) -> None:
        if transport.max_frame < self.LEAST_FRAME:
            raise ValueError(
                f"a transport carries frames of {self.LEAST_FRAME} bytes at least, not {transport.max_frame}"
            )
        self._transport = transport
        self._prover = prover
        self._on_unsent = on_unsent
        self.max_bundle = transport.max_frame - len(PLAIN) if prover is None else prover.max_bundle
        """Bytes that a bundle may have at all."""
        self._max_bytes = min(self.MAX_BYTES, self.max_bundle)
        self._bundles: dict[str | None, _Bundle] = {}
        self._due = False  # whether the loop is going to call `flush`
        self._late: asyncio.TimerHandle | None = None  # what calls it, in a simulation that lets bundles leave late
        self._loop = asyncio.get_running_loop()

    def post(self, to: str | None, wire: Wire) -> None:
        """Let `wire` leave for the node `to` (None: for every other node).

        Raises:
            ValueError: Some text in it is not Unicode. Nothing else in the bundle suffers.
        """
        bundle = self._bundles.get(to) or self._open(to)
        data = bundle.data
        before = len(data)
        try:
            encode_into(wire, data, -1)
        except Exception:
            del data[before:]
            raise
        if len(data) > self._max_bytes and bundle.wires:
            encoded = data[before:]
            del data[before:]
            self._send(to)
            bundle = self._bundles.get(to) or self._open(to)
            bundle.add(wire, encoded)
        else:
            bundle.wires.append(wire)
        if len(bundle.wires) == MAX_BUNDLE:
            self._send(to)

    def _open(self, to: str | None) -> _Bundle:
        bundle = self._bundles[to] = _Bundle()
        self._schedule()
        return bundle

    def _schedule(self) -> None:
        if not self._due:
            self._due = True
            if buggify("outbox: bundles leave late"):
                self._late = self._loop.call_later(self.LATE, self.flush)
            else:
                self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send everything now. What is posted meanwhile, by whoever receives it, leaves in the next turn."""
        self._due = False
        if self._late is not None:
            self._late.cancel()
            self._late = None
        try:
            for to in list(self._bundles):
                if to in self._bundles:
                    self._send(to)
        finally:
            if self._bundles:
                self._schedule()

    def _send(self, to: str | None) -> None:
        bundle = self._bundles.pop(to)  # before it is sent: a transport may call back
        if not bundle.wires:
            return
        try:
            frame = self._frame(to, bundle.complete())
            if to is None:
                missed = self._transport.broadcast(frame)
                if missed:
                    self._on_unsent(None, bundle.wires, _of_all(missed))
            else:
                self._transport.send(to, frame)
        except Exception as error:  # noqa: BLE001 - what a transport raises is for those whose messages it had
            self._on_unsent(to, bundle.wires, error)
        except asyncio.CancelledError as error:  # of something else: nothing here waits, so nothing can be cancelled
            self._on_unsent(to, bundle.wires, RuntimeError(f"the transport raised {error!r}"))

    def _frame(self, to: str | None, bundle: bytearray) -> bytes:
        if self._prover is None:
            return PLAIN + bundle
        now = _time.wall()
        try:
            return self._prover.sign(bundle, now) if to is None else self._prover.seal(to, bundle, now)
        except ValueError as error:
            raise Unreachable(node=to or "every node", reason=str(error)) from None


def _of_all(missed: Mapping[str, Overloaded]) -> Overloaded:
    """Return one error for all who miss a broadcast."""
    first, *others = missed.values()
    return Overloaded(name=f"{first.name}, and {len(others)} more", limit=first.limit) if others else first
