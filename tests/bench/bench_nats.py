"""NATS: a sealed call beside the bare request of nats-py, over the same server, in the same run.

Each client and each node has a connection of its own to the server; both ends share one loop and one processor, and the
server, a process of its own, has the other. Only the processor time of this process is measured where the table says
so; what somebody waits for is on the clock. A bare request is plain text, and is not answered when its node is gone; a
call is encoded, sealed and opened, both ways; it has a deadline, a type, a mailbox and a task, and is answered once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, cast

import nats
from nats.aio.msg import Msg

from meshkit.logger import Logger
from meshkit.runtime import Runtime
from meshkit.transports import NatsLimits, NatsTransport
from tests.bench.bench_tcp import ECHO, IDENTITIES, NEWS, TRUST, Blob, Echo, everybody
from tests.bench.harness import Compare, Fact, Measure
from tests.transports.nats_servers import any_url, binary

PATIENT = NatsLimits(connect_timeout=60.0)
"""All nodes share one loop here, which does nothing else than prove things while they meet."""
Work = Callable[[int], Awaitable[None]]


def bare_request(callers: int, size: int = 128) -> Work:
    async def work(n: int) -> None:
        asks, answers = await nats.connect(any_url()), await nats.connect(any_url())

        async def answer(message: Msg) -> None:
            await message.respond(message.data)

        await answers.subscribe("bench.echo", cb=answer)
        await answers.flush()  # its ping overtakes the subscription, which leaves
        await answers.flush()  # before this one
        body = bytes(size)
        await everybody(lambda: asks.request("bench.echo", body, timeout=60), n, callers)
        await asks.close()
        await answers.close()

    return work


async def joined(stack: AsyncExitStack, count: int) -> list[Runtime]:
    """Start `count` nodes, and return them when all know all."""
    runtimes: list[Runtime] = []
    for number in range(count):
        runtime = Runtime(
            f"node{number}",
            [Echo()],
            transport=NatsTransport(any_url(), subject="bench", limits=PATIENT),
            identity=IDENTITIES[number],
            trust=TRUST,
            logger=Logger(disabled=["bench", "runtime"]),
        )
        runtimes.append(await stack.enter_async_context(runtime))
    while any(sum(bool(peer.kinds) for peer in runtime.peers.values()) < count - 1 for runtime in runtimes):
        await asyncio.sleep(0.001)
    return runtimes


def sealed_call(callers: int, size: int = 128) -> Work:
    async def work(n: int) -> None:
        async with AsyncExitStack() as stack:
            alice, bob = await joined(stack, 2)
            blob = Blob(bytes(size))
            await everybody(lambda: alice.call(ECHO, blob, bob.node, timeout=60), n, callers)

    return work


def microseconds(work: Work) -> Callable[[int], float]:
    """Return the time of one call on the clock: that of 2 n, less that of n, so that setting up does not count."""

    def measure(n: int) -> float:
        return max(0.0, _seconds(work, 2 * n) - _seconds(work, n)) / n * 1e6

    return measure


def _seconds(work: Work, n: int) -> float:
    start = time.perf_counter()
    asyncio.run(cast("Any", work(n)))
    return time.perf_counter() - start


def deliveries(n: int) -> float:
    """Return the microseconds of one delivery of a broadcast to ten nodes; 100 go out in each turn of the loop."""

    async def main() -> float:
        async with AsyncExitStack() as stack:
            sender, *others = await joined(stack, 11)
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
            return (time.perf_counter() - start) / (n * 10) * 1e6

    return asyncio.run(main())


def forming(n: int) -> float:
    """Return the milliseconds until n nodes all know all."""

    async def main() -> float:
        async with AsyncExitStack() as stack:
            start = time.perf_counter()
            await joined(stack, max(2, n))
            return (time.perf_counter() - start) * 1000

    return asyncio.run(main())


def measures() -> list[Measure]:
    """Return the comparisons."""
    if binary() is None:
        return []  # there is no server to measure with
    any_url()  # it is started here, and not where time is taken
    return [
        Compare(
            "sealed call, 100 in flight / nats-py request, CPU", bare_request(100), sealed_call(100), 8_000, goal=1.0
        ),
        Compare("sealed call, 1 in flight / nats-py request, CPU", bare_request(1), sealed_call(1), 1_000),
        *(
            Fact(f"{what}, {callers} in flight", microseconds(work(callers)), 5_000, "µs", rounds=3)
            for callers in (100, 1)
            for what, work in (("nats-py request", bare_request), ("sealed call", sealed_call))
        ),
        Fact("broadcast to ten nodes, each delivery", deliveries, 2_000, "µs", rounds=3),
        *(Fact(f"{nodes} nodes find each other", forming, nodes, "ms", rounds=3) for nodes in (2, 10, 30)),
    ]
