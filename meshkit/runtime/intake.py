"""The intake: the way of a message from a frame that came from another node to the mailbox of its handler.

Read `received`, then `take`, `_on_tell` and `_on_ask`: in this order a message passes through here. Nothing waits, and
no frame, whatever is in it, raises an error.
"""

import asyncio
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Raw
from msgspec.structs import replace

from meshkit import _time
from meshkit.errors import (
    MalformedFrame,
    MeshkitError,
    NoHandler,
    NotAccepted,
    Overloaded,
    Stale,
    UnknownSender,
    Untrusted,
)
from meshkit.runtime.behavior import Broadcast, Request
from meshkit.runtime.calls import Calls
from meshkit.runtime.dispatcher import Dispatcher
from meshkit.runtime.failures import DeadLetter, not_handled
from meshkit.runtime.frame import Opened, Prover, claimed_sender
from meshkit.runtime.graph import Graph
from meshkit.runtime.journal import Journal, shown
from meshkit.runtime.message import Message
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.presence import Heartbeat
from meshkit.runtime.routes import Route
from meshkit.runtime.stages import Continue, Drop, Stopped
from meshkit.runtime.wire import Ask, Beat, Cancel, Failure, Goodbye, Reply, Tell, Wire, decode, decode_each, refusal

__all__ = ["Intake", "reason_of"]

_GRID = 1024
"""Deadlines of handlers lie on this many to the second, so that under load many calls in a row have the same: a worker
sets a timer only for a new one. What travels is rounded to milliseconds already."""
_MAX_DETAIL = 200  # characters of what a trust predicate raised


class Intake:
    """What comes in to one node. `answer(caller, answer)` sends an answer, and never raises."""

    def __init__(
        self,
        node: str,
        graph: Graph,
        dispatcher: Dispatcher,
        calls: Calls,
        heartbeat: Heartbeat,
        prover: Prover | None,
        journal: Journal,
        answer: Callable[[str, Reply | Failure], None],
    ) -> None:
        self.draining = False  # whether new work of other nodes is refused
        self.routes = graph.routes
        self._node = node
        self._graph = graph
        self._dispatcher = dispatcher
        self._calls = calls
        self._heartbeat = heartbeat
        self._prover = prover
        self._journal = journal
        self._answer = answer
        self._now = _time.clock_of(asyncio.get_running_loop())
        self._takes: dict[type[Wire], Callable[[str, Any], object]] = {
            Tell: self._on_tell,
            Ask: self._on_ask,
            Cancel: lambda sender, cancel: dispatcher.cancel(sender, cancel.id),
            Reply: self._on_answer,
            Failure: self._on_answer,
            Beat: heartbeat.heard,
            Goodbye: self._on_goodbye,
        }
        for route in graph.routes.values():
            route.compile(node, dispatcher.repeated, self._now)

    def received(self, sender: str, frame: bytes) -> None:
        """Take a frame from the transport, which says who the `sender` is; of one that is proved, the proof says it."""
        try:
            opened = self._open(sender, frame)
        except (Untrusted, Overloaded) as error:
            return self._refuse(sender, error, claimed_sender(frame))
        sender = opened.sender
        try:
            wires = decode(opened.bundle)
        except MalformedFrame:
            wires = self._understood(sender, opened.bundle)
        if opened.stale is not None:
            return self._refuse_late(opened, wires)
        for wire in wires:
            if opened.to_all and not isinstance(wire, Tell | Beat | Goodbye):
                self._journal.drop("", "frame", "not_sealed", wire.id, sender)
            else:
                self.take(sender, wire)
        return None

    def _open(self, sender: str, frame: bytes) -> Opened:
        if not isinstance(frame, bytes):
            raise MalformedFrame(reason=f"a frame that is {type(frame).__name__} and not bytes")
        if frame[:2] == PLAIN:
            if self._prover is not None:
                raise UnknownSender
            return Opened(sender, frame[2:], to_all=False, time=0.0, stale=None)
        if self._prover is None:
            raise MalformedFrame(reason="a node without an identity cannot open it")
        return self._prover.open(frame, _time.wall())

    def _refuse(self, sender: str, error: MeshkitError, claimed: str = "") -> None:
        """Count a frame that goes no further, and say why: its `sender` is who the transport, or the proof, says."""
        says = f" (it says that it is from {claimed})" if claimed and claimed != sender else ""
        cause = error.__cause__ if isinstance(error, UnknownSender) else None
        why = "" if cause is None else f" ({shown(cause)})"[:_MAX_DETAIL]
        self._journal.drop("", "frame", reason_of(error), "", sender, f"{error}{why}{says}")

    def _understood(self, sender: str, bundle: bytes) -> list[Wire]:
        """Return the messages of a bundle that are understood, and count the others: newer nodes may know more."""
        wires: list[Wire] = []
        try:
            for wire in decode_each(bundle):
                if isinstance(wire, MalformedFrame):
                    self._journal.drop("", "frame", "malformed_message", "", sender, str(wire))
                else:
                    wires.append(wire)
        except MalformedFrame as error:
            self._refuse(sender, error)
        return wires

    def _refuse_late(self, opened: Opened, wires: Sequence[Wire]) -> None:
        """Refuse what came too late, unless it is asked again what this node knows already.

        What may have been accepted before, of which nothing is remembered, is not refused: it may have run.
        """
        self._refuse(opened.sender, Stale())
        for wire in wires:
            if isinstance(wire, Ask) and not opened.to_all and not self._dispatcher.knows(opened.sender, wire.id):
                late = Failure(wire.id, "not_accepted", "it was sent too long ago", asked=wire.time)
                self._answer(opened.sender, Failure(wire.id, "cut") if opened.forgotten else late)

    def take(self, sender: str, wire: Wire) -> None:
        """Take what a node has sent, and is known to have sent."""
        if sender in self._heartbeat.silent:
            self._heartbeat.heard_again(sender, wire)
        self._takes[type(wire)](sender, wire)

    def _on_answer(self, sender: str, answer: Reply | Failure) -> None:
        if not self._calls.answered(sender, answer):
            self._journal.drop("", "kind", "wrong_sender", answer.id, sender)

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
        """Let a message that nobody waits for into the mailboxes; return False if none of them had room."""
        passed = self.admit(route, message, size)
        if passed is None:
            return True
        full = [handler for handler in route.handlers if not self._dispatcher.offer(handler, passed.message, size)]
        taken = len(full) < len(route.handlers)
        if taken and passed.then is not None:
            passed.then()
        for handler in full:
            self._dispatcher.missed(handler, message)
        return taken

    def admit(self, route: Route, message: Message[Any], size: int) -> Continue | None:
        """Let a message that nobody waits for pass the stages; return None, and see to it, if one has stopped it."""
        passed = route.pipeline.run(message)
        if isinstance(passed, Continue):
            return passed
        self._stopped(route, message, size, passed)
        return None

    def _on_ask(self, sender: str, ask: Ask) -> None:
        route = self.routes.get((ask.kind, ask.version))
        if route is None or not isinstance(route.behavior, Request):
            stage, error = self._no_route(ask.kind, ask.version)
            self._journal.drop(self._known(ask.kind), stage, reason_of(error), ask.id, sender)
            self._answer(sender, replace(refusal(ask.id, error), asked=ask.time))
        elif self.draining and sender != self._node and not self._dispatcher.knows(sender, ask.id):
            self._journal.drop(ask.kind, "mailbox", "draining", ask.id, sender)
            self._answer(sender, Failure(ask.id, "draining", asked=ask.time))
        else:
            deadline = math.floor((self._now() + ask.remaining / 1000) * _GRID) / _GRID
            message = Message(ask.id, ask.kind, sender, ask.payload, ask.time, ask.version, deadline)
            passed = route.pipeline.run(message)
            if isinstance(passed, Stopped):
                answer = self._stopped(route, message, len(ask.payload), passed)
            else:
                handler = route.handlers[0]
                full = self._dispatcher.serve(handler, passed.message, len(ask.payload))
                if full is None:
                    if passed.then is not None:
                        passed.then()
                    return
                self._journal.drop(ask.kind, "mailbox", reason_of(full), ask.id, sender)
                answer = refusal(ask.id, full)
            if answer is not None:
                self._answer(sender, replace(answer, asked=ask.time))

    def _stopped(self, route: Route, message: Message[Any], size: int, stopped: Stopped) -> Failure | None:
        """Take note of a message that a stage stopped; return what its caller is to be told, if anything."""
        kind, call_id, sender = message.kind, message.id, message.sender
        stage, outcome = stopped.stage, stopped.outcome
        if isinstance(outcome, Drop):
            self._journal.drop(kind, stage, outcome.reason, call_id, sender)
            if stage in {"dedupe", "deadline"}:
                return None  # it was answered, or will be; or its caller has given up
            return refusal(call_id, NotAccepted(kind=kind, node=self._node, reason=f"{outcome.reason} ({stage})"))
        error = outcome.error
        self._journal.drop(kind, stage, reason_of(error), call_id, sender)
        if isinstance(error, MeshkitError):
            return refusal(call_id, error)

        names = ", ".join(handler.name for handler in route.handlers)
        letter = DeadLetter(_kept(stopped.message), names, stage, 1, error, _kept(message), size)
        self._dispatcher.failures.end(route.handlers[0], letter, error)
        return not_handled(call_id, stage, route.handled.on_error)

    def replay(self, letter: DeadLetter) -> bool:
        """Handle a dead letter again, from where it failed or else from the first stage; return False if none can."""
        message = replace(letter.original, deadline=math.inf)  # its caller does not wait any more
        if letter.stage in {"handler", "order_by"}:
            handler = self._graph.handler(letter.handler, message)
            return handler is not None and self._dispatcher.offer(handler, message, letter.size)
        route = self.routes.get((message.kind, message.version))
        return route is not None and self.receive(route, message, letter.size)

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

    def found(self, node: str) -> None:
        """Tell a node that has just been connected that this one is up."""
        self._heartbeat.found(node)

    def lost(self, node: str) -> None:
        """Fail the calls that wait for a node that has gone, and give up the work that it waits for."""
        self._heartbeat.lost(node)
        self.give_up(node)

    def _on_goodbye(self, sender: str, _: Goodbye) -> None:
        self._heartbeat.forget(sender, "it said goodbye")
        self.give_up(sender)

    def give_up(self, node: str) -> None:
        """Wait no more for a node, and work no more for it."""
        self._calls.lost(node)
        self._dispatcher.lost(node)


def _kept(message: Message[Any]) -> Message[Any]:
    """Return a message that may be kept: what is not decoded is part of the frame that it came in."""
    return replace(message, payload=bytes(message.payload)) if isinstance(message.payload, Raw) else message


@functools.cache
def _snake_case(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def reason_of(error: Exception) -> str:
    """Return what drops because of such an error are counted under: "rate_limited"; "failed" if it is not ours."""
    return _snake_case(type(error).__name__) if isinstance(error, MeshkitError) else "failed"
