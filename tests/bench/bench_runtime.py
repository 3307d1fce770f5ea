"""The runtime: a local emit beside an `asyncio.Queue` hop, and a call beside queue, responder task and future."""

import asyncio
from typing import Any

import msgspec

from meshkit.logger import Logger
from meshkit.runtime import Message, Runtime, Service, handles, local, request
from meshkit.transports import MemoryHub, MemoryTransport
from tests.bench.harness import Compare, Measure


class Number(msgspec.Struct, frozen=True):
    value: int


TICK = local("bench:tick", Number)
DOUBLE = request("bench:double", Number, reply=Number)


class Bench(Service):
    name = "bench"

    def __init__(self, expected: int = 0) -> None:
        self.left = expected
        self.done = asyncio.Event()

    @handles(TICK)
    async def tick(self, msg: Message[Number]) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()

    @handles(DOUBLE)
    async def double(self, msg: Message[Number]) -> Number:
        return Number(msg.payload.value * 2)


def runtime(name: str, service: Service, hub: MemoryHub | None = None) -> Runtime:
    return Runtime(name, [service], transport=MemoryTransport(hub) if hub else None, logger=Logger(disabled=["bench"]))


async def queue_hop(n: int) -> None:
    """Put n numbers into a bounded queue; a consumer task calls an async handler for each."""
    queue: asyncio.Queue[Number] = asyncio.Queue(1000)
    left, done = n, asyncio.Event()

    async def handler(number: Number) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async def consume() -> None:
        while True:
            await handler(await queue.get())

    consumer = asyncio.create_task(consume())
    number = Number(1)
    for _ in range(n):
        await queue.put(number)
    await done.wait()
    consumer.cancel()


async def local_emit(n: int) -> None:
    service = Bench(n)
    async with runtime("alice", service) as rt:
        emit, number = rt.emit, Number(1)
        for _ in range(n):
            await emit(TICK, number)
        await service.done.wait()


async def queue_call(n: int, callers: int) -> None:
    """Each caller puts a request and a future into a queue; a responder task handles it and sets the future."""
    queue: asyncio.Queue[tuple[Number, asyncio.Future[Number]]] = asyncio.Queue(1000)
    loop = asyncio.get_running_loop()

    async def handler(number: Number) -> Number:
        return Number(number.value * 2)

    async def respond() -> None:
        while True:
            number, future = await queue.get()
            future.set_result(await handler(number))

    async def caller(count: int) -> None:
        number = Number(1)
        for _ in range(count):
            future: asyncio.Future[Number] = loop.create_future()
            await queue.put((number, future))
            await future

    responder = asyncio.create_task(respond())
    await everybody(caller, n, callers)
    responder.cancel()


async def everybody(caller: Any, n: int, callers: int) -> None:
    callers = min(n, callers)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller(n // callers))


async def own_call(n: int, callers: int) -> None:
    async with runtime("alice", Bench()) as rt:
        await everybody(caller_of(rt, "alice"), n, callers)


async def hub_call(n: int, callers: int) -> None:
    hub = MemoryHub()
    async with runtime("alice", Bench(), hub) as alice, runtime("bob", Bench(), hub):
        await everybody(caller_of(alice, "bob"), n, callers)


def caller_of(rt: Runtime, to: str) -> Any:
    async def caller(count: int) -> None:
        call, number = rt.call, Number(1)
        for _ in range(count):
            await call(DOUBLE, number, to, timeout=30)

    return caller


def measures() -> list[Measure]:
    """Return the comparisons."""
    return [
        Compare("local emit / asyncio.Queue hop", queue_hop, local_emit, 50_000, goal=3),
        *(
            Compare(
                f"{name}, {callers:,} callers / queue + responder + future",
                lambda n, callers=callers: queue_call(n, callers),
                lambda n, callers=callers, ours=ours: ours(n, callers),
                20_000,
                goal=2,
            )
            for name, ours in (("call of its own node", own_call), ("call through the hub", hub_call))
            for callers in (1, 1000)
        ),
    ]
