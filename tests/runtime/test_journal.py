"""The journal: what became of messages, in numbers and in stories."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from meshkit.errors import CallTimeout, RemoteError, Unreachable
from meshkit.events import Event
from meshkit.runtime import Drop, MessageDropped, MessageSent, Reject, Service, Stage, broadcast, handles, request
from meshkit.runtime.journal import MAX_NOTE, Journal
from meshkit.runtime.message import Message
from meshkit.transports import MemoryHub
from tests.runtime.nodes import ODD, SLEEP, STORE, STORED, TEASE, Node, Stash, Store, mesh

WORDS = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS)))
def test_every_drop_is_counted_and_told_and_the_latest_are_kept(drops: list[tuple[str, str, str, str]]) -> None:
    events: list[Event] = []
    journal = Journal(events.append)
    journal.drops = type(journal.drops)(maxlen=5)
    for kind, stage, reason, message_id in drops:
        journal.drop(kind, stage, reason, message_id, "alice")
    assert journal.dropped == Counter((kind, stage, reason) for kind, stage, reason, _ in drops)
    expected = [MessageDropped(kind, stage, reason, message_id, "alice") for kind, stage, reason, message_id in drops]
    assert events == expected
    assert [*journal.drops] == expected[-5:]
    for wanted in "abc":
        lines = [f"dropped at {stage}: {why}, from node 'alice'" for _, stage, why, of in drops if of == wanted]
        assert journal.explain(wanted).splitlines()[1:] == [
            f"  {line}" for line in lines or ["nothing is remembered of it here"]
        ]


def test_all_is_bounded_however_many_messages_and_reasons_there_are() -> None:
    journal = Journal()
    count = Journal.NOTES + Journal.REASONS + 5
    for number in range(count):
        journal.drop("x", "stage", f"reason {number}", f"{number}")
    assert len(journal.drops) == Journal.DROPS
    assert len(journal.dropped) == Journal.REASONS + 1
    assert journal.dropped["x", "stage", "other"] == count - Journal.REASONS
    assert journal.dropped.total() == count
    journal.drop("x", "stage", "reason 0", "again")
    assert journal.dropped["x", "stage", "reason 0"] == 2, "a reason that is known is counted as ever"
    assert "nothing is remembered" in journal.explain("0")
    assert "dropped at stage" in journal.explain(f"{count - 1}")


def test_of_what_a_drop_says_so_much_is_kept_and_no_more() -> None:
    journal = Journal()
    journal.drop("x", "stage", "y" * 1_000_000, "5f", "alice", "z" * 1_000_000)
    [dropped] = journal.drops
    assert (dropped.reason, dropped.detail) == ("y" * MAX_NOTE, "z" * MAX_NOTE)
    assert journal.dropped == {("x", "stage", "y" * MAX_NOTE): 1}
    assert len(journal.explain("5f")) < MAX_NOTE + 100


def test_nothing_that_others_say_passes_for_a_step_of_its_own() -> None:
    journal = Journal()
    journal.drop("x", "stage", "odd\n  answered by node 'bob'\x1b[2J", "5f")
    assert journal.explain("5f").splitlines()[1:] == [
        r"  dropped at stage: odd\n  answered by node 'bob'\x1b[2J",
    ]


def test_what_has_left_is_counted_and_told() -> None:
    events: list[Event] = []
    journal = Journal(events.append)
    journal.send("x", "5f", None)
    Journal().send("x", "5f", None)
    assert journal.sent == 1
    assert events == [MessageSent("x", "5f", None)]


def test_stats_are_a_copy() -> None:
    journal = Journal()
    before = journal.stats(queued=1, running=2, pending=3)
    journal.drop("x", "stage", "reason")
    assert (before.dropped, before.queued, before.running, before.pending) == ({}, 1, 2, 3)


def story(node: Node, message_id: str) -> list[str]:
    head, *steps = node.explain(message_id).splitlines()
    assert head == f"message {message_id}"
    return [step.removeprefix("  ") for step in steps]


async def test_the_story_of_a_broadcast_is_told_by_who_emitted_it_and_by_each_who_received_it() -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        message_id = await alice.emit(TEASE, "boo")
        await asyncio.sleep(0.01)
        received = ["queued for stash.tease, from node 'alice'", "handled by stash.tease"]
        assert story(alice, message_id) == ["sent to every node", *received]
        assert story(bob, message_id) == received
        message_id = await alice.emit(TEASE, "raise", to="bob")
        await asyncio.sleep(0.01)
        assert story(alice, message_id) == ["sent to node 'bob'"]
        assert story(bob, message_id) == [received[0], "stash.tease failed: ValueError('a secret')"]


async def test_the_story_of_a_local_message() -> None:
    async with Node("alice", Stash()) as alice:
        message_id = await alice.emit(STORED, [])
        await asyncio.sleep(0.01)
        assert story(alice, message_id) == [
            "queued for stash.on_stored, from node 'alice'",
            "handled by stash.on_stored",
        ]


async def test_the_story_of_a_call_is_told_on_both_nodes() -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        await alice.call(STORE, Store("f"), to="bob", id="good")
        with pytest.raises(CallTimeout):
            await alice.call(SLEEP, 9.0, to="bob", timeout=1, id="late")
        with pytest.raises(Exception, match="quota"):
            await alice.call(ODD, "reject", to="bob", id="rejected")
        waiting = asyncio.create_task(alice.call(SLEEP, 9.0, to="bob", id="cancelled"))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0.01)
        queued = "queued for stash.sleep, from node 'alice'"
        assert story(alice, "good") == ["asked of node 'bob'", "answered by node 'bob'"]
        assert story(bob, "good") == ["queued for stash.store, from node 'alice'", "handled by stash.store"]
        assert story(alice, "late")[0] == "asked of node 'bob'"
        assert story(alice, "late")[1].startswith("no reply: 'stash:sleep' on node 'bob'")
        assert story(bob, "late") == [queued, "given up by its caller: stash.sleep was cancelled"]
        assert story(alice, "rejected")[1].startswith("no reply: ")
        assert story(bob, "rejected")[1] == "rejected by stash.odd: quota"
        assert story(alice, "cancelled") == ["asked of node 'bob'", "nobody waits for the reply any more"]
        assert story(bob, "cancelled") == [queued, "given up by its caller: stash.sleep was cancelled"]


async def test_the_story_of_what_was_dropped_says_where_and_why() -> None:
    hub = MemoryHub()
    shout = broadcast("x:tell", int, stages=[Stage("calm", lambda _: Drop("shouting"))])
    size = request("x:ask", int, reply=int, filter=lambda msg: msg.payload > 0)

    class Some(Service):
        name = "some"

        @handles(shout)
        async def tell(self, msg: Message[int]) -> None: ...

        @handles(size)
        async def ask(self, msg: Message[int]) -> int:
            raise Reject("never")

    async with Node("alice", hub=hub) as alice, Node("bob", Some(), hub=hub) as bob:
        message_id = await alice.emit(shout, 1)
        await asyncio.sleep(0.01)
        assert story(bob, message_id) == ["dropped at calm: shouting, from node 'alice'"]
        with pytest.raises(Exception, match="filtered"):
            await alice.call(size, 0, to="bob", id="call")
        assert story(bob, "call") == ["dropped at filter: filtered, from node 'alice'"]
        assert story(alice, "call")[0] == "asked of node 'bob'"
        assert "filtered" in story(alice, "call")[1]
        with pytest.raises(Unreachable):
            await alice.call(size, 0, to="nobody", id="lost")
        assert "no reply: node 'nobody' cannot be reached" in alice.explain("lost")


async def test_of_what_other_nodes_make_long_both_nodes_keep_little() -> None:
    question, long = request("x:ask", str, reply=str), "x" * 100_000

    class Some(Service):
        name = "some"

        @handles(question)
        async def answer(self, msg: Message[str]) -> str:
            if msg.payload.startswith("x"):
                raise KeyError(msg.payload)
            raise Reject("never", "y" * 100_000)

    async with mesh("alice") as (hub, [alice], _), Node("bob", Some(), hub=hub, logger=None) as bob:
        for call_id, payload in (("raised", long), ("rejected", "no")):
            with pytest.raises(RemoteError):
                await alice.call(question, payload, to="bob", id=call_id)
            assert len(alice.explain(call_id)) < 500
            assert len(bob.explain(call_id)) < 500
        assert "KeyError('xxx" in bob.explain("raised")
        assert "yyy" in alice.explain("rejected")


async def test_of_what_never_came_there_is_no_story() -> None:
    node = Node("alice")
    assert "nothing is remembered of it here" in node.explain("5f")
    async with node:
        assert node.explain("5f") == "message 5f\n  nothing is remembered of it here"
