"""The router: the way of a message from `emit` or `call` to the mailbox of its handler, here or on another node.

Nothing here waits, but for two: `emit`, for room in the mailboxes of this node, and only with a local kind; `call`, for
the answer.
"""

import asyncio
from collections.abc import Mapping
from typing import TypeVar

import anyio
import msgspec

from meshkit import _check, _time
from meshkit.call_registry import CallRegistry
from meshkit.errors import CallTimeout, MalformedFrame, MeshkitError, PeerLost, RemoteError
from meshkit.logger import ServiceLog
from meshkit.runtime.behavior import Broadcast, Local, Request
from meshkit.runtime.crew import Crew
from meshkit.runtime.dispatcher import Dispatcher
from meshkit.runtime.graph import Graph
from meshkit.runtime.message import Ids, Message
from meshkit.runtime.stats import Counts, RuntimeStats
from meshkit.runtime.transport import Transport
from meshkit.runtime.wire import Ask, Cancel, Failure, Reply, Tell, Why, Wire, decode, encode, encode_payload, to_error

__all__ = ["Router"]

P = TypeVar("P")
R = TypeVar("R")

_LONGEST = 1e9  # seconds that a call may wait, as far as other nodes are told


class Router:
    """The way of messages through one node, from its start to its stop."""

    def __init__(
        self, node: str, graph: Graph, crews: Mapping[str, Crew], transport: Transport, log: ServiceLog
    ) -> None:
        self.draining = False  # whether new work of other nodes is refused
        self.counts = Counts()
        self.dispatcher = Dispatcher(node, graph, crews, self.counts, self._send_quietly)
        self._node = node
        self._graph = graph
        self._transport = transport
        self._log = log
        self._calls: CallRegistry[msgspec.Raw] = CallRegistry(name=f"calls of node {node!r}")
        self._new_id = Ids().new
        self._asked: dict[str, tuple[str, str]] = {}  # by id of a call: the node that was asked, and the kind

    # --- what goes out

    async def emit(self, behavior: Local[P] | Broadcast[P], payload: P, to: str | None) -> str:
        """Send a message that nobody answers, and return its id."""
        behavior.check(payload)
        kind, message_id = behavior.kind, self._new_id()
        if isinstance(behavior, Local):
            if to is not None:
                raise ValueError(f"{behavior!r} never leaves its node, so it cannot be emitted to {to!r}")
            handlers = self._graph.local_handlers(behavior)
            if not handlers:
                self._drop(kind, "no_handler")
            message = Message(message_id, kind, self._node, payload, _time.wall())
            if not self.dispatcher.try_deliver(handlers, message):
                await self.dispatcher.deliver(handlers, message)
        elif isinstance(behavior, Broadcast):
            tell = Tell(message_id, kind, _time.wall(), encode_payload(payload))
            if to is None:
                self._transport.broadcast(encode(tell))
                self._on_tell(self._node, tell)
            else:
                self._send(to, tell)
        else:
            raise TypeError(f"{behavior!r} asks for a reply: use call(), which returns it")
        self.counts.sent += 1
        return message_id

    async def call(self, behavior: Request[P, R], payload: P, to: str, timeout: float) -> R:
        """Ask the node `to`, and return its reply."""
        if not isinstance(behavior, Request):
            raise TypeError(f"{behavior!r} has no reply: use emit()")
        behavior.check(payload)
        kind, call_id = behavior.kind, self._new_id()
        remaining = min(_check.duration("timeout", timeout), anyio.current_effective_deadline() - _time.now())
        remaining = max(0.0, min(remaining, _LONGEST))  # the deadline of a scope that has been cancelled is -infinity
        ask = Ask(call_id, kind, _time.wall(), int(remaining * 1000), encode_payload(payload))
        self.counts.sent += 1
        self._asked[call_id] = (to, kind)
        try:
            reply = await self._calls.call(lambda _: self._send(to, ask), timeout=timeout, id=call_id)
        except CallTimeout:
            self._send_quietly(to, Cancel(call_id))
            raise CallTimeout(name=f"{kind!r} on node {to!r}", timeout=timeout) from None
        except asyncio.CancelledError:
            self._send_quietly(to, Cancel(call_id))
            raise
        finally:
            del self._asked[call_id]
        try:
            return behavior.reply_decoder.decode(reply)
        except Exception as error:
            self._log.exception("the reply of node %r to %r is not what was declared", to, kind, message_id=call_id)
            raise RemoteError(node=to, kind=kind, code="bad_reply", correlation_id=call_id) from error

    def _send(self, to: str, wire: Wire) -> None:
        if to == self._node:
            self._take(to, wire)
        else:
            self._transport.send(to, encode(wire))

    def _send_quietly(self, to: str, wire: Wire) -> None:
        """Send what nobody is there to be told about, if it cannot be sent."""
        try:
            self._send(to, wire)
        except MeshkitError as error:
            self._log.debug("%s for node %r was not sent: %s", type(wire).__name__, to, error)
        except Exception:  # noqa: BLE001 - a transport that fails must not take with it who answers
            self._log.exception("%s for node %r was not sent: the transport failed", type(wire).__name__, to)

    # --- what comes in

    def received(self, sender: str, frame: bytes) -> None:
        """Take a frame from the transport."""
        try:
            wire = decode(frame)
        except MalformedFrame:
            self._drop("", "malformed")
        else:
            self._take(sender, wire)

    def _take(self, sender: str, wire: Wire) -> None:
        if isinstance(wire, Tell):
            self._on_tell(sender, wire)
        elif isinstance(wire, Ask):
            self._on_ask(sender, wire)
        elif isinstance(wire, Cancel):
            self.dispatcher.cancel(sender, wire.id)
        else:
            self._on_answer(sender, wire)

    def _on_tell(self, sender: str, tell: Tell) -> None:
        handlers = self._graph.broadcasts.get(tell.kind)
        if handlers is None:
            return self._drop("", "no_handler")
        if self.draining and sender != self._node:
            return self._drop(tell.kind, "draining")
        try:
            payload = handlers[0].behavior.decoder.decode(tell.payload)
        except Exception as error:  # noqa: BLE001 - hostile bytes raise more than msgspec's own error
            self._log.debug("%r from node %r is not what was declared: %s", tell.kind, sender, error)
            return self._drop(tell.kind, "malformed")
        message = Message(tell.id, tell.kind, sender, payload, tell.time)
        for handler in handlers:
            if not self.dispatcher.try_deliver([handler], message):
                self._drop(tell.kind, "draining" if handler.mailbox.closed else "overloaded")
        return None

    def _on_ask(self, sender: str, ask: Ask) -> None:
        handler = self._graph.requests.get(ask.kind)
        if handler is None:
            return self._refuse(sender, ask, "no_handler")
        if self.draining and sender != self._node:
            return self._refuse(sender, ask, "draining")
        if (sender, ask.id) in self.dispatcher.serving:
            return self._drop(ask.kind, "duplicate")  # the answer to the first one answers both
        try:
            payload = handler.behavior.decoder.decode(ask.payload)
        except Exception as error:  # noqa: BLE001 - hostile bytes raise more than msgspec's own error
            return self._refuse(sender, ask, "malformed", f"{ask.kind!r} on node {self._node!r}: {error}")
        deadline = _time.now() + ask.remaining / 1000
        message = Message(ask.id, ask.kind, sender, payload, ask.time, deadline)
        if self.dispatcher.serve(handler, message):
            return None
        if handler.mailbox.closed:
            return self._refuse(sender, ask, "draining")
        return self._refuse(sender, ask, "overloaded", handler.mailbox.name, handler.mailbox.max_mailbox)

    def _refuse(self, sender: str, ask: Ask, why: Why, detail: str = "", limit: int = 0) -> None:
        self._drop("" if why == "no_handler" else ask.kind, why)
        self._send_quietly(sender, Failure(ask.id, why, detail, limit))

    def _on_answer(self, sender: str, answer: Reply | Failure) -> None:
        asked, kind = self._asked.get(answer.id, (sender, ""))
        if asked != sender:
            self._drop("", "wrong_sender")  # an answer counts only if it comes from the node that was asked
        elif isinstance(answer, Reply):
            self._calls.resolve(answer.id, answer.payload)
        else:
            self._calls.reject(answer.id, to_error(answer, sender, kind))

    def _drop(self, kind: str, reason: str) -> None:
        self.counts.dropped[kind, reason] += 1

    def lost(self, node: str) -> None:
        """Fail the calls that wait for a node that has gone, and give up the work that it waits for."""
        for call_id in [call_id for call_id, (asked, _) in self._asked.items() if asked == node]:
            self._calls.reject(call_id, PeerLost(node=node))
        self.dispatcher.lost(node)

    # --- the state, and the end

    def stats(self) -> RuntimeStats:
        """Return what has happened so far."""
        counts = self.counts
        return RuntimeStats(
            sent=counts.sent,
            delivered=counts.delivered,
            handled=counts.handled,
            failed=counts.failed,
            cancelled=counts.cancelled,
            cut=counts.cut.total(),
            queued=self.dispatcher.queued,
            running=self.dispatcher.running,
            pending=len(self._calls),
            dropped=dict(counts.dropped),
        )

    def close(self) -> None:
        """Fail every call that still waits for its answer."""
        self._calls.close()
