"""An hour of what meshkit does in the background: heartbeats, a circuit breaker over a peer that fails, batches."""

import asyncio

from meshkit import (
    BatchCollector,
    CircuitBreaker,
    CircuitOpen,
    Message,
    Reject,
    RemoteError,
    Runtime,
    Service,
    handles,
    request,
)
from meshkit.testing import SimCluster, SimLoop, SimNetwork, SimNode

ASK = request("hour:ask", int, reply=int)
HOUR = 3600.0


class Moody(Service):
    """Fails for five minutes, then works for five minutes."""

    name = "moody"

    @handles(ASK)
    async def ask(self, msg: Message[int]) -> int:
        if msg.payload // 300 % 2:
            raise Reject("moody")
        return msg.payload


async def an_hour(sim: SimLoop) -> dict[str, int]:
    """Let an hour pass; return what has happened."""
    batches: list[list[int]] = []

    async def flush(items: list[int]) -> None:
        batches.append(items)

    def make(node: SimNode) -> Runtime:
        return Runtime(node.name, [Moody()], transport=node.transport(), identity=node.identity)

    async with SimCluster(make, ["alice", "bob"], network=SimNetwork()) as cluster:
        alice, bob = cluster["alice"], cluster["bob"]
        breaker = CircuitBreaker(failure_threshold=3, reset_timeout=30.0, trips_on=RemoteError)
        happened = dict.fromkeys(("answered", "failed", "refused"), 0)

        async def ask() -> None:
            async with BatchCollector(flush, max_size=10, max_wait=20.0) as collector:
                while (second := int(sim.now)) < HOUR:
                    try:
                        await collector.add(await breaker.call(alice.rt.call, ASK, second, to=bob.id))
                        happened["answered"] += 1
                    except RemoteError:
                        happened["failed"] += 1
                    except CircuitOpen:
                        happened["refused"] += 1
                    await asyncio.sleep(5)

        await alice.run(ask())
        assert cluster.connected()
        assert sum(map(len, batches)) == happened["answered"]
        frames = cluster.network.verdicts.total()
    assert all(happened.values()), happened
    return {**happened, "batches": len(batches), "frames": frames}
