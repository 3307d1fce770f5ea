"""Presence: who is up, what they handle, and what comes of it when they go."""

import asyncio
import math
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

from meshkit.errors import CallTimeout, PeerLost, Unreachable
from meshkit.events import Event
from meshkit.runtime import Peer, PeerGone, PeerUp
from meshkit.runtime.presence import Heartbeat, Presence
from meshkit.runtime.wire import Beat, Goodbye, Tell, encode_payload
from meshkit.testing import SimLoop, run, simulated
from meshkit.testing._sim_faults import Faults
from meshkit.transports import MemoryHub
from tests.runtime.nodes import SLEEP, STORE, TEASE, Node, Stash, Store, mesh, plain
from tests.runtime.test_messages import balanced, settle

KINDS = ("stash:odd", "stash:sleep", "stash:store")


def now() -> float:
    return asyncio.get_running_loop().time()


def beat(name: str = "bob", every: float = 1.0, **options: Any) -> Beat:
    return Beat(name, ("x:y",), every, **options)


# --- the core


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("hfs"), st.floats(0.01, 20), st.floats(0, 30))))
def test_who_is_up_is_who_was_heard_of_lately(steps: list[tuple[str, str, float, float]]) -> None:
    presence, model, silent, time = Presence(), dict[str, float](), set[str](), 0.0
    last: dict[str, float] = {}  # what is granted when the first 2.5 intervals are over
    for node, step, every, later in steps:
        time += later
        if step == "h":
            model[node], last[node] = time + 2.5 * every, every
            silent.discard(node)
            assert presence.heard(node, beat(node, every), time) == model[node]
        elif step == "f":
            assert presence.forget(node) is (model.pop(node, None) is not None)
            last.pop(node, None)
            silent.discard(node)
        else:
            overdue = {node for node, until in model.items() if until <= time}
            gone = {node for node in overdue if node not in last}
            assert set(presence.fallen_silent(time)) == gone
            model |= {node: time + last.pop(node) for node in overdue - gone}
            silent |= gone
            model = {node: until for node, until in model.items() if node not in gone}
            last = {node: every for node, every in last.items() if node in model}
        assert presence.peers.keys() == model.keys()
        assert presence.silent.keys() == silent
        assert presence.wake_at() == min(model.values(), default=math.inf)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("hhfs"), st.sets(st.sampled_from("xyz")), st.booleans())
    )
)
def test_who_handles_a_kind_is_whoever_is_up_and_said_so_last(
    steps: list[tuple[str, str, set[str], bool]],
) -> None:
    presence = Presence()
    for time, (node, step, kinds, draining) in enumerate(steps):
        if step == "h":
            presence.heard(node, Beat(node, tuple(kinds), 1.0, draining=draining), time)
        elif step == "f":
            presence.forget(node)
        else:
            presence.fallen_silent(time)
        for kind in "xyz":
            assert presence.that_handle(kind) == [peer for peer in presence.peers.values() if kind in peer.kinds]


def test_to_look_for_those_who_handle_a_kind_looks_at_all_nodes_only_when_one_has_changed() -> None:
    looked = 0

    class Kinds(tuple[str, ...]):
        def __contains__(self, kind: object) -> bool:
            nonlocal looked
            looked += 1
            return super().__contains__(kind)

    presence = Presence()
    for node in "abc":
        for time in range(3):
            presence.heard(node, Beat(node, Kinds(["x:y"]), 9.0), time)
    for _ in range(5):
        assert [peer.node for peer in presence.that_handle("x:y")] == ["a", "b", "c"]
        presence.heard("a", Beat("a", Kinds(["x:y"]), 9.0), 5.0)
    assert looked == 3
    for number in range(100):
        assert presence.that_handle(f"made up {number}") == []
    assert len(vars(presence)["_handling"]) == 1


@pytest.mark.parametrize("every", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300])
def test_whatever_a_node_claims_it_is_found_silent_some_day(every: float) -> None:
    presence = Presence()
    until = presence.heard("bob", beat(every=every), 5.0)
    assert presence.fallen_silent(until) == []
    until = presence.wake_at()
    assert until == 5 + Presence.PATIENCE * Presence.LONGEST
    assert presence.fallen_silent(math.nextafter(until, 0)) == []
    assert presence.fallen_silent(until) == ["bob"]


def test_who_looks_late_looks_again_one_interval_later_and_then_knows() -> None:
    presence = Presence()
    for node, every in (("bob", 1.0), ("carol", 60.0)):
        presence.heard(node, beat(node, every), 0.0)
    assert presence.fallen_silent(3600.0) == [], "it stood still itself"
    presence.heard("carol", beat("carol", 60.0), 3600.5)
    assert presence.wake_at() == 3601
    assert presence.fallen_silent(3601.0) == ["bob"]
    assert [*presence.peers] == ["carol"]


def test_no_more_nodes_are_heard_or_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Presence, "MAX_PEERS", 3)
    presence = Presence()
    assert [presence.heard(node, beat(), 0.0) for node in "abcd"] == [2.5, 2.5, 2.5, math.inf]
    assert presence.heard("a", beat(), 1.0) == 3.5, "who is known is heard"
    assert [*presence.peers] == ["a", "b", "c"]
    assert [presence.fallen_silent(now) for now in (8.0, 9.0)] == [[], ["a", "b", "c"]]
    presence.heard("d", beat(), 9.0)
    assert [presence.fallen_silent(now) for now in (98.0, 99.0)] == [[], ["d"]]
    assert [*presence.silent] == ["b", "c", "d"]
    for node in "stuv":
        presence.lose(node)
    assert [*presence.lost] == ["t", "u", "v"]


# --- nodes


class Told:
    """An observer that remembers who came and went."""

    def __init__(self) -> None:
        self.news: list[Event] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, PeerUp | PeerGone):
            self.news.append(event)


async def test_nodes_that_meet_know_each_other_by_name_and_by_what_they_handle() -> None:
    told = Told()
    hub = MemoryHub()
    async with Node("alice", Stash(), hub=hub, observer=told) as alice:
        async with Node("bob", hub=hub) as bob:
            await settle()
            assert alice.peers == {"bob": Peer("bob", "bob")}
            assert bob.peers == {"alice": Peer("alice", "alice", KINDS)}
        assert alice.peers == {}
        assert told.news == [
            PeerUp(Peer("bob", "bob")),
            PeerUp(Peer("bob", "bob", draining=True)),
            PeerGone("bob", "it said goodbye"),
        ]
    assert alice.peers == {}
    assert bob.peers == {}


async def test_a_node_is_announced_when_its_services_are_ready_and_not_before() -> None:
    class Slow(Stash):
        async def start(self) -> None:
            await asyncio.sleep(5)

    async with mesh("alice") as (hub, [alice], _):
        bob = Node("bob", Slow(), hub=hub)
        starting = asyncio.create_task(bob.start())
        await asyncio.sleep(4)
        assert alice.peers == {"bob": Peer("bob", "bob")}
        await starting
        await settle()
        assert alice.peers["bob"].kinds == KINDS
        await bob.stop()


async def test_a_name_is_a_label_that_several_may_bear() -> None:
    async with mesh("alice") as (hub, [alice], _):
        for node in ("k1", "k2"):
            hub.send(node, "alice", plain(beat("bob")))
        assert [alice.peers.get(node) for node in ("k1", "k2")] == [
            Peer(node, "bob", ("x:y",)) for node in ("k1", "k2")
        ]
        hub.send("k1", "alice", plain(Goodbye()))
        assert [*alice.peers] == ["k2"]


async def test_a_silent_node_fails_its_pending_calls_at_once_and_is_asked_no_more_until_it_is_heard() -> None:
    told = Told()
    hub, stash = MemoryHub(), Stash()
    async with (
        Node("alice", stash, hub=hub, heartbeat=60.0, observer=told) as alice,
        Node("bob", Stash(), hub=hub, heartbeat=2.0) as bob,
    ):
        await asyncio.sleep(1)
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        asking = asyncio.create_task(bob.call(SLEEP, 100.0, to="alice", timeout=200))
        await settle()
        hub.silence("bob")
        with pytest.raises(PeerLost) as caught:
            await asked
        assert caught.value.executed == "maybe"
        assert now() == 7, "3.5 of its own intervals, and not of ours"
        await settle()
        assert stash.cancelled == [100.0], "for whom it worked"
        assert alice.peers == {}
        assert told.news[-1] == PeerGone("bob", "it has fallen silent")
        for verb in (alice.call(STORE, Store("x"), to="bob"), alice.emit(TEASE, "x", to="bob")):
            with pytest.raises(Unreachable):
                await verb
        hub.heal()
        await asyncio.sleep(2)
        assert alice.peers["bob"].kinds == KINDS
        assert (await alice.call(STORE, Store("x"), to="bob")).size == 0
        asking.cancel()
        await asyncio.wait([asking])


async def test_a_node_of_which_anything_is_heard_is_not_silent_any_more() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], _):
        await settle()
        hub.silence("bob")
        await asyncio.sleep(8)
        hub.heal()
        with pytest.raises(Unreachable, match="it has fallen silent"):
            await alice.call(STORE, Store("x"), to="bob")
        hub.send("bob", "alice", plain(Tell("5f", "social:tease", 1, 0.0, encode_payload("x"))))
        assert (await alice.call(STORE, Store("x"), to="bob")).size == 0


async def test_nobody_is_taken_for_silent_while_it_beats() -> None:
    told = Told()
    async with mesh("alice", "bob", "carol", observer=told) as (_, nodes, _):
        await asyncio.sleep(1000)
        assert all(len(node.peers) == 2 for node in nodes)
        assert not [event for event in told.news if isinstance(event, PeerGone)]


async def test_a_node_that_started_again_unnoticed_fails_what_its_former_self_was_asked() -> None:
    """On a transport that does not tell: nobody said goodbye, no connection was lost."""
    told = Told()
    async with mesh("alice", observer=told) as (hub, [alice], [stash]):
        hub.join("bob", cast("Any", Deaf()))
        hub.send("bob", "alice", plain(beat(greets=True)))
        asked = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob", timeout=100))
        await settle()
        hub.send("bob", "alice", plain(beat()))
        await settle()
        assert not asked.done(), "a sign of life like any other"
        hub.send("bob", "alice", plain(beat(greets=True)))
        with pytest.raises(PeerLost):
            await asked
        assert now() == pytest.approx(0.002)
        assert "bob" in alice.peers
        assert [type(event) for event in told.news] == [PeerUp, PeerGone, PeerUp]
        assert stash.begun == []


class Deaf:
    """A node that takes everything and does nothing."""

    def received(self, sender: str, frame: bytes) -> None:
        """Take it."""

    def lost(self, node: str) -> None:
        """Take note."""


async def test_a_node_of_the_same_name_that_starts_after_another_is_a_node_like_any_other() -> None:
    async with mesh("alice") as (hub, [alice], _):
        for _ in range(3):
            async with Node("bob", Stash(), hub=hub):
                await settle()
                assert alice.peers == {"bob": Peer("bob", "bob", KINDS)}
                assert (await alice.call(STORE, Store("x"), to="bob")).size == 0
            assert alice.peers == {}


async def test_a_node_that_goes_without_goodbye_and_comes_again_was_lost_in_between() -> None:
    async with mesh("alice", "bob") as (hub, [alice, bob], _):
        await settle()
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        await settle()
        receiver = cast("Any", bob)._life.router.intake
        hub.leave("bob")
        hub.join("bob", receiver)
        with pytest.raises(PeerLost):
            await asked
        await asyncio.sleep(2)
        assert alice.peers["bob"].kinds == KINDS
        assert (await alice.call(STORE, Store("x"), to="bob")).size == 0


# --- those who were given up, and have not noticed


class OneWayHub(MemoryHub):
    """Carries nothing from `lost` to anybody."""

    lost = ""

    def send(self, sender: str, to: str, frame: bytes) -> None:
        if sender != self.lost:
            super().send(sender, to, frame)


async def test_a_node_that_was_given_up_and_has_not_noticed_is_told_so_as_soon_as_it_is_heard_again() -> None:
    told = Told()
    hub, stash, other = OneWayHub(), Stash(), Stash()
    async with Node("alice", stash, hub=hub, observer=told) as alice, Node("bob", other, hub=hub) as bob:
        await asyncio.sleep(1)
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        asking = asyncio.create_task(bob.call(SLEEP, 99.0, to="alice", timeout=200))
        await settle()
        hub.lost = "alice"
        with pytest.raises(PeerLost):
            await asking
        await settle()
        assert now() == pytest.approx(7.001)
        assert other.cancelled == [100.0]
        assert not asked.done(), "as far as alice knows, bob is up and at work"
        assert stash.cancelled == []
        hub.lost = ""
        with pytest.raises(PeerLost):
            await asked
        assert now() == 8, "with her next sign of life"
        await settle()
        assert stash.cancelled == [99.0], "for which nobody waits"
        assert [type(event) for event in told.news] == [PeerUp, PeerGone, PeerUp]
        for one, to in ((alice, "bob"), (bob, "alice")):
            assert (await one.call(STORE, Store("x"), to=to)).size == 0
        assert balanced(alice)
        assert balanced(bob)


async def test_a_node_that_the_transport_lost_on_one_side_only_is_told_so_when_it_is_found_again() -> None:
    async with mesh("alice", "bob") as (_, [alice, bob], [_, other]):
        await settle()
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        await settle()
        intake = cast("Any", bob)._life.router.intake
        intake.lost("alice")
        await settle()
        assert other.cancelled == [100.0]
        assert not asked.done()
        intake.found("alice")
        with pytest.raises(PeerLost):
            await asked
        again = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob"))
        await settle()
        intake.found("alice")
        assert await again == 1.0, "what was told once is not told again"


async def test_nodes_that_gave_each_other_up_meet_again_without_another_farewell() -> None:
    told = Told()
    hub = MemoryHub()
    async with Node("alice", Stash(), hub=hub, observer=told) as alice:
        await asyncio.sleep(0.5)
        async with Node("bob", Stash(), hub=hub, observer=told) as bob:
            await settle()
            hub.cut("alice", "bob")
            await asyncio.sleep(20)
            assert [type(event) for event in told.news] == [PeerUp, PeerUp, PeerGone, PeerGone]
            hub.heal()
            await asyncio.sleep(2)
            assert [type(event) for event in told.news[4:]] == [PeerUp, PeerUp]
            assert (await alice.call(STORE, Store("x"), to="bob")).size == 0
            assert (await bob.call(STORE, Store("x"), to="alice")).size == 0


@pytest.mark.parametrize("seconds", [3.2, 5.15, 5.5, 7.0, 3600.0])
async def test_a_loop_that_stood_still_takes_nobody_for_silent(seconds: float) -> None:
    told = Told()
    async with mesh("alice", "bob", observer=told) as (_, [alice, bob], _):
        await asyncio.sleep(1.9)
        asked = asyncio.create_task(alice.call(SLEEP, 20.0, to="bob", timeout=5000))
        await settle()
        cast("Any", asyncio.get_running_loop())._now += seconds  # a callback that takes so long
        assert await asked == 20
        assert not [event for event in told.news if isinstance(event, PeerGone)]
        assert [*alice.peers, *bob.peers] == ["bob", "alice"]


async def test_a_loop_that_stood_still_knows_one_heartbeat_later_who_has_gone() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], _):
        await settle()
        hub.silence("bob")
        asked = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob", timeout=5000))
        await settle()
        cast("Any", asyncio.get_running_loop())._now += 3600
        with pytest.raises(PeerLost):
            await asked
        assert now() == pytest.approx(3602.002)


# --- opting out


async def test_a_node_without_a_heartbeat_is_heard_of_by_nobody_but_hears_the_others() -> None:
    hub = MemoryHub()
    async with Node("alice", Stash(), hub=hub, heartbeat=None) as alice, Node("bob", Stash(), hub=hub) as bob:
        await settle()
        assert bob.peers == {"alice": Peer("alice", "alice")}, "the transport knows it"
        assert alice.peers["bob"].kinds == KINDS
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        await settle()
        hub.silence("bob")
        with pytest.raises(PeerLost):
            await asked
        assert now() == 7
        hub.heal()
        await bob.call(STORE, Store("x"), to="alice")
        hub.silence("alice")
        with pytest.raises(CallTimeout):
            await bob.call(STORE, Store("x"), to="alice", timeout=50)
        hub.heal()


async def test_where_nobody_has_a_heartbeat_there_is_no_timer_and_calls_work_all_the_same() -> None:
    async with mesh("alice", "bob", heartbeat=None) as (_, [alice, bob], _):
        timers = cast("Any", asyncio.get_running_loop())._scheduled
        assert [timer for timer in timers if not timer.cancelled()] == []
        assert (await alice.call(STORE, Store("x"), to="bob")).size == 0
        asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="bob", timeout=200))
        await settle()
        bob.grace = 0
        await bob.stop()
        assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], PeerLost)
        assert alice.peers == {}
        assert balanced(alice)


@pytest.mark.parametrize("heartbeat", [0, -1, math.nan, math.inf, "1"])
def test_a_heartbeat_is_a_number_of_seconds(heartbeat: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="heartbeat must be"):
        Node("alice", heartbeat=heartbeat)


def test_a_node_that_has_stopped_has_no_timer_left() -> None:
    async def main() -> None:
        hub = MemoryHub()
        async with Node("alice", hub=hub), Node("bob", hub=hub):
            await asyncio.sleep(10)
            hub.silence("bob")
            await asyncio.sleep(3)

    run(main)  # which fails if any is


# --- where a simulation leaves beats out


def test_a_beat_that_is_left_out_is_never_the_greeting_nor_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faults, "ARMED", 1.0)
    monkeypatch.setattr(Faults, "FIRES", 1.0)

    async def main(sim: SimLoop) -> None:
        gone: list[str] = []
        said: list[tuple[float, bool]] = []

        def say(_: str | None, wire: Beat) -> None:
            said.append((sim.now, wire.greets))
            listener.heard("bob", wire)

        listener = Heartbeat(Presence(), None, lambda _to, _wire: None, gone.append, None)
        speaker = Heartbeat(Presence(), beat(every=1.0), say, gone.append, None)
        speaker.start()
        await asyncio.sleep(7)
        speaker.stop()
        listener.stop()
        assert said == [(0.0, True), (2.0, False), (4.0, False), (6.0, False)], "every other one at most"
        assert gone == []

    simulated(1, main, buggify=True)
