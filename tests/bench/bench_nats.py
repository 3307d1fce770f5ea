"""NATS: a sealed call beside the bare request of nats-py, over the same server, in the same run.

Each client and each node has a connection of its own to the server; both ends share one loop and one processor, and the
server, a process of its own, has the other. Only the processor time of this process is measured where the table says
so; what somebody waits for is on the clock. A bare request is plain text, and is not answered when its node is gone; a
call is encoded, sealed and opened, both ways; it has a deadline, a type, a mailbox and a task, and is answered once.
"""

from functools import partial

import nats
from nats.aio.msg import Msg

from meshkit.runtime.transport import Transport
from meshkit.transports import NatsLimits, NatsTransport
from tests.bench.harness import Compare, Fact, Measure
from tests.bench.mesh import Work, deliveries, everybody, forming, microseconds, sealed_call
from tests.transports.nats_servers import any_url, binary

PATIENT = NatsLimits(connect_timeout=60.0)
"""All nodes share one loop here, which does nothing else than prove things while they meet."""


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


def nats_transport(first: Transport | None) -> NatsTransport:
    """Return the transport of a node."""
    return NatsTransport(any_url(), subject="bench", limits=PATIENT)


nats_call = partial(sealed_call, nats_transport)


def measures() -> list[Measure]:
    """Return the comparisons."""
    if binary() is None:
        return []  # there is no server to measure with
    any_url()  # it is started here, and not where time is taken
    return [
        Compare(
            "sealed call, 100 in flight / nats-py request, CPU",
            bare_request(100),
            nats_call(100),
            8_000,
            goal=1.0,
        ),
        Compare("sealed call, 1 in flight / nats-py request, CPU", bare_request(1), nats_call(1), 1_000),
        *(
            Fact(f"{what}, {callers} in flight", microseconds(work(callers)), 5_000, "µs", rounds=3)
            for callers in (100, 1)
            for what, work in (("nats-py request", bare_request), ("sealed call", nats_call))
        ),
        Fact("broadcast to ten nodes, each delivery", deliveries(nats_transport, 10), 2_000, "µs", rounds=3),
        *(
            Fact(f"{nodes} nodes find each other", forming(nats_transport), nodes, "ms", rounds=3)
            for nodes in (2, 10, 30)
        ),
    ]
