"""TCP: a sealed call beside the least that any protocol over TCP does, and what it costs as things grow.

The bare echo is a client and a server of length-prefixed records, each an `asyncio.Protocol` that writes once for all
that it has in one turn of the loop; the client keeps a future for each request. Both ends of both share one loop and
one processor, on the loopback device. A call is more: it is encoded, sealed and opened, both ways; it has a deadline, a
type, a mailbox and a task, and it is answered once.
"""

import asyncio
import struct
from collections.abc import Sequence
from typing import cast

from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Transport
from meshkit.transports import TcpTransport
from tests.bench.harness import Compare, Fact, Measure
from tests.bench.mesh import IDENTITIES, TRUST, Work, deliveries, everybody, forming, microseconds, sealed_call

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


def bare_call(callers: int, size: int = 128) -> Work:
    async def work(n: int) -> None:
        loop, body = asyncio.get_running_loop(), bytes(size)
        server = await loop.create_server(BareServer, "127.0.0.1", 0)
        transport, client = await loop.create_connection(Bare, *server.sockets[0].getsockname())
        await everybody(lambda: client.call(body), n, callers)
        transport.abort()
        server.close()

    return work


# --- the mesh


def tcp(first: Transport | None) -> TcpTransport:
    """Return the transport of a node, which is told the address of the first one."""
    return TcpTransport("127.0.0.1:0", join=[str(cast("TcpTransport", first).address)] if first else [])


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


def measures() -> list[Measure]:
    """Return the comparisons."""
    return [
        Compare("frames of the transport alone, 1 in flight / bare echo", bare_call(1), frames, 3_000, goal=1.35),
        Compare("sealed call, 1 in flight / bare echo", bare_call(1), sealed_call(tcp, 1), 3_000, goal=1.35),
        Compare("sealed call, 100 in flight / bare echo", bare_call(100), sealed_call(tcp, 100), 20_000, goal=4),
        Fact("broadcast to ten nodes, each delivery", deliveries(tcp, 10), 2_000, "µs", goal=1e6 / 150_000, rounds=3),
        *(
            Fact(f"call, {callers:,} in flight", microseconds(sealed_call(tcp, callers)), 10_000, "µs", rounds=3)
            for callers in (10, 1_000, 10_000)
        ),
        *(
            Fact(f"call, {size:,} B there and back", microseconds(sealed_call(tcp, 10, size)), 500, "µs", rounds=3)
            for size in (16, 1_024, 65_536, 1_000_000)
        ),
        *(Fact(f"{nodes} nodes find each other", forming(tcp), nodes, "ms", rounds=3) for nodes in (2, 10, 50)),
    ]
