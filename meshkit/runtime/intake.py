"""The intake: the way of a message from a frame that came from another node to the mailbox of its handler.

Read `received`, then `take`, `_on_tell` and `_on_ask`: in this order a message passes through here. Nothing waits, and
no frame, whatever is in it, raises an error.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from meshkit import _time
from meshkit.errors import MalformedFrame, MeshkitError, NoHandler, NotAccepted, Overloaded, UnknownSender, Untrusted
from meshkit.events import Observer, notify
from meshkit.runtime.behavior import Broadcast, Request
from meshkit.runtime.calls import Calls
from meshkit.runtime.dispatcher import Dispatcher
from meshkit.runtime.frame import Prover
from meshkit.runtime.graph import Graph
from meshkit.runtime.journal import Journal
from meshkit.runtime.letters import DeadLetter
from meshkit.runtime.message import Message
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.presence import PeerGone, Presence
from meshkit.runtime.routes import Route
from meshkit.runtime.stages import Continue, Drop, Fail
from meshkit.runtime.wire import Ask, Beat, Cancel, Failure, Goodbye, Reply, Tell, Wire, decode, refusal

__all__ = ["Intake", "reason_of"]


class Intake:
    """What comes in to one node. `answer(caller, answer)` sends an answer, and never raises."""

    def __init__(
        self,
        node: str,
        graph: Graph,
        dispatcher: Dispatcher,
        calls: Calls,
        presence: Presence,
        prover: Prover | None,
        journal: Journal,
        answer: Callable[[str, Reply | Failure], None],
        observer: Observer | None,
    ) -> None:
        self.draining = False  # whether new work of other nodes is refused
        self.on_greeting: Callable[[str], None] = lambda node: None
        self.routes = graph.routes
        self._node = node
        self._graph = graph
        self._dispatcher = dispatcher
        self._calls = calls
        self._presence = presence
        self._prover = prover
        self._journal = journal
        self._answer = answer
        self._observer = observer
        for route in graph.routes.values():
            route.compile(node, dispatcher.repeated)

    def received(self, sender: str, frame: bytes) -> None:
        """Take a frame from the transport, which says who the `sender` is; of one that is proved, the proof says it."""
        stale = to_all = False
        try:
            if frame[:2] != PLAIN:
                if self._prover is None:
                    raise MalformedFrame(reason="it is proved, which a node without an identity cannot verify")
                opened = self._prover.open(frame, _time.wall())
                sender, to_all, stale, frame = opened.sender, opened.to_all, opened.stale is not None, opened.bundle
                wires = decode(frame)
            elif self._prover is not None:
                raise UnknownSender
            else:
                wires = decode(frame[2:])
        except (Untrusted, Overloaded) as error:
            return self._journal.drop("", "frame", reason_of(error), "", sender)
        if stale:
            self._journal.drop("", "frame", "stale", "", sender)
        for wire in wires:
            if stale:
                if isinstance(wire, Ask) and not self._dispatcher.knows(sender, wire.id):
                    reason = "it was stamped too long ago, or in the future, or before the node started"
                    self._answer(sender, Failure(wire.id, "not_accepted", reason))
            elif to_all and not isinstance(wire, Tell | Beat | Goodbye):
                self._journal.drop("", "frame", "not_sealed", wire.id, sender)
            else:
                self.take(sender, wire)
        return None

    def take(self, sender: str, wire: Wire) -> None:
        """Take what a node has sent, and is known to have sent."""
        if isinstance(wire, Tell):
            self._on_tell(sender, wire)
        elif isinstance(wire, Ask):
            self._on_ask(sender, wire)
        elif isinstance(wire, Cancel):
            self._dispatcher.cancel(sender, wire.id)
        elif isinstance(wire, Reply | Failure):
            if not self._calls.answered(sender, wire):
                self._journal.drop("", "kind", "wrong_sender", wire.id, sender)
        elif isinstance(wire, Beat):
            self._on_beat(sender, wire)
        else:
            self.lost(sender, "it said goodbye")

    def _on_tell(self, sender: str, tell: Tell) -> None:
        route = self.routes.get((tell.kind, tell.version))
        if route is None or not isinstance(route.behavior, Broadcast):
            stage, error = self._no_route(tell.kind, tell.version)
            self._journal.drop(self._known(tell.kind), stage, reason_of(error), tell.id, sender)
        elif self.draining and sender != self._node:
            self._journal.drop(tell.kind, "mailbox", "draining", tell.id, sender)
        else:
            message = Message(tell.id, tell.kind, sender, tell.payload, tell.time, tell.version)
            self.receive(route, message, len(tell.payload))

    def receive(self, route: Route, message: Message[Any], size: int) -> bool:
        """Let a message that nobody waits for into the mailboxes; return whether it came into one."""
        outcome, stage = route.pipeline.run(message)
        if not isinstance(outcome, Continue):
            self.stopped(route, message, size, outcome, stage)
            return False
        taken = False
        for handler in route.handlers:
            if self._dispatcher.offer(handler, outcome.message, size):
                self._journal.note(message.id, handler.queued)
                taken = True
            else:
                why = "draining" if handler.mailbox.closed else "overloaded"
                self._journal.drop(message.kind, "mailbox", why, message.id, message.sender)
        if taken:
            route.remember(outcome.message)
        return taken

    def _on_ask(self, sender: str, ask: Ask) -> None:
        route = self.routes.get((ask.kind, ask.version))
        if route is None or not isinstance(route.behavior, Request):
            stage, error = self._no_route(ask.kind, ask.version)
            self._journal.drop(self._known(ask.kind), stage, reason_of(error), ask.id, sender)
            self._answer(sender, refusal(ask.id, error))
        elif self.draining and sender != self._node and (sender, ask.id) not in self._dispatcher.serving:
            self._journal.drop(ask.kind, "mailbox", "draining", ask.id, sender)
            self._answer(sender, Failure(ask.id, "draining"))
        else:
            deadline = _time.now() + ask.remaining / 1000
            message = Message(ask.id, ask.kind, sender, ask.payload, ask.time, ask.version, deadline)
            outcome, stage = route.pipeline.run(message)
            if not isinstance(outcome, Continue):
                answer = self.stopped(route, message, len(ask.payload), outcome, stage)
            else:
                handler = route.handlers[0]
                full = self._dispatcher.serve(handler, outcome.message, len(ask.payload))
                if full is None:
                    return self._journal.note(ask.id, handler.queued)
                why = "draining" if handler.mailbox.closed else "overloaded"
                self._journal.drop(ask.kind, "mailbox", why, ask.id, sender)
                answer = Failure(ask.id, "draining") if handler.mailbox.closed else refusal(ask.id, full)
            if answer is not None:
                self._answer(sender, answer)
        return None

    def stopped(
        self, route: Route, message: Message[Any], size: int, outcome: Drop | Fail, stage: str
    ) -> Failure | None:
        """Take note of a message that a stage stopped; return what its caller is to be told, if anything."""
        kind, call_id, sender = message.kind, message.id, message.sender
        if isinstance(outcome, Drop):
            self._journal.drop(kind, stage, outcome.reason, call_id, sender)
            if stage in {"dedupe", "deadline"}:
                return None  # it was answered, or will be; or its caller has given up
            return refusal(call_id, NotAccepted(kind=kind, node=self._node, reason=f"{outcome.reason} ({stage})"))
        error = outcome.error
        self._journal.drop(kind, stage, reason_of(error), call_id, sender)
        if isinstance(error, MeshkitError):
            return refusal(call_id, error)

        def again() -> bool:
            return self.receive(route, message, size)

        names = ", ".join(handler.name for handler in route.handlers)
        self._dispatcher.give_up(route.handlers[0], DeadLetter(message, names, stage, 1, error, again), error)
        return Failure(call_id, "failed", code="internal")

    def _known(self, kind: str) -> str:
        return kind if kind in self._graph.kinds else ""  # else whoever makes up kinds could fill the memory

    def _no_route(self, kind: str, version: int) -> tuple[str, MeshkitError]:
        """Return at which stage a message goes no further for which there is no route, and why."""
        newest = self._graph.kinds.get(kind)
        if newest is None or (kind, version) in self.routes:
            return "kind", NoHandler(kind=kind, node=self._node)
        versions = [str(of) for handled, of in self.routes if handled == kind]
        reason = f"it is of version {version}, and only {', '.join(versions)} is handled"
        return "version", NotAccepted(kind=kind, node=self._node, reason=reason)

    def _on_beat(self, sender: str, beat: Beat) -> None:
        news = self._presence.heard(sender, beat, _time.now())
        if news is not None:
            notify(self._observer, news)
        if beat.greets:
            self.on_greeting(sender)

    def found(self, node: str) -> None:
        """Tell a node that has just been connected that this one is up."""
        self.on_greeting(node)

    def lost(self, node: str, reason: str = "the connection is gone") -> None:
        """Fail the calls that wait for a node that has gone, and give up the work that it waits for."""
        if self._presence.forget(node):
            notify(self._observer, PeerGone(node, reason))
        self._calls.lost(node)
        self._dispatcher.lost(node)

    def look_for_the_silent(self) -> None:
        """Take note of the nodes that have been silent for too long."""
        for node in self._presence.fallen_silent(_time.now()):
            notify(self._observer, PeerGone(node, "it has fallen silent"))
            self._calls.lost(node)
            self._dispatcher.lost(node)


@functools.cache
def _snake_case(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def reason_of(error: Exception) -> str:
    """Return what drops because of such an error are counted under: "rate_limited"; "failed" if it is not ours."""
    return _snake_case(type(error).__name__) if isinstance(error, MeshkitError) else "failed"
