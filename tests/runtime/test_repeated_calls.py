"""Calls that are repeated under their id, over a network that holds back what is sent."""

import asyncio

import pytest

from meshkit import CallTimeout, Message, Overloaded, Runtime, Service, handles, request
from meshkit.testing import SimLoop, SimNetwork, simulate

WORK = request("repeat:work", str, reply=str, max_mailbox=1, max_concurrent=1)


class Worker(Service):
    name = "worker"

    def __init__(self) -> None:
        self.begun: list[str] = []

    @handles(WORK)
    async def work(self, msg: Message[str]) -> str:
        self.begun.append(msg.payload)
        await asyncio.sleep(1.0 if msg.payload == "long" else 0.1)
        return msg.payload


@simulate(seeds=3)
async def test_a_refusal_that_is_late_says_nothing_of_the_same_request_sent_again(sim: SimLoop) -> None:
    network, worker = SimNetwork(), Worker()
    async with (
        Runtime("alice", transport=network.transport()) as alice,
        Runtime("bob", services=[worker], transport=network.transport()) as bob,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(2):  # one is handled, and one waits: there is no room for more
            group.create_task(bob.call(WORK, "long", to="bob"))
            await asyncio.sleep(0.01)
        network.hold("bob", "alice", one_way=True)
        with pytest.raises(CallTimeout):  # its answer is held
            await alice.call(WORK, "first", to="bob", id="x", timeout=0.5)
        await asyncio.sleep(2)
        sim.call_later(0.01, network.release)
        assert await alice.call(WORK, "again", to="bob", id="x", timeout=0.5) == "again"
    assert worker.begun == ["long", "long", "again"]


@simulate(seeds=3)
async def test_a_request_that_is_refused_again_is_told_so(sim: SimLoop) -> None:
    network = SimNetwork()
    async with (
        Runtime("alice", transport=network.transport()) as alice,
        Runtime("bob", services=[Worker()], transport=network.transport()) as bob,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(2):
            group.create_task(bob.call(WORK, "long", to="bob"))
            await asyncio.sleep(0.01)
        for _ in range(2):
            with pytest.raises(Overloaded):
                await alice.call(WORK, "again", to="bob", id="x", timeout=0.5)
