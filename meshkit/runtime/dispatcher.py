"""The dispatcher: a message waits in the mailbox of its service, a worker runs the handler, the caller is answered."""

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from meshkit import _time
from meshkit.runtime.behavior import Reject
from meshkit.runtime.crew import Crew, take_back_cancellations
from meshkit.runtime.graph import Graph, Handler
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.message import Message
from meshkit.runtime.stats import Counts
from meshkit.runtime.wire import Failure, Reply, encode_payload

__all__ = ["Delivery", "Dispatcher"]


class Delivery(msgspec.Struct, eq=False):
    """A message on its way to one handler."""

    handler: Handler
    message: Message[Any]
    is_call: bool = False
    caller_waits: bool = True
    scope: anyio.CancelScope | None = None  # cancels the handler of a call, once it runs


class Dispatcher:
    """What the services of one node have to do. `answer(caller, answer)` sends an answer, and never raises."""

    def __init__(
        self,
        node: str,
        graph: Graph,
        crews: Mapping[str, Crew],
        counts: Counts,
        answer: Callable[[str, Reply | Failure], None],
    ) -> None:
        self._counts = counts
        self._answer = answer
        self.serving: dict[tuple[str, str], Delivery] = {}  # calls that wait or run, by caller and id
        self._mailboxes: dict[str, Mailbox[Delivery]] = {}  # by service
        for service in graph.services:
            self._mailboxes[service.name] = Mailbox(
                f"mailbox of service {service.name!r} on node {node!r}",
                self._run,
                crews[service.name].spawn,
                max_mailbox=service.max_mailbox,
                max_concurrent=service.max_concurrent,
            )
        for handler in graph.handlers:
            handler.mailbox = self._mailboxes[handler.service.name]

    # --- into the mailbox

    def try_deliver(self, handlers: Sequence[Handler], message: Message[Any]) -> bool:
        """Put a message into the mailboxes of all handlers; into none, and return False, if one of them has no room."""
        for handler in handlers:
            if not handler.mailbox.has_room:
                return False
        for handler in handlers:
            self._counts.delivered += 1
            handler.mailbox.put(Delivery(handler, message))
        return True

    async def deliver(self, handlers: Sequence[Handler], message: Message[Any]) -> None:
        """Put a message into the mailboxes of all handlers, waiting for room; into none, if that fails."""
        reserved: list[Mailbox[Delivery]] = []
        try:
            for handler in handlers:
                await handler.mailbox.reserve()
                reserved.append(handler.mailbox)
            for mailbox in reserved:
                mailbox.require_open()  # one may have been closed while this waited for another
        except BaseException:
            for mailbox in reserved:
                mailbox.release()
            raise
        for handler in handlers:
            self._counts.delivered += 1
            handler.mailbox.put(Delivery(handler, message), reserved=True)

    def serve(self, handler: Handler, message: Message[Any]) -> bool:
        """Put a call into the mailbox, if there is room; it will be answered."""
        if not handler.mailbox.has_room:
            return False
        delivery = self.serving[message.sender, message.id] = Delivery(handler, message, is_call=True)
        self._counts.delivered += 1
        handler.mailbox.put(delivery)
        return True

    def cancel(self, caller: str, call_id: str) -> None:
        """Give up a call whose caller does not wait any more, unless it has been answered already."""
        delivery = self.serving.get((caller, call_id))
        if delivery is None:
            return
        delivery.caller_waits = False
        if delivery.scope is not None:
            delivery.scope.cancel()
        else:
            delivery.handler.mailbox.discard(delivery)
            self._counts.cancelled += 1
            del self.serving[caller, call_id]

    def lost(self, node: str) -> None:
        """Give up all calls of a node that has gone."""
        for caller, call_id in [key for key in self.serving if key[0] == node]:
            self.cancel(caller, call_id)

    # --- out of the mailbox, in a worker

    async def _run(self, delivery: Delivery, scope: anyio.CancelScope) -> None:
        if delivery.is_call:
            await self._serve(delivery, scope)
            return
        try:
            await delivery.handler.method(delivery.message)
            self._counts.handled += 1
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure
            self._failed(delivery, error)
        except asyncio.CancelledError as error:
            self._interrupted(delivery, error)

    async def _serve(self, delivery: Delivery, scope: anyio.CancelScope) -> None:
        handler, message = delivery.handler, delivery.message
        answer: Reply | Failure | None = None
        delivery.scope = scope
        try:
            if message.deadline <= _time.now():  # what has expired never starts
                self._counts.cancelled += 1
                return
            scope.deadline = message.deadline
            reply = await handler.method(message)
            handler.behavior.check_reply(reply)
            answer = Reply(message.id, encode_payload(reply))
            self._counts.handled += 1
        except Reject as reject:
            self._counts.failed += 1
            answer = Failure(message.id, "failed", reject.detail, code=reject.code, retryable=reject.retryable)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure; its caller learns no more
            self._failed(delivery, error)
            answer = Failure(message.id, "failed", code="internal")
        except asyncio.CancelledError as error:
            if scope.cancel_called and not handler.mailbox.closed:
                self._counts.cancelled += 1
                raise
            answer = Failure(message.id, "cut" if handler.mailbox.closed else "failed", code="internal")
            self._interrupted(delivery, error)
        finally:
            scope.deadline = math.inf
            del self.serving[message.sender, message.id]
            if answer is not None and delivery.caller_waits:
                self._answer(message.sender, answer)

    def _failed(self, delivery: Delivery, error: BaseException) -> None:
        self._counts.failed += 1
        handler, message = delivery.handler, delivery.message
        handler.service.log.error(
            "%r failed on %r from node %r", handler, message.kind, message.sender, message_id=message.id, exc_info=error
        )

    def _interrupted(self, delivery: Delivery, error: asyncio.CancelledError) -> None:
        """Pass on the cancellation of a worker at the end. Any other one is the handler's own doing: its failure."""
        if delivery.handler.mailbox.closed:
            self._counts.cut[delivery.message.kind] += 1
            raise error
        take_back_cancellations()
        self._failed(delivery, error)

    # --- the state, and the end

    @property
    def queued(self) -> int:
        """How many messages wait in mailboxes."""
        return sum(map(len, self._mailboxes.values()))

    @property
    def running(self) -> int:
        """How many messages are being handled."""
        return sum(mailbox.running for mailbox in self._mailboxes.values())

    async def quiet(self, services: Collection[str]) -> None:
        """Wait until no message of these services waits or is being handled."""
        mailboxes = [self._mailboxes[service] for service in services]
        while busy := [mailbox for mailbox in mailboxes if mailbox.busy]:
            await busy[0].quiet()

    def open_mailbox(self, service: str) -> None:
        """Let the handlers of a service begin."""
        self._mailboxes[service].open()

    def close_mailbox(self, service: str) -> None:
        """Take no more messages for a service, and refuse the calls that no handler has begun."""
        for delivery in self._mailboxes[service].close():
            message = delivery.message
            self._counts.cut[message.kind] += 1
            if delivery.is_call:
                del self.serving[message.sender, message.id]
                self._answer(message.sender, Failure(message.id, "draining"))

    def close(self) -> None:
        """Answer the callers of handlers that refused to end."""
        for caller, call_id in list(self.serving):
            self._answer(caller, Failure(call_id, "cut"))
