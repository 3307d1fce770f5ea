"""What the benchmarks of the transports measure alike: calls and broadcasts of a mesh of nodes that share one loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import cast

import msgspec

from meshkit.logger import Logger
from meshkit.runtime import Identity, Message, Runtime, Service, broadcast, handles, request
from meshkit.runtime.transport import Transport

Work = Callable[[int], Awaitable[None]]
"""Does something as many times as it is told."""
Wire = Callable[[Transport | None], Transport]
"""Makes the transport of a node. It is given that of the first node, unless this is the first."""
NewLoop = Callable[[], asyncio.AbstractEventLoop] | None


class Blob(msgspec.Struct, frozen=True):
    data: bytes


ECHO = request("bench:echo", Blob, reply=Blob)
NEWS = broadcast("bench:news", Blob)
IDENTITIES = [Identity.from_seed(number.to_bytes(32)) for number in range(1, 51)]
TRUST = [identity.node_id for identity in IDENTITIES]


class Echo(Service):
    name = "bench"
    max_mailbox = 20_000
    max_concurrent = 20_000

    def __init__(self) -> None:
        self.left = 0
        self.done = asyncio.Event()

    @handles(ECHO)
    async def echo(self, msg: Message[Blob]) -> Blob:
        return msg.payload

    @handles(NEWS)
    async def news(self, msg: Message[Blob]) -> None:
        self.left -= 1
        if self.left <= 0:
            self.done.set()


async def joined(stack: AsyncExitStack, wire: Wire, count: int) -> list[Runtime]:
    """Start `count` nodes, and return them when all know all."""
    first: Transport | None = None
    runtimes: list[Runtime] = []
    for number in range(count):
        transport = wire(first)
        first = first or transport
        runtime = Runtime(
            f"node{number}",
            [Echo()],
            transport=transport,
            identity=IDENTITIES[number],
            trust=TRUST,
            logger=Logger(disabled=["bench", "runtime"]),
        )
        runtimes.append(await stack.enter_async_context(runtime))
    while any(sum(bool(peer.kinds) for peer in runtime.peers.values()) < count - 1 for runtime in runtimes):
        await asyncio.sleep(0.001)
    return runtimes


async def everybody(call: Callable[[], Awaitable[object]], n: int, callers: int) -> None:
    """Make n calls, as many as there are callers at once."""

    async def caller(count: int) -> None:
        for _ in range(count):
            await call()

    callers = min(n, callers)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller(n // callers))


def sealed_call(wire: Wire, callers: int, size: int = 128) -> Work:
    """Return n calls between two nodes, with `size` bytes there and back."""

    async def work(n: int) -> None:
        async with AsyncExitStack() as stack:
            alice, bob = await joined(stack, wire, 2)
            blob = Blob(bytes(size))
            await everybody(lambda: alice.call(ECHO, blob, bob.node, timeout=60), n, callers)

    return work


# --- seconds on the clock, since that is what somebody waits for


def seconds(work: Work, n: int, new_loop: NewLoop = None) -> float:
    """Return the time of n calls: that of 2 n, less that of n, so that to begin and to end do not count."""
    return max(1e-9, _seconds(work, 2 * n, new_loop) - _seconds(work, n, new_loop))


def _seconds(work: Work, n: int, new_loop: NewLoop) -> float:
    async def timed() -> float:
        start = time.perf_counter()
        await work(n)
        return time.perf_counter() - start

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(timed())


def microseconds(work: Work, new_loop: NewLoop = None) -> Callable[[int], float]:
    """Return a measure of the microseconds of each call."""
    return lambda n: seconds(work, n, new_loop) / n * 1e6


def deliveries(wire: Wire, nodes: int) -> Callable[[int], float]:
    """Return the microseconds of one delivery of a broadcast, of which 100 go out in each turn of the loop."""

    async def main(n: int) -> float:
        async with AsyncExitStack() as stack:
            sender, *others = await joined(stack, wire, nodes + 1)
            services = [cast("Echo", other.services[0]) for other in others]
            for service in services:
                service.left = n
            blob = Blob(bytes(128))
            start = time.perf_counter()
            for number in range(n):
                await sender.emit(NEWS, blob)
                if number % 100 == 99:
                    await asyncio.sleep(0)
            for service in services:
                await service.done.wait()
            return (time.perf_counter() - start) / (n * nodes) * 1e6

    return lambda n: asyncio.run(main(n))


def forming(wire: Wire) -> Callable[[int], float]:
    """Return the milliseconds until n nodes all know all."""

    async def main(n: int) -> float:
        async with AsyncExitStack() as stack:
            start = time.perf_counter()
            await joined(stack, wire, max(2, n))
            return (time.perf_counter() - start) * 1000

    return lambda n: asyncio.run(main(n))
