"""Services and nodes that the tests of the runtime share."""

import asyncio
import functools
import io
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec

from meshkit.logger import Logger
from meshkit.runtime import Message, Reject, Runtime, Service, broadcast, handles, local, request
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.wire import Wire, encode
from meshkit.testing import CancellationPoint, cancellation_points, run
from meshkit.transports import MemoryHub, MemoryTransport


class Store(msgspec.Struct, frozen=True):
    name: str
    data: bytes = b""


class StoreAck(msgspec.Struct, frozen=True):
    size: int


STORE = request("stash:store", Store, reply=StoreAck)
SLEEP = request("stash:sleep", float, reply=float)
ODD = request("stash:odd", str, reply=list[int])
TEASE = broadcast("social:tease", str)
STORED = local("stash:stored", list[str])


class Stash(Service):
    name, emoji = "stash", "📦"

    def __init__(self) -> None:
        self.begun: list[object] = []
        self.ended: list[object] = []
        self.cancelled: list[object] = []
        self.teases: list[Message[str]] = []
        self.stored: list[Message[list[str]]] = []

    @handles(STORE)
    async def store(self, msg: Message[Store]) -> StoreAck:
        self.begun.append(msg.payload.name)
        return StoreAck(len(msg.payload.data))

    @handles(SLEEP)
    async def sleep(self, msg: Message[float]) -> float:
        self.begun.append(msg.payload)
        try:
            await asyncio.sleep(msg.payload)
        except asyncio.CancelledError:
            self.cancelled.append(msg.payload)
            raise
        self.ended.append(msg.payload)
        return msg.payload

    @handles(ODD)
    async def odd(self, msg: Message[str]) -> list[int]:
        answers: dict[str, Callable[[], Any]] = {
            "raise": lambda: 1 / 0,
            "reject": lambda: _raise(Reject("quota", "too much", retryable=True)),
            "other type": lambda: "text",
            "wrong inside": lambda: ["text"],
            "unencodable": lambda: [object()],
            "cancels itself": lambda: _raise(asyncio.CancelledError()),
            "cancels its task": cancel_task,
            "cancels its task twice": lambda: cancel_task() and cancel_task(),
        }
        answer: Any = answers[msg.payload]()
        await asyncio.sleep(0)
        return [] if answer is True else answer

    @handles(TEASE)
    async def tease(self, msg: Message[str]) -> None:
        self.teases.append(msg)
        if msg.payload == "raise":
            raise ValueError("a secret")

    @handles(STORED)
    async def on_stored(self, msg: Message[list[str]]) -> None:
        self.stored.append(msg)


def everywhere(scenario: Callable[[CancellationPoint], Coroutine[Any, Any, None]]) -> None:
    """Run `scenario(point)` on virtual time once for every point at which it can be cancelled."""
    count = 0
    for point in cancellation_points():
        run(functools.partial(scenario, point))
        count += 1
    assert count > 3, "the scenario never waited: nothing was cancelled"


def plain(*wires: Wire) -> bytes:
    """Return a frame that proves nothing, as nodes of one process send them."""
    return PLAIN + encode(wires)


def cancel_task() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancel()


def _raise(error: BaseException) -> None:
    raise error


class Node(Runtime):
    """A runtime that keeps its log in memory."""

    def __init__(self, name: str, *services: Service, hub: MemoryHub | None = None, **options: Any) -> None:
        self.output = io.StringIO()
        options.setdefault("transport", None if hub is None else MemoryTransport(hub))
        options.setdefault("logger", Logger(node=name, output=self.output))
        super().__init__(name, services, **options)

    @property
    def logged(self) -> str:
        return self.output.getvalue()


@asynccontextmanager
async def mesh(*names: str, **options: Any) -> AsyncIterator[tuple[MemoryHub, list[Node], list[Stash]]]:
    """Run nodes of these names on one hub, each with a `Stash`."""
    hub = MemoryHub()
    stashes = [Stash() for _ in names]
    nodes = [Node(name, stash, hub=hub, **options) for name, stash in zip(names, stashes, strict=True)]
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        yield hub, nodes, stashes
