import asyncio
from typing import Any, cast

import pytest

from meshkit.errors import Closed, Unreachable
from meshkit.testing import run
from meshkit.transports import MemoryHub, MemoryTransport


class Ear:
    """A receiver that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.gone: list[str] = []

    def received(self, sender: str, frame: bytes) -> None:
        self.heard.append((sender, frame))

    def found(self, node: str) -> None:
        raise AssertionError("on a hub all are there at once")

    def lost(self, node: str) -> None:
        self.gone.append(node)


async def joined(hub: MemoryHub, *names: str) -> tuple[list[MemoryTransport], list[Ear]]:
    transports, ears = [MemoryTransport(hub) for _ in names], [Ear() for _ in names]
    for name, transport, ear in zip(names, transports, ears, strict=True):
        await transport.start(name, ear, None)
    return transports, ears


async def test_a_frame_reaches_the_node_it_is_sent_to_at_once_and_in_order() -> None:
    [alice, *_], [own, bob, carol] = await joined(MemoryHub(), "alice", "bob", "carol")
    for number in range(10):
        alice.send("bob", bytes([number]))
    assert bob.heard == [("alice", bytes([number])) for number in range(10)]
    assert own.heard == carol.heard == []


async def test_a_broadcast_reaches_every_other_node() -> None:
    [alice, *_], [own, bob, carol] = await joined(MemoryHub(), "alice", "bob", "carol")
    alice.broadcast(b"x")
    assert own.heard == []
    assert bob.heard == carol.heard == [("alice", b"x")]


async def test_nobody_there() -> None:
    [alice], _ = await joined(MemoryHub(), "alice")
    with pytest.raises(Unreachable, match="node 'bob' cannot be reached: the hub has only alice"):
        alice.send("bob", b"x")
    alice.broadcast(b"x")


async def test_peers_are_the_others() -> None:
    [alice, bob], _ = await joined(MemoryHub(), "alice", "bob")
    assert list(alice.peers) == ["bob"]
    assert list(bob.peers) == ["alice"]
    await bob.close()
    assert list(alice.peers) == []
    assert list(bob.peers) == []


async def test_the_others_are_told_who_has_left() -> None:
    [alice, *_], [own, bob, carol] = await joined(MemoryHub(), "alice", "bob", "carol")
    await alice.close()
    await alice.close()
    assert (own.gone, bob.gone, carol.gone) == ([], ["alice"], ["alice"])


async def test_a_closed_transport_sends_nothing_until_it_is_started_again() -> None:
    hub = MemoryHub()
    [alice], _ = await joined(hub, "alice")
    await alice.close()
    with pytest.raises(Closed):
        alice.send("bob", b"x")
    with pytest.raises(Closed):
        alice.broadcast(b"x")
    ear = Ear()
    await alice.start("alice", ear, None)
    hub.send("zoe", "alice", b"x")
    assert ear.heard == [("zoe", b"x")]


async def test_a_name_is_given_once() -> None:
    hub = MemoryHub()
    await joined(hub, "alice", "bob")
    with pytest.raises(ValueError, match=r"node 'alice' cannot join MemoryHub.*: there is a node of that name"):
        await joined(hub, "alice")
    assert hub.nodes == ("alice", "bob")


async def test_a_transport_serves_one_runtime() -> None:
    [alice], _ = await joined(MemoryHub(), "alice")
    with pytest.raises(
        RuntimeError, match="is in use: give each runtime a MemoryTransport of its own, on the same hub"
    ):
        await alice.start("bob", Ear(), None)


async def test_what_a_silent_node_says_and_is_told_vanishes() -> None:
    hub = MemoryHub()
    [alice, bob, _], ears = await joined(hub, "alice", "bob", "carol")
    hub.silence("bob")
    alice.broadcast(b"1")
    alice.send("bob", b"2")
    bob.broadcast(b"3")
    assert [ear.heard for ear in ears] == [[], [], [("alice", b"1")]]
    hub.heal()
    alice.send("bob", b"4")
    assert ears[1].heard == [("alice", b"4")]


async def test_a_cut_is_between_two_nodes_in_both_directions() -> None:
    hub = MemoryHub()
    [alice, bob, _], ears = await joined(hub, "alice", "bob", "carol")
    hub.cut("bob", "alice")
    alice.broadcast(b"1")
    bob.broadcast(b"2")
    assert [ear.heard for ear in ears] == [[], [], [("alice", b"1"), ("bob", b"2")]]
    hub.heal()
    bob.send("alice", b"3")
    assert ears[0].heard == [("bob", b"3")]


async def test_a_node_may_leave_while_it_is_told_something() -> None:
    hub = MemoryHub()
    [alice, bob, _], [_, ear, carol] = await joined(hub, "alice", "bob", "carol")

    def leave(sender: str, frame: bytes) -> None:
        hub.leave("carol")

    cast("Any", ear).received = leave
    alice.broadcast(b"x")
    assert carol.heard == []
    assert hub.nodes == ("alice", "bob")
    assert list(bob.peers) == ["alice"]


def test_a_hub_belongs_to_one_loop_at_a_time() -> None:
    hub = MemoryHub()

    async def main() -> None:
        await joined(hub, "alice")
        with pytest.raises(RuntimeError, match=r"cannot join MemoryHub.*whose nodes run on another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(cast("Any", joined(hub, "bob"))))

    asyncio.run(main())
    assert hub.nodes == (), "they went down with their loop"
    run(lambda: joined(hub, "alice"))


def test_it_says_what_it_is() -> None:
    hub = MemoryHub()
    assert repr(hub) == "MemoryHub(nodes=[])"
    assert repr(MemoryTransport(hub)) == "MemoryTransport(MemoryHub(nodes=[]), node=None)"
    assert hub.nodes == ()


@pytest.mark.parametrize("hub", [None, "hub", MemoryHub])
def test_a_transport_needs_a_hub(hub: Any) -> None:
    with pytest.raises(TypeError, match="hub must be a MemoryHub, which the nodes of a mesh share, not"):
        MemoryTransport(hub)


async def test_closing_an_old_transport_does_not_take_down_who_has_its_name_now() -> None:
    hub = MemoryHub()
    [old], _ = await joined(hub, "alice")
    hub.leave("alice")
    hub.leave("alice")
    [new, _], [_, bob] = await joined(hub, "alice", "bob")
    await old.close()
    assert (hub.nodes, bob.gone) == (("alice", "bob"), [])
    await new.close()
    assert (hub.nodes, bob.gone) == (("bob",), ["alice"])
