"""What is emitted: local kinds, broadcasts, and messages to one node."""

import asyncio
from contextvars import ContextVar
from typing import Any, cast

import msgspec
import pytest
import structlog

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime import Message, Runtime, Service, broadcast, handles, local, request
from meshkit.runtime.wire import Ask, Tell, encode_payload
from meshkit.testing import CancellationPoint
from meshkit.transports import MemoryHub
from tests.runtime.nodes import SLEEP, STORE, STORED, TEASE, Node, Stash, Store, everywhere, mesh, plain

NUMBER = local("slow:number", int)
NUMBERS = broadcast("slow:numbers", int)


class Slow(Service):
    """Takes a second for everything, one after the other."""

    name = "slow"
    max_mailbox = 2
    max_concurrent = 1

    def __init__(self, name: str = "slow") -> None:
        self.name = name
        self.seen: list[int] = []

    @handles(NUMBER)
    @handles(NUMBERS)
    async def number(self, msg: Message[int]) -> None:
        await asyncio.sleep(1)
        self.seen.append(msg.payload)


async def settle() -> None:
    await asyncio.sleep(0.001)


async def test_a_local_message_is_the_very_object_and_stays_on_its_node() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], [stash, other]):
        payload = ["a"]
        message_id = await alice.emit(STORED, payload)
        await settle()
        [message] = stash.stored
        assert message.payload is payload
        assert (message.id, message.kind, message.sender) == (message_id, "stash:stored", "alice")
        assert message.time == 1_767_225_600.0
        assert message.deadline == float("inf")
        assert other.stored == []


async def test_a_broadcast_reaches_every_node_the_emitter_included_each_with_a_copy_of_its_own() -> None:
    async with mesh("alice", "bob", "carol") as (_, [alice, *_], stashes):
        message_id = await alice.emit(TEASE, "bob")
        await settle()
        for stash in stashes:
            [message] = stash.teases
            assert message == Message(message_id, "social:tease", "alice", "bob", 1_767_225_600.0)
        assert len({id(stash.teases[0]) for stash in stashes}) == 3


async def test_a_broadcast_may_go_to_one_node_alone() -> None:
    async with mesh("alice", "bob", "carol") as (_, [alice, *_], [own, bobs, carols]):
        await alice.emit(TEASE, "psst", to="bob")
        await alice.emit(TEASE, "note to self", to="alice")
        await settle()
        assert [[tease.payload for tease in stash.teases] for stash in (own, bobs, carols)] == [
            ["note to self"],
            ["psst"],
            [],
        ]
        with pytest.raises(Unreachable, match="node 'dave' cannot be reached: node 'alice' can reach bob, carol"):
            await alice.emit(TEASE, "hello?", to="dave")


async def test_ids_are_128_random_bits() -> None:
    async with Node("alice", Stash()) as alice:
        ids = {await alice.emit(STORED, []) for _ in range(100)}
        assert len(ids) == 100
        assert {len(bytes.fromhex(message_id)) for message_id in ids} == {16}


async def test_a_node_without_a_transport_is_alone_but_whole() -> None:
    stash = Stash()
    async with Node("alice", stash) as alice:
        assert alice.peers == {}
        await alice.emit(TEASE, "me")
        assert (await alice.call(STORE, Store("f", b"123"), to="alice")).size == 3
        await settle()
        assert [tease.payload for tease in stash.teases] == ["me"]
        with pytest.raises(Unreachable, match="node 'bob' cannot be reached: node 'alice' can reach nobody"):
            await alice.emit(TEASE, "bob", to="bob")


async def test_a_local_kind_cannot_be_sent_away_and_a_request_not_emitted() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        with pytest.raises(ValueError, match="never leaves its node, so it cannot be emitted to 'bob'"):
            await alice.emit(STORED, [], to="bob")
        with pytest.raises(TypeError, match=r"is for call\(\), if it is a request"):
            await alice.emit(cast("Any", STORE), Store("f"))


async def test_a_payload_of_another_type_is_refused_where_it_is_emitted() -> None:
    async with Node("alice") as alice:
        with pytest.raises(TypeError, match="social:tease: the payload must be str, not int"):
            await alice.emit(TEASE, cast("Any", 3))
        with pytest.raises(TypeError, match="unsupported"):
            await alice.emit(broadcast("x:any", list[object]), [object()])
        assert alice.stats().sent == 0


async def test_what_nobody_here_handles_is_counted_but_for_broadcasts_of_its_own_which_are_for_others() -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        await alice.emit(local("x:unheard", int), 1)
        await alice.emit(broadcast("x:unheard", int), 1)
        await settle()
        assert alice.stats().dropped == {("x:unheard", "kind", "no_handler"): 1}
        assert bob.stats().dropped == {("", "kind", "no_handler"): 1}
        await alice.emit(broadcast("x:unheard", int), 1, to="alice")
        assert alice.stats().dropped["", "kind", "no_handler"] == 1, "it was meant for this very node"


async def test_an_emit_waits_while_a_mailbox_is_full() -> None:
    slow = Slow()
    async with Node("alice", slow) as alice:
        loop = asyncio.get_running_loop()
        emitted = []
        for number in range(5):
            await alice.emit(NUMBER, number)
            emitted.append(loop.time())
        assert emitted == [0, 0, 0, 1, 2], "one is handled, two wait, the others wait for room"
        await asyncio.sleep(10)
        assert slow.seen == [0, 1, 2, 3, 4]


def test_a_cancelled_emit_has_delivered_nothing_to_anybody() -> None:
    async def scenario(point: CancellationPoint) -> None:
        slow, other = Slow(), Slow("other")
        other.max_mailbox = 1
        async with Node("alice", slow, other) as alice:
            for number in range(2):
                await alice.emit(NUMBER, number)
            waiting = asyncio.create_task(point.cancel(alice.emit(NUMBER, 7)))
            await asyncio.sleep(0)
            behind = asyncio.create_task(alice.emit(NUMBER, 8))
            cancelled = await waiting
            await behind
            await asyncio.sleep(20)
            expected = [0, 1, 8] if cancelled else [0, 1, 7, 8]
            assert slow.seen == other.seen == expected

    everywhere(scenario)


async def test_broadcasts_are_dropped_and_counted_where_there_is_no_room() -> None:
    hub, slow, fast = MemoryHub(), Slow(), Slow()
    fast.max_mailbox = 100
    async with Node("alice", slow, hub=hub) as alice, Node("bob", fast, hub=hub) as bob:
        for number in range(5):
            await alice.emit(NUMBERS, number)
        assert alice.stats().dropped == {("slow:numbers", "mailbox", "overloaded"): 3}, (
            "the newest; a worker had not begun yet"
        )
        assert bob.stats().dropped == {}
        await asyncio.sleep(10)
        assert slow.seen == [0, 1]
        assert fast.seen == [0, 1, 2, 3, 4]


async def test_a_handler_that_emits_to_its_own_full_mailbox_is_told_so() -> None:
    class Echo(Service):
        name = "echo"
        max_mailbox = 1
        max_concurrent = 1

        def __init__(self) -> None:
            self.errors: list[Overloaded] = []

        @handles(NUMBER)
        async def number(self, msg: Message[int]) -> None:
            if msg.payload == 0:
                await self.rt.emit(NUMBER, 1)
                with pytest.raises(Overloaded) as caught:
                    await self.rt.emit(NUMBER, 2)
                self.errors.append(caught.value)

    echo = Echo()
    async with Node("alice", echo) as alice:
        await alice.emit(NUMBER, 0)
        await settle()
        [error] = echo.errors
        assert str(error) == "mailbox of service 'echo' on node 'alice': full, it holds 1 already"


async def test_a_handler_that_raises_is_logged_with_its_traceback_and_the_others_go_on() -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], [own, other]):
        message_id = await alice.emit(TEASE, "raise")
        await alice.emit(TEASE, "next")
        await settle()
        for node, stash in ((alice, own), (bob, other)):
            assert [tease.payload for tease in stash.teases] == ["raise", "next"]
            assert "stash.tease failed on 'social:tease' from node 'alice'" in node.logged
            assert message_id in node.logged
            assert "ValueError: a secret" in node.logged
            assert (node.stats().handled, node.stats().failed) == (1, 1)


async def test_messages_of_one_sender_begin_in_order() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], [_, stash]):
        for number in range(500):
            await alice.emit(TEASE, str(number), to="bob")
        await settle()
        assert [tease.payload for tease in stash.teases] == [str(number) for number in range(500)]


async def test_a_message_that_is_not_what_was_declared_reaches_no_handler() -> None:
    async with mesh("alice", "bob") as (hub, [_, bob], [_, stash]):
        payloads: list[object] = [3, ["x"], None, {}]
        for payload in payloads:
            hub.send("alice", "bob", plain(Tell("1", "social:tease", 1, 0.0, encode_payload(payload))))
        hub.send("alice", "bob", plain(Tell("1", "social:tease", 1, 0.0, msgspec.Raw(b"\xa3\xff\xff\xff"))))
        hub.send("alice", "bob", plain(Tell("1", "social:tease", 1, 0.0, msgspec.Raw(b"\xa3x"))))
        await settle()
        assert stash.teases == []
        assert sum(bob.stats().dropped.values()) == 6


async def test_local_kinds_and_requests_cannot_be_told_from_outside() -> None:
    async with mesh("alice", "bob") as (hub, [_, bob], [_, stash]):
        hub.send("alice", "bob", plain(Tell("1", "stash:stored", 1, 0.0, encode_payload(["x"]))))
        hub.send("alice", "bob", plain(Tell("1", "stash:store", 1, 0.0, encode_payload(Store("x")))))
        hub.send("alice", "bob", plain(Ask("1", "stash:stored", 1, 0.0, 1000, encode_payload(["x"]))))
        hub.send("alice", "bob", plain(Ask("1", "social:tease", 1, 0.0, 1000, encode_payload("x"))))
        await settle()
        assert (stash.stored, stash.teases, stash.begun) == ([], [], [])
        assert bob.stats().dropped == {
            ("stash:stored", "kind", "no_handler"): 2,
            ("stash:store", "kind", "no_handler"): 1,
            ("social:tease", "kind", "no_handler"): 1,
        }


async def test_before_the_start_and_after_the_stop_nothing_is_sent() -> None:
    node = Node("alice", Stash())
    with pytest.raises(RuntimeError, match="node 'alice' is not running: use `async with`, or"):
        await node.emit(TEASE, "x")
    async with node:
        pass
    for verb in (node.emit(TEASE, "x"), node.emit(STORED, []), node.call(SLEEP, 1.0, to="alice")):
        with pytest.raises(Closed, match="node 'alice' is closed") as caught:
            await verb
        assert caught.value.executed == "no"


async def test_the_books_balance() -> None:
    async with mesh("alice", "bob") as (_, nodes, _):
        for payload in ("x", "raise", "y"):
            await nodes[0].emit(TEASE, payload)
        tasks = [asyncio.create_task(nodes[0].call(SLEEP, 100.0, to="bob", timeout=5 + n)) for n in range(3)]
        for _ in range(100):
            await asyncio.sleep(0.1)
            for node in nodes:
                assert balanced(node)
        assert nodes[0].stats().pending == 0
        assert nodes[1].stats().cancelled == 3
        await asyncio.gather(*tasks, return_exceptions=True)


def balanced(node: Runtime) -> bool:
    stats = node.stats()
    ended = stats.handled + stats.failed + stats.cancelled + stats.cut
    return stats.delivered == ended + stats.queued + stats.running


USER: ContextVar[str] = ContextVar("user", default="nobody")
LOGIN = request("forgetful:login", str, reply=str)


class Forgetful(Service):
    name = "forgetful"

    @handles(LOGIN)
    async def login(self, msg: Message[str]) -> str:
        before = USER.get()
        USER.set(msg.payload)
        structlog.contextvars.bind_contextvars(user=msg.payload)
        await asyncio.sleep(0)
        self.log.info("logged in")
        return before


async def test_the_context_variables_that_a_handler_sets_are_seen_by_no_other_handler_and_in_no_other_line() -> None:
    node = Node("alice", Forgetful())
    token = USER.set("host")
    async with node:
        USER.reset(token)
        assert [await node.call(LOGIN, f"bob{n}", to="alice") for n in range(3)] == ["host"] * 3
    for n in range(3):
        [line] = [line for line in node.logged.splitlines() if f"bob{n}" in line]
        assert line.count("user=") == 1
