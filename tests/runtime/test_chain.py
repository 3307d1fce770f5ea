"""A call that makes a call that makes a call: deadlines and cancellations travel with it."""

import asyncio
import itertools
from typing import Any, Self

import anyio
import pytest

from meshkit.errors import CallTimeout, RemoteError
from meshkit.runtime import Message, Service, handles, request
from tests.runtime.lag import LaggingHub
from tests.runtime.nodes import Node
from tests.runtime.test_messages import balanced

HOP = request("chain:hop", list[str], reply=list[str])
NODES = ("alice", "bob", "carol", "dave")


def now() -> float:
    return asyncio.get_running_loop().time()


class Chain(Service):
    """Works for a while, asks the next one, and notes what it was given."""

    name = "chain"
    max_concurrent = 1

    def __init__(self, diary: dict[str, list[tuple[str, float]]], work: float, last: float) -> None:
        self.diary = diary
        self.work = work
        self.last = last

    def note(self, what: str, number: float) -> None:
        self.diary.setdefault(what, []).append((self.rt.name, number))

    @handles(HOP)
    async def hop(self, msg: Message[list[str]]) -> list[str]:
        assert msg.deadline == anyio.current_effective_deadline()
        self.note("left", msg.deadline - now())
        try:
            await asyncio.sleep(self.work if msg.payload else self.last)
            if not msg.payload:
                return [self.rt.name]
            return [self.rt.name, *await self.rt.call(HOP, msg.payload[1:], to=msg.payload[0], timeout=100)]
        except asyncio.CancelledError:
            self.note("cancelled", now())
            raise


class Links:
    """Four nodes in a row, on links of `lag` seconds."""

    def __init__(self, *, lag: float = 0.01, work: float = 0.1, last: float = 1000.0) -> None:
        self.hub = LaggingHub(lag)
        self.diary: dict[str, Any] = {}
        self.nodes = [Node(name, Chain(self.diary, work, last), hub=self.hub, heartbeat=None) for name in NODES]

    async def __aenter__(self) -> Self:
        for node in self.nodes:
            await node.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes:
            await node.stop()
            assert balanced(node)

    def ask(self, timeout: float = 1.0) -> Any:
        return self.nodes[0].call(HOP, ["carol", "dave"], to="bob", timeout=timeout)


async def test_a_reply_comes_back_through_all_of_them() -> None:
    async with Links(last=0.1) as links:
        assert await links.ask() == ["bob", "carol", "dave"]
        assert now() == pytest.approx(0.36), "three times its work, and six times on its way"


async def test_each_hop_sees_less_time_than_the_one_before() -> None:
    async with Links() as links:
        with pytest.raises(CallTimeout):
            await links.ask()
        assert now() == 1
        hops, left = zip(*links.diary["left"], strict=True)
        assert hops == ("bob", "carol", "dave")
        assert list(left) == [pytest.approx(budget, abs=0.005) for budget in (1.0, 0.9, 0.8)]
        assert list(left) == sorted(set(left), reverse=True), "each less than the one before"
        await asyncio.sleep(0.1)


async def test_all_handlers_are_cancelled_within_one_exchange_of_the_outermost_callers_cancellation() -> None:
    async with Links() as links:
        call = asyncio.create_task(links.ask())
        await asyncio.sleep(0.5)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert now() == 0.5, "it does not wait for them"
        await asyncio.sleep(0.1)
        assert links.diary["cancelled"] == [
            ("bob", pytest.approx(0.51)),
            ("carol", pytest.approx(0.52)),
            ("dave", pytest.approx(0.53)),
        ]
        assert all((node.stats().running, node.stats().pending) == (0, 0) for node in links.nodes)


async def test_an_enclosing_deadline_is_the_budget_of_them_all() -> None:
    async with Links() as links:
        with anyio.move_on_after(1) as scope:
            await links.ask(timeout=50)
        assert scope.cancelled_caught
        await asyncio.sleep(0.1)
        assert links.diary["left"][0] == ("bob", pytest.approx(1.0, abs=0.002))
        assert [name for name, _ in links.diary["cancelled"]] == ["bob", "carol", "dave"]


async def test_where_no_cancellation_arrives_each_handler_ends_at_its_own_deadline() -> None:
    async with Links() as links:
        call = asyncio.create_task(links.ask())
        await asyncio.sleep(0.5)
        for one, other in itertools.pairwise(NODES):
            links.hub.cut(one, other)
        call.cancel()
        await asyncio.sleep(5)
        assert sorted(name for name, _ in links.diary["cancelled"]) == ["bob", "carol", "dave"]
        assert max(at for _, at in links.diary["cancelled"]) <= 1 + 3 * 0.01


async def test_expired_work_never_starts() -> None:
    """The budget is used up where the second hop waits for its turn, with no cancellation to help."""
    async with Links() as links:
        carol = links.nodes[2]
        busy = asyncio.create_task(carol.call(HOP, [], to="carol", timeout=3))
        await asyncio.sleep(0.01)
        links.diary.clear()
        call = asyncio.create_task(links.ask())
        await asyncio.sleep(0.5)
        assert carol.stats().queued == 1
        links.hub.cut("bob", "carol")
        with pytest.raises(CallTimeout):
            await call
        with pytest.raises(CallTimeout):
            await busy
        await asyncio.sleep(1)
        assert [name for name, _ in links.diary["left"]] == ["bob"]
        assert carol.stats().delivered == 2
        assert carol.stats().cancelled == 2


async def test_who_asks_with_less_time_than_the_way_takes_starts_nothing() -> None:
    """What is on its way longer than its caller waits is overtaken by nothing: the cancellation comes right behind."""
    async with Links(lag=0.5) as links:
        with pytest.raises(CallTimeout):
            await links.ask(timeout=0.0001)
        await asyncio.sleep(5)
        assert links.diary == {}


async def test_who_asks_the_first_is_told_that_the_first_has_failed_whoever_it_was() -> None:
    async with Links(last=0.1) as links:
        with pytest.raises(RemoteError) as caught:
            await links.nodes[0].call(HOP, ["carol", "nobody"], to="bob", timeout=1)
        assert (caught.value.node, caught.value.code) == ("bob", "internal")


async def test_a_chain_can_be_cancelled_at_any_time_and_nothing_runs_on() -> None:
    async with Links(last=0.1) as links:
        for step in range(80):
            links.diary.clear()
            call = asyncio.create_task(links.ask())
            await asyncio.sleep(0.0051 * step)
            call.cancel()
            await asyncio.sleep(0.031)
            assert all((node.stats().running, node.stats().pending) == (0, 0) for node in links.nodes)
            begun = [name for name, _ in links.diary.get("left", [])]
            ended = [name for name, _ in links.diary.get("cancelled", [])]
            assert begun[: len(ended)] == ended, "who had not replied already was cancelled"
            assert call.cancelled() or ended == []
