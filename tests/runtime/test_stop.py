"""The end of a node, when something else happens at the same time: who is told of what, and what still works."""

import asyncio

import pytest

from meshkit.runtime import Message, Service, handles, local
from tests.runtime.nodes import Node
from tests.runtime.test_life import Noted, now
from tests.runtime.test_messages import balanced, settle

TICK = local("clock:tick", int)
URGENT = local("clock:urgent", int, overflow="refuse")
ONE_BY_ONE = local("clock:one_by_one", int, max_mailbox=1, max_concurrent=1)


class Clock(Service):
    """Emits something all the time."""

    name = "clock"

    async def start(self) -> None:
        self.spawn(self.tick)

    async def tick(self) -> None:
        while True:
            await self.rt.emit(TICK, 1)
            await self.rt.emit(URGENT, 1)
            await asyncio.sleep(0.1)


class Hears(Service):
    """Takes a second for each of them, and as long to stop as it is told."""

    def __init__(self, name: str, stop: float = 0.0) -> None:
        self.name = name
        self.heard: list[int] = []
        self._stop = stop

    @handles(TICK)
    @handles(URGENT)
    async def hear(self, msg: Message[int]) -> None:
        self.heard.append(msg.payload)

    @handles(ONE_BY_ONE)
    async def slowly(self, msg: Message[int]) -> None:
        self.heard.append(msg.payload)
        await asyncio.sleep(1)

    async def stop(self) -> None:
        await asyncio.sleep(self._stop)


# --- services that have stopped, and those that have not


async def test_who_emits_to_a_service_that_has_stopped_goes_on_and_what_it_missed_is_counted() -> None:
    async with Node("alice", Clock(), Hears("hears", stop=9.05)) as alice:
        await asyncio.sleep(0.05)
    assert alice.logged == ""
    dropped = alice.stats().dropped
    assert dropped == {(kind.kind, "mailbox", "draining"): 91 for kind in (TICK, URGENT)}
    assert balanced(alice)


async def test_a_service_that_has_stopped_takes_nothing_from_the_others() -> None:
    still = Hears("still")
    async with Node("alice", still, Clock(), Hears("stops", stop=0.55)):
        pass
    assert len(still.heard) == 2 * 6


@pytest.mark.parametrize("others", [0, 1])
async def test_an_emit_that_waits_for_a_service_that_stops_then_waits_for_the_others_only(others: int) -> None:
    emitted: list[float] = []

    async def emit_four(service: Service) -> None:
        async def emit() -> None:
            for number in range(4):
                await service.rt.emit(ONE_BY_ONE, number)
                emitted.append(now())

        service.spawn(emit)

    listens = [Hears("listens") for _ in range(others)]
    async with Node("alice", *listens, Noted("first", [], start=emit_four), Hears("stops", stop=9.0), grace=0) as alice:
        await settle()
        assert emitted == [0, 0], "one that is handled, and one that waits"
    assert emitted == ([0, 0, 1, 2] if others else [0, 0, 0.001, 0.001])
    assert [len(service.heard) for service in listens] == [4] * others
    assert alice.stats().dropped == {(ONE_BY_ONE.kind, "mailbox", "draining"): 2}
    assert balanced(alice)
