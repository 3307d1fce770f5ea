"""One node, for unit tests of its services: the runtime is real, and the test plays all other nodes.

>>> from meshkit.runtime import Message, Service, broadcast, handles, request
>>> from meshkit.testing import Sent, TestRuntime, run
>>> PRICE = request("shop:price", str, reply=int)
>>> ORDER = request("shop:order", str, reply=int)
>>> SOLD = broadcast("shop:sold", str)
>>> class Shop(Service):
...     name = "shop"
...
...     @handles(ORDER)
...     async def order(self, msg: Message[str]) -> int:
...         price = await self.rt.call(PRICE, msg.payload)
...         await self.rt.emit(SOLD, msg.payload)
...         return 2 * price
>>> async def main():
...     async with TestRuntime(Shop()) as rt:
...         rt.answer(PRICE, 10)
...         assert await rt.inject(ORDER, "apple") == 20
...         assert rt.sent == [Sent(PRICE, "apple", to="peer"), Sent(SOLD, "apple")]
>>> run(main)
"""

import asyncio
import contextlib
import enum
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar, overload

from meshkit import _check, _time
from meshkit.errors import (
    Draining,
    MalformedFrame,
    NoHandler,
    NotAccepted,
    Overloaded,
    PeerLost,
    RateLimited,
    RemoteError,
    Unreachable,
)
from meshkit.events import Observer
from meshkit.logger import Logger
from meshkit.runtime import Behavior, Broadcast, Local, Message, Receiver, Reject, Replies, Request, Runtime, Service
from meshkit.runtime.calls import Calls
from meshkit.runtime.journal import Journal
from meshkit.runtime.message import check_name, new_ids
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.wire import Ask, Beat, Failure, Reply, Tell, Wire, decode, encode, encode_payload, refusal
from meshkit.testing.virtual_time import VirtualTimeLoop

__all__ = ["SILENCE", "Sent", "Silence", "TestRuntime"]

P = TypeVar("P")
R = TypeVar("R")

_FOREVER = 1e9  # seconds until the next sign of life of a peer


class Silence(enum.Enum):
    """The type of `SILENCE`."""

    SILENCE = "silence"


SILENCE: Final = Silence.SILENCE
"""What `TestRuntime.answer` is given where no answer comes: the call times out."""


@dataclass(frozen=True)
class Sent:
    """A message, or a request, that left the node for others; `to` is None if it went to every node."""

    behavior: Behavior[Any]
    payload: Any
    to: str | None = None


class TestRuntime(Runtime):
    """A `Runtime` on virtual time, in the middle of a mesh that the test plays.

    What it sends to others is in `sent`, decoded; requests get the `answer` that was scripted for their kind. `inject`
    sends it a message of another node. Everything else is that of any runtime: `emit` and `call` from the node itself,
    `stats()`, `drops`, `explain`, `dead_letters`.

    Leaving `async with` raises an `AssertionError` if it has asked others for something that was not scripted.

    Args:
        services: What is tested.
        name: What the node is called.
        peers: The other nodes; each handles the kinds that are scripted. Nobody else can be reached.
        logger: Where its services log, as for any `Runtime`.
        observer: As for any `Runtime`.
    """

    __test__ = False  # pytest shall not take it for a test

    def __init__(
        self,
        *services: Service,
        name: str = "node",
        peers: Iterable[str] = ("peer",),
        logger: Logger | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._others = _Others(peers)
        super().__init__(name, services, transport=self._others, heartbeat=None, logger=logger, observer=observer)
        if name in self._others.peers:
            raise ValueError(f"peers must be other nodes, and {name!r} is this one")

    async def start(self) -> None:
        """Start it, as any runtime.

        Raises:
            RuntimeError: Time is real here.
        """
        if not isinstance(asyncio.get_running_loop(), VirtualTimeLoop):
            raise RuntimeError(  # noqa: TRY004 - the loop is no argument
                "a TestRuntime needs virtual time: request the fixture `virtual_time`, or use meshkit.testing.run"
            )
        await super().start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        unscripted, self._others.unscripted = self._others.unscripted, {}
        if unscripted:
            what = f"node {self.name!r} asked for what was not scripted: " + "; ".join(unscripted)
            if error is None:
                raise AssertionError(what)
            error.add_note(what)  # it may be why

    # --- what it sends

    @property
    def sent(self) -> list[Sent]:
        """What it has sent to other nodes so far, in order; clear the list when you like."""
        if self._life is not None and not self._life.over:
            self._life.router.outbox.flush()  # what was posted in this very turn of the loop is on its way already
        return self._others.sent

    def answer(self, behavior: Request[P, R], *answers: R | Exception | Silence) -> None:
        """Script what other nodes answer to requests of this kind: one after the other, the last again and again.

        An answer is a reply; or an error: `Reject`, as their handler would raise it, a `RemoteError`, `PeerLost`, or a
        refusal (`Overloaded`, `RateLimited`, `Draining`, `NotAccepted`, `NoHandler`, `MalformedFrame`); or `SILENCE`.

        Raises:
            TypeError: A reply is not of the declared type, or an error is none that comes from another node.
        """
        if not isinstance(behavior, Request):
            raise TypeError(f"{behavior!r} is not answered: only a request is")
        if not answers:
            raise TypeError(f"answer({behavior!r}) needs an answer: a reply, an error or SILENCE")
        for answer in answers:
            _answer(behavior, "", answer)
        self._others.script(behavior, answers)

    async def emit(self, behavior: Local[P] | Broadcast[P], payload: P, to: str | None = None) -> str:
        """Send a message, as any runtime."""
        self._others.learn(behavior)
        return await super().emit(behavior, payload, to)

    async def call(
        self,
        behavior: Request[P, R],
        payload: P,
        to: str | None = None,
        timeout: float = 10.0,
        *,
        id: str | None = None,  # noqa: A002 - as in Runtime
    ) -> R:
        """Ask for something, as any runtime."""
        with self._others.asked(behavior):
            return await super().call(behavior, payload, to, timeout, id=id)

    async def call_many(
        self,
        behavior: Request[P, R],
        payload: P,
        to: Iterable[str] | None = None,
        timeout: float = 10.0,
        *,
        quorum: int | None = None,
    ) -> Replies[R]:
        """Ask several nodes, as any runtime."""
        with self._others.asked(behavior):
            return await super().call_many(behavior, payload, to, timeout, quorum=quorum)

    # --- what it receives

    @overload
    async def inject(self, behavior: Request[P, R], payload: P, sender: str = ..., timeout: float = ...) -> R: ...

    @overload
    async def inject(self, behavior: Broadcast[P], payload: P, sender: str = ...) -> str: ...

    async def inject(
        self, behavior: Request[P, R] | Broadcast[P], payload: P, sender: str = "peer", timeout: float = 10.0
    ) -> R | str:
        """Let another node send it a message; a `sender` that was not among its peers is from now on.

        A request returns the reply that the sender gets, or raises its error, as `Runtime.call` does; meanwhile time
        passes. Any other message returns its id when all has been done that is to be done at this instant.

        Raises:
            TypeError: The payload is not of the declared type; or the kind never comes from another node.
            NoHandler: No service here handles the kind.
        """
        if not isinstance(behavior, Request | Broadcast):
            raise TypeError(f"{behavior!r} never comes from another node: emit() it")
        if sender == self.name:
            raise ValueError(f"what {sender!r} sends to itself is not injected: use emit() or call()")
        self._running()
        behavior.check(payload)
        self._others.join(sender)
        message_id = self._others.new_id()
        message = Message(message_id, behavior.kind, sender, payload, _time.wall())
        if isinstance(behavior, Request):
            return await self._others.calls[sender].call(behavior, message, self.node, timeout)
        tell = Tell(message_id, behavior.kind, behavior.version, message.time, encode_payload(payload))
        self._others.deliver(sender, tell)
        await self.advance(0)
        if any(drop.message_id == message_id and drop.reason == "no_handler" for drop in self.drops):
            raise NoHandler(kind=behavior.kind, node=self.node)
        return message_id

    async def advance(self, seconds: float) -> None:
        """Let time pass, and all be done that is then to be done; `advance(0)`: all that is to be done now."""
        if _check.duration("seconds", seconds, zero=True):
            await asyncio.sleep(seconds)
        loop = asyncio.get_running_loop()
        if isinstance(loop, VirtualTimeLoop):
            await loop.settle()


class _Others:
    """The transport: all other nodes, as the one that is tested sees them."""

    in_process = True
    exposed = False
    max_frame = sys.maxsize

    def __init__(self, peers: Iterable[str]) -> None:
        if isinstance(peers, str):
            raise TypeError(f"peers must be names of nodes, as in [{peers!r}], not one string")
        self.sent: list[Sent] = []
        self.unscripted: dict[str, None] = {}  # what was asked for without a script
        self.new_id = new_ids().__next__
        self.peers: dict[str, None] = {}
        self.calls: dict[str, Calls] = {}  # by node: those that it makes, while the tested one runs
        self._node = ""
        self._receiver: Receiver | None = None
        self._behaviors: dict[tuple[str, int], Behavior[Any]] = {}
        self._scripts: dict[tuple[str, int], list[Any]] = {}
        for peer in peers:
            self.join(peer)

    # --- the transport

    async def start(self, node: str, receiver: Receiver, prover: object) -> None:
        self._node, self._receiver = node, receiver
        for peer in self.peers:
            self._introduce(peer)

    def send(self, to: str, frame: bytes) -> None:
        if to not in self.peers:
            raise Unreachable(node=to, reason=f"it is none of the TestRuntime's peers: {', '.join(self.peers)}")
        for wire in decode(frame[len(PLAIN) :]):
            self._take(to, wire)

    def broadcast(self, frame: bytes) -> None:
        for wire in decode(frame[len(PLAIN) :]):
            self._take(None, wire)

    async def close(self) -> None:
        self._receiver = None
        calls, self.calls = self.calls, {}
        for of_peer in calls.values():
            of_peer.lost(self._node)

    # --- what the tested node sends

    def learn(self, behavior: object) -> None:
        """Take note of a behavior by which something may be sent."""
        if isinstance(behavior, Behavior):
            self._behaviors[behavior.kind, behavior.version] = behavior

    @contextlib.contextmanager
    def asked(self, behavior: object) -> Generator[None]:
        """Take note of a behavior by which something is asked; and if nobody handles it, that it was not scripted."""
        self.learn(behavior)
        try:
            yield
        except NoHandler as error:
            if error.node is None:
                self._unscripted(error.kind, "any node")
            raise

    def script(self, behavior: Request[Any, Any], answers: Iterable[Any]) -> None:
        self._scripts[behavior.kind, behavior.version] = list(answers)
        for peer in self.peers:
            self._introduce(peer)

    def _take(self, to: str | None, wire: Wire) -> None:
        if isinstance(wire, Tell | Ask):
            behavior = self._behaviors[wire.kind, wire.version]
            self.sent.append(Sent(behavior, behavior.decoder.decode(wire.payload), to))
        if to is None:
            return
        if isinstance(wire, Ask):
            answer = self._answer_to(wire, to)
            if answer is not None:
                self.deliver(to, answer)
        elif isinstance(wire, Reply | Failure):
            self.calls[to].answered(self._node, wire)

    def _answer_to(self, ask: Ask, to: str) -> Reply | Failure | None:
        key = (ask.kind, ask.version)
        answers = self._scripts.get(key)
        if answers is None:
            return Failure(ask.id, "not_accepted", self._unscripted(ask.kind, f"node {to!r}", ask.version))
        return _answer(self._behaviors[key], ask.id, answers.pop(0) if len(answers) > 1 else answers[0])

    def _unscripted(self, kind: str, node: str, version: int = 1) -> str:
        of_version = f" (version {version})" if version > 1 else ""
        what = f"the test scripted no answer to {kind!r}{of_version}, which {node} was asked: rt.answer(...) does"
        self.unscripted[what] = None
        return what

    # --- what others send

    def join(self, node: str) -> None:
        """Let another node join, if it is new."""
        if node not in self.peers:
            self.peers[check_name("the name of a peer", node)] = None
            self._introduce(node)

    def _introduce(self, peer: str) -> None:
        """Let the tested node know of a peer, and what that handles, if it runs."""
        if self._receiver is None:
            return
        if peer not in self.calls:
            self.calls[peer] = Calls(peer, lambda _, size: None, lambda _, wire: self.deliver(peer, wire), Journal())
        self.deliver(peer, Beat(peer, tuple(sorted({kind for kind, _ in self._scripts})), _FOREVER))

    def deliver(self, sender: str, wire: Wire) -> None:
        if self._receiver is not None:
            self._receiver.received(sender, PLAIN + encode([wire]))


def _answer(behavior: Behavior[Any], call_id: str, answer: object) -> Reply | Failure | None:
    """Return what travels if `answer` is the answer to a request; None if nothing does."""
    match answer:
        case Silence():
            return None
        case Reject() | RemoteError():
            return Failure(call_id, "failed", answer.detail, code=answer.code, retryable=answer.retryable)
        case PeerLost():
            return Failure(call_id, "cut")
        case NoHandler() | NotAccepted() | MalformedFrame() | Overloaded() | RateLimited() | Draining():
            return refusal(call_id, answer)
        case BaseException():
            raise TypeError(
                f"{answer!r} is no answer of another node: that is a reply, SILENCE (which ends in a CallTimeout), "
                "Reject (which its handler raises), RemoteError, PeerLost, or one of NoHandler, NotAccepted, "
                "MalformedFrame, Overloaded, RateLimited and Draining; Unreachable is every node that is no peer"
            )
        case _:
            if isinstance(behavior, Request):
                behavior.check_reply(answer)
            return Reply(call_id, encode_payload(answer))
