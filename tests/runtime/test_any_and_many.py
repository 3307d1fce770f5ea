"""Asking any node that handles a kind, and asking many at once."""

import asyncio
import copy
import pickle
from typing import Any, Self, cast

import anyio
import msgspec
import pytest

from meshkit.errors import (
    CallTimeout,
    Draining,
    NoHandler,
    OutcomeUnknown,
    Overloaded,
    RemoteError,
    Unreachable,
)
from meshkit.runtime import Message, Reject, Replies, Service, TooFewReplies, handles, request
from meshkit.runtime.calls import first_that_takes_it
from meshkit.testing import CancellationPoint
from meshkit.transports import MemoryHub
from tests.runtime.nodes import ODD, SLEEP, STORE, Node, Store, StoreAck, everywhere, mesh
from tests.runtime.test_messages import balanced, settle

WHO = request("who:are_you", float, reply=str)
MORE = request("who:more", float, reply=str)


def now() -> float:
    return asyncio.get_running_loop().time()


class Who(Service):
    """Says on which node it is, after so many seconds; or refuses to."""

    name = "who"

    def __init__(self, code: str = "") -> None:
        self.code = code
        self.asked = 0
        self.cancelled = 0

    @handles(WHO)
    @handles(MORE)
    async def who(self, msg: Message[float]) -> str:
        self.asked += 1
        if self.code:
            raise Reject(self.code)
        try:
            await asyncio.sleep(msg.payload)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.rt.name


class Three:
    """Nodes that handle WHO, and alice, who does not."""

    def __init__(self, **services: Service) -> None:
        self.hub = MemoryHub()
        self.services: dict[str, Any] = services or {name: Who() for name in ("bob", "carol", "dave")}
        self.nodes = {name: Node(name, service, hub=self.hub) for name, service in self.services.items()}
        self.alice = Node("alice", hub=self.hub)

    async def __aenter__(self) -> Self:
        for node in (*self.nodes.values(), self.alice):
            await node.start()
        await settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in (*self.nodes.values(), self.alice):
            await node.stop()


# --- any


async def test_any_node_that_handles_the_kind_is_asked_each_in_its_turn() -> None:
    async with Three() as three:
        asked = [await three.alice.call(WHO, 0.0) for _ in range(9)]
        assert sorted(asked[:3]) == ["bob", "carol", "dave"]
        assert asked == asked[:3] * 3


async def test_two_kinds_that_are_asked_by_turns_do_not_take_each_others_turns() -> None:
    async with Three(bob=Who(), carol=Who()) as three:
        asked = [(await three.alice.call(WHO, 0.0), await three.alice.call(MORE, 0.0)) for _ in range(4)]
        for answers in zip(*asked, strict=True):
            assert sorted(answers) == ["bob", "bob", "carol", "carol"]


async def test_a_node_that_handles_the_kind_asks_itself_too() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], stashes):
        await settle()
        for _ in range(4):
            await alice.call(STORE, Store("x"))
        assert [len(stash.begun) for stash in stashes] == [2, 2]


async def test_a_node_that_refuses_is_passed_over() -> None:
    class Full(Who):
        max_mailbox = 1
        max_concurrent = 1

    async with Three(bob=Full(), carol=Who()) as three:
        calls = [asyncio.create_task(three.alice.call(WHO, 4.0, to="bob"))]
        await settle()
        calls.append(asyncio.create_task(three.alice.call(WHO, 4.0, to="bob")))
        await settle()
        assert [await three.alice.call(WHO, 0.0) for _ in range(4)] == ["carol"] * 4
        assert three.nodes["bob"].stats().dropped == {("who:are_you", "mailbox", "overloaded"): 2}
        await asyncio.gather(*calls)


async def test_a_node_that_ran_and_failed_is_not_passed_over() -> None:
    async with Three(bob=Who("broken"), carol=Who("broken")) as three:
        with pytest.raises(RemoteError):
            await three.alice.call(WHO, 0.0)
        assert sum(service.asked for service in three.services.values()) == 1


async def test_when_all_refuse_the_last_refusal_is_raised() -> None:
    class Full(Who):
        max_mailbox = 1
        max_concurrent = 1

    async with Three(bob=Full(), carol=Full()) as three:
        calls = [asyncio.create_task(three.alice.call(WHO, 5.0, to=node)) for node in ("bob", "carol")]
        await settle()
        calls += [asyncio.create_task(three.alice.call(WHO, 5.0, to=node)) for node in ("bob", "carol")]
        await settle()
        with pytest.raises(Overloaded) as caught:
            await three.alice.call(WHO, 0.0)
        assert caught.value.executed == "no"
        await asyncio.gather(*calls)


async def test_draining_and_silent_nodes_are_not_asked() -> None:
    async with Three() as three:
        busy = asyncio.create_task(three.alice.call(WHO, 3.0, to="bob"))
        await settle()
        stopping = asyncio.create_task(three.nodes["bob"].stop())
        await settle()
        assert three.alice.peers["bob"].draining
        assert {await three.alice.call(WHO, 0.0) for _ in range(6)} == {"carol", "dave"}
        assert three.services["bob"].asked == 1
        assert await busy == "bob"
        await stopping
        three.hub.silence("carol")
        await asyncio.sleep(8)
        assert {await three.alice.call(WHO, 0.0) for _ in range(6)} == {"dave"}


async def test_nobody_handles_the_kind_or_all_that_do_are_draining() -> None:
    async with Three(bob=Who()) as three:
        with pytest.raises(NoHandler) as nobody:
            await three.alice.call(STORE, Store("x"))
        assert nobody.value.executed == "no"
        with pytest.raises(NoHandler):
            await three.alice.call_many(STORE, Store("x"))
        busy = asyncio.create_task(three.alice.call(WHO, 3.0))
        await settle()
        stopping = asyncio.create_task(three.nodes["bob"].stop())
        await settle()
        for verb in (three.alice.call(WHO, 0.0), three.alice.call_many(WHO, 0.0)):
            with pytest.raises(Draining, match="'bob' is draining"):
                await verb
        await asyncio.gather(busy, stopping)


async def test_a_node_that_has_just_started_may_ask_any_before_it_has_heard_of_them() -> None:
    hub = MemoryHub()
    async with Node("bob", Who(), hub=hub), Node("carol", hub=hub), Node("alice", hub=hub) as alice:
        assert await alice.call(WHO, 0.0) == "bob"
        assert now() == 0


async def test_nodes_without_a_heartbeat_are_asked_where_nobody_else_is_known() -> None:
    hub = MemoryHub()
    async with (
        Node("quiet", Who(), hub=hub, heartbeat=None),
        Node("useless", hub=hub, heartbeat=None),
        Node("alice", hub=hub) as alice,
    ):
        assert await alice.call(WHO, 0.0) == "quiet"
        async with Node("bob", Who(), hub=hub):
            await settle()
            assert {await alice.call(WHO, 0.0) for _ in range(6)} == {"bob"}
        with pytest.raises(NoHandler):
            await alice.call(STORE, Store("x"))


async def test_all_that_are_asked_share_one_timeout() -> None:
    """The first refuses late: when it stops after its grace. The second is given what is left."""

    class One(Who):
        max_concurrent = 1

    hub = MemoryHub()
    nodes = [Node(name, One(), hub=hub, grace=3) for name in ("bob", "carol")]
    async with Node("alice", hub=hub) as alice:
        for node in nodes:
            await node.start()
        await settle()
        busy = [asyncio.create_task(alice.call(WHO, 100.0, to=node.name, timeout=200)) for node in nodes]
        await settle()
        begun = now()
        asked = asyncio.create_task(alice.call(WHO, 0.0, timeout=5))
        await asyncio.sleep(1)
        [first] = [node for node in nodes if node.stats().queued]
        [second] = [node for node in nodes if node is not first]
        stopping = asyncio.create_task(first.stop())
        await asyncio.sleep(3.5)
        assert second.stats().queued == 1
        with pytest.raises(CallTimeout, match=rf"on node {second.name!r}: no result within 1 s"):
            await asked
        assert now() == begun + 5
        await stopping
        await second.stop()
        await asyncio.gather(*busy, return_exceptions=True)


async def test_a_refusal_that_comes_as_time_runs_out_is_raised() -> None:
    """Not a complaint about the time that is left for the next one, which is none."""

    async def refuse(node: str, left: float) -> str:
        asked.append((node, left))
        await asyncio.sleep(2)
        raise Draining(node=node)

    asked: list[tuple[str, float]] = []
    with pytest.raises(Draining, match="'bob'"):
        await first_that_takes_it(["alice", "bob", "carol"], 4.0, refuse)
    assert asked == [("alice", 4.0), ("bob", 2.0)]


async def test_a_repeated_request_goes_to_the_node_that_was_asked() -> None:
    async with mesh("alice") as (_, [alice], _):
        with pytest.raises(ValueError, match="id needs to"):
            await alice.call(STORE, Store("x"), id="5f")


def test_asking_any_can_be_cancelled_anywhere_and_nothing_is_left() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async with mesh("alice", "bob") as (_, nodes, stashes):
            await settle()

            async def ask() -> None:
                for _ in range(2):
                    await nodes[0].call(SLEEP, 1.0)

            await point.cancel(ask())
            await asyncio.sleep(0.1)
            assert [stash.begun for stash in stashes] == [stash.ended + stash.cancelled for stash in stashes]
            assert all(map(balanced, nodes))
            assert nodes[0].stats().pending == 0

    everywhere(scenario)


# --- many


async def test_many_are_asked_at_once_and_each_has_a_reply_or_an_error() -> None:
    async with Three(bob=Who(), carol=Who("broken"), dave=Who()) as three:
        replies = await three.alice.call_many(WHO, 1.0, [*three.nodes, "zoe"])
        assert now() == pytest.approx(1.001)
        assert replies.replies == {"bob": "bob", "dave": "dave"}
        assert {node: type(error) for node, error in replies.errors.items()} == {
            "carol": RemoteError,
            "zoe": Unreachable,
        }


async def test_by_default_all_that_handle_the_kind_are_asked_this_node_too() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], stashes), Node("carol", hub=hub):
        await settle()
        replies = await alice.call_many(STORE, Store("x", b"123"))
        assert replies == Replies({"alice": StoreAck(3), "bob": StoreAck(3)}, {})
        assert [stash.begun for stash in stashes] == [["x"], ["x"]]


async def test_the_tasks_that_ask_say_whose_they_are_and_whom_they_ask() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        await settle()
        before = asyncio.all_tasks()
        many = asyncio.ensure_future(alice.call_many(SLEEP, 1.0))
        await settle()
        names = {task.get_name() for task in asyncio.all_tasks() - before - {many}}
        assert {name for name in names if "worker" not in name} == {
            f"meshkit:alice:runtime:call stash:sleep on {node}" for node in ("alice", "bob")
        }
        await many


async def test_a_node_that_is_named_twice_is_asked_once_and_who_asks_nobody_hears_nothing() -> None:
    async with Three() as three:
        replies = await three.alice.call_many(WHO, 0.0, ["bob", "carol", "bob"], quorum=2)
        assert replies.replies == {"bob": "bob", "carol": "carol"}
        assert three.services["bob"].asked == 1
        assert await three.alice.call_many(WHO, 0.0, []) == Replies({}, {})


async def test_with_a_quorum_the_slow_ones_are_not_waited_for_but_cancelled() -> None:
    class Slow(Who):
        async def who(self, msg: Message[float]) -> str:
            return await super().who(msgspec.structs.replace(msg, payload=100.0))

    async with Three(bob=Who(), carol=Slow(), dave=Who()) as three:
        begun = now()
        replies = await three.alice.call_many(WHO, 1.0, quorum=2)
        assert now() - begun == pytest.approx(1)
        assert replies == Replies({"bob": "bob", "dave": "dave"}, {})
        await settle()
        assert three.services["carol"].cancelled == 1
        assert balanced(three.nodes["carol"])


async def test_a_quorum_that_cannot_be_reached_any_more_fails_at_once() -> None:
    async with Three(bob=Who("one"), carol=Who("two"), dave=Who()) as three:
        begun = now()
        with pytest.raises(TooFewReplies) as caught:
            await three.alice.call_many(WHO, 5.0, quorum=2)
        assert now() == begun
        error = caught.value
        assert isinstance(error, OutcomeUnknown), "it has run where it failed: a Retrier must not take it for refused"
        assert error.executed == "maybe"
        assert (error.quorum, error.replies, sorted(error.errors)) == (2, {}, ["bob", "carol"])
        assert str(error).startswith("'who:are_you' from node 'alice': fewer than 2 replies came (")
        assert "with code 'one'" in str(error)
        await settle()
        assert three.services["dave"].cancelled == 1


async def test_too_few_replies_where_nothing_ran_says_so() -> None:
    async with Three() as three:
        with pytest.raises(TooFewReplies) as caught:
            await three.alice.call_many(WHO, 0.0, ["bob", "zoe"], quorum=3)
        assert caught.value.executed == "no"
        assert str(caught.value) == "'who:are_you' from node 'alice': fewer than 3 replies came"
        assert three.services["bob"].asked == 0, "nobody was asked in vain"
        with pytest.raises(TooFewReplies) as caught:
            await three.alice.call_many(WHO, 0.0, ["yves", "zoe"], quorum=1)
        assert caught.value.executed == "no"
        with pytest.raises(TooFewReplies) as caught:
            await three.alice.call_many(WHO, 0.0, ["bob", "yves", "zoe"], quorum=2)
        assert caught.value.executed == "maybe", "bob may have begun"


async def test_too_few_replies_pickle_and_copy_with_all_that_they_have() -> None:
    error = TooFewReplies(
        name="ask",
        quorum=4,
        replies={"bob": StoreAck(3)},
        errors={name: Draining(node=name) for name in ("carol", "dave", "erin", "frank")},
    )
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == str(error)
        assert str(other).endswith("; and 1 others)")
        assert other.replies == {"bob": StoreAck(3)}
        assert [*other.errors] == ["carol", "dave", "erin", "frank"]
        assert all(isinstance(error, Draining) for error in other.errors.values())
        assert (other.executed, other.quorum) == ("maybe", 4)
    error.replies = {"bob": lambda: 3}
    assert str(pickle.loads(pickle.dumps(error))) == str(error), (
        "a reply that does not pickle spoils no more than itself"
    )
    replies = Replies({"bob": StoreAck(3)}, {"carol": Draining(node="carol")})
    again = pickle.loads(pickle.dumps(replies))
    assert again.replies == replies.replies
    assert str(again.errors["carol"]) == str(replies.errors["carol"])


async def test_what_is_asked_wrongly_is_raised_as_it_is() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], stashes):
        await settle()
        with pytest.raises(TypeError, match="the payload must be Store"):
            await alice.call_many(STORE, cast("Store", "x"))
        with pytest.raises(TypeError, match="Encoding objects of type object is unsupported"):
            await alice.call_many(STORE, Store("x", cast("bytes", object())), ["alice", "bob"])
        with pytest.raises(ValueError, match="timeout must be"):
            await alice.call_many(STORE, Store("x"), ["alice", "bob"], timeout=-1)
        with pytest.raises(ValueError, match="quorum must be"):
            await alice.call_many(STORE, Store("x"), quorum=0)
        with pytest.raises(TypeError, match=r"to must be ids of nodes, as in \['bob'\], not one string"):
            await alice.call_many(STORE, Store("x"), "bob")
        assert [stash.begun for stash in stashes] == [[], []]


async def test_who_has_not_answered_in_time_is_an_error_of_its_own() -> None:
    async with Three() as three:
        three.hub.silence("carol")
        replies = await three.alice.call_many(WHO, 0.0, timeout=2)
        assert sorted(replies.replies) == ["bob", "dave"]
        assert isinstance(replies.errors["carol"], CallTimeout)


async def test_an_enclosing_deadline_ends_them_all() -> None:
    async with Three() as three:
        begun = now()
        with anyio.move_on_after(2) as scope:
            await three.alice.call_many(WHO, 100.0, timeout=50)
        assert scope.cancelled_caught
        assert now() - begun == 2
        await settle()
        assert [service.cancelled for service in three.services.values()] == [1, 1, 1]


def test_asking_many_can_be_cancelled_anywhere_and_all_are_cancelled() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async with mesh("alice", "bob", "carol") as (_, nodes, stashes):
            await settle()
            before = asyncio.all_tasks()
            if not await point.cancel(nodes[0].call_many(SLEEP, 1.0, quorum=2)):
                assert len(point.result.replies) >= 2
            await asyncio.sleep(0.1)
            assert [stash.begun for stash in stashes] == [stash.ended + stash.cancelled for stash in stashes]
            assert all(map(balanced, nodes))
            assert nodes[0].stats().pending == 0
            assert all("worker" in task.get_name() for task in asyncio.all_tasks() - before)

    everywhere(scenario)


async def test_a_failure_holds_no_frame_that_holds_it() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        replies = await alice.call_many(ODD, "raise", ["bob"])
        assert replies.errors["bob"].__traceback__ is None
