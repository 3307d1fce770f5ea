"""The router: the way of a message from `emit` or `call` to the outbox, or to the intake of this very node.

Nothing here waits, but for two: `emit`, for room in the mailboxes of this node, and only with a local kind; `call`, for
the answer. What comes from other nodes arrives at the intake.
"""

import copy
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from meshkit import _check, _time
from meshkit.errors import Closed, Draining, NoHandler, NotAccepted, OutcomeUnknown, PeerLost, Refused, Unreachable
from meshkit.events import Observer
from meshkit.logger import ServiceLog
from meshkit.runtime.behavior import Behavior, Broadcast, Local, Request
from meshkit.runtime.calls import Calls, Replies, first_that_takes_it, gather
from meshkit.runtime.dispatcher import Dispatcher
from meshkit.runtime.failures import DeadLetters
from meshkit.runtime.frame import Prover
from meshkit.runtime.graph import Graph
from meshkit.runtime.intake import Intake, reason_of
from meshkit.runtime.journal import Journal, RuntimeStats, shown
from meshkit.runtime.mailboxes import first_full
from meshkit.runtime.message import Message, check_id, new_ids
from meshkit.runtime.outbox import Outbox
from meshkit.runtime.presence import Heartbeat, Presence
from meshkit.runtime.service import Service
from meshkit.runtime.stages import Continue, Drop
from meshkit.runtime.supervisor import Supervisor
from meshkit.runtime.transport import Transport
from meshkit.runtime.wire import MAX_KINDS, Ask, Beat, Failure, Goodbye, Reply, Tell, Wire, encode, encode_payload

__all__ = ["Router"]

P = TypeVar("P")
R = TypeVar("R")

_NOT_A_REQUEST = "call() takes a request; {!r} is for emit(), if it is a broadcast or a local kind"
_ENVELOPE = 1024  # bytes of a bundle that are for the other fields of a message


class Router:
    """The way of messages through one node, from its start to its stop."""

    def __init__(
        self,
        node: str,
        name: str,
        graph: Graph,
        supervisors: Mapping[str, Supervisor],
        transport: Transport,
        prover: Prover | None,
        beat: Beat | None,
        log: ServiceLog,
        observer: Observer | None,
        letters: DeadLetters,
        escalate: Callable[[Service, str, BaseException], None],
    ) -> None:
        if beat is not None and len(beat.kinds) > MAX_KINDS:
            raise ValueError(
                f"node {node!r} handles {len(beat.kinds)} kinds of requests, of which it may have {MAX_KINDS}"
            )
        self.journal = Journal(observer)
        self.presence = Presence()
        self.dispatcher = Dispatcher(node, graph, supervisors, self.journal, letters, self._answer, escalate)
        self.calls = Calls(node, self._check_size, self._post, self.journal)
        self.outbox = Outbox(transport, prover, self._on_unsent)
        self.heartbeat = Heartbeat(self.presence, beat, self.outbox.post, self._on_gone, observer)
        self.intake = Intake(
            node, graph, self.dispatcher, self.calls, self.heartbeat, prover, self.journal, self._answer
        )
        self._node = node
        self._name = name
        self._graph = graph
        self._transport = transport
        self._max_payload = self.outbox.max_bundle - _ENVELOPE
        if beat is not None and len(encode(beat)) > self._max_payload:
            raise ValueError(f"the names of the kinds that {node!r} handles do not fit into a frame of its transport")
        self._log = log
        self._new_id = new_ids().__next__
        self._wall = _time.wall_of(_time.running_loop())
        self._turns: Counter[str] = Counter()  # by kind: how often any node was asked, so that each gets its turn

    # --- what goes out

    async def emit(self, behavior: Local[P] | Broadcast[P], payload: P, to: str | None) -> str:
        """Send a message that nobody answers, and return its id."""
        if isinstance(behavior, Local):
            if to is not None:
                raise ValueError(f"{behavior!r} never leaves its node, so it cannot be emitted to {to!r}")
            message, then = self._emitted(behavior, self._new_id(), payload)
            full = self._emit_here(behavior, message)
            if full is not None:
                await full
        elif isinstance(behavior, Broadcast):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
            message, then = self._emitted(behavior, self._new_id(), payload)
            self._emit_out(behavior, message, to)
        else:
            raise TypeError(f"emit() takes a local kind or a broadcast; {behavior!r} is for call(), if it is a request")
        if then is not None:
            then()
        self.journal.send(message.kind, message.id, to)
        return message.id

    def _emit_here(self, behavior: Local[P], message: Message[P]) -> Awaitable[None] | None:
        """Put a message into the mailboxes of this node; where there is no room, return what waits for it."""
        route = self._graph.local_route(behavior)
        if route is None:
            self.journal.drop(message.kind, "kind", "no_handler", message.id, self._node)
            return None
        if behavior.overflow in {"drop_newest", "drop_oldest"}:
            self.intake.receive(route, message, 0)
            return None
        passed = self.intake.admit(route, message, 0)
        if passed is None:
            return None
        if self.dispatcher.offer_all(route.handlers, passed.message):
            if passed.then is not None:
                passed.then()
            return None
        full = first_full(handler.mailbox for handler in route.handlers)
        if full is not None and behavior.overflow == "refuse":
            self.journal.drop(message.kind, "mailbox", "overloaded", message.id, self._node)
            raise full.overloaded()
        # Meanwhile others may come in, so that the stages are asked again.
        return self.dispatcher.deliver_all(route.handlers, lambda: self.intake.admit(route, message, 0))

    def _emit_out(self, behavior: Broadcast[P], message: Message[P], to: str | None) -> None:
        encoded = encode_payload(message.payload)
        tell = Tell(message.id, message.kind, behavior.version, message.time, encoded)
        self._check_size(to, len(encoded))
        if to is None:
            self.outbox.post(None, tell)
            self.journal.note((message.id, "sent to every node", ""))
            if (tell.kind, tell.version) in self.intake.routes:  # else it is for others, and no drop
                self.intake.take(self._node, tell)
        else:
            self._require_way(to)
            self.journal.note((message.id, "sent to", to))
            self._post(to, tell)

    def call(
        self, behavior: Request[P, R], payload: P, to: str | None, timeout: float, call_id: str | None
    ) -> Awaitable[R]:
        """Ask the node `to` (None: any one that handles the kind); what this returns waits for its reply."""
        if not isinstance(behavior, Request):
            raise TypeError(_NOT_A_REQUEST.format(behavior))
        timeout = _check.duration("timeout", timeout)
        if to is None:
            if call_id is not None:
                raise ValueError("id needs to: only the node that was asked knows what it has answered")
            return self._call_any(behavior, payload, timeout)
        message_id = self._new_id() if call_id is None else check_id(call_id)
        message, then = self._emitted(behavior, message_id, payload)
        return self._ask(behavior, message, to, timeout, then, repeats=call_id is not None)

    async def _call_any(self, behavior: Request[P, R], payload: P, timeout: float) -> R:
        message, then = self._emitted(behavior, self._new_id(), payload)
        nodes = self._that_handle(behavior.kind) or self._of_whom_nothing_is_known()
        if not nodes:
            raise self._nobody(behavior.kind)
        return await first_that_takes_it(
            nodes, timeout, lambda node, left: self._ask(behavior, message, node, left, then)
        )

    async def call_many(
        self, behavior: Request[P, R], payload: P, to: Sequence[str] | None, timeout: float, quorum: int | None
    ) -> Replies[R]:
        """Ask several nodes at once; return when `quorum` have replied (None: when each has answered)."""
        if not isinstance(behavior, Request):
            raise TypeError(_NOT_A_REQUEST.format(behavior))
        if to is None:
            to = self._that_handle(behavior.kind)
            if not to:
                raise self._nobody(behavior.kind)
        return await gather(
            to,
            lambda node: self.call(behavior, payload, node, timeout, None),
            quorum=quorum,
            name=f"{behavior.kind!r} from node {self._node!r}",
            task=f"meshkit:{self._name}:runtime:call {behavior.kind}",
        )

    def _ask(
        self,
        behavior: Request[P, R],
        message: Message[P],
        to: str,
        timeout: float,
        then: Callable[[], object] | None,
        *,
        repeats: bool = False,
    ) -> Awaitable[R]:
        peer = self.presence.peers.get(to)
        if peer is not None and peer.draining and not repeats:  # what it has it finishes, and it repeats its answers
            raise Draining(node=to)
        if to in self.presence.silent:
            raise Unreachable(node=to, reason="it has fallen silent")
        return self.calls.call(behavior, message, to, timeout, then)

    def _that_handle(self, kind: str) -> Sequence[str]:
        """Return the nodes that take requests of a kind, each time beginning with another one."""
        nodes = [peer.node for peer in self.presence.that_handle(kind) if not peer.draining]
        if kind in self._graph.requests and not self.intake.draining:
            nodes.append(self._node)
        self._turns[kind] += 1
        first = self._turns[kind] % max(1, len(nodes))
        return nodes[first:] + nodes[:first]

    def _of_whom_nothing_is_known(self) -> Sequence[str]:
        """Return the nodes that have no heartbeat, or have just come: they can but be asked."""
        known = self.presence.peers.keys() | self.presence.silent.keys()
        return [node for node in self._transport.peers if node not in known]

    def _nobody(self, kind: str) -> Refused:
        """Return why nobody can be asked."""
        draining = [peer.node for peer in self.presence.that_handle(kind)]
        if kind in self._graph.requests:
            draining.append(self._node)
        return Draining(node=draining[0]) if draining else NoHandler(kind=kind, node=None)

    def _on_gone(self, node: str) -> None:
        self.intake.give_up(node)

    def _emitted(
        self, behavior: Behavior[P], message_id: str, payload: P
    ) -> tuple[Message[P], Callable[[], object] | None]:
        """Pass a message through the stages of its emission; raise what stops it, or return what is to be done then."""
        behavior.check(payload)
        message = Message(message_id, behavior.kind, self._node, payload, self._wall(), behavior.version)
        if behavior.emitting is None:
            return message, None
        passed = behavior.emitting.run(message)
        if isinstance(passed, Continue):
            return passed.message, passed.then
        stage, outcome = passed.stage, passed.outcome
        if isinstance(outcome, Drop):
            self.journal.drop(message.kind, stage, outcome.reason, message.id, self._node)
            raise NotAccepted(kind=message.kind, node=self._node, reason=f"{outcome.reason} (stage {stage})")
        self.journal.drop(message.kind, stage, reason_of(outcome.error), message.id, self._node)
        try:
            raise outcome.error
        finally:
            del passed, outcome  # they hold the error, and it holds this frame: a cycle

    def _check_size(self, to: str | None, size: int) -> None:
        """Raise an error unless a payload fits into a frame, which it needs to leave this node."""
        if size > self._max_payload and to != self._node:
            raise ValueError(f"a payload of {size} bytes does not fit into a frame: it may have {self._max_payload}")

    def _require_way(self, to: str) -> None:
        peers, presence = self._transport.peers, self.presence
        if to != self._node and (to in presence.silent or not (to in presence.peers or to in peers)):
            known = ", ".join(sorted({*peers, *presence.peers} - presence.silent.keys())) or "nobody"
            raise Unreachable(node=to, reason=f"node {self._node!r} can reach {known}")

    def _post(self, to: str, wire: Wire) -> None:
        if to == self._node:
            self.intake.take(to, wire)
        else:
            self.outbox.post(to, wire)

    def _answer(self, caller: str, answer: Reply | Failure) -> None:
        size = len(answer.payload) if isinstance(answer, Reply) else 0
        if size > self._max_payload and caller != self._node:
            self._log.error(
                "a reply of %d bytes to node %r does not fit into a frame", size, caller, message_id=answer.id
            )
            answer = Failure(answer.id, "failed", code="internal")
        self._post(caller, answer)

    def _on_unsent(self, to: str | None, wires: Sequence[Wire], error: Exception) -> None:
        """Tell those who wait for an answer, and count the rest."""
        if not isinstance(error, Refused | OutcomeUnknown | Closed):  # nobody knows how far it had come
            self._log.error("the transport failed", peer=to or "every node", exc_info=error)
            error = PeerLost(node=to or "every node")
        for wire in wires:
            if isinstance(wire, Ask):
                self.calls.fail(wire.id, copy.copy(error))
            elif not isinstance(wire, Beat | Goodbye):
                kind = wire.kind if isinstance(wire, Tell) else ""
                self.journal.drop(kind, "transport", reason_of(error), wire.id, self._node, shown(error))

    def say_goodbye(self) -> None:
        """Say that this node is leaving, after everything else that it had to say."""
        self.outbox.flush()
        self.outbox.post(None, Goodbye())
        self.outbox.flush()

    # --- the state, and the end

    def stats(self) -> RuntimeStats:
        """Return what has happened so far."""
        mailboxes = self.dispatcher.mailboxes
        return self.journal.stats(queued=mailboxes.queued, running=mailboxes.running, pending=len(self.calls))

    def close(self) -> None:
        """Fail every call that still waits for its answer."""
        self.calls.close()
