"""The dispatcher: a message waits in a mailbox, a worker runs the handler, the caller is answered.

What follows when a handler raises is in `failures`.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from meshkit import _time
from meshkit.errors import Closed, Draining, MeshkitError
from meshkit.runtime.answers import Answers
from meshkit.runtime.delivery import Delivery, delivery_of, fail
from meshkit.runtime.failures import DeadLetters, Failures, answer_of
from meshkit.runtime.graph import Graph, Handler
from meshkit.runtime.journal import Journal
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.mailboxes import Mailboxes, first_full
from meshkit.runtime.message import Message
from meshkit.runtime.service import Reject, Service
from meshkit.runtime.stages import Continue
from meshkit.runtime.supervisor import ENDS_THE_PROCESS, Supervisor, uncancel
from meshkit.runtime.wire import Failure, Reply, Why, encode_payload, refusal, rejection

__all__ = ["Dispatcher"]


class Dispatcher:
    """What the services of one node have to do.

    `answer(caller, answer)` sends an answer, and never raises; `escalate(service, what, error)` stops the node.
    """

    def __init__(
        self,
        node: str,
        graph: Graph,
        supervisors: Mapping[str, Supervisor],
        journal: Journal,
        letters: DeadLetters,
        answer: Callable[[str, Reply | Failure], None],
        escalate: Callable[[Service, str, BaseException], None],
    ) -> None:
        self.failures = Failures(journal, letters, escalate)
        self._node = node
        self._journal = journal
        self._answer = answer
        self._answers = Answers()
        self._now = _time.clock_of(asyncio.get_running_loop())
        self.serving: dict[tuple[str, str], Delivery] = {}  # calls that wait, run or rest, by caller and id
        self.mailboxes = Mailboxes(node, graph, supervisors, self._run)

    # --- into the mailbox

    def offer(self, handler: Handler, message: Message[Any], size: int) -> bool:
        """Put a message into the mailbox of one handler; return False if there is no room for it."""
        delivery = delivery_of(handler, message, size)
        if not (handler.mailbox.offer(delivery) or self._offer_instead(delivery)):
            return False
        self._took(handler, message)
        return True

    def _took(self, handler: Handler, message: Message[Any]) -> None:
        self._journal.delivered += 1
        self._journal.note((message.id, handler.queued, message.sender))

    def _offer_instead(self, delivery: Delivery) -> bool:
        """Put a message into the mailbox instead of the oldest ones, where its behavior says so."""
        mailbox: Mailbox[Delivery] = delivery.handler.mailbox
        if delivery.handler.behavior.overflow != "drop_oldest" or mailbox.closed:
            return False
        for oldest in mailbox.discard_oldest(delivery.size):
            self._journal.cancelled += 1
            self._journal.note((oldest.message.id, "given up in the mailbox: newer ones needed its place", ""))
        return mailbox.offer(delivery)

    def offer_all(self, handlers: Sequence[Handler], message: Message[Any]) -> bool:
        """Put a message into the mailboxes of all handlers; into none, and return False, if one of them has no room."""
        if len(handlers) == 1:
            return self.offer(handlers[0], message, 0)
        if not all(handler.mailbox.has_room() for handler in handlers):
            return False
        for handler in handlers:
            self.offer(handler, message, 0)
        return True

    async def deliver_all(self, handlers: Sequence[Handler], admit: Callable[[], Continue | None]) -> None:
        """Wait for room in the mailboxes of all handlers, and put there what `admit` returns then, if anything.

        It holds no place in one while it waits for another: a handler of the other one may need that place to go on.
        """
        held: Mailbox[Delivery] | None = None
        boxes: list[Mailbox[Delivery]] = [handler.mailbox for handler in handlers]
        while (full := first_full(boxes, besides=held)) is not None:
            if held is not None:
                held.release()
            held = None
            with contextlib.suppress(Closed):  # its service stops meanwhile
                await full.reserve()
                held = full
        passed: Continue | None = None
        try:
            passed = admit()
        finally:
            if passed is None and held is not None:
                held.release()
        if passed is None:
            return
        for handler in handlers:
            if held is not None and handler.mailbox is held:
                held.put_reserved(delivery_of(handler, passed.message))
                self._took(handler, passed.message)
            elif not self.offer(handler, passed.message, 0):
                self.missed(handler, passed.message)
        if passed.then is not None and not all(box.closed for box in boxes):
            passed.then()

    def missed(self, handler: Handler, message: Message[Any]) -> None:
        """Count a message that one handler does not get: its mailbox is full, or its service has stopped."""
        why = "draining" if handler.mailbox.closed else "overloaded"
        self._journal.drop(message.kind, "mailbox", why, message.id, message.sender)

    def serve(self, handler: Handler, message: Message[Any], size: int) -> MeshkitError | None:
        """Put a call into the mailbox: it will be answered. Or return why not."""
        mailbox: Mailbox[Delivery] = handler.mailbox
        delivery = delivery_of(handler, message, size, is_call=True)
        if not mailbox.offer(delivery):
            return Draining(node=self._node) if mailbox.closed else mailbox.overloaded()
        self.serving[message.sender, message.id] = delivery
        self._took(handler, message)
        return None

    def repeated(self, message: Message[Any]) -> bool:
        """Return whether this request came before; if so, it joins the work in flight, or is answered again."""
        delivery = self.serving.get((message.sender, message.id))
        if delivery is None:
            answer = self._answers.get(message.sender, message.id, self._now())
            if answer is None:
                return False
            self._answer(message.sender, answer)
            return True
        if not delivery.caller_waits or (delivery.scope is not None and delivery.scope.cancel_called):
            delivery.again = message  # its turn comes when the handler that is being cancelled has ended
        else:
            deadline = max(message.deadline, delivery.message.deadline)
            delivery.message = msgspec.structs.replace(delivery.message, deadline=deadline, time=message.time)
            if delivery.scope is not None:
                delivery.scope.deadline = deadline
        return True

    def knows(self, caller: str, call_id: str) -> bool:
        """Return whether a request is being handled, or was answered."""
        answered = self._answers.get(caller, call_id, self._now())
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
        delivery.handler.mailbox.discard(delivery)
        self._journal.cancelled += 1
        self._journal.note((call_id, f"given up by its caller before {delivery.its_turn}", ""))
        del self.serving[caller, call_id]

    def lost(self, node: str) -> None:
        """Give up all calls of a node that has gone."""
        for caller, call_id in [key for key in self.serving if key[0] == node]:
            self.cancel(caller, call_id)

    # --- out of the mailbox, in a worker

    def _run(self, delivery: Delivery, scope: anyio.CancelScope) -> Coroutine[Any, Any, float | None]:
        """Handle a message; return the seconds after which it is to be handled again, or None if that is all."""
        if delivery.is_call:
            return self._serve(delivery, scope)
        if scope.deadline != math.inf:  # of a call before
            scope.deadline = math.inf
        return self._tell(delivery)

    async def _tell(self, delivery: Delivery) -> float | None:
        try:
            if delivery.order_error is not None:
                fail(delivery.order_error)
            await delivery.handler.method(delivery.message)
            self._journal.handled += 1
            self._journal.note((delivery.message.id, delivery.handler.ended, ""))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure
            return self.failures.failed(delivery, error)
        except asyncio.CancelledError as error:
            self._interrupted(delivery, error)
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:  # noqa: BLE001 - it would end the worker, and nobody would learn of it
            self.failures.give_up(delivery, RuntimeError(f"it raised {type(error).__name__}"), error)
        return None

    async def _serve(self, delivery: Delivery, scope: anyio.CancelScope) -> float | None:
        handler, message = delivery.handler, delivery.message
        answer: Reply | Failure | None = None
        again: float | None = None
        delivery.scope = scope
        try:
            if message.deadline <= self._now():  # what has expired never starts
                self._journal.cancelled += 1
                self._journal.note((message.id, f"expired before {delivery.its_turn}", ""))
                return None
            if scope.deadline != message.deadline:  # a new timer: a tenth of what a call costs
                scope.deadline = message.deadline
            if delivery.order_error is not None:
                fail(delivery.order_error)
            reply = await handler.method(message)
            handler.behavior.check_reply(reply)
            answer = Reply(message.id, encode_payload(reply))
            self._journal.handled += 1
            self._journal.note((message.id, handler.ended, ""))
        except Reject as reject:
            self._journal.failed += 1
            answer = rejection(message.id, reject.code, reject.detail, retryable=reject.retryable)
            self._journal.note((message.id, f"rejected by {handler.name}: {answer.code}", ""))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure; its caller learns no more
            again = self.failures.failed(delivery, error)
            answer = answer_of(delivery)
        except asyncio.CancelledError as error:
            if scope.cancel_called and not handler.mailbox.closed:
                self._journal.cancelled += 1
                self._journal.note((message.id, f"given up by its caller: {handler.name} was cancelled", ""))
                raise
            answer = Failure(message.id, "cut" if handler.mailbox.closed else "failed", code="internal")
            self._interrupted(delivery, error)
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:  # noqa: BLE001 - it would end the worker, and nobody would be answered
            self.failures.give_up(delivery, RuntimeError(f"it raised {type(error).__name__}"), error)
            answer = Failure(message.id, "failed", code="internal")
        finally:
            delivery.scope = None
            if again is None:
                given_up = scope.cancel_called and not handler.mailbox.closed  # then to fail is no answer
                self._end(delivery, None if given_up and isinstance(answer, Failure) else answer)
        return again

    def _end(self, delivery: Delivery, answer: Reply | Failure | None) -> None:
        message, again = delivery.message, delivery.again
        del self.serving[message.sender, message.id]
        if answer is None and again is not None:
            fresh = msgspec.structs.replace(message, deadline=again.deadline, time=again.time)
            refused = self.serve(delivery.handler, fresh, delivery.size)
            if refused is None:
                return
            why = "draining" if isinstance(refused, Draining) else "overloaded"
            self._journal.drop(message.kind, "mailbox", why, message.id, message.sender)
            answer = msgspec.structs.replace(refusal(message.id, refused), asked=again.time)
        if answer is None:
            return
        if isinstance(answer, Reply) or (answer.why == "failed" and not answer.retryable):
            self._answers.keep(message.sender, answer, self._now())
        if delivery.caller_waits or again is not None:
            self._answer(message.sender, answer)

    def _interrupted(self, delivery: Delivery, error: asyncio.CancelledError) -> None:
        """Pass on the cancellation of a worker at the end. Any other one is the handler's own doing: its failure."""
        if delivery.handler.mailbox.closed:
            self._cut(delivery)
            raise error
        uncancel()
        self.failures.give_up(delivery, RuntimeError("it cancelled its own task"), error)

    # --- the end

    def close_mailboxes(self, service: str) -> None:
        """Take no more messages for a service, and refuse the calls that no handler has begun."""
        for delivery in self.mailboxes.close(service):
            self._cut(delivery)
            if delivery.is_call:
                message = delivery.message
                del self.serving[message.sender, message.id]
                why: Why = "draining" if delivery.attempts == 1 else "cut"
                self._answer(message.sender, Failure(message.id, why, asked=message.time))

    def _cut(self, delivery: Delivery) -> None:
        self._journal.cut[delivery.message.kind] += 1
        self._journal.note((delivery.message.id, "cut: the node stopped", ""))

    def close(self) -> None:
        """Answer the callers of handlers that refused to end."""
        for (caller, call_id), delivery in self.serving.items():
            if delivery.caller_waits or delivery.again is not None:
                delivery.caller_waits, delivery.again = False, None
                self._answer(caller, Failure(call_id, "cut"))
