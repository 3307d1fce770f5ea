"""The dispatcher: a message waits in a mailbox, a worker runs the handler, the caller is answered.

When a handler raises, its behavior says what follows: first `retry`, off the worker, while the message keeps its place;
in the end `on_error`.
"""

import asyncio
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from meshkit import _time
from meshkit.errors import MeshkitError, Overloaded
from meshkit.retrier import Backoff
from meshkit.runtime.answers import Answers
from meshkit.runtime.crew import Crew, take_back_cancellations
from meshkit.runtime.graph import Graph, Handler
from meshkit.runtime.handling import Reject
from meshkit.runtime.journal import Journal
from meshkit.runtime.letters import DeadLetter, DeadLetters
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.message import Message
from meshkit.runtime.service import Service
from meshkit.runtime.wire import Failure, Reply, encode_payload

__all__ = ["Delivery", "Dispatcher"]


class Delivery(msgspec.Struct, eq=False):
    """A message on its way to one handler."""

    handler: Handler
    message: Message[Any]
    size: int
    key: Any = None
    is_call: bool = False
    caller_waits: bool = True
    attempts: int = 1
    scope: anyio.CancelScope | None = None  # cancels the handler of a call, while it runs
    retry: asyncio.TimerHandle | None = None
    again: Message[Any] | None = None  # the same request came again while its handler was being cancelled


class Dispatcher:
    """What the services of one node have to do.

    `answer(caller, answer)` sends an answer, and never raises; `escalate(service, what, error)` stops the node.
    """

    def __init__(
        self,
        node: str,
        graph: Graph,
        crews: Mapping[str, Crew],
        journal: Journal,
        letters: DeadLetters,
        answer: Callable[[str, Reply | Failure], None],
        escalate: Callable[[Service, str, BaseException], None],
    ) -> None:
        self._journal = journal
        self._letters = letters
        self._answer = answer
        self._escalate = escalate
        self._loop = asyncio.get_running_loop()
        self._answers = Answers()
        self._resting: dict[Delivery, None] = {}  # waits to be retried
        self.serving: dict[tuple[str, str], Delivery] = {}  # calls that wait or run, by caller and id
        self._mailboxes: dict[str, list[Mailbox[Delivery]]] = {}  # by service; the first is that of the service itself
        for service in graph.services:
            mailbox = self._new_mailbox(f"mailbox of service {service.name!r} on node {node!r}", service, crews)
            self._mailboxes[service.name] = [mailbox]
        for handler in graph.handlers:
            of_service = self._mailboxes[handler.service.name]
            handler.mailbox = of_service[0]
            if handler.behavior.own_mailbox:
                name = f"mailbox of {handler.behavior.kind!r} on node {node!r}"
                handler.mailbox = self._new_mailbox(name, handler.service, crews, handler)
                of_service.append(handler.mailbox)

    def _new_mailbox(
        self, name: str, service: Service, crews: Mapping[str, Crew], handler: Handler | None = None
    ) -> Mailbox[Delivery]:
        declared = None if handler is None else handler.behavior
        return Mailbox(
            name,
            self._run,
            crews[service.name].spawn,
            max_mailbox=(declared and declared.max_mailbox) or service.max_mailbox,
            max_bytes=service.max_mailbox_bytes,
            max_concurrent=(declared and declared.max_concurrent) or service.max_concurrent,
        )

    # --- into the mailbox

    def _delivery(self, handler: Handler, message: Message[Any], size: int, is_call: bool = False) -> Delivery:
        order_by = handler.behavior.order_by
        if order_by is None:
            return Delivery(handler, message, size, None, is_call)
        key = message.sender if order_by == "sender" else order_by(message)
        return Delivery(handler, message, size, (handler.behavior.kind, key), is_call)

    def offer(self, handler: Handler, message: Message[Any], size: int) -> bool:
        """Put a message into the mailbox of one handler; return False if there is no room for it."""
        mailbox: Mailbox[Delivery] = handler.mailbox
        delivery = self._delivery(handler, message, size)
        if not mailbox.has_room(size):
            if handler.behavior.overflow == "drop_oldest" and not mailbox.closed:
                for oldest in mailbox.discard_oldest(size):
                    self._journal.cancelled += 1
                    self._journal.note(oldest.message.id, "given up in the mailbox: newer ones needed its place")
            if not mailbox.has_room(size):
                return False
        self._journal.delivered += 1
        mailbox.put(delivery)
        return True

    def offer_all(self, handlers: Sequence[Handler], message: Message[Any]) -> bool:
        """Put a message into the mailboxes of all handlers; into none, and return False, if one of them has no room."""
        deliveries = [self._delivery(handler, message, 0) for handler in handlers]
        for handler in handlers:
            if not handler.mailbox.has_room():
                return False
        for delivery in deliveries:
            self._journal.delivered += 1
            delivery.handler.mailbox.put(delivery)
        return True

    async def deliver_all(self, handlers: Sequence[Handler], message: Message[Any]) -> None:
        """Put a message into the mailboxes of all handlers, waiting for room; into none, if that fails."""
        deliveries = [self._delivery(handler, message, 0) for handler in handlers]
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
        for delivery in deliveries:
            self._journal.delivered += 1
            delivery.handler.mailbox.put(delivery, reserved=True)

    def serve(self, handler: Handler, message: Message[Any], size: int) -> MeshkitError | None:
        """Put a call into the mailbox: it will be answered. Or return why not."""
        mailbox = handler.mailbox
        delivery = self._delivery(handler, message, size, is_call=True)
        if not mailbox.has_room(size):
            return Overloaded(name=mailbox.name, limit=mailbox.max_mailbox)
        self.serving[message.sender, message.id] = delivery
        self._journal.delivered += 1
        mailbox.put(delivery)
        return None

    def repeated(self, message: Message[Any]) -> bool:
        """Return whether this request came before; if so, it joins the work in flight, or is answered again."""
        caller, call_id = message.sender, message.id
        delivery = self.serving.get((caller, call_id))
        if delivery is None:
            answer = self._answers.get(caller, call_id, _time.now())
            if answer is not None:
                self._answer(caller, answer)
            return answer is not None
        if not delivery.caller_waits:
            delivery.again = message  # decoded again when the handler that is being cancelled has ended
        elif message.deadline > delivery.message.deadline:
            delivery.message = msgspec.structs.replace(delivery.message, deadline=message.deadline)
            if delivery.scope is not None:
                delivery.scope.deadline = message.deadline
        return True

    def knows(self, caller: str, call_id: str) -> bool:
        """Return whether a request is being handled, or was answered."""
        answered = self._answers.get(caller, call_id, _time.now())
        return answered is not None or (caller, call_id) in self.serving

    def cancel(self, caller: str, call_id: str) -> None:
        """Give up a call whose caller does not wait any more, unless it has been answered already."""
        delivery = self.serving.get((caller, call_id))
        if delivery is None:
            return
        delivery.caller_waits = False
        delivery.again = None
        if delivery.scope is not None:
            delivery.scope.cancel()
            return
        if not self._wake_up(delivery):
            delivery.handler.mailbox.discard(delivery)
        self._journal.cancelled += 1
        self._journal.note(call_id, "given up by its caller before it began")
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
            self._handled(delivery)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure
            self._failed(delivery, error)
        except asyncio.CancelledError as error:
            self._interrupted(delivery, error)

    async def _serve(self, delivery: Delivery, scope: anyio.CancelScope) -> None:
        handler, message = delivery.handler, delivery.message
        answer: Reply | Failure | None = None
        delivery.scope = scope
        resting = False
        try:
            if message.deadline <= _time.now():  # what has expired never starts
                self._journal.cancelled += 1
                self._journal.note(message.id, "expired before it began")
                return
            scope.deadline = message.deadline
            reply = await handler.method(message)
            handler.behavior.check_reply(reply)
            answer = Reply(message.id, encode_payload(reply))
            self._handled(delivery)
        except Reject as reject:
            self._journal.failed += 1
            self._journal.note(message.id, f"rejected by {handler.name}: {reject.code}")
            answer = Failure(message.id, "failed", reject.detail, code=reject.code, retryable=reject.retryable)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure; its caller learns no more
            resting = self._failed(delivery, error)
            answer = Failure(message.id, "failed", code="internal")
        except asyncio.CancelledError as error:
            if scope.cancel_called and not handler.mailbox.closed:
                self._journal.cancelled += 1
                self._journal.note(message.id, f"given up by its caller: {handler.name} was cancelled")
                raise
            answer = Failure(message.id, "cut" if handler.mailbox.closed else "failed", code="internal")
            self._interrupted(delivery, error)
        finally:
            delivery.scope = None
            scope.deadline = math.inf
            if not resting:
                self._end(delivery, answer)

    def _end(self, delivery: Delivery, answer: Reply | Failure | None) -> None:
        message = delivery.message
        del self.serving[message.sender, message.id]
        if answer is not None:
            if isinstance(answer, Reply) or (answer.why == "failed" and not answer.retryable):
                self._answers.keep(message.sender, answer, _time.now())
            if delivery.caller_waits:
                self._answer(message.sender, answer)
        elif delivery.again is not None:
            again = msgspec.structs.replace(message, deadline=delivery.again.deadline)
            if self.serve(delivery.handler, again, delivery.size):
                self._answer(message.sender, Failure(message.id, "overloaded", delivery.handler.mailbox.name))

    def _handled(self, delivery: Delivery) -> None:
        self._journal.handled += 1
        self._journal.note(delivery.message.id, delivery.handler.ended)

    def _interrupted(self, delivery: Delivery, error: asyncio.CancelledError) -> None:
        """Pass on the cancellation of a worker at the end. Any other one is the handler's own doing: its failure."""
        if delivery.handler.mailbox.closed:
            self._cut(delivery)
            raise error
        take_back_cancellations()
        self._give_up(delivery, RuntimeError("it cancelled its own task"), error)

    # --- failures

    def _failed(self, delivery: Delivery, error: Exception) -> bool:
        """Deal with what a handler raised; return whether it will be called again."""
        policy, message, mailbox = delivery.handler.behavior.retry, delivery.message, delivery.handler.mailbox
        if policy is not None and delivery.attempts <= policy.max_retries and not mailbox.closed:
            backoff = Backoff(base_delay=policy.base_delay, max_delay=policy.max_delay, jitter=policy.jitter)
            delay = backoff.delay(delivery.attempts, random.random)
            if _time.now() + delay < message.deadline and delivery.caller_waits:
                self._journal.retried += 1
                self._journal.note(message.id, f"{delivery.handler.name} raised {error!r}: again in {delay:.3g} s")
                delivery.attempts += 1
                mailbox.keep_place()
                self._resting[delivery] = None
                delivery.retry = self._loop.call_later(delay, self._retry, delivery)
                return True
        self._give_up(delivery, error, error)
        return False

    def _retry(self, delivery: Delivery) -> None:
        del self._resting[delivery]
        delivery.handler.mailbox.put(delivery, reserved=True)

    def _wake_up(self, delivery: Delivery) -> bool:
        """Let a delivery that waits to be retried wait no more, nor have a place; return whether it did."""
        if delivery not in self._resting:
            return False
        del self._resting[delivery]
        if delivery.retry is not None:
            delivery.retry.cancel()
        delivery.handler.mailbox.release()
        return True

    def _give_up(self, delivery: Delivery, error: Exception, raised: BaseException) -> None:
        self._journal.failed += 1
        handler, message = delivery.handler, delivery.message

        def again() -> bool:
            return self.offer(handler, msgspec.structs.replace(message, deadline=math.inf), delivery.size)

        letter = DeadLetter(message, handler.name, "handler", delivery.attempts, error, again)
        self.give_up(handler, letter, raised)

    def give_up(self, handler: Handler, letter: DeadLetter, raised: BaseException) -> None:
        """Do with a message that failed, in a handler or a stage, what its behavior says."""
        message, where = letter.message, "" if letter.stage == "handler" else f" at {letter.stage}"
        self._journal.note(message.id, f"{letter.handler} failed{where}: {raised!r}")
        if handler.behavior.on_error == "drop":
            return
        handler.service.log.error(
            "%s failed%s on %r from node %r",
            letter.handler,
            where,
            message.kind,
            message.sender,
            message_id=message.id,
            exc_info=raised,
        )
        if handler.behavior.on_error == "dead_letter":
            self._letters.add(letter)
        elif handler.behavior.on_error == "raise":
            self._escalate(handler.service, f"handler {letter.handler!r}{where}", raised)

    # --- the state, and the end

    @property
    def queued(self) -> int:
        """How many messages wait in mailboxes, or to be retried."""
        return sum(len(mailbox) for mailboxes in self._mailboxes.values() for mailbox in mailboxes) + len(self._resting)

    @property
    def running(self) -> int:
        """How many messages are being handled."""
        return sum(mailbox.running for mailboxes in self._mailboxes.values() for mailbox in mailboxes)

    async def quiet(self, services: Collection[str]) -> None:
        """Wait until no message of these services waits or is being handled."""
        mailboxes = [mailbox for service in services for mailbox in self._mailboxes[service]]
        while busy := [mailbox for mailbox in mailboxes if mailbox.busy]:
            await busy[0].quiet()

    def open_mailboxes(self, service: str) -> None:
        """Let the handlers of a service begin."""
        for mailbox in self._mailboxes[service]:
            mailbox.open()

    def close_mailboxes(self, service: str) -> None:
        """Take no more messages for a service, and refuse the calls that no handler has begun."""
        for mailbox in self._mailboxes[service]:
            resting = [delivery for delivery in self._resting if delivery.handler.mailbox is mailbox]
            for delivery in [*mailbox.close(), *(delivery for delivery in resting if self._wake_up(delivery))]:
                self._cut(delivery)
                if delivery.is_call:
                    message = delivery.message
                    del self.serving[message.sender, message.id]
                    self._answer(message.sender, Failure(message.id, "draining" if delivery.attempts == 1 else "cut"))

    def _cut(self, delivery: Delivery) -> None:
        self._journal.cut[delivery.message.kind] += 1
        self._journal.note(delivery.message.id, "cut: the node stopped")

    def close(self) -> None:
        """Answer the callers of handlers that refused to end."""
        for caller, call_id in list(self.serving):
            self._answer(caller, Failure(call_id, "cut"))
