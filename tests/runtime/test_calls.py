"""Calls: replies, every way to fail, deadlines that travel, cancellation that travels."""

import asyncio
import contextlib
import gc
import os
import random
import sys
import weakref
from typing import Any, cast

import anyio
import msgspec
import pytest

from meshkit.call_registry import PendingCalls
from meshkit.errors import (
    CallTimeout,
    Closed,
    Draining,
    MalformedFrame,
    MeshkitError,
    NoHandler,
    Overloaded,
    PeerLost,
    Refused,
    RemoteError,
    Unreachable,
)
from meshkit.runtime import Continue, Message, Runtime, Service, Stage, handles, request
from meshkit.runtime.journal import Journal, RuntimeStats
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.wire import Ask, Cancel, Failure, Reply, encode, encode_payload
from meshkit.testing import CancellationPoint, run
from meshkit.transports import MemoryHub, MemoryTransport
from tests.runtime.nodes import ODD, SLEEP, STORE, TEASE, Node, Stash, Store, StoreAck, everywhere, mesh, plain
from tests.runtime.test_messages import balanced, settle

NAMES = ("alice", "bob")
CALLS = int(os.environ.get("MESHKIT_TEST_CALLS", "1000"))
"""Calls at once; 10,000 take half a minute."""


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(params=["alice", "bob"])
def to(request: pytest.FixtureRequest) -> str:
    """The node that alice calls: her own, and another one."""
    return cast("str", request.param)


async def test_a_call_returns_the_reply(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        assert await alice.call(STORE, Store("file", b"12345"), to=to, timeout=5) == StoreAck(5)
        assert alice.stats().sent == 1
        assert alice.stats().pending == 0


async def test_a_handler_sees_who_asks_and_until_when(to: str) -> None:
    seen: list[Message[float]] = []

    class Looks(Service):
        name = "looks"

        @handles(SLEEP)
        async def look(self, msg: Message[float]) -> float:
            seen.append(msg)
            return anyio.current_effective_deadline() - now()

    hub = MemoryHub()
    async with Node("alice", Looks(), hub=hub) as alice, Node("bob", Looks(), hub=hub):
        await asyncio.sleep(3)
        assert await alice.call(SLEEP, 0.0, to=to, timeout=5) == 5
        with anyio.fail_after(2):
            assert await alice.call(SLEEP, 0.0, to=to, timeout=5) == 2
        assert [(msg.sender, msg.deadline, msg.time) for msg in seen] == [
            ("alice", 8, 1_767_225_603.0),
            ("alice", 5, 1_767_225_603.0),
        ]


async def error_of(verb: Any, kind: type[MeshkitError]) -> Any:
    """Return the error of a call, which comes at once."""
    before = now()
    with pytest.raises(kind) as caught:
        await verb
    assert now() == before, "it is known at once"
    return caught.value


async def test_nobody_there() -> None:
    async with mesh("alice") as (_, [alice], _):
        error = await error_of(alice.call(STORE, Store("x"), to="bob"), Unreachable)
        assert error.executed == "no"
        assert error.node == "bob"


async def test_no_handler(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        error = await error_of(alice.call(request("x:unknown", int, reply=int), 1, to=to), NoHandler)
        assert str(error) == f"node {to!r} has no handler for 'x:unknown'"
        assert error.executed == "no"
        unheard = request("social:tease", str, reply=str)
        await error_of(alice.call(unheard, "x", to=to), NoHandler)


async def test_a_payload_of_another_type_here_and_there(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        with pytest.raises(TypeError, match="stash:store: the payload must be Store, not str"):
            await alice.call(STORE, cast("Store", "x"), to=to)
        otherwise = request("stash:store", dict[str, int], reply=StoreAck)
        error = await error_of(alice.call(otherwise, {"name": 3}, to=to), MalformedFrame)
        assert error.executed == "no"
        why = f"'stash:store' on node {to!r}: Expected `str`, got `int` - at `$.name`"
        assert str(error) == f"the bytes are not what was declared: {why}"


async def test_a_full_mailbox(to: str) -> None:
    class Full(Stash):
        max_mailbox = 2
        max_concurrent = 1

    hub = MemoryHub()
    async with Node("alice", Full(), hub=hub) as alice, Node("bob", Full(), hub=hub):
        calls = [asyncio.create_task(alice.call(SLEEP, 1.0, to=to))]
        await settle()
        calls += [asyncio.create_task(alice.call(SLEEP, 1.0, to=to)) for _ in range(2)]
        await settle()
        error = await error_of(alice.call(STORE, Store("x"), to=to), Overloaded)
        assert str(error) == f"mailbox of service 'stash' on node {to!r}: full, it holds 2 already"
        assert await asyncio.gather(*calls, return_exceptions=True) == [1.0, 1.0, 1.0]
        assert (await alice.call(STORE, Store("x"), to=to)).size == 0


async def test_a_handler_that_raises_tells_its_log_all_and_its_caller_no_more_than_where_to_look(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        error = await error_of(alice.call(ODD, "raise", to=to), RemoteError)
        assert (error.executed, error.code, error.node, error.kind) == ("yes", "internal", to, "stash:odd")
        assert (error.detail, error.retryable) == ("", False)
        for secret in ("ZeroDivisionError", "division"):
            assert secret not in repr(error)
            assert secret not in str(error)
        log = {"alice": alice, "bob": bob}[to].logged
        assert "ZeroDivisionError: division by zero" in log
        assert "Traceback" in log
        assert error.correlation_id in log
        assert error.__cause__ is None


async def test_a_handler_can_fail_with_a_code(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        error = await error_of(alice.call(ODD, "reject", to=to), RemoteError)
        assert (error.code, error.detail, error.retryable, error.executed) == ("quota", "too much", True, "yes")
        assert alice.logged + bob.logged == "", "it was said on purpose"
        assert error.correlation_id == "", "so there is nothing to look for"


@pytest.mark.parametrize(
    ("odd", "logged"),
    [
        ("other type", "TypeError: stash:odd: the reply must be list[int], not str"),
        ("unencodable", "TypeError: Encoding objects of type object is unsupported"),
        ("cancels itself", "CancelledError"),
        ("cancels its task", "CancelledError"),
        ("cancels its task twice", "CancelledError"),
    ],
)
async def test_a_handler_that_misbehaves_fails_and_its_service_lives_on(to: str, odd: str, logged: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        for _ in range(3):
            error = await error_of(alice.call(ODD, odd, to=to), RemoteError)
            assert error.code == "internal"
        assert logged in {"alice": alice, "bob": bob}[to].logged
        assert (await alice.call(STORE, Store("x"), to=to)).size == 0


async def test_a_reply_that_is_not_what_was_declared(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        error = await error_of(alice.call(ODD, "wrong inside", to=to), RemoteError)
        assert (error.code, error.executed) == ("bad_reply", "yes")
        assert isinstance(error.__cause__, msgspec.ValidationError)


async def test_only_requests_can_be_called() -> None:
    async with mesh("alice") as (_, [alice], _):
        with pytest.raises(TypeError, match=r"Broadcast\('social:tease', str\) is for emit"):
            await alice.call(cast("Any", TEASE), "x", to="alice")


async def test_who_has_gone_gets_no_answer_and_nobody_minds() -> None:
    async with mesh("alice") as (hub, [alice], _):
        hub.send("zoe", "alice", plain(Ask("id", "x:unknown", 1, 0.0, 1000, encode_payload(1))))
        await settle()
        assert alice.stats().dropped == {("", "kind", "no_handler"): 1, ("", "transport", "unreachable"): 1}
        assert alice.logged == ""


async def test_a_transport_that_fails_to_send_an_answer_does_not_take_the_worker_with_it() -> None:
    class Broken(MemoryTransport):
        def send(self, to: str, frame: bytes) -> None:
            raise OSError("cable cut")

    hub, node = MemoryHub(), Node("x")
    bob = Runtime("bob", [Stash()], transport=Broken(hub), logger=node.logger)
    async with Node("alice", hub=hub) as alice, bob:
        for _ in range(3):
            with pytest.raises(CallTimeout):
                await alice.call(STORE, Store("x"), to="bob", timeout=1)
        assert node.logged.count("the transport failed") >= 3
        assert bob.stats().dropped["", "transport", "peer_lost"] == 3
        assert "OSError: cable cut" in node.logged
        assert bob.stats().handled == 3


async def test_a_call_may_wait_for_ages(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        assert (await alice.call(STORE, Store("x"), to=to, timeout=1e300)).size == 0


async def test_a_timeout_ends_the_call_and_the_handler(to: str) -> None:
    async with mesh("alice", "bob") as (_, nodes, stashes):
        with pytest.raises(CallTimeout) as caught:
            await nodes[0].call(SLEEP, 100.0, to=to, timeout=2.5)
        assert now() == 2.5
        assert str(caught.value) == (
            f"'stash:sleep' on node {to!r}: no result within 2.5 s; it may still have happened"
        )
        await settle()
        assert [stash.cancelled for stash in stashes if stash.begun] == [[100.0]]
        assert all(map(balanced, nodes))
        assert sum(node.stats().cancelled for node in nodes) == 1


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", None])
async def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    async with mesh("alice") as (_, [alice], _):
        with pytest.raises((ValueError, TypeError), match="timeout must be"):
            await alice.call(STORE, Store("x"), to="alice", timeout=timeout)


async def test_a_cancelled_caller_cancels_the_handler(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], stashes):
        call = asyncio.create_task(alice.call(SLEEP, 100.0, to=to, timeout=200))
        await asyncio.sleep(1)
        call.cancel()
        await settle()
        assert call.cancelled()
        assert [stash.cancelled for stash in stashes if stash.begun] == [[100.0]]


async def test_a_handler_that_swallows_its_cancellation_does_not_pass_it_on_to_the_next_message() -> None:
    class Swallows(Service):
        name = "swallows"
        max_concurrent = 1

        @handles(SLEEP)
        async def sleep(self, msg: Message[float]) -> float:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(msg.payload)
            return anyio.current_effective_deadline() - now()

        @handles(TEASE)
        async def tease(self, msg: Message[str]) -> None:
            await asyncio.sleep(1)
            teases.append(msg.payload)

    teases: list[str] = []
    async with Node("alice", Swallows()) as alice:
        for _ in range(3):
            with pytest.raises(CallTimeout):
                await alice.call(SLEEP, 10.0, to="alice", timeout=1)
            await alice.emit(TEASE, "x")
            assert await alice.call(SLEEP, 1.0, to="alice", timeout=5) == 3
        assert teases == ["x", "x", "x"]
        assert balanced(alice)


async def test_a_call_that_still_waits_in_the_mailbox_leaves_it_with_its_caller(to: str) -> None:
    class One(Stash):
        max_concurrent = 1
        max_mailbox = 1

    hub, stashes = MemoryHub(), [One(), One()]
    async with Node("alice", stashes[0], hub=hub) as alice, Node("bob", stashes[1], hub=hub) as bob:
        first = asyncio.create_task(alice.call(SLEEP, 10.0, to=to, timeout=20))
        await settle()
        second = asyncio.create_task(alice.call(SLEEP, 20.0, to=to, timeout=20))
        await settle()
        second.cancel()
        await settle()
        third = asyncio.create_task(alice.call(SLEEP, 1.0, to=to, timeout=20))
        assert await first == 10.0
        assert await third == 1.0, "there was room for it again"
        assert [stash.begun for stash in stashes if stash.begun] == [[10.0, 1.0]]
        assert balanced(alice)
        assert balanced(bob)


async def test_what_has_expired_in_the_mailbox_never_starts() -> None:
    class One(Stash):
        max_concurrent = 1

    hub, stash = MemoryHub(), One()
    async with Node("alice", Stash(), hub=hub) as alice, Node("bob", stash, hub=hub) as bob:
        first = asyncio.create_task(alice.call(SLEEP, 10.0, to="bob", timeout=20))
        await settle()
        hub.cut("alice", "bob")  # so that no cancellation can arrive
        hub.heal()
        second = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob", timeout=5))
        await settle()
        hub.cut("alice", "bob")
        with pytest.raises(CallTimeout):
            await second
        hub.heal()
        assert await first == 10.0
        await settle()
        assert stash.begun == [10.0]
        assert bob.stats().cancelled == 1
        assert balanced(bob)


async def test_an_enclosing_deadline_ends_the_call_and_the_handler(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], stashes):
        with anyio.move_on_after(3) as scope:
            await alice.call(SLEEP, 100.0, to=to, timeout=50)
        assert scope.cancelled_caught
        assert now() == 3
        await settle()
        assert [stash.cancelled for stash in stashes if stash.begun] == [[100.0]]


async def test_a_call_under_a_deadline_that_has_passed_starts_nothing(to: str) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], stashes):
        with anyio.CancelScope(deadline=now() - 1):
            await alice.call(STORE, Store("x"), to=to)
        await settle()
        assert [stash.begun for stash in stashes] == [[], []]


async def test_when_the_cancellation_is_lost_the_handler_ends_at_the_deadline_all_the_same() -> None:
    async with mesh("alice", "bob") as (hub, [alice, bob], [_, stash]):
        call = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=5))
        await asyncio.sleep(1)
        hub.silence("bob")
        call.cancel()
        await asyncio.sleep(3.9)
        assert stash.cancelled == []
        await asyncio.sleep(0.2)
        assert stash.cancelled == [100.0]
        assert balanced(bob)


async def test_a_node_that_leaves_fails_what_it_was_asked_and_cancels_what_it_asked_for() -> None:
    async with mesh("alice") as (hub, [alice], [stash]):
        bob = Node("bob", Stash(), hub=hub, grace=0)
        await bob.start()
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        asking = asyncio.create_task(bob.call(SLEEP, 50.0, to="alice", timeout=200))
        await asyncio.sleep(1)
        await bob.stop()
        assert now() == 1
        with pytest.raises(PeerLost, match="node 'bob' went away before it answered") as caught:
            await asked
        assert caught.value.executed == "maybe"
        with pytest.raises(Closed) as closed:
            await asking
        assert closed.value.executed == "maybe"
        await settle()
        assert stash.cancelled == [50.0]
        assert balanced(alice)


async def test_a_node_that_vanishes_fails_what_it_was_asked_at_once() -> None:
    async with mesh("alice", "bob") as (hub, [alice, bob], _):
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        await asyncio.sleep(1)
        hub.silence("bob")
        hub.leave("bob")
        with pytest.raises(PeerLost):
            await asked
        assert now() == 1
        hub.join("bob", cast("Any", bob)._life.router)


async def test_a_silent_node_is_noticed_by_the_timeout_only() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], [_, stash]):
        hub.silence("bob")
        with pytest.raises(CallTimeout):
            await alice.call(STORE, Store("x"), to="bob", timeout=3)
        assert now() == 3
        assert stash.begun == []


async def test_a_draining_node_refuses_new_calls_and_finishes_those_it_has() -> None:
    async with mesh("alice") as (hub, [alice], _):
        stash = Stash()
        bob = Node("bob", stash, hub=hub, grace=5)
        await bob.start()
        asked = asyncio.create_task(alice.call(SLEEP, 2.0, to="bob"))
        await asyncio.sleep(1)
        stopping = asyncio.create_task(bob.stop())
        await settle()
        error = await error_of(alice.call(STORE, Store("x"), to="bob"), Draining)
        assert error.executed == "no"
        assert isinstance(error, Refused)
        await alice.emit(TEASE, "too late", to="bob")
        await settle()
        assert bob.stats().dropped["social:tease", "mailbox", "draining"] == 1
        assert await asked == 2.0
        await stopping
        assert now() == 2
        assert bob.logged == ""


async def test_what_does_not_finish_within_the_grace_is_cut_answered_and_reported() -> None:
    class One(Stash):
        max_concurrent = 1

    async with mesh("alice") as (hub, [alice], _):
        stash = One()
        bob = Node("bob", stash, hub=hub, grace=5)
        await bob.start()
        running, queued = (asyncio.create_task(alice.call(SLEEP, s, to="bob", timeout=200)) for s in (100.0, 1.0))
        await settle()
        await bob.emit(TEASE, "queued")
        await asyncio.sleep(1)
        await bob.stop()
        assert now() == pytest.approx(6.001)
        with pytest.raises(PeerLost):
            await running
        with pytest.raises(Draining):
            await queued
        assert stash.cancelled == [100.0]
        assert bob.stats().cut == 3
        assert balanced(bob)
        expected = "node 'bob' stopped before it had handled: social:tease (1), stash:sleep (2)"
        assert expected in bob.logged


async def test_while_draining_a_node_may_still_call_itself_and_others() -> None:
    FORWARD = request("x:forward", str, reply=float)  # noqa: N806 - as behaviors are named

    class Forwards(Service):
        name = "forwards"

        @handles(FORWARD)
        async def forward(self, msg: Message[str]) -> float:
            await asyncio.sleep(1)
            return await self.rt.call(SLEEP, 1.0, to=msg.payload)

    async with mesh("alice") as (hub, [alice], _):
        bob = Node("bob", Stash(), Forwards(), hub=hub, grace=5)
        await bob.start()
        calls = [asyncio.create_task(alice.call(FORWARD, to, to="bob")) for to in ("alice", "bob")]
        await asyncio.sleep(0.5)
        await bob.stop()
        assert await asyncio.gather(*calls) == [1.0, 1.0]


async def test_an_answer_counts_only_if_it_comes_from_the_node_that_was_asked() -> None:
    async with mesh("alice", "bob", "mallory") as (hub, [alice, *_], _):
        call = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob"))
        await settle()
        [call_id] = cast("Any", alice)._life.router.calls._asked
        hub.send("mallory", "alice", plain(Reply(call_id, encode_payload(666.0))))
        hub.send("mallory", "alice", plain(Failure(call_id, "draining")))
        hub.send("mallory", "bob", plain(Cancel(call_id)))
        assert await call == 1.0
        assert alice.stats().dropped == {("", "kind", "wrong_sender"): 2}


async def test_a_request_that_comes_twice_runs_once() -> None:
    async with mesh("alice", "bob") as (hub, [_, bob], [_, stash]):
        ask = plain(Ask("id", "stash:sleep", 1, 0.0, 5000, encode_payload(1.0)))
        hub.send("alice", "bob", ask)
        hub.send("alice", "bob", ask)
        await asyncio.sleep(2)
        assert stash.begun == [1.0]
        assert bob.stats().dropped == {("stash:sleep", "dedupe", "duplicate"): 1}


async def test_answers_and_cancellations_that_nobody_waits_for_are_harmless() -> None:
    async with mesh("alice", "bob") as (hub, [alice, bob], _):
        for wire in (Reply("?", encode_payload(1)), Failure("?", "cut"), Cancel("?")):
            hub.send("alice", "bob", plain(wire))
        for frame in (b"", b"\xc1", b"\x94", b"nonsense", encode(["z", 1]), encode([[]]), bytes(1000)):
            hub.send("alice", "bob", PLAIN + frame)
        # An array of things that are no messages is a bundle.
        assert bob.stats().dropped == {("", "frame", "malformed_frame"): 5, ("", "frame", "malformed_message"): 3}
        assert (await alice.call(STORE, Store("x"), to="bob")).size == 0


def test_a_call_can_be_cancelled_anywhere_and_nothing_is_left(to: str) -> None:
    async def scenario(point: CancellationPoint) -> None:
        async with mesh("alice", "bob") as (_, nodes, stashes):
            if not await point.cancel(nodes[0].call(SLEEP, 1.0, to=to)):
                assert point.result == 1.0
            await asyncio.sleep(0.1)
            assert [stash.begun for stash in stashes] == [stash.ended + stash.cancelled for stash in stashes]
            for node in nodes:
                assert balanced(node)
                assert (node.stats().pending, node.stats().running) == (0, 0)
            assert not cast("Any", nodes[0])._life.router.calls._asked

    everywhere(scenario)


def test_a_handler_can_be_cancelled_anywhere_and_its_caller_is_answered() -> None:
    async def scenario(point: CancellationPoint) -> None:
        kind = request("x:steps", int, reply=int)

        class Steps(Service):
            name = "steps"

            @handles(kind)
            async def steps(self, msg: Message[int]) -> int:
                async def work() -> None:
                    await asyncio.sleep(1)
                    await self.rt.emit(TEASE, "x")
                    await self.rt.call(SLEEP, 1.0, to="bob")

                return 1 if await point.cancel(work()) else 2

        async with mesh("bob") as (hub, [bob], _), Node("alice", Steps(), Stash(), hub=hub) as alice:
            assert await bob.call(kind, 0, to="alice") in {1, 2}
            await asyncio.sleep(2)
            assert balanced(alice)
            assert balanced(bob)
            assert bob.stats().running == 0

    everywhere(scenario)


@pytest.mark.parametrize("seed", range(3))
async def test_a_thousand_calls_cancelled_at_random_leave_nothing_behind(seed: int) -> None:
    rng = random.Random(seed)
    async with mesh("alice", "bob", "carol") as (_, nodes, stashes):
        tasks_before = len(asyncio.all_tasks())

        async def one() -> float:
            caller = rng.choice(nodes)
            await asyncio.sleep(rng.random())
            seconds = rng.choice([0.0, rng.random(), 100.0])
            return await caller.call(SLEEP, seconds, to=rng.choice(nodes).name, timeout=rng.uniform(0.1, 2))

        calls = [asyncio.create_task(one()) for _ in range(1000)]
        for call in rng.sample(calls, 300):
            asyncio.get_running_loop().call_later(rng.random() * 2, call.cancel)
        await asyncio.wait(calls)
        await asyncio.sleep(5)
        outcomes = {type(call.exception()) if not call.cancelled() else "cancelled" for call in calls}
        assert outcomes == {type(None), CallTimeout, "cancelled"}
        for node, stash in zip(nodes, stashes, strict=True):
            stats = node.stats()
            assert balanced(node)
            assert (stats.pending, stats.running, stats.queued) == (0, 0, 0)
            assert not cast("Any", node)._life.router.calls._asked
            assert not cast("Any", node)._life.router.dispatcher.serving
            assert len(stash.begun) == len(stash.ended) + len(stash.cancelled)
        assert len(asyncio.all_tasks()) <= tasks_before + len(nodes), "each keeps one idle worker"


async def test_calls_round_after_round_of_which_a_third_is_cancelled_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No wrong reply; tables empty, tasks and timers as before; memory flat after the first round.

    Answers are kept for a minute, for those who ask again; so that is how long the next round waits. What is remembered
    up to a number is full after the first round.
    """
    monkeypatch.setattr(Journal, "NOTES", CALLS)
    monkeypatch.setattr(PendingCalls, "REMEMBERED", CALLS // 4)

    class Wide(Stash):
        max_mailbox = 10_000
        max_concurrent = 200

        @handles(SLEEP)
        async def sleep(self, msg: Message[float]) -> float:
            await asyncio.sleep(0.001)
            return msg.payload

    rng = random.Random(5)
    loop = cast("Any", asyncio.get_running_loop())
    blocks: list[int] = []
    hub = MemoryHub()
    options: dict[str, Any] = {"hub": hub, "heartbeat": None}
    async with Node("alice", Wide(), **options) as alice, Node("bob", Wide(), **options) as bob:
        for _ in range(5):
            calls = [asyncio.create_task(alice.call(SLEEP, float(n), to="bob", timeout=60)) for n in range(CALLS)]
            for call in rng.sample(calls, CALLS * 3 // 10):
                loop.call_later(rng.random() * CALLS / 250_000, call.cancel)
            await asyncio.wait(calls)
            await settle()
            replies = [None if call.cancelled() else call.result() for call in calls]
            assert CALLS // 10 < replies.count(None) <= CALLS * 3 // 10, (
                "some had their reply before they were cancelled"
            )
            assert all(reply in {None, float(number)} for number, reply in enumerate(replies))
            for node in (alice, bob):
                assert balanced(node)
                router = cast("Any", node)._life.router
                assert not router.calls._asked
                assert not router.dispatcher.serving
                assert len(router.calls) == node.stats().queued == node.stats().running == 0
            assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
            tasks = sorted(task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()})
            assert [name for name in tasks if "worker" not in name] == [f"meshkit:{n}:runtime:life" for n in NAMES]
            assert len(tasks) <= 4, "each keeps one idle worker"
            calls.clear()
            replies.clear()
            await asyncio.sleep(61)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        assert max(blocks[1:]) - blocks[0] < CALLS, f"less than one thing for every call is left: {blocks}"


async def test_thousands_of_concurrent_calls_each_get_their_own_reply() -> None:
    class Wide(Stash):
        max_mailbox = 3000

    hub = MemoryHub()
    async with Node("alice", Wide(), hub=hub) as alice, Node("bob", Wide(), hub=hub):
        calls = [alice.call(STORE, Store("x", bytes(number % 500)), to="bob", timeout=60) for number in range(3000)]
        sizes = [ack.size for ack in await asyncio.gather(*calls)]
        assert sizes == [number % 500 for number in range(3000)]


async def test_a_call_that_uses_the_id_of_one_that_was_lost_in_the_same_turn_is_not_lost_with_it() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        lost = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", id="5f"))
        await settle()
        lost.cancel()
        again = asyncio.create_task(alice.call(SLEEP, 1.0, to="alice", id="5f"))
        cast("Any", alice)._life.router.intake.give_up("bob")
        assert await again == 1.0
        assert lost.cancelled()


async def test_an_id_of_which_a_call_is_pending_is_refused() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], [_, stash]):
        first = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob", id="5f"))
        await settle()
        with pytest.raises(ValueError, match="a call with the id '5f' is pending already"):
            await alice.call(SLEEP, 2.0, to="bob", id="5f")
        assert await first == 1.0
        assert stash.begun == [1.0]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"payload": 3}, TypeError),
        ({"payload": Store("\ud800")}, ValueError),
        ({"to": []}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"id": 5}, ValueError),
        ({"id": "\ud800"}, ValueError),
        ({"id": "5f", "to": None}, ValueError),
    ],
)
async def test_a_call_that_is_called_wrongly_leaves_no_trace(wrong: dict[str, Any], error: type[Exception]) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        arguments: dict[str, Any] = {"payload": Store("x"), "to": "bob"}
        with pytest.raises(error):
            await alice.call(STORE, **(arguments | wrong))
        assert alice.stats() == RuntimeStats()
        assert not cast("Any", alice)._life.router.journal._notes
        assert not cast("Any", alice)._life.router.calls._asked


async def test_a_call_for_which_there_is_no_room_among_the_pending_ones_was_not_sent() -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], _):
        cast("Any", alice)._life.router.calls._registry._pending.max_pending = 1
        first = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob"))
        await settle()
        with pytest.raises(Overloaded, match="calls of node 'alice'") as caught:
            await alice.call(SLEEP, 2.0, to="bob", id="second")
        assert alice.explain("second") == f"message second\n  no reply: {caught.value}"
        assert await first == 1.0
        assert alice.stats().sent == bob.stats().delivered == 1


@pytest.mark.parametrize("how", ["times out", "is stopped by a stage", "is one of many that are stopped by a stage"])
def test_a_payload_is_forgotten_with_the_error_of_its_call(how: str) -> None:
    """At once, and not when the garbage collector comes: frames hold the payload, and errors hold frames."""

    class Parcel(msgspec.Struct, weakref=True):
        seconds: float

    def fail(_: Message[Parcel]) -> Continue:
        raise ValueError("too early")

    stages = [] if how == "times out" else [Stage("strict", fail, on="emit")]
    parcel = request("parcel:send", Parcel, reply=bool, stages=stages)

    class Slow(Service):
        name = "slow"

        @handles(parcel)
        async def take(self, msg: Message[Parcel]) -> bool:
            await asyncio.sleep(msg.payload.seconds)
            return True

    async def main() -> None:
        async with Node("alice", Slow()) as alice:
            payload = Parcel(9.0)
            alive = weakref.ref(payload)
            gc.collect()
            gc.disable()
            try:
                with contextlib.suppress(CallTimeout, ValueError):
                    if "many" in how:
                        await alice.call_many(parcel, payload, ["alice", "bob"])
                    else:
                        await alice.call(parcel, payload, to="alice", timeout=1)
                del payload
                await settle()
                assert alive() is None
            finally:
                gc.enable()

    run(main)


async def test_only_requests_can_be_called_of_many_and_only_behaviors_emitted() -> None:
    async with mesh("alice") as (_, [alice], _):
        with pytest.raises(TypeError, match=r"Broadcast\('social:tease', str\) is for emit"):
            await alice.call_many(cast("Any", TEASE), "x")
        with pytest.raises(TypeError, match=r"emit\(\) takes a local kind or a broadcast; 'social:tease' is"):
            await alice.emit(cast("Any", "social:tease"), "x")


@pytest.mark.parametrize("to", [3, b"bob", Runtime("bob")])
async def test_a_node_is_named_by_its_id(to: Any) -> None:
    async with Runtime("alice", [Stash()]) as alice:
        for verb in (
            lambda: alice.call(STORE, Store("x"), to=to),
            lambda: alice.call_many(STORE, Store("x"), [to]),
            lambda: alice.emit(TEASE, "x", to=to),
        ):
            with pytest.raises(TypeError, match=r"to must be the id of a node, as in rt\.node"):
                await verb()
        assert alice.stats().pending == 0
