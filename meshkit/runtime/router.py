"""The router: the way of a message, from `emit` or `call` to its handler and back.

Read it from top to bottom: what goes out, what comes in, what runs, what goes back. Nothing here waits but `emit` (for
room in the mailboxes of this node, and only with a local kind) and `call` (for the answer).
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import anyio
import msgspec

from meshkit import _check, _time
from meshkit.call_registry import CallRegistry
from meshkit.errors import CallTimeout, MalformedFrame, MeshkitError, PeerLost, RemoteError
from meshkit.logger import ServiceLog
from meshkit.runtime.behavior import Behavior, Broadcast, Local, Reject, Request
from meshkit.runtime.crew import Crew
from meshkit.runtime.graph import Graph, Handler
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.message import Message, new_id
from meshkit.runtime.stats import RuntimeStats
from meshkit.runtime.transport import Transport
from meshkit.runtime.wire import Ask, Cancel, Event, Failure, Reply, Why, Wire, decode, encode, encode_payload, to_error

__all__ = ["Delivery", "Router"]

P = TypeVar("P")
R = TypeVar("R")


class Delivery:
    """A message on its way to one handler; for a call, until it is answered."""

    __slots__ = ("handler", "is_call", "message", "scope", "unanswered")

    def __init__(self, handler: Handler[Any], message: Message[Any], *, is_call: bool = False) -> None:
        self.handler = handler
        self.message = message
        self.is_call = is_call
        self.unanswered = is_call  # whether somebody still waits for an answer
        self.scope: anyio.CancelScope | None = None  # what a running call is cancelled by


class Router:
    """The way of messages through one node, from the start of its runtime to the stop."""

    def __init__(
        self, node: str, graph: Graph, crews: Mapping[str, Crew], transport: Transport, log: ServiceLog
    ) -> None:
        self.node = node
        self.draining = False  # no new work from other nodes
        self.calls: CallRegistry[msgspec.Raw] = CallRegistry(name=f"calls of node {node!r}")
        self.mailboxes: dict[str, Mailbox[Delivery]] = {}
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()  # by kind ("" where this node does not know it) and reason
        self.cut: Counter[str] = Counter()  # by kind: what was delivered, but not handled before the end
        self._graph = graph
        self._transport = transport
        self._log = log
        self._asked: dict[str, tuple[str, str]] = {}  # id of a call -> the node that was asked, and the kind
        self._serving: dict[tuple[str, str], Delivery] = {}  # (caller, id of its call) -> the work for it
        for service in graph.services:
            self.mailboxes[service.name] = Mailbox(
                f"mailbox of service {service.name!r} on node {node!r}",
                self._run,
                crews[service.name].spawn,
                max_mailbox=service.max_mailbox,
                max_concurrent=service.max_concurrent,
            )

    # --- what goes out

    async def emit(self, behavior: Behavior[P], payload: P, to: str | None) -> str:
        """Send a message that nobody waits for, and return its id."""
        behavior.check(payload)
        message_id = new_id()
        if isinstance(behavior, Local):
            if to is not None:
                raise ValueError(f"{behavior!r} never leaves its node, so it cannot be emitted to {to!r}")
            await self._deliver(behavior, Message(message_id, behavior.kind, self.node, payload, _time.wall()))
        elif isinstance(behavior, Broadcast):
            event = Event(message_id, behavior.kind, _time.wall(), encode_payload(payload))
            if to is None:
                self._transport.broadcast(encode(event))
                self._on_event(self.node, event)
            else:
                self._send(to, event)
        else:
            raise TypeError(f"{behavior!r} asks for a reply: use call(), which returns it")
        self.counts["sent"] += 1
        return message_id

    async def _deliver(self, behavior: Local[P], message: Message[P]) -> None:
        """Put a local message into the mailbox of every handler, or of none if this is cancelled."""
        handlers = self._graph.local.get(behavior.kind)
        if not handlers:
            self.dropped[behavior.kind, "no_handler"] += 1
            return
        reserved: list[Mailbox[Delivery]] = []
        try:
            for handler in handlers:
                if handler.behavior is not behavior and handler.behavior != behavior:
                    raise ValueError(f"{behavior!r} is emitted, but {handler!r} handles {handler.behavior!r}")
                mailbox = self.mailboxes[handler.service.name]
                if not mailbox.try_reserve():
                    await mailbox.reserve()
                reserved.append(mailbox)
        except BaseException:
            for mailbox in reserved:
                mailbox.release()
            raise
        for handler, mailbox in zip(handlers, reserved, strict=True):
            self.counts["delivered"] += 1
            mailbox.put(Delivery(handler, message))

    async def call(self, behavior: Request[P, R], payload: P, to: str, timeout: float) -> R:
        """Ask the node `to`, and return its reply."""
        if not isinstance(behavior, Request):
            raise TypeError(f"{behavior!r} has no reply: emit() it")
        behavior.check(payload)
        kind = behavior.kind
        remaining = min(_check.duration("timeout", timeout), anyio.current_effective_deadline() - _time.now())
        call_id = new_id()
        ask = Ask(call_id, kind, _time.wall(), int(max(0.0, remaining) * 1000), encode_payload(payload))
        self._asked[call_id] = (to, kind)
        try:
            raw = await self.calls.call(lambda _: self._send(to, ask), timeout=timeout, id=call_id)
        except CallTimeout:
            self._send_quietly(to, Cancel(call_id))
            raise CallTimeout(name=f"{kind!r} on node {to!r}", timeout=timeout) from None
        except asyncio.CancelledError:
            self._send_quietly(to, Cancel(call_id))
            raise
        finally:
            del self._asked[call_id]
            self.counts["sent"] += 1
        try:
            return behavior.reply_decoder.decode(raw)
        except Exception as error:
            self._log.exception("%r: the reply of node %r is not what was declared", kind, to)
            raise RemoteError(node=to, kind=kind, code="bad_reply", correlation_id=call_id) from error

    def _send(self, to: str, wire: Wire) -> None:
        if to == self.node:
            self._take(to, wire)
        else:
            self._transport.send(to, encode(wire))

    def _send_quietly(self, to: str, wire: Wire) -> None:
        """Send what nobody is there to be told about, if it cannot be sent."""
        try:
            self._send(to, wire)
        except MeshkitError as error:
            self._log.debug("%s for node %r was not sent: %s", type(wire).__name__, to, error)

    # --- what comes in; none of this waits

    def received(self, sender: str, frame: bytes) -> None:
        """Take a frame from the transport."""
        try:
            wire = decode(frame)
        except MalformedFrame:
            self.dropped["", "malformed"] += 1
        else:
            self._take(sender, wire)

    def _take(self, sender: str, wire: Wire) -> None:
        if isinstance(wire, Event):
            self._on_event(sender, wire)
        elif isinstance(wire, Ask):
            self._on_ask(sender, wire)
        elif isinstance(wire, Cancel):
            self._on_cancel(sender, wire)
        else:
            self._on_answer(sender, wire)

    def _on_event(self, sender: str, event: Event) -> None:
        handlers = self._graph.events.get(event.kind)
        if not handlers:
            self.dropped["", "no_handler"] += 1
            return
        if self.draining and sender != self.node:
            self.dropped[event.kind, "draining"] += 1
            return
        try:
            payload = handlers[0].behavior.decoder.decode(event.payload)
        except Exception as error:  # noqa: BLE001 - hostile bytes raise more than msgspec's own error
            self.dropped[event.kind, "malformed"] += 1
            self._log.debug("%r from node %r is not what was declared: %s", event.kind, sender, error)
            return
        message = Message(event.id, event.kind, sender, payload, event.time)
        for handler in handlers:
            mailbox = self.mailboxes[handler.service.name]
            if mailbox.try_reserve():
                self.counts["delivered"] += 1
                mailbox.put(Delivery(handler, message))
            else:
                self.dropped[event.kind, "overloaded"] += 1

    def _on_ask(self, sender: str, ask: Ask) -> None:
        handler = self._graph.requests.get(ask.kind)
        if handler is None:
            return self._refuse(sender, ask, "no_handler")
        if self.draining and sender != self.node:
            return self._refuse(sender, ask, "draining")
        if (sender, ask.id) in self._serving:
            self.dropped[ask.kind, "duplicate"] += 1  # the answer to the first one answers both
            return None
        try:
            payload = handler.behavior.decoder.decode(ask.payload)
        except Exception as error:  # noqa: BLE001 - hostile bytes raise more than msgspec's own error
            return self._refuse(sender, ask, "malformed", f"{ask.kind!r} on node {self.node!r}: {error}")
        mailbox = self.mailboxes[handler.service.name]
        if not mailbox.try_reserve():
            return self._refuse(sender, ask, "overloaded", mailbox.name, mailbox.max_mailbox)
        deadline = _time.now() + ask.remaining / 1000
        message = Message(ask.id, ask.kind, sender, payload, ask.time, deadline)
        delivery = self._serving[sender, ask.id] = Delivery(handler, message, is_call=True)
        self.counts["delivered"] += 1
        mailbox.put(delivery)
        return None

    def _refuse(self, sender: str, ask: Ask, why: Why, detail: str = "", limit: int = 0) -> None:
        self.dropped["" if why == "no_handler" else ask.kind, why] += 1
        self._send_quietly(sender, Failure(ask.id, why, detail, limit))

    def _on_cancel(self, sender: str, cancel: Cancel) -> None:
        delivery = self._serving.get((sender, cancel.id))
        if delivery is None:
            return  # it has been answered already
        delivery.unanswered = False
        if delivery.scope is not None:
            delivery.scope.cancel()
        elif self.mailboxes[delivery.handler.service.name].discard(delivery):
            self.counts["cancelled"] += 1
            del self._serving[sender, cancel.id]

    def _on_answer(self, sender: str, answer: Reply | Failure) -> None:
        asked, kind = self._asked.get(answer.id, (sender, ""))
        if asked != sender:
            self.dropped["", "wrong_sender"] += 1  # an answer counts only if it comes from the node that was asked
        elif isinstance(answer, Reply):
            self.calls.resolve(answer.id, answer.payload)
        else:
            self.calls.reject(answer.id, to_error(answer, sender, kind))

    def lost(self, node: str) -> None:
        """Fail the calls that wait for `node`, and cancel the work that it waits for."""
        for call_id in [call_id for call_id, (asked, _) in self._asked.items() if asked == node]:
            self.calls.reject(call_id, PeerLost(node=node))
        for _, call_id in [key for key in self._serving if key[0] == node]:
            self._on_cancel(node, Cancel(call_id))

    # --- what runs, in a worker of the service, and what goes back

    async def _run(self, delivery: Delivery) -> None:
        if delivery.is_call:
            await self._serve(delivery)
            return
        try:
            await delivery.handler.method(delivery.message)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure
            self._failed(delivery, error)
        except asyncio.CancelledError as error:
            self._interrupted(delivery, error)
        else:
            self.counts["handled"] += 1

    async def _serve(self, delivery: Delivery) -> None:
        handler, message = delivery.handler, delivery.message
        answer: Reply | Failure | None = None
        try:
            with anyio.CancelScope(deadline=message.deadline) as delivery.scope:
                if message.deadline > _time.now():  # expired work never starts
                    reply = await handler.method(message)
                    handler.behavior.check_reply(reply)
                    answer = Reply(message.id, encode_payload(reply))
            self.counts["cancelled" if answer is None else "handled"] += 1
        except Reject as reject:
            self.counts["failed"] += 1
            answer = Failure(message.id, "failed", reject.detail, 0, reject.code, reject.retryable)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure, and its caller learns only that
            self._failed(delivery, error)
            answer = Failure(message.id, "failed", code="internal")
        except asyncio.CancelledError as error:
            cut = self.mailboxes[handler.service.name].closed
            answer = Failure(message.id, "cut" if cut else "failed", code="internal")
            self._interrupted(delivery, error)
        finally:
            del self._serving[message.sender, message.id]
            if answer is not None and delivery.unanswered:
                self._send_quietly(message.sender, answer)

    def _failed(self, delivery: Delivery, error: BaseException) -> None:
        self.counts["failed"] += 1
        message = delivery.message
        delivery.handler.service.log.exception(
            "%r from node %r failed in %r", message.kind, message.sender, delivery.handler,
            message_id=message.id, exc_info=error,
        )  # fmt: skip

    def _interrupted(self, delivery: Delivery, error: asyncio.CancelledError) -> None:
        """Pass on the cancellation of a worker at the end; any other one is the handler's own doing."""
        if self.mailboxes[delivery.handler.service.name].closed:
            self.cut[delivery.message.kind] += 1
            raise error
        task = asyncio.current_task()
        while task is not None and task.uncancel():
            pass
        self._failed(delivery, error)

    def stats(self) -> RuntimeStats:
        """Return what has happened so far."""
        boxes = self.mailboxes.values()
        return RuntimeStats(
            **self.counts,
            cut=self.cut.total(),
            queued=sum(map(len, boxes)),
            running=sum(mailbox.running for mailbox in boxes),
            pending=len(self.calls),
            dropped=dict(self.dropped),
        )

    # --- the end

    async def quiet(self) -> None:
        """Wait until no message waits or is being handled."""
        while busy := [mailbox for mailbox in self.mailboxes.values() if mailbox.busy]:
            await busy[0].quiet()

    def close_mailbox(self, service: str) -> None:
        """Take no more messages for `service`, and refuse those that no handler has begun."""
        for delivery in self.mailboxes[service].close():
            message = delivery.message
            self.cut[message.kind] += 1
            if delivery.is_call:
                del self._serving[message.sender, message.id]
                self._send_quietly(message.sender, Failure(message.id, "draining"))

    def close(self) -> None:
        """Answer for the handlers that refused to end, and fail every call that still waits."""
        for caller, call_id in list(self._serving):
            self._send_quietly(caller, Failure(call_id, "cut"))
        self.calls.close()
