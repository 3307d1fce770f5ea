"""The router: the way of a message from `emit` or `call` to the outbox, or to the intake of this very node.

Nothing here waits, but for two: `emit`, for room in the mailboxes of this node, and only with a local kind; `call`, for
the answer. What comes from other nodes arrives at the intake.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from meshkit import _check, _time
from meshkit.errors import Draining, MeshkitError, NoHandler, NotAccepted, Overloaded, Unreachable
from meshkit.events import Observer
from meshkit.logger import ServiceLog
from meshkit.runtime.behavior import Behavior, Broadcast, Local, Request
from meshkit.runtime.calls import Calls, Replies, first_that_takes_it, gather
from meshkit.runtime.crew import Crew
from meshkit.runtime.dispatcher import Dispatcher
from meshkit.runtime.frame import Prover
from meshkit.runtime.graph import Graph
from meshkit.runtime.intake import Intake, reason_of
from meshkit.runtime.journal import Journal, RuntimeStats
from meshkit.runtime.letters import DeadLetters
from meshkit.runtime.message import Ids, Message
from meshkit.runtime.outbox import Outbox
from meshkit.runtime.presence import Presence
from meshkit.runtime.service import Service
from meshkit.runtime.stages import Continue, Drop
from meshkit.runtime.transport import Transport
from meshkit.runtime.wire import Ask, Beat, Failure, Goodbye, Reply, Tell, Wire, encode_payload

__all__ = ["Router"]

P = TypeVar("P")
R = TypeVar("R")

_ENVELOPE = 1024  # bytes of a bundle that are for the other fields of a message


class Router:
    """The way of messages through one node, from its start to its stop."""

    def __init__(
        self,
        node: str,
        graph: Graph,
        crews: Mapping[str, Crew],
        transport: Transport,
        prover: Prover | None,
        log: ServiceLog,
        observer: Observer | None,
        letters: DeadLetters,
        escalate: Callable[[Service, str, BaseException], None],
    ) -> None:
        self.journal = Journal(observer)
        self.presence = Presence()
        self.dispatcher = Dispatcher(node, graph, crews, self.journal, letters, self._answer, escalate)
        self.calls = Calls(node, self._post)
        self.intake = Intake(
            node, graph, self.dispatcher, self.calls, self.presence, prover, self.journal, self._answer, observer
        )
        self.outbox = Outbox(transport, prover, self._on_unsent)
        self._node = node
        self._graph = graph
        self._transport = transport
        self._max_payload = math.inf if prover is None else prover.max_bundle - _ENVELOPE
        self._log = log
        self._new_id = Ids().new
        self._turn = 0  # which of the nodes that handle a kind is asked first

    # --- what goes out

    async def emit(self, behavior: Local[P] | Broadcast[P], payload: P, to: str | None) -> str:
        """Send a message that nobody answers, and return its id."""
        message = self._emitted(behavior, Message(self._new_id(), behavior.kind, self._node, payload, _time.wall()))
        if isinstance(behavior, Local):
            if to is not None:
                raise ValueError(f"{behavior!r} never leaves its node, so it cannot be emitted to {to!r}")
            await self._emit_here(behavior, message)
        elif isinstance(behavior, Broadcast):
            encoded = encode_payload(message.payload)
            tell = Tell(message.id, message.kind, behavior.version, message.time, encoded)
            if to is None:
                self.outbox.post(None, tell, self._fitting(len(encoded)))
                self.journal.note(message.id, "sent to every node")
                self.intake.take(self._node, tell)
            else:
                self._require_way(to)
                self.journal.note(message.id, f"sent to node {to!r}")
                self._post(to, tell, len(encoded))
        else:
            raise TypeError(f"{behavior!r} asks for a reply: use call(), which returns it")
        self.journal.sent += 1
        return message.id

    async def _emit_here(self, behavior: Local[P], message: Message[P]) -> None:
        route = self._graph.local_route(behavior)
        if route is None:
            return self.journal.drop(message.kind, "kind", "no_handler", message.id, self._node)
        if behavior.overflow in {"drop_newest", "drop_oldest"}:
            self.intake.receive(route, message, 0)
            return None
        outcome, stage = route.pipeline.run(message)
        if not isinstance(outcome, Continue):
            self.intake.stopped(route, message, 0, outcome, stage)
        elif not self.dispatcher.offer_all(route.handlers, outcome.message):
            if behavior.overflow == "refuse":
                full = next(handler.mailbox for handler in route.handlers if not handler.mailbox.has_room())
                raise Overloaded(name=full.name, limit=full.max_mailbox)
            await self.dispatcher.deliver_all(route.handlers, outcome.message)
        return None

    async def call(self, behavior: Request[P, R], payload: P, to: str | None, timeout: float, call_id: str | None) -> R:
        """Ask the node `to` (None: any one that handles the kind), and return its reply."""
        if not isinstance(behavior, Request):
            raise TypeError(f"{behavior!r} has no reply: use emit()")
        _check.duration("timeout", timeout)
        if call_id is None:
            call_id = self._new_id()
        message = self._emitted(behavior, Message(call_id, behavior.kind, self._node, payload, _time.wall()))
        if to is not None:
            return await self._ask(behavior, message, to, timeout)
        deadline = _time.now() + timeout

        def ask(node: str) -> Any:
            return self._ask(behavior, message, node, deadline - _time.now())

        reply: R = await first_that_takes_it(self._that_handle(behavior.kind), ask)
        return reply

    async def call_many(
        self, behavior: Request[P, R], payload: P, to: Sequence[str] | None, timeout: float, quorum: int | None
    ) -> Replies[R]:
        """Ask several nodes at once; return when `quorum` have replied (None: when each has answered)."""
        behavior.check(payload)
        if to is None:
            to = self._that_handle(behavior.kind)
        name = f"{behavior.kind!r} from node {self._node!r}"
        return await gather(
            to, lambda node: self.call(behavior, payload, node, timeout, None), quorum=quorum, name=name
        )

    async def _ask(self, behavior: Request[P, R], message: Message[P], to: str, timeout: float) -> R:
        if to != self._node:
            peer = self.presence.peers.get(to)
            if peer is not None and peer.draining:
                raise Draining(node=to)
            if to in self.presence.silent:
                raise Unreachable(node=to, reason="it has fallen silent")
        self.journal.sent += 1
        self.journal.note(message.id, f"asked of node {to!r}")
        return await self.calls.call(behavior, message, to, timeout)

    def _that_handle(self, kind: str) -> Sequence[str]:
        """Return the nodes that handle a kind of request, each time beginning with another one."""
        nodes = [*self.presence.that_handle(kind)]
        if kind in self._graph.requests and not self.intake.draining:
            nodes.append(self._node)
        if not nodes:
            raise NoHandler(kind=kind, node="any")
        self._turn += 1
        first = self._turn % len(nodes)
        return nodes[first:] + nodes[:first]

    def _emitted(self, behavior: Behavior[P], message: Message[P]) -> Message[P]:
        """Pass a message through the stages of its emission; raise what stops it."""
        behavior.check(message.payload)
        pipeline = behavior.emitting
        if pipeline is None:
            return message
        outcome, stage = pipeline.run(message)
        if isinstance(outcome, Continue):
            behavior.check(outcome.message.payload)
            return outcome.message
        if isinstance(outcome, Drop):
            self.journal.drop(message.kind, stage, outcome.reason, message.id, self._node)
            raise NotAccepted(kind=message.kind, node=self._node, reason=f"{outcome.reason} (stage {stage})")
        raise outcome.error

    def _fitting(self, size: int) -> int:
        """Return the size of a payload, which must fit into a frame."""
        if size > self._max_payload:
            raise ValueError(f"a payload of {size} bytes does not fit into a frame: it may have {self._max_payload}")
        return size

    def _require_way(self, to: str) -> None:
        if to != self._node and (to in self.presence.silent or to not in self._transport.peers):
            known = ", ".join(sorted(self._transport.peers)) or "nobody"
            raise Unreachable(node=to, reason=f"node {self._node!r} can reach {known}")

    def _post(self, to: str, wire: Wire, size: int = 0) -> None:
        if to == self._node:
            self.intake.take(to, wire)
        else:
            self.outbox.post(to, wire, self._fitting(size))

    def _answer(self, caller: str, answer: Reply | Failure) -> None:
        size = len(answer.payload) if isinstance(answer, Reply) else 0
        if size > self._max_payload and caller != self._node:
            self._log.error(
                "a reply of %d bytes to node %r does not fit into a frame", size, caller, message_id=answer.id
            )
            answer, size = Failure(answer.id, "failed", code="internal"), 0
        self._post(caller, answer, size)

    def _on_unsent(self, to: str | None, wires: Sequence[Wire], error: Exception) -> None:
        """Tell those who wait for an answer, and count the rest."""
        if not isinstance(error, MeshkitError):
            self._log.error("the transport failed", node=to, exc_info=error)
            error = Unreachable(node=to or "every node", reason=f"the transport failed: {type(error).__name__}")
        for wire in wires:
            if isinstance(wire, Ask):
                self.calls.fail(wire.id, copy.copy(error))
            elif not isinstance(wire, Beat | Goodbye):
                kind = wire.kind if isinstance(wire, Tell) else ""
                self.journal.drop(kind, "transport", reason_of(error), wire.id, self._node)

    def announce(self, name: str, every: float, *, greets: bool = False, to: str | None = None) -> None:
        """Say that this node is up, to one node or to all."""
        self.outbox.post(to, Beat(name, self._graph.requests, every, self.intake.draining, greets))

    def say_goodbye(self) -> None:
        """Say that this node is leaving, and send what is still to be sent."""
        self.outbox.post(None, Goodbye())
        self.outbox.flush()

    # --- the state, and the end

    def stats(self) -> RuntimeStats:
        """Return what has happened so far."""
        return self.journal.stats(
            queued=self.dispatcher.queued, running=self.dispatcher.running, pending=len(self.calls)
        )

    def close(self) -> None:
        """Fail every call that still waits for its answer."""
        self.calls.close()
