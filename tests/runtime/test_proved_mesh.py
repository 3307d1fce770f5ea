"""Nodes that have identities, on one hub: everything between them is proved."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal, cast

import anyio
import pytest

from meshkit.errors import CallTimeout, MalformedFrame, PeerLost, RemoteError, Unreachable
from meshkit.runtime import Identity, Message, MessageDropped, Peer, Reject, Runtime, Service, handles, request, router
from meshkit.runtime.frame import Prover
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.wire import Ask, Beat, Cancel, Failure, Goodbye, Reply, Tell, Wire, encode, encode_payload
from meshkit.testing import CancellationPoint, SimLoop
from meshkit.transports import MemoryHub
from tests.runtime.nodes import ODD, SLEEP, STORE, TEASE, Node, Stash, Store, StoreAck, everywhere, plain

ASK = request("verbose:ask", str, reply=str)
ALICE, BOB, CAROL, EVE = (Identity.from_seed(letter * 32) for letter in (b"a", b"b", b"c", b"e"))


class Tapped(MemoryHub):
    """A hub that remembers what it carried, and hands nothing over while it is `held`."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[str, str, bytes]] = []
        self.held = False

    def send(self, sender: str, to: str, frame: bytes) -> None:
        self.frames.append((sender, to, frame))
        if not self.held:
            super().send(sender, to, frame)

    def inject(self, to: Node, frame: bytes, sender: str = "somebody") -> None:
        receivers: Any = vars(self)["_nodes"]
        receivers[to.node].received(sender, frame)


@asynccontextmanager
async def proved(*identities: Identity | None, **options: Any) -> AsyncIterator[tuple[Tapped, list[Node], list[Stash]]]:
    hub = Tapped()
    stashes = [Stash() for _ in identities]
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(Node(f"node-{n}", stash, hub=hub, identity=identity, **options))
            for n, (identity, stash) in enumerate(zip(identities, stashes, strict=True))
        ]
        await settle()
        yield hub, nodes, stashes


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def wall() -> float:
    return cast("float", cast("Any", asyncio.get_running_loop()).wall_time())


def prover(identity: Identity) -> Prover:
    return Prover(identity, started=0.0)


def frame_drops(node: Node) -> dict[str, int]:
    return {reason: count for (_, stage, reason), count in node.stats().dropped.items() if stage == "frame"}


# --- it works as without ------------------------------------------------------------------------------------


async def test_the_public_key_of_a_node_is_its_id_and_its_name_a_label() -> None:
    async with proved(ALICE, BOB) as (_, [alice, bob], _):
        assert (alice.node, alice.name) == (ALICE.node_id, "node-0")
        assert alice.peers == {bob.node: Peer(bob.node, "node-1", kinds=tuple(sorted(alice.peers[bob.node].kinds)))}


async def test_a_call_is_answered_and_says_who_asked() -> None:
    async with proved(ALICE, BOB) as (_, [alice, bob], [_, stash]):
        assert await alice.call(STORE, Store("x", b"abc"), bob.node) == StoreAck(3)
        assert await bob.call(STORE, Store("x", b"a"), alice.node) == StoreAck(1)
        assert await alice.call(STORE, Store("own"), alice.node) == StoreAck(0)
        with pytest.raises(RemoteError, match="quota"):
            await alice.call(ODD, "reject", bob.node)
        assert stash.begun == ["x"]
        assert frame_drops(alice) == frame_drops(bob) == {}


async def test_a_broadcast_reaches_every_node_and_is_proved_to_be_of_its_sender() -> None:
    async with proved(ALICE, BOB, CAROL) as (_, [alice, bob, carol], stashes):
        await alice.emit(TEASE, "all")
        await bob.emit(TEASE, "one", to=carol.node)
        await settle()
        assert [[(msg.sender, msg.payload) for msg in stash.teases] for stash in stashes] == [
            [(alice.node, "all")],
            [(alice.node, "all")],
            [(alice.node, "all"), (bob.node, "one")],
        ]


async def test_any_and_many_are_asked() -> None:
    async with proved(ALICE, BOB, CAROL) as (_, [alice, bob, carol], stashes):
        for name in "123456":
            await alice.call(STORE, Store(name))
        assert [len(stash.begun) for stash in stashes] == [2, 2, 2]
        replies = await alice.call_many(STORE, Store("many", b"12"), quorum=3)
        assert replies.replies == dict.fromkeys((alice.node, bob.node, carol.node), StoreAck(2))


def test_a_call_that_is_cancelled_anywhere_is_cancelled_on_the_other_node_and_leaves_nothing() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async with proved(ALICE, BOB) as (_, [alice, bob], [_, stash]):
            await point.cancel(alice.call(SLEEP, 5.0, bob.node))
            await settle()
            assert len(stash.begun) == len(stash.cancelled) + len(stash.ended)
            assert alice.stats().pending == bob.stats().running == bob.stats().queued == 0
            assert await alice.call(STORE, Store("after", b"x"), bob.node) == StoreAck(1)

    everywhere(scenario)


async def test_what_times_out_is_cancelled_where_it_runs() -> None:
    async with proved(ALICE, BOB) as (_, [alice, bob], [_, stash]):
        with pytest.raises(CallTimeout):
            await alice.call(SLEEP, 5.0, bob.node, timeout=1)
        await settle()
        assert stash.cancelled == [5.0]


async def test_presence_is_proved_and_who_falls_silent_is_gone() -> None:
    async with proved(ALICE, BOB, CAROL) as (hub, [alice, bob, carol], _):
        assert set(alice.peers) == {bob.node, carol.node}
        hub.silence(bob.node)
        await anyio.sleep(10)
        assert set(alice.peers) == {carol.node}
        hub.heal()
        await anyio.sleep(3)
        assert set(alice.peers) == {bob.node, carol.node}
        assert frame_drops(alice) == frame_drops(carol) == {}


async def test_nothing_of_what_nodes_say_can_be_read_on_the_way() -> None:
    async with proved(ALICE, BOB) as (hub, [alice, bob], _):
        await alice.call(STORE, Store("the secret name", b"the secret data"), bob.node, id="the secret id")
        await settle()
        assert all(b"secret" not in frame for *_, frame in hub.frames)
        await alice.emit(TEASE, "for everybody")
        await settle()
        assert any(b"for everybody" in frame for *_, frame in hub.frames), "what is signed is not sealed"
        assert {frame[1] for *_, frame in hub.frames} == {1, 2}, "there is no frame that proves nothing"


async def test_what_is_asked_and_answered_in_one_turn_is_proved_once() -> None:
    async with proved(ALICE, BOB) as (hub, [alice, bob], _):
        hub.frames.clear()
        await asyncio.gather(*(alice.call(STORE, Store(str(n)), bob.node) for n in range(50)))
        assert len(hub.frames) < 10


# --- restarts -----------------------------------------------------------------------------------------------


async def test_a_node_that_restarts_with_its_identity_is_the_same_node_and_takes_nothing_from_before() -> None:
    async with proved(ALICE) as (hub, [alice], _):
        stash = Stash()
        bob = Node("bob", stash, hub=hub, identity=BOB)
        async with bob:
            await settle()
            await alice.call(STORE, Store("first"), bob.node)
            await alice.emit(TEASE, "first")
            await settle()
            before = [frame for sender, to, frame in hub.frames if (sender, to) == (alice.node, bob.node)]
        await anyio.sleep(3)  # the clocks of others may differ by less
        async with bob:
            await settle()
            assert bob.node == BOB.node_id
            assert set(alice.peers) == {bob.node}
            for frame in before:
                hub.inject(bob, frame)
            await settle()
            assert frame_drops(bob) == {"stale": len(before)}
            assert (stash.begun, len(stash.teases)) == (["first"], 1)
            await alice.call(STORE, Store("second"), bob.node)
            await bob.call(STORE, Store("third"), alice.node)
            assert stash.begun == ["first", "second"]


async def test_a_node_that_goes_fails_what_it_was_asked_and_is_found_again_when_it_is_back() -> None:
    async with proved(ALICE) as (hub, [alice], _):
        bob = Node("bob", Stash(), hub=hub, identity=BOB, grace=0)
        async with bob:
            await settle()
            call = asyncio.create_task(alice.call(SLEEP, 9.0, bob.node))
            await settle()
        with pytest.raises(PeerLost):
            await call
        with pytest.raises(Unreachable):
            await alice.call(STORE, Store("x"), bob.node)
        async with bob:
            await settle()
            assert await alice.call(STORE, Store("x"), bob.node) == StoreAck(0)


# --- time and replay ----------------------------------------------------------------------------------------


async def test_a_frame_that_comes_twice_is_taken_once() -> None:
    async with proved(ALICE, BOB) as (hub, [alice, bob], [_, stash]):
        await alice.call(STORE, Store("once"), bob.node)
        await alice.emit(TEASE, "once")
        await settle()
        count = 0
        for sender, to, frame in list(hub.frames):
            if (sender, to) == (alice.node, bob.node):
                hub.inject(bob, frame, sender)
                count += 1
        await settle()
        assert frame_drops(bob) == {"replayed": count}
        assert (stash.begun, len(stash.teases)) == (["once"], 1)


@pytest.mark.parametrize("delay", [29.0, 31.0])
async def test_a_request_that_was_held_up_for_too_long_is_refused_and_its_caller_told(delay: float) -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [alice, bob], [_, stash]):
        hub.held = True
        call = asyncio.create_task(alice.call(STORE, Store("late"), bob.node, timeout=100))
        await anyio.sleep(delay)
        hub.held = False
        [(sender, _, frame)] = hub.frames
        hub.inject(bob, frame, sender)
        await settle()
        if delay < 30:
            assert await call == StoreAck(0)
        else:
            with pytest.raises(Exception, match="it was sent too long ago") as caught:
                await call
            assert cast("Any", caught.value).executed == "no"
            hub.inject(bob, frame, sender)
            await settle()
            assert stash.begun == []
            assert frame_drops(bob) == {"stale": 2}


async def test_a_request_from_before_the_start_of_a_node_may_have_run_in_its_life_before() -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [alice, bob], [_, stash]):
        hub.held = True  # as if the node that was asked had gone
        call = asyncio.create_task(alice.call(STORE, Store("map"), bob.node, timeout=100, id="call-1"))
        await settle()
        hub.held = False
        ask = Ask("call-1", "stash:store", 1, 0.0, 1_000, encode_payload(Store("map")))
        hub.inject(bob, prover(ALICE).seal(bob.node, encode([ask]), wall() - 5), alice.node)
        with pytest.raises(PeerLost) as caught:
            await call
        assert caught.value.executed == "maybe"
        assert (stash.begun, frame_drops(bob)) == ([], {"stale": 1})


async def test_a_late_copy_of_a_request_that_runs_or_was_answered_is_not_refused() -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [alice, bob], [_, stash]):
        call = asyncio.create_task(alice.call(SLEEP, 40.0, bob.node, timeout=100))
        await settle()
        frame = hub.frames[0][2]
        await anyio.sleep(35)
        hub.inject(bob, frame)
        assert await call == 40.0
        hub.frames.clear()
        hub.inject(bob, frame)
        await settle()
        assert hub.frames == [], "nobody is told that it was refused: it ran"
        assert stash.begun == [40.0]


async def test_a_frame_from_the_future_is_not_answered_since_it_may_come_again() -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [_, bob], [_, stash]):
        ask = Ask("1", "stash:store", 1, 0.0, 1_000, encode_payload(Store("early")))
        frame = prover(ALICE).seal(bob.node, encode([ask]), wall() + 40)
        hub.inject(bob, frame)
        await settle()
        assert (frame_drops(bob), hub.frames, stash.begun) == ({"stale": 1}, [], [])
        await anyio.sleep(20)
        hub.inject(bob, frame)
        await settle()
        assert stash.begun == ["early"], "nobody was told that it would not run"


# --- strangers ----------------------------------------------------------------------------------------------


async def test_who_is_not_trusted_is_not_heard_and_the_observer_learns_who_it_claims_to_be() -> None:
    seen: list[MessageDropped] = []

    def observer(event: object) -> None:
        if isinstance(event, MessageDropped):
            seen.append(event)

    async with proved(ALICE, BOB, trust={ALICE.node_id, BOB.node_id}, observer=observer) as (hub, [alice, _], stashes):
        async with Node("eve", Stash(), hub=hub, identity=EVE) as eve:
            await settle()
            await eve.emit(TEASE, "boo")
            with pytest.raises(CallTimeout):
                await eve.call(STORE, Store("x"), alice.node, timeout=1)
            hub.inject(alice, prover(EVE).sign(b"", wall()), "10.0.0.7:4711")
        assert all(stash.begun == [] and stash.teases == [] for stash in stashes)
        assert set(frame_drops(alice)) == {"unknown_sender"}
        assert seen[-1].sender == EVE.node_id
        [from_elsewhere] = [event for event in seen if event.sender == "10.0.0.7:4711"]
        assert from_elsewhere.detail == f"The sender is not trusted here. (it says that it is from {EVE.node_id})"
        assert alice.drops[-1].kind == ""


async def test_a_predicate_that_fails_trusts_nobody_and_its_error_is_told() -> None:
    def trust(node: str) -> bool:
        raise LookupError("the directory is down" + "!" * 10_000)

    async with proved(ALICE, heartbeat=None, trust=trust) as (hub, [alice], _):
        hub.inject(alice, prover(BOB).sign(b"", wall()), BOB.node_id)
        [drop] = alice.drops
        assert (drop.stage, drop.reason, drop.sender) == ("frame", "unknown_sender", BOB.node_id)
        assert "LookupError('the directory is down" in drop.detail
        assert len(drop.detail) < 400


async def test_nodes_with_and_without_an_identity_do_not_hear_each_other() -> None:
    async with proved(ALICE, None, BOB, None) as (_, [alice, one, bob, two], stashes):
        for node in (alice, one):
            await node.emit(TEASE, node.name)
        await settle()
        assert [[msg.payload for msg in stash.teases] for stash in stashes] == [
            ["node-0"],
            ["node-1"],
            ["node-0"],
            ["node-1"],
        ]
        with pytest.raises(Unreachable, match="'node-1' is not a node id"):
            await alice.call(STORE, Store("x"), one.node)
        with pytest.raises(CallTimeout):
            await one.call(STORE, Store("x"), alice.node, timeout=1)
        assert await alice.call(STORE, Store("x"), bob.node) == StoreAck(0)
        assert await one.call(STORE, Store("x"), two.node) == StoreAck(0)
        assert set(frame_drops(alice)) == {"unknown_sender"}
        assert set(frame_drops(one)) == {"malformed_frame"}
        assert "a node without an identity cannot open it" in one.drops[-1].detail


async def test_a_frame_that_proves_nothing_is_not_taken_whoever_is_said_to_have_sent_it() -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [alice, bob], [stash, _]):
        call = asyncio.create_task(alice.call(SLEEP, 5.0, bob.node, id="id"))
        await settle()
        forged: list[Wire] = [
            Tell("1", "social:tease", 1, 0.0, encode_payload("boo")),
            Ask("2", "stash:store", 1, 0.0, 1_000, encode_payload(Store("x"))),
            Reply("id", encode_payload(0.0)),
            Failure("id", "failed"),
            Cancel("id"),
            Beat("eve", (), 1.0),
            Goodbye(),
        ]
        for node in (alice, bob):
            for sender in (alice.node, bob.node, "eve"):
                for wire in forged:
                    hub.inject(node, plain(wire), sender)
        assert await call == 5.0
        assert frame_drops(alice) == frame_drops(bob) == {"unknown_sender": 21}
        assert stash.teases == stash.begun == []


async def test_one_node_cannot_answer_or_cancel_for_another_even_if_both_are_trusted() -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [alice, bob], [_, stash]):
        call = asyncio.create_task(alice.call(SLEEP, 5.0, bob.node, id="id"))
        await settle()
        carol = prover(CAROL)
        answers: list[Wire] = [Reply("id", encode_payload(0.0)), Failure("id", "cut"), Goodbye()]
        for wire in answers:
            hub.inject(alice, carol.seal(alice.node, encode([wire]), wall()), bob.node)
        orders: list[Wire] = [Cancel("id"), Goodbye()]
        for wire in orders:
            hub.inject(bob, carol.seal(bob.node, encode([wire]), wall()), alice.node)
        assert await call == 5.0
        assert alice.stats().dropped == {("", "kind", "wrong_sender"): 2}
        assert stash.cancelled == []


async def test_what_is_for_one_node_does_not_count_where_it_is_signed_for_all() -> None:
    async with proved(ALICE, BOB, heartbeat=None) as (hub, [alice, bob], [_, stash]):
        call = asyncio.create_task(alice.call(SLEEP, 5.0, bob.node, id="id"))
        await settle()
        answers = encode([Reply("id", encode_payload(0.0)), Failure("id", "cut")])
        hub.inject(alice, prover(BOB).sign(answers, wall()))
        asks = encode([Ask("2", "stash:store", 1, 0.0, 1_000, encode_payload(Store("x"))), Cancel("id")])
        hub.inject(bob, prover(ALICE).sign(asks, wall()))
        assert await call == 5.0
        assert frame_drops(alice) == frame_drops(bob) == {"not_sealed": 2}
        assert stash.begun == [5.0]


async def test_a_frame_that_is_not_bytes_is_malformed() -> None:
    async with proved(ALICE, None, heartbeat=None) as (hub, [alice, one], _):
        for node in (alice, one):
            for frame in (None, 7, "text", object(), [1, 2], bytearray(200)):
                hub.inject(node, cast("Any", frame))
            assert frame_drops(node) == {"malformed_frame": 6}


# --- at the start -------------------------------------------------------------------------------------------


class Exposed:
    """A transport that strangers may reach, or that at least leaves the process."""

    in_process = False
    max_frame = 1024 * 1024
    peers = ()

    def __init__(self, *, exposed: bool) -> None:
        self.exposed = exposed

    async def start(self, node: str, receiver: object, prover: object) -> None: ...
    async def close(self) -> None: ...
    def send(self, to: str, frame: bytes) -> None: ...
    def broadcast(self, frame: bytes) -> None:
        assert not frame.startswith(PLAIN)


async def start(*, exposed: bool, **options: Any) -> None:
    async with Runtime("alice", transport=Exposed(exposed=exposed), **options):
        pass


async def test_a_node_whose_messages_leave_the_process_has_an_identity_of_its_own() -> None:
    one, two = (Runtime("alice", transport=Exposed(exposed=False)) for _ in range(2))
    ids = {one.node, two.node}
    assert len(ids - {"alice"}) == 2
    for _ in range(2):
        async with one:
            await one.emit(TEASE, "x")  # it is proved: see the transport
    assert ids == {one.node, two.node}, "it is the same after a restart"
    await start(exposed=True, trust={BOB.node_id})


def test_in_a_simulation_it_comes_from_the_seed() -> None:
    async def made() -> str:
        return Runtime("alice", transport=Exposed(exposed=False)).node

    ids = []
    for seed in (1, 1, 2):
        with contextlib.closing(SimLoop(seed)) as loop:
            ids.append(loop.run_until_complete(made()))
    assert ids[0] == ids[1] != ids[2]


async def test_a_node_that_strangers_can_reach_must_say_whom_it_trusts() -> None:
    with pytest.raises(ValueError, match="can be reached by strangers: say with trust= whom it trusts"):
        await start(exposed=True, identity=ALICE)
    with pytest.raises(ValueError, match="can be reached by strangers: say with trust= whom it trusts"):
        await start(exposed=True)
    everybody: list[Any] = [set(), [BOB.node_id], lambda node: True]
    for trust in everybody:
        await start(exposed=True, identity=ALICE, trust=trust)
    await start(exposed=False, identity=ALICE)


def test_trust_needs_an_identity() -> None:
    with pytest.raises(ValueError, match="trust needs an identity: only nodes that have one prove who they are"):
        Node("alice", trust={BOB.node_id})


@pytest.mark.parametrize("trust", ["bob", BOB.node_id, ["bob"], [BOB], 7])
async def test_trust_that_can_never_be_is_refused_at_the_start(trust: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        await start(exposed=False, identity=ALICE, trust=trust)


def test_names_are_short_since_others_remember_them() -> None:
    Node("x" * 255)
    with pytest.raises(ValueError, match="the name of a node must have at most 255 characters, not 256"):
        Node("x" * 256)


async def test_a_node_handles_so_many_kinds_as_others_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "MAX_KINDS", 2)
    with pytest.raises(ValueError, match="handles 3 kinds of requests, of which it may have 2"):
        async with proved(ALICE):
            pass


async def test_a_refusal_with_more_to_say_than_fits_into_a_frame_reaches_its_caller() -> None:
    class Verbose(Service):
        name = "verbose"

        @handles(ASK)
        async def ask(self, msg: Message[str]) -> str:
            raise Reject("quota", msg.payload * 2_000_000)

    hub = MemoryHub()
    async with (
        Node("alice", hub=hub, identity=ALICE) as alice,
        Node("bob", Verbose(), hub=hub, identity=BOB) as bob,
    ):
        with pytest.raises(RemoteError) as caught:
            await alice.call(ASK, "x", bob.node)
        assert (caught.value.code, caught.value.detail) == ("quota", "x" * 4_096)


async def test_a_refusal_that_quotes_a_large_payload_reaches_its_caller() -> None:
    choose = request("verbose:ask", cast("type[str]", Literal["yes", "no"]), reply=str)

    class Choosy(Service):
        name = "choosy"

        @handles(choose)
        async def yes_or_no(self, msg: Message[str]) -> str:
            return msg.payload

    hub = MemoryHub()
    async with (
        Node("alice", hub=hub, identity=ALICE) as alice,
        Node("bob", Choosy(), hub=hub, identity=BOB) as bob,
    ):
        with pytest.raises(MalformedFrame) as caught:
            await alice.call(ASK, "x" * 1_000_000, bob.node)
        assert len(caught.value.reason) <= 1_000
