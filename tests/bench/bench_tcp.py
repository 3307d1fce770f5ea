"""TCP: a sealed call beside the least that any protocol over TCP does, and what it costs as things grow.

The bare echo is a client and a server of length-prefixed records, each an `asyncio.Protocol` that writes once for all
that it has in one turn of the loop; the client keeps a future for each request. Both ends of both share one loop and
one processor, on the loopback device. A call is more: it is encoded, sealed and opened, both ways; it has a deadline, a
type, a mailbox and a task, and it is answered once.
"""

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import msgspec

from meshkit.logger import Logger
from meshkit.runtime import Identity, Message, Runtime, Service, broadcast, handles, request
from meshkit.runtime.frame import Prover
from meshkit.transports import TcpTransport
from tests.bench.harness import Compare, Fact, Measure


class Blob(msgspec.Struct, frozen=True):
    data: bytes


ECHO = request("bench:echo", Blob, reply=Blob)
NEWS = broadcast("bench:news", Blob)


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


# --- the bare echo


class Bare(asyncio.Protocol):
    """Records of 4 bytes of length, 8 bytes of id and a body; what is sent in one turn of the loop is one write."""

    def __init__(self) -> None:
        self.waiting: dict[int, asyncio.Future[bytes]] = {}
        self.number = 0
        self._out: list[bytes] = []
        self._buffer = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def send(self, number: int, body: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(struct.pack(">IQ", len(body), number) + body)

    def _flush(self) -> None:
        self.transport.write(b"".join(self._out))
        self._out.clear()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        while len(buffer) - at >= 12:
            size, number = struct.unpack_from(">IQ", buffer, at)
            if len(buffer) - at - 12 < size:
                break
            self.on_record(number, buffer[at + 12 : at + 12 + size])
            at += 12 + size
        self._buffer = buffer[at:]

    def on_record(self, number: int, body: bytes) -> None:
        self.waiting.pop(number).set_result(body)

    async def call(self, body: bytes) -> bytes:
        self.number += 1
        future: asyncio.Future[bytes] = self._loop.create_future()
        self.waiting[self.number] = future
        self.send(self.number, body)
        return await future


class BareServer(Bare):
    def on_record(self, number: int, body: bytes) -> None:
        self.send(number, body)


async def everybody(call: Callable[[], Awaitable[object]], n: int, callers: int) -> None:
    async def caller(count: int) -> None:
        for _ in range(count):
            await call()

    callers = min(n, callers)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller(n // callers))


def bare_call(callers: int, size: int = 128) -> Callable[[int], Awaitable[None]]:
    async def work(n: int) -> None:
        loop, body = asyncio.get_running_loop(), bytes(size)
        server = await loop.create_server(BareServer, "127.0.0.1", 0)
        transport, client = await loop.create_connection(Bare, *server.sockets[0].getsockname())
        await everybody(lambda: client.call(body), n, callers)
        transport.abort()
        server.close()

    return work


# --- the mesh

IDENTITIES = [Identity.from_seed(number.to_bytes(32)) for number in range(1, 51)]
TRUST = [identity.node_id for identity in IDENTITIES]


async def joined(stack: AsyncExitStack, count: int) -> list[Runtime]:
    """Start `count` nodes, and return them when all know all."""
    transports: list[TcpTransport] = []
    runtimes: list[Runtime] = []
    for number in range(count):
        join = [str(transports[0].address)] if transports else []
        transports.append(TcpTransport("127.0.0.1:0", join=join))
        runtime = Runtime(
            f"node{number}",
            [Echo()],
            transport=transports[-1],
            identity=IDENTITIES[number],
            trust=TRUST,
            logger=Logger(disabled=["bench", "runtime"]),
        )
        runtimes.append(await stack.enter_async_context(runtime))
    while any(sum(bool(peer.kinds) for peer in runtime.peers.values()) < count - 1 for runtime in runtimes):
        await asyncio.sleep(0.001)
    return runtimes


def sealed_call(callers: int, size: int = 128) -> Callable[[int], Awaitable[None]]:
    async def work(n: int) -> None:
        async with AsyncExitStack() as stack:
            alice, bob = await joined(stack, 2)
            blob = Blob(bytes(size))
            await everybody(lambda: alice.call(ECHO, blob, bob.node, timeout=60), n, callers)

    return work


# --- the transport alone


class Ear:
    """A receiver that returns every frame, or takes it as the answer."""

    def __init__(self, number: int, join: Sequence[str] = (), *, returns: bool) -> None:
        self.identity = IDENTITIES[number]
        self.transport = TcpTransport("127.0.0.1:0", join=join)
        self.met = asyncio.Event()
        self._returns = returns
        self._answer: asyncio.Future[bytes] | None = None

    async def start(self) -> None:
        prover = Prover(self.identity, trust=TRUST, started=0.0)
        await self.transport.start(self.identity.node_id, self, prover)

    def received(self, sender: str, frame: bytes) -> None:
        if self._returns:
            self.transport.send(sender, frame)
        elif self._answer is not None:
            self._answer.set_result(frame)

    def found(self, node: str) -> None:
        self.met.set()

    def lost(self, node: str) -> None:
        pass

    async def call(self, to: str, frame: bytes) -> bytes:
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.send(to, frame)
        return await self._answer


async def frames(n: int) -> None:
    bob = Ear(1, returns=True)
    await bob.start()
    alice = Ear(0, [str(bob.transport.address)], returns=False)
    await alice.start()
    await alice.met.wait()
    await everybody(lambda: alice.call(bob.identity.node_id, bytes(128)), n, 1)
    await alice.transport.close()
    await bob.transport.close()


# --- as things grow: seconds on the clock, since that is what somebody waits for


def microseconds(work: Callable[[int], Awaitable[None]]) -> Callable[[int], float]:
    """Return the time of one call: that of n, less that of setting up."""

    def measure(n: int) -> float:
        return max(0.0, _seconds(work, 2 * n) - _seconds(work, n)) / n * 1e6

    return measure


def _seconds(work: Callable[[int], Awaitable[None]], n: int) -> float:
    start = time.perf_counter()
    asyncio.run(cast("Any", work(n)))
    return time.perf_counter() - start


def deliveries(nodes: int) -> Callable[[int], float]:
    """Return the microseconds of one delivery of a broadcast, of which 100 go out in each turn of the loop."""

    def measure(n: int) -> float:
        return asyncio.run(_deliveries(nodes, n))

    return measure


async def _deliveries(nodes: int, n: int) -> float:
    async with AsyncExitStack() as stack:
        sender, *others = await joined(stack, nodes + 1)
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


def forming(n: int) -> float:
    """Return the milliseconds until n nodes, given one address, all know all."""

    async def main() -> float:
        async with AsyncExitStack() as stack:
            start = time.perf_counter()
            await joined(stack, max(2, n))
            return (time.perf_counter() - start) * 1000

    return asyncio.run(main())


def measures() -> list[Measure]:
    """Return the comparisons."""
    return [
        Compare("frames of the transport alone, 1 in flight / bare echo", bare_call(1), frames, 3_000, goal=1.35),
        Compare("sealed call, 1 in flight / bare echo", bare_call(1), sealed_call(1), 3_000, goal=1.35),
        Compare("sealed call, 100 in flight / bare echo", bare_call(100), sealed_call(100), 20_000, goal=4),
        Fact("broadcast to ten nodes, each delivery", deliveries(10), 2_000, "µs", goal=1e6 / 150_000, rounds=3),
        *(
            Fact(f"call, {callers:,} in flight", microseconds(sealed_call(callers)), 10_000, "µs", rounds=3)
            for callers in (10, 1_000, 10_000)
        ),
        *(
            Fact(f"call, {size:,} B there and back", microseconds(sealed_call(10, size)), 500, "µs", rounds=3)
            for size in (16, 1_024, 65_536, 1_000_000)
        ),
        *(Fact(f"{nodes} nodes find each other", forming, nodes, "ms", rounds=3) for nodes in (2, 10, 50)),
    ]
