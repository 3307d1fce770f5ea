"""What the tests are made of: nodes that remember, runtimes that echo, runs that leave nothing behind."""

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar

import anyio

from meshkit import _time
from meshkit.errors import Closed, Overloaded, Refused
from meshkit.runtime import Identity
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Transport
from meshkit.testing.conformance._scenario import BROKEN, leaving_nothing, require
from meshkit.testing.virtual_time import run

T = TypeVar("T", bound=Transport)


class Node(Generic[T]):
    """A transport, and what it has told its receiver, which this is."""

    def __init__(self, name: str, transport: T, patience: float) -> None:
        self.name, self.transport = name, transport
        self.identity = None if transport.in_process else identity_of(name)
        self.id = name if self.identity is None else self.identity.node_id
        self.heard: list[tuple[str, bytes]] = []
        self.gone: list[str] = []
        self.on_frame: Callable[[str, bytes], object] = lambda sender, frame: None
        self._closed = False
        self._patience = patience
        self._thread = threading.get_ident()
        self._wrong: list[str] = []

    def __repr__(self) -> str:
        return self.name

    def received(self, sender: str, frame: bytes) -> None:
        """Take a frame from the transport."""
        self._check("a frame")
        if type(frame) is not bytes:
            self._wrong.append(f"a frame is handed over as bytes, not as a {type(frame).__name__}")
        self.heard.append((sender, bytes(frame)))
        self.on_frame(sender, frame)

    def found(self, node: str) -> None:
        """Take note that another node can be reached now."""
        self._check("a node that was found")
        if node not in self.transport.peers or node == self.id:
            self._wrong.append("who is told to be found() is another node, and among the peers")

    def lost(self, node: str) -> None:
        """Take note that another node is gone."""
        self._check("the loss of a node")
        self.gone.append(node)

    def _check(self, what: str) -> None:
        if self._closed:
            self._wrong.append(f"nothing comes after close() has returned, but {what} did")
        if threading.get_ident() != self._thread:
            self._wrong.append(
                f"the receiver is called in the thread of its event loop only, but {what} came in another"
            )

    def of(self, sender: "Node[T]") -> list[bytes]:
        """Return the frames that came from `sender`, in the order in which they came."""
        return [frame for node, frame in self.heard if node == sender.id]

    async def start(self, prover: Prover | None = None) -> None:
        """Start the transport."""
        if self.identity is not None and prover is None:
            trust = [identity_of(name).node_id for name in ("alice", "bob", "carol", "dave")]
            prover = Prover(self.identity, trust=trust, started=_time.wall())
        with self._promptly("start"):
            await self.transport.start(self.id, self, prover)
        self._closed = False

    def send(self, to: "Node[T]", frame: bytes) -> None:
        """Send a frame that may be sent."""
        with self._only_our_errors("send"):
            self.transport.send(to.id, frame)

    def broadcast(self, frame: bytes) -> None:
        """Broadcast a frame that may be sent."""
        with self._only_our_errors("broadcast"):
            self.transport.broadcast(frame)

    async def close(self) -> None:
        """Close the transport."""
        with self._promptly("close"):
            await self.transport.close()
        self._closed = True

    def check(self) -> None:
        """Fail the test if the receiver was told what it must not be told."""
        require(not self._wrong, "; ".join(dict.fromkeys(self._wrong)))

    @contextmanager
    def _only_our_errors(self, verb: str) -> Generator[None]:
        try:
            yield
        except (Refused, Closed):
            raise
        except Exception as error:
            raise AssertionError(f"{BROKEN}: {verb}() raises Unreachable, Overloaded, Closed, not {error!r}") from error

    @contextmanager
    def _promptly(self, verb: str) -> Generator[None]:
        with anyio.move_on_after(self._patience) as scope:
            yield
        require(not scope.cancelled_caught, f"{verb}() of node {self.name} returns within {self._patience:g} s")


@functools.cache
def identity_of(name: str) -> Identity:
    """Return the identity that the node of this name always has."""
    return Identity.from_seed(name.encode().ljust(32, b"."))


class Conditions(Generic[T]):
    """What the tests of a transport run on, and in."""

    ordered = True
    """Frames from one node to another arrive in the order in which they were sent, or not at all."""
    lossless = True
    """Every frame that was accepted arrives, while its sender and its receiver are up."""
    authenticated = False
    """Only nodes that are trusted get in, and each only under its own name."""
    notices_loss = True
    """The others are told when a node has closed its transport."""
    max_frame: int | None = None
    """Bytes that a frame may have; None: there is no limit to be tested."""
    max_buffer: int | None = None
    """Bytes that may wait for one node; None: there is no limit to be tested."""
    real_time = False
    """Whether the tests run on an ordinary event loop; else on virtual time."""
    patience = 10.0
    """Seconds within which whatever is promised must have happened."""
    settle = 0.1
    """Seconds after which whatever must not come would have come."""

    def transport(self, others: Sequence[T]) -> T:
        """Return the transport of one more node of a mesh; `others` have been started, and are none for the first."""
        raise NotImplementedError

    def address(self, transport: T) -> tuple[str, int] | None:
        """Return the host and the TCP port at which strangers can reach a started transport; None: they cannot."""
        return None

    def run_scenario(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `main()` on an event loop of its own; fail if it leaves anything behind."""
        if self.real_time:
            asyncio.run(leaving_nothing(main))
        else:
            run(main)

    async def _until(self, happened: Callable[[], object], promise: str | Callable[[], str]) -> None:
        """Wait until this has happened; fail if it does not, within `patience`."""
        deadline = _time.now() + self.patience
        while not happened():
            if _time.now() >= deadline:
                text = promise if isinstance(promise, str) else promise()
                require(False, f"{text} (within {self.patience:g} s)")
            await asyncio.sleep(0.005)  # there is no event to wait for: peers, for one, come and go unannounced

    async def _nothing_comes(self) -> None:
        """Wait for what must not come, for as long as it may take."""
        await asyncio.sleep(self.settle)

    @asynccontextmanager
    async def _nodes(self, *names: str) -> AsyncGenerator[list[Node[T]]]:
        """Run a mesh of bare transports."""
        nodes: list[Node[T]] = []
        async with AsyncExitStack() as stack:
            for name in names:
                nodes.append(node := self._node(name, *nodes))
                stack.push_async_callback(node.close)
                await node.start()
            for node in nodes:
                await self._finds(node, *nodes)
            yield nodes
        for node in nodes:
            node.check()

    def _node(self, name: str, *others: Node[T]) -> Node[T]:
        """Return one more node of a mesh, not started."""
        return Node(name, self.transport([other.transport for other in others]), self.patience)

    async def _finds(self, node: Node[T], *others: Node[T]) -> None:
        """Wait until these are the peers of `node`."""
        ids = {other.id for other in others} - {node.id}

        def promise() -> str:
            known = {other.id: other.name for other in others}
            has = [known.get(peer, peer) for peer in node.transport.peers]
            names = [known[other] for other in ids]
            return f"the peers of node {node} are the others, {sorted(names)}, not {sorted(has)}"

        await self._until(lambda: set(node.transport.peers) == ids, promise)

    async def _send(self, frame: bytes, sender: Node[T], to: Node[T]) -> None:
        """Send; wait while the buffer is full."""

        def sent() -> bool:
            try:
                sender.send(to, frame)
            except Overloaded:
                return False
            return True

        await self._until(sent, "a full buffer empties itself")

    async def _carries(self, frame: bytes, sender: Node[T], to: Node[T]) -> None:
        """Send, and wait until it arrives; over a transport that may lose frames, it is sent until it does."""
        deadline = _time.now() + self.patience
        before = to.of(sender).count(frame)

        def arrived() -> bool:
            return to.of(sender).count(frame) > before

        await self._send(frame, sender, to)
        while not self.lossless and not arrived() and _time.now() < deadline:
            await asyncio.sleep(self.settle)
            await self._send(frame, sender, to)
        await self._until(arrived, f"what {sender} sends, {len(frame)} bytes, arrives at {to} as it was sent")

    async def _arrives(self, frames: Sequence[bytes], sender: Node[T], to: Node[T]) -> None:
        """Wait for frames that were sent, if they must arrive."""
        if not self.lossless:
            return

        def missing() -> set[bytes]:
            return set(frames) - set(to.of(sender))

        def promise() -> str:
            some = ", ".join(repr(frame[:20]) for frame in sorted(missing())[:5])
            return f"lossless: {len(missing())} of {len(frames)} frames from {sender} never came to {to}, as {some}"

        await self._until(lambda: len(to.heard) >= len(set(frames)) and not missing(), promise)

    async def _error_of(self, verb: Any) -> Exception | None:
        """Return what `verb()` raises."""
        try:
            verb()
        except Exception as error:  # noqa: BLE001 - the test says what it should have been
            return error
        return None

    async def _is_told(self, node: Node[T], gone: Node[T]) -> None:
        """Wait until `node` is told that another one is gone."""
        await self._until(lambda: gone.id in node.gone, f"when {gone} closes, {node} is told lost({gone})")
