"""The runtime: identity, message routing, request and reply, service lifecycle, logs per service. Nothing else.

>>> import asyncio
>>> from meshkit.runtime import Message, Runtime, Service, handles, request
>>> UPPER = request("text:upper", str, reply=str)
>>> class Text(Service):
...     name = "text"
...
...     @handles(UPPER)
...     async def upper(self, msg: Message[str]) -> str:
...         return msg.payload.upper()
>>> async def main():
...     async with Runtime("alice", services=[Text()]) as rt:
...         return await rt.call(UPPER, "boo", to="alice")
>>> asyncio.run(main())
'BOO'
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from meshkit import _check, _time
from meshkit.events import Observer
from meshkit.logger import Logger, ServiceLog
from meshkit.runtime.behavior import Broadcast, Local, Request
from meshkit.runtime.calls import Replies
from meshkit.runtime.failures import DeadLetter, DeadLetters
from meshkit.runtime.frame import Prover, Trust
from meshkit.runtime.graph import Graph
from meshkit.runtime.identity import Identity
from meshkit.runtime.journal import Journal, MessageDropped, RuntimeStats
from meshkit.runtime.life import Life
from meshkit.runtime.lifecycle import Lifecycle
from meshkit.runtime.message import check_name
from meshkit.runtime.presence import Peer, Presence
from meshkit.runtime.service import Service
from meshkit.runtime.transport import Alone, Transport

__all__ = ["Runtime"]

P = TypeVar("P")
R = TypeVar("R")


class Runtime(Lifecycle):
    """One node: services, and the messages between them and those of other nodes.

    `async with` it, or `await rt.start()` and `await rt.stop()`, from any tasks: it lives in a task of its own. When it
    has stopped, it may be started again.

    Args:
        name: What the node is called.
        services: Its services, in the order in which they start.
        transport: How it reaches other nodes; without one it is alone.
        identity: The keys that prove what it sends; its public key is the node's id. Without one, the name is the id
            where no message leaves the process. Elsewhere it makes one, which no other `Runtime` object has: so its id
            is another one each time that the program runs (`Identity.load_or_create` keeps it).
        trust: The ids of the nodes whose messages are taken, or a function that is given an id; by default all.
        window: Seconds by which the clocks of two nodes may differ: a proved message that is older, or as far ahead, is
            refused.
        heartbeat: Seconds between its signs of life; a node that is silent for 3.5 of its own is gone. None: it gives
            none, so that nobody notices when it falls silent, and who asks any node asks it only if no other is known.
        logger: Where its services log; by default a `Logger` of its own, which is closed when it stops, and opened
            when it starts again.
        disabled_loggers: Names of services that log nothing.
        verbose_loggers: Names of services that log debug lines, and each event at once.
        grace: Seconds that handlers have to finish when it stops.
        max_dead_letters: Dead letters that are kept; beyond, the oldest is forgotten.
        observer: Is given a `MessageSent`, `MessageDropped`, `PeerUp` or `PeerGone` when that happens.
    """

    def __init__(
        self,
        name: str,
        services: Sequence[Service] = (),
        *,
        transport: Transport | None = None,
        identity: Identity | None = None,
        trust: Trust = None,
        window: float = 30.0,
        heartbeat: float | None = 2.0,
        logger: Logger | None = None,
        disabled_loggers: Iterable[str] = (),
        verbose_loggers: Iterable[str] = (),
        grace: float = 5.0,
        max_dead_letters: int = 1_000,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(check_name("the name of a node", name))
        if not isinstance(services, Iterable):
            raise TypeError(f"services must be a list of services, not {services!r}")
        if identity is not None and not isinstance(identity, Identity):
            raise TypeError(f"identity must be an Identity, such as Identity.load_or_create(path), not {identity!r}")
        if transport is not None and (isinstance(transport, type) or not hasattr(transport, "in_process")):
            raise TypeError(f"transport must be one, such as MemoryTransport(hub), not {transport!r}")
        if logger is not None and not isinstance(logger, Logger):
            raise TypeError(f"logger must be a meshkit.Logger, not {logger!r}")
        self.services = tuple(services)
        self.grace = _check.duration("grace", grace, zero=True)
        self.heartbeat = None if heartbeat is None else _check.duration("heartbeat", heartbeat)
        self.observer = observer
        self.letters = DeadLetters(_check.count("max_dead_letters", max_dead_letters))
        self._transport: Transport = Alone() if transport is None else transport
        if identity is None and not self._transport.in_process:
            identity = Identity.generate()
        self._identity = identity
        self.node = self.name if identity is None else identity.node_id
        self._trust = trust
        self._window = _check.duration("window", window)
        if identity is None and trust is not None:
            raise ValueError("trust needs an identity: only nodes that have one prove who they are")
        disabled, verbose = _names(disabled_loggers), _names(verbose_loggers)
        if logger is not None and (disabled or verbose):
            raise ValueError(
                "disabled_loggers and verbose_loggers are for a logger of its own: set them where you make it"
            )
        self._own_logger = logger is None
        self.logger = Logger(node=self.name, disabled=disabled, verbose=verbose) if logger is None else logger

    def __repr__(self) -> str:
        services = ", ".join(getattr(service, "name", "?") for service in self.services)
        return f"Runtime({self.name!r}, services=[{services}], {self._state})"

    # --- messages

    async def emit(self, behavior: Local[P] | Broadcast[P], payload: P, to: str | None = None) -> str:
        """Send a message that nobody answers, and return its id.

        A local kind goes to the handlers on this node; a service that has stopped misses it, which is counted. This
        waits while the mailbox of one of them is full; cancelled meanwhile, it has sent nothing. A broadcast goes to
        every node, this one included (`msg.sender` tells), or to the node `to` alone; whoever has no room for it drops
        it, and counts it.

        Raises:
            TypeError: The payload is not of the declared type, or cannot be encoded.
            ValueError: The payload is too large for a frame.
            NotAccepted: One of the behavior's own stages stopped it.
            Unreachable: There is no way to the node `to`.
            Overloaded: A handler would wait for room in the mailbox of its own service.
            Closed: The runtime has stopped.
        """
        _check_node(to)
        return await self._running().router.emit(behavior, payload, to)

    async def call(
        self,
        behavior: Request[P, R],
        payload: P,
        to: str | None = None,
        timeout: float = 10.0,
        *,
        id: str | None = None,  # noqa: A002 - the id of the request: so it reads at the caller's
    ) -> R:
        """Ask the node `to` and return its reply. To ask this node itself is fine.

        Without `to`, any node that is up and handles the kind is asked, each time another one; if it refuses, the next,
        within the same `timeout`.
        The handler is given what is left of `timeout`, or of the enclosing anyio deadline if that is sooner. It is
        cancelled when this gives up or is cancelled. `id` repeats an earlier request: if that one is still being
        handled, this joins it; if it was answered within the last minute, this gets the same answer.

        Raises:
            TypeError: The payload is not of the declared type, or cannot be encoded.
            ValueError: The payload is too large for a frame, a call with this `id` is pending already, or `id` is given
                without `to`.
            Refused: It did not run: `Unreachable`, `NoHandler`, `NotAccepted`, `RateLimited`, `Overloaded` or
                `Draining`; ask later, or another node.
            MalformedFrame: It did not run: the other node declares another payload.
            CallTimeout: There was no reply in time; it may have run.
            PeerLost: The node went away meanwhile; it may have run.
            RemoteError: It ran and failed. `code` is that of the handler's `Reject`, "internal" for any other
                exception, and "bad_reply" where the reply is not what this node declares.
            Closed: The runtime has stopped, or did meanwhile.
        """
        _check_node(to)
        return await self._running().router.call(behavior, payload, to, timeout, id)

    async def call_many(
        self,
        behavior: Request[P, R],
        payload: P,
        to: Iterable[str] | None = None,
        timeout: float = 10.0,
        *,
        quorum: int | None = None,
    ) -> Replies[R]:
        """Ask several nodes at once (by default all that are up and handle the kind, this one included).

        Returns the replies and the errors, by node: of all of them, or as soon as `quorum` have replied; the others are
        then cancelled.

        Raises:
            TooFewReplies: The `quorum` cannot be reached, or not any more. It has the replies and errors that came.
            NoHandler: No node is known that handles the kind.
            Draining: All that do are draining.
        """
        if isinstance(to, str):
            raise TypeError(f"to must be ids of nodes, as in [{to!r}], not one string")
        nodes = None if to is None else list(dict.fromkeys(to))
        for node in nodes or ():
            _check_node(node)
        return await self._running().router.call_many(behavior, payload, nodes, timeout, quorum)

    # --- what it knows

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The other nodes that are up, by id, sorted."""
        known = self._life.router.presence if self._life else Presence()
        nodes = sorted({*self._transport.peers, *known.peers} - known.silent.keys())
        return {node: known.peers.get(node) or Peer(node, node) for node in nodes}

    @property
    def dead_letters(self) -> Sequence[DeadLetter]:
        """The messages that could not be handled, of kinds that say `on_error="dead_letter"`; the oldest first."""
        return tuple(self.letters.letters)

    def replay(self, letter: DeadLetter) -> bool:
        """Handle a dead letter again; return False if there is no room for it now, or nobody who handles it.

        Nobody is answered: the caller of a request has been told long ago. If it fails again, there is a new letter.

        Raises:
            ValueError: It is not one of `dead_letters` any more.
        """
        return self.letters.replay(letter, self._running().router.intake.replay)

    @property
    def drops(self) -> Sequence[MessageDropped]:
        """The latest messages that went no further than some stage; the oldest first."""
        return () if self._life is None else tuple(self._life.router.journal.drops)

    def explain(self, message_id: str) -> str:
        """Tell what became of a message on this node, as far as that is remembered."""
        return Journal().explain(message_id) if self._life is None else self._life.router.journal.explain(message_id)

    def describe(self) -> str:
        """Return the stages of each kind that is handled here, by version: on the way out, and on the way in."""
        routes = self._running().router.intake.routes
        return "\n".join(str(routes[key]) for key in sorted(routes))

    def log(self, service: str) -> ServiceLog:
        """Return the log of a service: the same object as `rt.logger.service(service)`."""
        return self.logger.service(service)

    def stats(self) -> RuntimeStats:
        """Return what has happened since the last start."""
        return RuntimeStats() if self._life is None else self._life.router.stats()

    # --- its life

    def _new_life(self) -> Life:
        graph = Graph(self.name, self.services)
        end_of_log = self.logger.close if self._own_logger else self.logger.flush
        life = Life(self, graph, self._transport, self._prover(), self._cancel_body, end_of_log)
        if self._own_logger:
            self.logger.open()
        return life

    def _prover(self) -> Prover | None:
        """Return what proves what this node sends, if that must be."""
        if self._identity is None:
            return None
        if self._transport.exposed and self._trust is None:
            raise ValueError(f"node {self.name!r} can be reached by strangers: say with trust= whom it trusts")
        return Prover(
            self._identity,
            name=self.name,
            trust=self._trust,
            window=self._window,
            started=_time.wall(),
            max_frame=self._transport.max_frame,
        )


def _check_node(to: object) -> None:
    if to is not None and not isinstance(to, str):
        raise TypeError(f"to must be the id of a node, as in rt.node and the keys of rt.peers, not {to!r}")


def _names(names: Iterable[str]) -> Iterable[str]:
    return names if isinstance(names, str) else tuple(names)  # one string is for the Logger to complain about
