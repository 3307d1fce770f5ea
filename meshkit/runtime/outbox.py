"""The outbox: what one node has for others in one turn of its loop leaves in as few frames as possible.

A frame is proved once, for all that is in it:

    plain    between runtimes of one process, which have no identity
    sealed   to one node: confidential, and proved to come from this one
    signed   to every node: proved to come from this one
"""

import asyncio
from collections.abc import Callable, Sequence

from meshkit import _time
from meshkit.errors import Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Transport
from meshkit.runtime.wire import MAX_BUNDLE, Wire, encode

__all__ = ["PLAIN", "Outbox"]

PLAIN = b"\x01\x00"
"""The header of a frame that proves nothing: version 1, proof 0."""


class Outbox:
    """Bundles what is posted, by destination, and sends it when the present turn of the loop is over, or it is full.

    `on_unsent(to, wires, error)` is told what could not be sent; `to` is None for every node.
    """

    MAX_BYTES = 256 * 1024
    """Bytes of payload in a bundle; a single message may be larger."""

    def __init__(
        self,
        transport: Transport,
        prover: Prover | None,
        on_unsent: Callable[[str | None, Sequence[Wire], Exception], None],
    ) -> None:
        self._transport = transport
        self._prover = prover
        self._on_unsent = on_unsent
        self._bundles: dict[str | None, list[Wire]] = {}
        self._bytes: dict[str | None, int] = {}
        self._loop = asyncio.get_running_loop()

    def post(self, to: str | None, wire: Wire, size: int = 0) -> None:
        """Let `wire`, with a payload of `size` bytes, leave for the node `to` (None: for every other node)."""
        bundle = self._bundles.get(to)
        if bundle is None:
            if not self._bundles:
                self._loop.call_soon(self.flush)
            bundle = self._bundles[to] = []
            self._bytes[to] = 0
        elif len(bundle) == MAX_BUNDLE or self._bytes[to] + size > self.MAX_BYTES:
            self._send(to, bundle)
            bundle = self._bundles[to] = []
            self._bytes[to] = 0
        bundle.append(wire)
        self._bytes[to] += size

    def flush(self) -> None:
        """Send everything now."""
        bundles, self._bundles = self._bundles, {}
        for to, bundle in bundles.items():
            self._send(to, bundle)

    def _send(self, to: str | None, bundle: list[Wire]) -> None:
        try:
            frame = self._frame(to, encode(bundle))
            if to is None:
                self._transport.broadcast(frame)
            else:
                self._transport.send(to, frame)
        except Exception as error:  # noqa: BLE001 - what a transport raises is for those whose messages it had
            self._on_unsent(to, bundle, error)

    def _frame(self, to: str | None, bundle: bytes) -> bytes:
        if self._prover is None:
            return PLAIN + bundle
        now = _time.wall()
        if to is None:
            return self._prover.sign(bundle, now)
        try:
            return self._prover.seal(to, bundle, now)
        except ValueError as error:
            raise Unreachable(node=to, reason=str(error)) from None
