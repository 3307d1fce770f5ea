"""The mailboxes of a node: one for each service, and one for each kind that declares what it needs of its own."""

from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import Any

import anyio

from meshkit.runtime.delivery import Delivery
from meshkit.runtime.graph import Graph, Handler
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.service import Service
from meshkit.runtime.supervisor import Supervisor

__all__ = ["Mailboxes", "first_full"]


class Mailboxes:
    """Makes them, and tells each handler which is its own. `run(delivery, scope)` is what their workers do."""

    def __init__(
        self,
        node: str,
        graph: Graph,
        supervisors: Mapping[str, Supervisor],
        run: Callable[[Delivery, anyio.CancelScope], Coroutine[Any, Any, float | None]],
    ) -> None:
        self._supervisors = supervisors
        self._work = run
        self._of: dict[str, list[Mailbox[Delivery]]] = {}  # by service
        for service in graph.services:
            self._of[service.name] = [self._new(f"mailbox of service {service.name!r} on node {node!r}", service)]
        for handler in graph.handlers:
            of_service = self._of[handler.service.name]
            handler.mailbox = of_service[0]
            if handler.behavior.own_mailbox:
                name = f"mailbox of {handler.behavior.kind!r} on node {node!r}"
                handler.mailbox = self._new(name, handler.service, handler)
                of_service.append(handler.mailbox)

    def _new(self, name: str, service: Service, handler: Handler | None = None) -> Mailbox[Delivery]:
        declared = None if handler is None else handler.behavior
        return Mailbox(
            name,
            self._work,
            self._supervisors[service.name].spawn,
            max_mailbox=(declared and declared.max_mailbox) or service.max_mailbox,
            max_bytes=service.max_mailbox_bytes,
            max_concurrent=(declared and declared.max_concurrent) or service.max_concurrent,
        )

    def _all(self) -> list[Mailbox[Delivery]]:
        return [mailbox for mailboxes in self._of.values() for mailbox in mailboxes]

    @property
    def queued(self) -> int:
        """How many messages wait, for a handler or to be retried."""
        return sum(map(len, self._all()))

    @property
    def running(self) -> int:
        """How many messages are being handled."""
        return sum(mailbox.running for mailbox in self._all())

    async def quiet(self, services: Collection[str]) -> None:
        """Wait until no message of these services waits or is being handled."""
        mailboxes = [mailbox for service in services for mailbox in self._of[service]]
        while busy := [mailbox for mailbox in mailboxes if mailbox.busy]:
            await busy[0].quiet()

    def open(self, service: str) -> None:
        """Let the handlers of a service begin."""
        for mailbox in self._of[service]:
            mailbox.open()

    def close(self, service: str) -> list[Delivery]:
        """Take no more messages for a service, and return those that no handler has begun."""
        return [delivery for mailbox in self._of[service] for delivery in mailbox.close()]


def first_full(
    boxes: Iterable[Mailbox[Delivery]], besides: Mailbox[Delivery] | None = None
) -> Mailbox[Delivery] | None:
    """Return the first one without room, for which to wait is not in vain: one that is closed never has any again."""
    return next((box for box in boxes if box is not besides and not (box.closed or box.has_room())), None)
