"""Mailboxes that are full: what becomes of a message for which there is no room."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from meshkit.errors import Overloaded
from meshkit.retrier import RetryPolicy
from meshkit.runtime import Message, Service, broadcast, ephemeral, handles, local, request
from meshkit.runtime.options import Overflow
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node
from tests.runtime.test_messages import balanced

WAITING = local("box:waiting", int)
REFUSING = local("box:refusing", int, overflow="refuse")
NEWEST = local("box:newest", int, overflow="drop_newest")
OLDEST = local("box:oldest", int, overflow="drop_oldest", max_mailbox=3, max_concurrent=1)
ORDERED = local("box:ordered", int, overflow="drop_oldest", max_mailbox=3, order_by=lambda msg: msg.payload % 2)
FRESH = ephemeral("box:fresh", bytes, max_mailbox=3, max_concurrent=1)
TOLD = broadcast("box:told", bytes)
ASKED = request("box:asked", bytes, reply=int)


class Box(Service):
    """Takes a second for each message, one after the other; two may wait."""

    name = "box"
    max_mailbox = 2
    max_concurrent = 1
    max_mailbox_bytes = 1000

    def __init__(self, name: str = "box") -> None:
        self.name = name
        self.seen: list[Any] = []

    @handles(WAITING)
    @handles(REFUSING)
    @handles(NEWEST)
    @handles(OLDEST)
    @handles(ORDERED)
    async def take(self, msg: Message[int]) -> None:
        await self.see(msg.payload)

    @handles(FRESH)
    @handles(TOLD)
    async def take_bytes(self, msg: Message[bytes]) -> None:
        await self.see(msg.payload)

    async def see(self, payload: object) -> None:
        self.seen.append(payload)
        await asyncio.sleep(1)

    @handles(ASKED)
    async def answer(self, msg: Message[bytes]) -> int:
        await asyncio.sleep(1)
        return len(msg.payload)


@asynccontextmanager
async def boxes() -> AsyncIterator[tuple[Node, Node, Box]]:
    """Run alice, who sends, and bob, who has a box."""
    hub, box = MemoryHub(), Box()
    async with Node("alice", hub=hub) as alice, Node("bob", box, hub=hub) as bob:
        yield alice, bob, box
        assert balanced(bob)


def now() -> float:
    return asyncio.get_running_loop().time()


async def settle() -> None:
    await asyncio.sleep(0.001)


async def test_an_emit_is_refused_where_that_is_declared() -> None:
    async with boxes() as (_, bob, box):
        await bob.emit(REFUSING, 0)
        await settle()
        for number in (1, 2):
            await bob.emit(REFUSING, number)
        with pytest.raises(Overloaded, match="mailbox of service 'box' on node 'bob': full, it holds 2 already"):
            await bob.emit(REFUSING, 3)
        await asyncio.sleep(5)
        assert box.seen == [0, 1, 2]
        assert bob.stats().dropped == {("box:refusing", "mailbox", "overloaded"): 1}


@pytest.mark.parametrize(
    ("behavior", "seen", "counted"),
    [(NEWEST, [0, 1, 2], "dropped"), (OLDEST, [0, 4, 5, 6], "cancelled"), (ORDERED, [0, 4, 5, 6], "cancelled")],
)
async def test_the_newest_or_the_oldest_is_dropped_as_declared_and_counted(
    behavior: Any, seen: list[int], counted: str
) -> None:
    async with boxes() as (_, bob, box):
        ids = []
        for number in range(7):
            ids.append(await bob.emit(behavior, number))
            if number == 0:
                await settle()
        await asyncio.sleep(10)
        assert sorted(box.seen) == seen
        stats = bob.stats()
        dropped = stats.dropped.get((behavior.kind, "mailbox", "overloaded"), 0)
        assert {"dropped": dropped, "cancelled": stats.cancelled}[counted] == 7 - len(seen)
        lost = next(ids[number] for number in range(7) if number not in seen)
        assert "dropped at mailbox" in bob.explain(lost) or "newer ones needed its place" in bob.explain(lost)


async def test_where_order_matters_the_oldest_is_dropped_though_it_stands_in_line() -> None:
    kind = local("box:line", int, overflow="drop_oldest", max_mailbox=2, order_by=lambda msg: "one key")
    box = Box()

    class Line(Service):
        name = "line"

        @handles(kind)
        async def take(self, msg: Message[int]) -> None:
            await box.take(msg)

    async with Node("bob", Line()) as bob:
        await bob.emit(kind, 0)
        await settle()
        for number in range(1, 6):
            await bob.emit(kind, number)
        await asyncio.sleep(10)
        assert box.seen == [0, 4, 5]
        assert bob.stats().cancelled == 3
        assert balanced(bob)


async def test_what_waits_to_be_retried_counts_and_is_the_oldest() -> None:
    policy = RetryPolicy(max_retries=3, base_delay=5.0, max_delay=5.0, jitter=False)
    kind = local("box:retried", int, overflow="drop_oldest", max_mailbox=2, retry=policy)

    seen: list[int] = []

    class Failing(Service):
        name = "failing"

        @handles(kind)
        async def take(self, msg: Message[int]) -> None:
            seen.append(msg.payload)
            raise ValueError

    async with Node("bob", Failing()) as bob:
        for number in range(4):
            await bob.emit(kind, number)
            await settle()
            assert bob.stats().queued <= 2
        assert bob.stats().cancelled == 2
        await asyncio.sleep(5)
        assert seen == [0, 1, 2, 3, 2, 3]
        assert balanced(bob)


async def test_bytes_are_bounded_too_and_the_error_says_so() -> None:
    async with boxes() as (alice, bob, box):
        first = asyncio.create_task(alice.call(ASKED, b"", to="bob"))
        await settle()
        large = asyncio.create_task(alice.call(ASKED, b"x" * 5000, to="bob"))
        await settle()
        with pytest.raises(Overloaded, match="mailbox of service 'box' on node 'bob', in bytes: full, it holds 1000"):
            await alice.call(ASKED, b"y", to="bob")
        assert await large == 5000, "where nothing else waits, there is room for anything"
        assert await first == 0
        await alice.emit(TOLD, b"x" * 600)
        await settle()
        await alice.emit(TOLD, b"y" * 600)
        await alice.emit(TOLD, b"z" * 600)
        await asyncio.sleep(5)
        assert [payload[:1] for payload in box.seen] == [b"x", b"y"]
        assert bob.stats().dropped == {
            ("box:asked", "mailbox", "overloaded"): 1,
            ("box:told", "mailbox", "overloaded"): 1,
        }


async def test_as_many_of_the_oldest_go_as_a_large_message_needs() -> None:
    async with boxes() as (alice, bob, box):
        await alice.emit(FRESH, b"0")
        await settle()
        for letter in (b"a", b"b"):
            await alice.emit(FRESH, letter * 400)
        await alice.emit(FRESH, b"c" * 900)
        await asyncio.sleep(5)
        assert [payload[:1] for payload in box.seen] == [b"0", b"c"]
        assert bob.stats().cancelled == 2


async def test_a_slow_consumer_refuses_or_holds_back_and_others_do_not_feel_it() -> None:
    ping = request("quick:ping", int, reply=float)

    class Quick(Service):
        name = "quick"

        @handles(ping)
        async def answer(self, msg: Message[int]) -> float:
            return now()

    hub, box = MemoryHub(), Box()
    async with Node("alice", hub=hub) as alice, Node("bob", box, Quick(), hub=hub) as bob:
        refused = 0
        for number in range(500):
            calls = [asyncio.create_task(alice.call(ASKED, b"x", to="bob", timeout=30)) for _ in range(4)]
            await alice.emit(TOLD, b"x")
            sent = now()
            assert await alice.call(ping, number, to="bob") == sent
            await asyncio.sleep(0.01)
            refused += sum(call.done() and isinstance(call.exception(), Overloaded) for call in calls)
            assert bob.stats().queued <= 2
            assert bob.stats().running <= 1
        assert refused > 1900
        assert bob.stats().dropped["box:told", "mailbox", "overloaded"] > 450
        assert balanced(bob)

        held_back = now()
        for number in range(10):
            await bob.emit(WAITING, number)
            assert bob.stats().queued <= 2
        assert now() - held_back > 7, "who emits here goes no faster than the handler"
        assert now() - held_back < 15


async def test_who_waits_for_one_mailbox_holds_no_place_in_another() -> None:
    """Else: alice holds the last place of the second, waiting for the first, whose handler waits for that place."""
    both, onward = local("box:both", int), local("box:onward", int)
    seen: list[str] = []

    class First(Service):
        name = "first"
        max_mailbox = max_concurrent = 1

        @handles(both)
        async def one(self, msg: Message[int]) -> None:
            await asyncio.sleep(1)
            await self.rt.emit(onward, msg.payload)

    class Second(Service):
        name = "a-second"
        max_mailbox = max_concurrent = 1

        @handles(both)
        async def one(self, msg: Message[int]) -> None:
            seen.append(f"both {msg.payload}")

        @handles(onward)
        async def two(self, msg: Message[int]) -> None:
            seen.append(f"onward {msg.payload}")

    async with Node("alice", Second(), First()) as alice:
        for number in range(5):
            await alice.emit(both, number)
        await asyncio.sleep(10)
        assert sorted(seen) == sorted(f"{what} {number}" for what in ("both", "onward") for number in range(5))
        assert balanced(alice)


async def test_emitters_to_several_mailboxes_all_get_through_at_last() -> None:
    kind = local("box:all", int)

    class Each(Service):
        max_mailbox = max_concurrent = 1

        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds
            self.seen: list[int] = []

        @handles(kind)
        async def take(self, msg: Message[int]) -> None:
            self.seen.append(msg.payload)
            await asyncio.sleep(self.seconds)

    services = [Each("a", 1.0), Each("b", 0.3), Each("c", 0.7)]
    async with Node("alice", *services) as alice:
        await asyncio.gather(*(alice.emit(kind, number) for number in range(20)))
        await asyncio.sleep(5)
        assert now() < 30
        for service in services:
            assert sorted(service.seen) == list(range(20))
        assert len({tuple(service.seen) for service in services}) == 1, "all see them in the same order"


async def test_a_task_that_a_handler_began_does_not_wait_for_its_own_mailbox_either() -> None:
    errors: list[Exception] = []

    class Own(Service):
        name = "own"
        max_mailbox = max_concurrent = 1

        @handles(WAITING)
        async def take(self, msg: Message[int]) -> None:
            if msg.payload == 0:
                async with anyio.create_task_group() as group:
                    for number in (1, 2):
                        group.start_soon(self.emit, number)

        async def emit(self, number: int) -> None:
            try:
                await self.rt.emit(WAITING, number)
            except Overloaded as error:
                errors.append(error)

    async with Node("alice", Own()) as alice:
        await alice.emit(WAITING, 0)
        await asyncio.sleep(1)
        assert len(errors) == 1
        assert alice.stats().handled == 2


async def test_a_background_task_may_wait_for_the_mailbox_of_its_own_service() -> None:
    class Own(Box):
        async def start(self) -> None:
            self.spawn(self.emit_all)

        async def emit_all(self) -> None:
            for number in range(6):
                await self.rt.emit(WAITING, number)

    own = Own()
    async with Node("alice", own):
        await asyncio.sleep(10)
        assert own.seen == list(range(6))


@pytest.mark.parametrize("overflow", ["wait", "refuse", "drop_newest", "drop_oldest"])
async def test_a_message_that_was_put_is_never_lost_nor_doubled(overflow: Overflow) -> None:
    kind = local("box:any", int, overflow=overflow, max_mailbox=5, max_concurrent=2)

    seen: list[int] = []

    class Irregular(Service):
        name = "irregular"

        @handles(kind)
        async def take(self, msg: Message[int]) -> None:
            await asyncio.sleep(0.1 * (msg.payload % 3))
            seen.append(msg.payload)

    async with Node("alice", Irregular()) as alice:
        refused = 0

        async def emit(number: int) -> None:
            nonlocal refused
            await asyncio.sleep(0.02 * number)
            try:
                await alice.emit(kind, number)
            except Overloaded:
                refused += 1
            assert alice.stats().queued <= 5
            assert balanced(alice)

        await asyncio.gather(*(emit(number) for number in range(100)))
        await asyncio.sleep(10)
        stats = alice.stats()
        dropped = sum(stats.dropped.values())
        assert len(set(seen)) == len(seen) == stats.handled
        assert stats.handled + stats.cancelled + dropped == 100
        assert (stats.handled == 100) is (overflow == "wait")
        assert refused == (dropped if overflow == "refuse" else 0)
