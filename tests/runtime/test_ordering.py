"""Order: messages of the same key are handled one after the other, whatever else happens."""

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, strategies as st

from meshkit.errors import CallTimeout, NotAccepted
from meshkit.retrier import RetryPolicy
from meshkit.runtime import Message, Service, broadcast, handles, local, request
from meshkit.runtime.backlog import Backlog
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.supervisor import Supervisor
from meshkit.testing import run
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node
from tests.runtime.test_messages import balanced


class Item:
    """Runs `1 + len(rests)` times for `seconds`, with these rests between."""

    def __init__(self, name: int, key: object, seconds: float, rests: list[float]) -> None:
        self.name, self.key, self.seconds, self.rests = name, key, seconds, rests
        self.size, self.number = 1, 0
        self.state = "waits"  # or "runs", "rests" until `until`, "gone"
        self.until = 0.0

    def __repr__(self) -> str:
        return f"{self.name}({self.key})"


class Naive:
    """The model: a list of all items in order of arrival, searched from its start each time."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def there(self) -> list[Item]:
        return [item for item in self.items if item.state != "gone"]

    def outside(self) -> list[Item]:
        return [item for item in self.there() if item.state != "runs"]

    def next(self, now: float) -> Item | None:
        """Return the oldest of those before which there is no other one with their key."""
        keys: set[object] = set()
        for item in self.there():
            rested = item.state == "rests" and item.until <= now
            if item.key not in keys and (item.state == "waits" or rested):
                return item
            if item.key is not None:
                keys.add(item.key)
        return None


steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "discard", "drop oldest", "pause"]),
        st.sampled_from([None, "a", "b", "c"]),
        st.integers(0, 5),
        st.lists(st.integers(0, 5), max_size=2),
    ),
    max_size=40,
)


@given(st.integers(1, 4), st.booleans(), steps)
def test_the_oldest_goes_first_of_which_no_older_one_has_the_key(
    max_concurrent: int, end_early: bool, program: list[tuple[str, Any, int, list[int]]]
) -> None:
    async def main() -> None:
        naive = Naive()
        now = asyncio.get_running_loop().time
        supervisor = Supervisor("meshkit:alice:x", lambda *_: None)

        async def handle(item: Item, _scope: anyio.CancelScope) -> float | None:
            assert item is naive.next(now()), "another one was to be next"
            item.state = "runs"
            assert sum(other.state == "runs" for other in naive.items) <= max_concurrent
            await asyncio.sleep(item.seconds)
            if not item.rests:
                item.state = "gone"
                return None
            delay = item.rests.pop()
            item.state, item.until = "rests", now() + delay
            return delay

        box: Mailbox[Item] = Mailbox(
            "box", handle, supervisor.spawn, max_mailbox=8, max_bytes=100, max_concurrent=max_concurrent
        )
        box.open()
        for number, (verb, key, argument, rests) in enumerate(program):
            odd = number * 0.0001  # so that no two things happen at the same time
            outside = naive.outside()
            if verb == "put" and box.has_room(1):
                item = Item(number, key, argument + odd, [rest + odd / 7 for rest in rests])
                naive.items.append(item)
                box.offer(item)
            elif verb == "discard" and naive.items:
                item = naive.items[argument % len(naive.items)]
                assert box.discard(item) is (item in outside)
                if item in outside:
                    item.state = "gone"
            elif verb == "drop oldest" and len(outside) >= 8:
                dropped = box.discard_oldest(1)
                assert dropped == outside[: len(outside) - 7]
                for item in dropped:
                    item.state = "gone"
            elif verb == "pause":
                await asyncio.sleep(argument / 2 + odd / 3)
                await settle()
                idle = max_concurrent - sum(item.state == "runs" for item in naive.items)
                assert not idle or naive.next(now()) is None, "a worker is free, and something could run"
            assert len(box) == len(naive.outside())
            assert box._backlog.bytes == len(naive.outside())
        if end_early:
            assert box.close() == naive.outside()
        else:
            await box.quiet()
            assert naive.there() == []
            assert box._backlog._lines == {}
            box.close()
        assert await supervisor.end(20.0) == []

    run(main)


def test_what_comes_back_goes_where_it_belongs() -> None:
    backlog: Backlog[Item] = Backlog(10, 10)
    items = [Item(number, None, 0.0, []) for number in range(4)]
    for item in items:
        backlog.add(item)
    for item in [backlog.take() for _ in range(3)]:
        backlog.rest(item)
    for at in (0, 2, 1):
        backlog.end_rest(items[at])
    assert [backlog.take() for _ in items] == items


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


EVENT = local("log:event", tuple[str, int], order_by=lambda msg: msg.payload[0], max_concurrent=8, max_mailbox=1000)
FLAKY = local(
    "log:flaky",
    tuple[str, int],
    order_by=lambda msg: msg.payload[0],
    retry=RetryPolicy(max_retries=5, base_delay=1.0, jitter=False),
)
TELL = broadcast("log:tell", int, order_by="sender")
ASK = request("log:ask", tuple[str, float], reply=str, order_by=lambda msg: msg.payload[0], max_concurrent=8)


class Log(Service):
    """Writes down what begins and ends."""

    name = "log"

    def __init__(self) -> None:
        self.diary: list[Any] = []
        self.failures: dict[Any, int] = {}

    @handles(EVENT)
    @handles(FLAKY)
    async def event(self, msg: Message[tuple[str, int]]) -> None:
        self.diary.append(msg.payload)
        await asyncio.sleep(1)
        if self.failures.get(msg.payload, 0) > 0:
            self.failures[msg.payload] -= 1
            raise ValueError(msg.payload)
        self.diary.append((*msg.payload, "done"))

    @handles(TELL)
    async def tell(self, msg: Message[int]) -> None:
        self.diary.append((msg.sender, msg.payload))
        await asyncio.sleep(1.0 if msg.sender == "alice" else 0.1)

    @handles(ASK)
    async def ask(self, msg: Message[tuple[str, float]]) -> str:
        self.diary.append(msg.payload)
        await asyncio.sleep(msg.payload[1])
        return msg.payload[0]


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_messages_of_a_key_wait_for_each_other_and_other_keys_do_not_wait() -> None:
    log = Log()
    async with Node("alice", log) as alice:
        for number in range(5):
            await alice.emit(EVENT, ("slow", number))
        await alice.emit(EVENT, ("other", 0))
        await asyncio.sleep(0.5)
        assert log.diary == [("slow", 0), ("other", 0)]
        await asyncio.sleep(10)
        ends = [entry for entry in log.diary if entry[0] == "slow"]
        assert ends == [x for n in range(5) for x in (("slow", n), ("slow", n, "done"))]


async def test_what_is_retried_keeps_its_place_before_those_with_its_key_and_no_worker() -> None:
    log = Log()
    log.failures["a", 0] = 2
    log.max_concurrent = 1
    async with Node("alice", log) as alice:
        for payload in [("a", 0), ("a", 1), ("b", 0), ("b", 1)]:
            await alice.emit(FLAKY, payload)
        await asyncio.sleep(1.5)
        assert log.diary == [("a", 0), ("b", 0)], "while it rests, another key has the worker"
        await asyncio.sleep(20)
        assert [entry for entry in log.diary if entry[0] == "a"] == [
            ("a", 0),
            ("a", 0),
            ("a", 0),
            ("a", 0, "done"),
            ("a", 1),
            ("a", 1, "done"),
        ]
        assert alice.stats().retried == 2
        assert alice.stats().handled == 4


async def test_one_that_fails_for_good_lets_the_next_of_its_key_go() -> None:
    log = Log()
    log.failures["a", 0] = 100
    async with Node("alice", log) as alice:
        await alice.emit(FLAKY, ("a", 0))
        await alice.emit(FLAKY, ("a", 1))
        await asyncio.sleep(100)
        assert log.diary == [("a", 0)] * 6 + [("a", 1), ("a", 1, "done")]
        assert alice.stats().failed == 1


async def test_a_call_that_is_cancelled_leaves_its_line_wherever_it_stands() -> None:
    log = Log()
    async with Node("alice", log) as alice:
        calls = [asyncio.create_task(alice.call(ASK, ("a", 2.0 + n), to="alice", timeout=60)) for n in range(4)]
        await asyncio.sleep(1)
        calls[1].cancel()  # it stands in line
        calls[0].cancel()  # it runs
        assert await calls[2] == "a"
        assert log.diary == [("a", 2.0), ("a", 4.0), ("a", 5.0)]
        assert await calls[3] == "a"
        assert now() == 1 + 4 + 5
        assert balanced(alice)


async def test_a_call_in_line_that_times_out_does_not_stop_those_behind_it() -> None:
    log = Log()
    async with Node("alice", log) as alice:
        first = asyncio.create_task(alice.call(ASK, ("a", 5.0), to="alice"))
        await settle()
        with pytest.raises(CallTimeout):
            await alice.call(ASK, ("a", 1.0), to="alice", timeout=2)
        assert await alice.call(ASK, ("a", 1.5), to="alice") == "a"
        assert log.diary == [("a", 5.0), ("a", 1.5)]
        assert await first == "a"


async def test_each_sender_has_an_order_of_its_own() -> None:
    hub, log = MemoryHub(), Log()
    async with Node("alice", hub=hub) as alice, Node("bob", hub=hub) as bob, Node("carol", log, hub=hub):
        for number in range(20):
            await alice.emit(TELL, number, to="carol")
            await bob.emit(TELL, number, to="carol")
        await asyncio.sleep(5)
        assert [n for sender, n in log.diary if sender == "bob"] == list(range(20)), "who is fast does not wait"
        await asyncio.sleep(30)
        assert [n for sender, n in log.diary if sender == "alice"] == list(range(20))


async def test_none_is_a_key_like_any_other() -> None:
    kind = local("log:none", int, order_by=lambda msg: None)

    seen: list[tuple[int, float]] = []

    class One(Service):
        name = "one"

        @handles(kind)
        async def one(self, msg: Message[int]) -> None:
            await asyncio.sleep(1)
            seen.append((msg.payload, now()))

    async with Node("alice", One()) as alice:
        for number in range(3):
            await alice.emit(kind, number)
        await asyncio.sleep(10)
    assert seen == [(0, 1), (1, 2), (2, 3)]


async def test_no_key_starves_while_others_flood() -> None:
    log = Log()
    async with Node("alice", log) as alice:

        async def flood(key: str) -> None:
            for number in range(200):
                await alice.emit(EVENT, (key, number))
                await asyncio.sleep(0.1)

        floods = [asyncio.create_task(flood(key)) for key in "abcdefghij"]
        await asyncio.sleep(5)
        before = len(log.diary)
        await alice.emit(EVENT, ("quiet", 0))
        waiting = alice.stats().queued
        while ("quiet", 0) not in log.diary:
            await asyncio.sleep(0.1)
        begun = [entry for entry in log.diary[before:] if len(entry) == 2]
        assert len(begun) <= waiting + 8, "nobody who came later has overtaken it"
        await asyncio.gather(*floods)


def _raise(_: Any) -> Any:
    raise LookupError("no such field")


@pytest.mark.parametrize("order_by", [_raise, lambda _: ["unhashable"], lambda _: ("deep", {})])
async def test_a_message_without_a_usable_key_fails_as_by_its_handler(order_by: Callable[[Any], Any]) -> None:
    policy = RetryPolicy(max_retries=3)
    stored = local("odd:local", int, order_by=order_by, on_error="dead_letter", retry=policy)
    told = broadcast("odd:broadcast", int, order_by=order_by, on_error="dead_letter", retry=policy)
    asked = request("odd:request", int, reply=int, order_by=order_by, on_error="dead_letter", retry=policy)

    class Odd(Service):
        name = "odd"

        @handles(stored)
        @handles(told)
        async def one(self, msg: Message[int]) -> None:
            pytest.fail("it was handled")

        @handles(asked)
        async def two(self, msg: Message[int]) -> int:
            pytest.fail("it was handled")

    hub = MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", Odd(), hub=hub) as bob:
        await bob.emit(stored, 1)
        await alice.emit(told, 2)
        with pytest.raises(NotAccepted, match="its stage 'order_by' failed"):
            await alice.call(asked, 3, to="bob")
        assert now() < 1, "another try would be of no use"
        letters = [(letter.message.payload, letter.stage, letter.attempts) for letter in bob.dead_letters]
        assert letters == [(1, "order_by", 1), (2, "order_by", 1), (3, "order_by", 1)]
        assert bob.stats().failed == 3
        assert "odd.two failed at order_by on 'odd:request' from node 'alice'" in bob.logged
        assert bob.replay(bob.dead_letters[0])
        await settle()
        assert [letter.message.payload for letter in bob.dead_letters] == [2, 3, 1]
        assert balanced(bob)
