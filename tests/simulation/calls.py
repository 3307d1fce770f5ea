"""Very many calls over a bad network, each retried until it is answered: what they do is done once."""

import asyncio
import time
from collections import Counter
from typing import NamedTuple

from meshkit import Message, OutcomeUnknown, Refused, Retrier, RetryPolicy, Runtime, Service, handles, request
from meshkit.testing import Link, SimCluster, SimLoop, SimNode, Verdict, simulated

ADD = request("calls:add", int, reply=int)
BAD = Link(delay=0.01, jitter=0.01, loss=0.1, duplication=0.1, reordering=0.1)
CALLERS = 500


class Adder(Service):
    name = "adder"
    max_concurrent = CALLERS

    def __init__(self, added: Counter[int]) -> None:
        self.added = added

    @handles(ADD)
    async def add(self, msg: Message[int]) -> int:
        self.added[msg.payload] += 1
        return msg.payload


class Tally(NamedTuple):
    """What came of many calls, and what became of their frames."""

    replies: int
    effects: int
    lost: int
    doubled: int
    late: int
    trace: str


async def many_calls(sim: SimLoop, count: int) -> Tally:
    """Make so many calls, and check what came of them."""
    added: Counter[int] = Counter()

    def make(node: SimNode) -> Runtime:
        return Runtime(node.name, [Adder(added)], transport=node.transport(), identity=node.identity)

    policy = RetryPolicy(max_retries=50, base_delay=0.05, max_delay=0.2)
    retrier = Retrier(policy, on=(OutcomeUnknown, Refused), idempotent=True)
    numbers = iter(range(count))
    replies = 0
    async with SimCluster(make, ["alice", "bob"]) as cluster:
        alice, bob = cluster["alice"], cluster["bob"]
        cluster.network.link = BAD

        async def call(number: int) -> int:
            return await alice.rt.call(ADD, number, to=bob.id, timeout=0.5, id=f"call {number}")

        async def caller() -> None:
            nonlocal replies
            for number in numbers:
                await asyncio.sleep(sim.rng.random() * 0.05)  # or they would share frames, and few would be lost
                assert await retrier.call(call, number) == number
                replies += 1

        async def callers() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(caller())

        await alice.run(callers())
        assert replies == count == len(added) == added.total(), "each call has one effect, and none is lost"
        lost, doubled, late = (
            cluster.network.verdicts[each] for each in (Verdict.LOSE, Verdict.DUPLICATE, Verdict.REORDER)
        )
        assert min(lost, doubled, late) > count / 50, (lost, doubled, late)
    return Tally(replies, added.total(), lost, doubled, late, sim.trace)


def timed_calls(count: int) -> tuple[Tally, float]:
    """Make so many calls in a simulation of their own; return what came of them, and how many were made in a second."""
    begun = time.monotonic()
    tally = simulated(1, lambda sim: many_calls(sim, count))
    return tally, count / (time.monotonic() - begun)
