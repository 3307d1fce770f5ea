import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio
import pytest

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.testing import CancellationPoint, cancellation_points
from meshkit.transports import TcpLimits, TcpTransport
from tests.transports.nodes import PATIENCE, identity, running
from tests.transports.tcp_nodes import QUICK, Node, mesh

pytestmark = pytest.mark.real_time
LOG = "meshkit.transports.tcp"


# --- arguments


def test_bad_arguments_are_named() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"listen": "7001"}, "listen must be"),
        ({"join": ["bob"]}, "an address in join must be"),
        ({"join": [":7001"]}, "an address in join must be"),
        ({"listen": ":7001", "advertise": ":7001"}, "advertise must be"),
        ({"advertise": "bob:7001"}, "it does not listen: give listen="),
        ({"listen": ":7001", "client_ssl": object()}, "give server_ssl and client_ssl, or neither"),
        ({"server_ssl": object()}, "give server_ssl and client_ssl, or neither"),
    ]
    for arguments, text in bad:
        with pytest.raises(ValueError, match=text):
            TcpTransport(**arguments)
    with pytest.raises(TypeError, match=r"not one: join=\['bob:7001'\]"):
        TcpTransport(join="bob:7001")
    with pytest.raises(ValueError, match="write_timeout must be finite and more than zero seconds, not 0"):
        TcpLimits(write_timeout=0)
    with pytest.raises(ValueError, match="max_peers must be at least 1, not 0"):
        TcpLimits(max_peers=0)


def test_it_is_exposed_where_other_machines_can_reach_it() -> None:
    assert not TcpTransport().exposed
    assert not TcpTransport("127.0.0.1:0").exposed
    assert not TcpTransport("[::1]:0").exposed
    assert not TcpTransport("localhost:7001").exposed
    assert TcpTransport(":7001").exposed
    assert TcpTransport("0.0.0.0:7001").exposed
    assert TcpTransport("10.1.2.3:7001").exposed
    assert TcpTransport("bob.example:7001").exposed


def test_it_is_exposed_where_it_joins_a_mesh_beyond_this_machine() -> None:
    assert not TcpTransport(join=["127.0.0.1:7001", "localhost:7002"]).exposed
    assert TcpTransport("127.0.0.1:0", join=["127.0.0.1:7001", "bob.example:7001"]).exposed
    assert not TcpTransport.in_process


async def test_it_says_where_it_listens() -> None:
    node = Node("alice")
    assert node.transport.address is None
    assert repr(node.transport) == "TcpTransport(127.0.0.1:0, peers=0)"
    async with running(node):
        assert node.port > 0
        assert repr(node.transport) == f"TcpTransport({node.address}, peers=0)"
    assert node.transport.address is None
    everywhere = Node("alice", ":0")
    async with running(everywhere):
        assert everywhere.address == f":{everywhere.port}"
    known = Node("alice", advertise="alice.example:7001")
    async with running(known):
        assert known.address == "alice.example:7001"
    silent = Node("alice", None)
    async with running(silent):
        assert silent.transport.address is None


# --- errors at the start


async def test_a_busy_port_is_said_to_be_busy_and_nothing_is_left_behind() -> None:
    alice = Node("alice")
    async with running(alice):
        bob = Node("bob", alice.address)
        with pytest.raises(
            OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: another process listens there"
        ) as caught:
            await bob.start()
        assert caught.value.errno == errno.EADDRINUSE
    async with running(bob):
        assert bob.port


@pytest.mark.parametrize(
    ("listen", "text"),
    [("192.0.2.1:7001", "this machine has no such address"), ("no-such-host.invalid:7001", "there is no such host")],
)
async def test_an_address_where_nobody_can_listen_is_explained(listen: str, text: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {listen}: {text}"):
        await Node("alice", listen).start()


async def test_a_port_of_the_system_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_server", refuse)
    with pytest.raises(PermissionError, match=r"cannot listen on 127\.0\.0\.1:80: this user may not"):
        await Node("alice", "127.0.0.1:80").start()


async def test_it_needs_an_identity_and_serves_one_runtime() -> None:
    alice = Node("alice")
    with pytest.raises(ValueError, match="node 'alice' needs an identity"):
        await alice.transport.start("alice", alice, None)
    async with running(alice):
        with pytest.raises(RuntimeError, match="is in use: give each runtime a TcpTransport of its own"):
            await alice.start()


# --- frames


async def test_frames_arrive_in_order_and_from_whom_they_are() -> None:
    async with mesh("alice", "bob") as [alice, bob]:
        frames = [number.to_bytes(2) * (number + 1) for number in range(300)]
        for frame in frames:
            alice.transport.send(bob.id, frame)
            bob.transport.send(alice.id, frame)
        for node, other in ((alice, bob), (bob, alice)):
            await node.hears(len(frames))
            assert node.heard == [(other.id, frame) for frame in frames]
            assert all(type(frame) is bytes for _, frame in node.heard)


@pytest.mark.parametrize("size", [0, 1, 65536, 1024 * 1024])
async def test_a_frame_of_any_size_that_may_be(size: int) -> None:
    async with mesh("alice", "bob") as [alice, bob]:
        frame = bytes(range(256)) * (size // 256) + bytes(size % 256)
        alice.transport.send(bob.id, frame)
        await bob.until(lambda: bob.heard)
        assert bob.heard == [(alice.id, frame)]


async def test_a_frame_that_is_too_large_is_not_sent() -> None:
    async with mesh("alice", "bob", limits=TcpLimits(max_frame=10)) as [alice, bob]:
        with pytest.raises(ValueError, match="a frame must have at most 10 bytes, not 11"):
            alice.transport.send(bob.id, bytes(11))
        with pytest.raises(ValueError, match="a frame must have at most 10 bytes, not 11"):
            alice.transport.broadcast(bytes(11))


async def test_a_broadcast_reaches_every_other_node() -> None:
    async with mesh("alice", "bob", "carol") as [alice, bob, carol]:
        alice.transport.broadcast(b"x")
        for node in (bob, carol):
            await node.hears(1)
            assert node.heard == [(alice.id, b"x")]
        assert alice.heard == []


async def test_nobody_there() -> None:
    alice = Node("alice")
    with pytest.raises(Closed):
        alice.transport.send("bob", b"x")
    async with running(alice):
        with pytest.raises(Unreachable, match="node 'bob' cannot be reached: there is no connection to it"):
            alice.transport.send("bob", b"x")
        alice.transport.broadcast(b"x")
    with pytest.raises(Closed):
        alice.transport.broadcast(b"x")


async def test_a_peer_that_does_not_read_is_overload_and_then_lost_and_the_others_do_not_notice() -> None:
    limits = TcpLimits(max_buffer=1_000_000, ping_interval=0.1, write_timeout=0.5, silence_timeout=60)
    async with mesh("alice", "bob", "carol", limits=limits) as [alice, bob, carol]:
        frozen = bob.transport._mesh.links[alice.id]._transport  # type: ignore[union-attr]
        assert frozen is not None
        frozen.pause_reading()
        sent = 0
        with pytest.raises(Overloaded, match=r"connection to node .* \(bytes\): full, it holds 1000000 already"):
            while True:
                alice.transport.send(bob.id, bytes(100_000))
                sent += 1
        assert sent < 200
        alice.transport.broadcast(b"still here")
        await carol.until(lambda: carol.heard)
        await alice.until(lambda: alice.gone)
        assert alice.gone == [bob.id]
        assert list(alice.transport.peers) == [carol.id]


async def test_what_waits_for_a_slow_peer_arrives_completely_and_in_order() -> None:
    async with mesh("alice", "bob", limits=TcpLimits(max_buffer=40_000_000)) as [alice, bob]:
        slow = bob.transport._mesh.links[alice.id]._transport  # type: ignore[union-attr]
        assert slow is not None
        slow.pause_reading()
        frames = [bytes([number % 256]) * 200_000 for number in range(100)]
        for frame in frames:
            alice.transport.send(bob.id, frame)
        slow.resume_reading()
        await bob.until(lambda: len(bob.heard) == len(frames))
        assert bob.frames == frames


# --- who finds whom


async def test_one_join_address_is_enough_to_find_everyone() -> None:
    async with mesh(*(f"node {number}" for number in range(7))) as nodes:
        for node in nodes:
            assert len(node.transport.peers) == 6
            assert sorted(node.met) == sorted(other.id for other in nodes if other is not node)


async def test_they_find_each_other_however_small_a_frame_may_be() -> None:
    async with mesh("a", "b", "c", "d", limits=TcpLimits(max_frame=1)) as nodes:
        nodes[0].transport.broadcast(b"x")
        await nodes[3].hears(1)
        assert all(node.gone == [] for node in nodes)


async def test_a_chain_of_join_addresses_becomes_a_mesh() -> None:
    nodes = [Node("a")]
    async with running(nodes[0]):
        for name in "bcde":
            nodes.append(Node(name, join=[nodes[-1].address]))
            await nodes[-1].start()
        try:
            for node in nodes:
                await node.meets(*(other for other in nodes if other is not node))
        finally:
            for node in nodes:
                await node.transport.close()


async def test_two_meshes_become_one_when_a_node_joins_both() -> None:
    async with mesh("a", "b") as one, mesh("c", "d") as other:
        bridge = Node("e", None, join=[one[0].address, other[1].address])
        async with running(bridge):
            nodes = [*one, *other, bridge]
            for node in nodes:
                await node.meets(*(other for other in nodes if other is not node))


async def test_a_node_that_does_not_listen_takes_part() -> None:
    alice = Node("alice")
    async with running(alice):
        bob = Node("bob", None, join=[alice.address])
        async with running(bob):
            await alice.meets(bob)
            alice.transport.send(bob.id, b"x")
            await bob.until(lambda: bob.heard)


@pytest.mark.parametrize("first", ["refuses", "says nothing"])
async def test_a_name_with_several_addresses_is_reached_although_the_first_one_is_dead(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = Node("alice"), Node("bob", None, join=["mesh.example:7001"], limits=QUICK)
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
        if first == "refuses":
            dead.close()

        async def resolve(host: str, _: int, **options: object) -> list[Any]:
            assert host == "mesh.example"
            places = [("127.0.0.1", port), ("127.0.0.1", alice.port)]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

        async with running(alice):
            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
            async with running(bob):
                await bob.meets(alice)


async def test_start_does_not_wait_for_those_who_are_not_there_yet(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    alice = Node("alice", join=[f"127.0.0.1:{port}"])
    with caplog.at_level(logging.INFO, LOG):
        async with running(alice):
            assert not alice.transport.peers
            async with running(bob := Node("bob", f"127.0.0.1:{port}")):
                await alice.meets(bob)
    assert len([line for line in caplog.messages if "cannot be joined" in line]) <= 1


@pytest.mark.parametrize("attempt", range(10))
async def test_nodes_that_dial_each_other_at_the_same_time_share_one_connection_and_lose_nothing(attempt: int) -> None:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    alice = Node("alice", f"127.0.0.1:{ports[0]}", join=[f"127.0.0.1:{ports[1]}"])
    bob = Node("bob", f"127.0.0.1:{ports[1]}", join=[f"127.0.0.1:{ports[0]}"])
    sent = {alice: 0, bob: 0}

    def chatter(node: Node, other: Node) -> Any:
        def received(sender: str, frame: bytes) -> None:
            node.heard.append((sender, frame))
            if sent[node] < 500:
                sent[node] += 1
                node.transport.send(other.id, sent[node].to_bytes(2))
            node._news.set()

        return received

    alice.received, bob.received = chatter(alice, bob), chatter(bob, alice)  # type: ignore[method-assign]
    async with running(alice, bob):
        await asyncio.gather(alice.meets(bob), bob.meets(alice))
        for node, other in ((alice, bob), (bob, alice)):
            sent[node] += 1
            node.transport.send(other.id, sent[node].to_bytes(2))
        await alice.until(lambda: len(alice.heard) >= 500)
        await bob.until(lambda: len(bob.heard) >= 500)
        for node in (alice, bob):
            assert node.frames == [n.to_bytes(2) for n in range(1, len(node.heard) + 1)]
            assert node.gone == []
            assert len(node.met) == 1


# --- who is let in


async def test_a_stranger_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    alice = Node("alice", trust={identity("bob").node_id})
    async with running(alice):
        eve, bob = Node("eve", join=[alice.address]), Node("bob", join=[alice.address])
        async with running(eve, bob):
            await alice.meets(bob)
            await told(caplog, "does not trust this node: add the id of this node to its trust=")
            assert not eve.transport.peers
            assert list(alice.transport.peers) == [bob.id]
    assert any(eve.id in line and "which is not trusted" in line for line in caplog.messages)


async def test_two_nodes_with_one_key_are_told_so(caplog: pytest.LogCaptureFixture) -> None:
    alice = Node("alice")
    async with running(alice), running(Node("alice", join=[alice.address])):
        await told(caplog, "each node needs a key of its own")
        assert not alice.transport.peers


async def test_strangers_cannot_be_introduced() -> None:
    """Bob, who trusts all, knows Eve; he tells Alice of her, who does not care."""
    bob = Node("bob")
    async with running(bob):
        eve = Node("eve", join=[bob.address])
        alice = Node("alice", join=[bob.address], trust={bob.id})
        async with running(eve, alice):
            await bob.meets(eve, alice)
            await alice.meets(bob)
            bob.transport.send(alice.id, b"after the addresses")
            await alice.until(lambda: alice.heard)
            assert list(alice.transport.peers) == [bob.id]


async def told(caplog: pytest.LogCaptureFixture, text: str) -> None:
    with anyio.fail_after(PATIENCE):
        while not any(text in line for line in caplog.messages):
            await asyncio.sleep(0)


async def test_no_more_peers_than_may_be(caplog: pytest.LogCaptureFixture) -> None:
    alice = Node("alice", limits=TcpLimits(max_peers=1))
    async with running(alice):
        bob, carol = Node("bob", join=[alice.address]), Node("carol", join=[alice.address])
        async with running(bob):
            await bob.meets(alice)
            async with running(carol):
                await told(caplog, "it has as many peers as it may have")
                assert list(alice.transport.peers) == [bob.id]


@pytest.mark.parametrize("other", ["bob", "carol", "dave", "erin"])  # some of them decide, some do not
async def test_who_is_one_too_many_is_told_before_it_believes_to_be_connected(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    alice = Node("alice", limits=TcpLimits(max_peers=1))
    async with running(alice), running(first := Node("first", join=[alice.address])):
        await first.meets(alice)
        await alice.meets(first)
        async with running(second := Node(other, None, join=[alice.address])):
            await told(caplog, "it has as many peers as it may have")
            assert second.met == second.gone == []


async def test_a_node_that_is_full_does_not_let_others_believe_that_it_has_joined_them() -> None:
    names = sorted(["alice", "bob", "carol"], key=lambda name: identity(name).node_id)
    first, second = Node(names[0]), Node(names[2])
    async with running(first, second):
        full = Node(names[1], join=[first.address], limits=TcpLimits(max_peers=1))
        async with running(full):
            await full.meets(first)
            link = full.transport._mesh.outgoing()  # type: ignore[union-attr]
            await asyncio.get_running_loop().create_connection(lambda: link, "127.0.0.1", second.port)
            await link.settled.wait()
            assert link.reason == "not wanted: full"
            with anyio.fail_after(PATIENCE):
                while second.transport._mesh._sockets._all:  # type: ignore[union-attr]
                    await asyncio.sleep(0)
            assert second.met == []


# --- loss


async def test_who_is_gone_is_lost_at_once_and_is_found_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOG):
        async with mesh("alice", "bob") as [alice, bob]:
            bob_port = bob.address
            closed = asyncio.create_task(bob.transport.close())
            await alice.until(lambda: alice.gone)
            await closed
            assert alice.gone == [bob.id]
            assert not alice.transport.peers
            with pytest.raises(Unreachable):
                alice.transport.send(bob.id, b"lost")
            async with running(again := Node("bob", bob_port)):
                await again.meets(alice)
                await alice.meets(again)
                again.transport.send(alice.id, b"back")
                await alice.until(lambda: alice.heard)
                assert again.heard == [], "nothing is kept for later"
    assert caplog.messages == [f"node {bob.id} has left", f"node {bob.id} has left"]


async def test_a_reset_is_noticed_at_once_and_told_in_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    async with mesh("alice", "bob") as [alice, bob]:
        sock = bob.transport._mesh.links[alice.id]._transport.get_extra_info("socket")  # type: ignore[union-attr]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        bob.transport._mesh.links[alice.id].drop("test")  # type: ignore[union-attr]
        await alice.until(lambda: alice.gone)
        await alice.until(lambda: len(alice.met) == 2)
        assert alice.gone == [bob.id]
    [lost, back] = [record.getMessage() for record in caplog.records if alice.id not in record.getMessage()][:2]
    assert lost.startswith(f"node {bob.id} is lost: the connection broke: ")
    assert back == f"node {bob.id} is back"


async def test_a_peer_that_has_lost_its_end_gets_a_new_connection_soon() -> None:
    """The node that decides still believes in the old one: it is asked, does not answer, and makes way."""
    async with mesh("alice", "bob", limits=QUICK) as nodes:
        arbiter, other = sorted(nodes, key=lambda node: node.id)
        half = other.transport._mesh.links.pop(arbiter.id)  # type: ignore[union-attr]
        half.data_received = lambda data: None  # type: ignore[method-assign]
        half.look = lambda now: None  # type: ignore[method-assign]
        half.gone.set()
        await arbiter.until(lambda: len(arbiter.met) == 2)
        await other.meets(arbiter)
        assert arbiter.gone == [other.id]


# --- the end


async def test_a_close_while_it_starts_ends_the_start_and_leaves_nothing() -> None:
    loop = asyncio.get_running_loop()
    sockets = sockets_of(loop)
    alice = Node("alice", "localhost:0", join=["127.0.0.1:1"])
    starting = asyncio.create_task(alice.start())
    await asyncio.sleep(0)  # now it looks up the name
    await alice.transport.close()
    with pytest.raises(Closed):
        await starting
    assert sockets_of(loop) == sockets
    assert asyncio.all_tasks() == {asyncio.current_task()}
    async with running(alice):
        assert alice.port


def test_a_close_after_its_loop_is_harmless_and_it_can_be_started_in_another() -> None:
    alice = Node("alice", None, join=["127.0.0.1:1"])

    async def again() -> None:
        await alice.transport.close()
        async with running(alice):
            assert not alice.transport.peers

    asyncio.run(alice.start())
    asyncio.run(again())


async def test_an_address_that_is_given_twice_is_one() -> None:
    async with running(Node("alice", join=["127.0.0.1:1", "127.0.0.1:01", "127.0.0.1:1"])):
        assert sum("dial" in task.get_name() for task in asyncio.all_tasks()) == 1


async def test_closing_twice_is_harmless_and_it_can_be_started_again() -> None:
    async with mesh("alice", "bob") as [alice, bob]:
        for _ in range(2):
            await alice.transport.close()
        await bob.until(lambda: bob.gone)
        await alice.start()
        bob_knows = Node("carol", join=[alice.address])
        async with running(bob_knows):
            await bob_knows.meets(alice)


async def test_what_was_sent_before_the_end_arrives() -> None:
    async with mesh("alice", "bob") as [alice, bob]:
        frames = [bytes([number]) * 500_000 for number in range(10)]
        for frame in frames:
            alice.transport.send(bob.id, frame)
        await alice.transport.close()
        await bob.until(lambda: bob.gone)
        assert bob.frames == frames


async def test_a_peer_that_does_not_read_cannot_hold_up_the_end() -> None:
    async with mesh("alice", "bob", limits=TcpLimits(close_timeout=0.2)) as [alice, bob]:
        frozen = bob.transport._mesh.links[alice.id]._transport  # type: ignore[union-attr]
        assert frozen is not None
        frozen.pause_reading()
        with suppress(Overloaded):
            while True:
                alice.transport.send(bob.id, bytes(1_000_000))
        with anyio.fail_after(2):
            await alice.transport.close()


async def test_a_peer_that_has_just_reset_its_connection_does_not_hold_up_the_end() -> None:
    def too_late() -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    async with mesh("alice", "bob", "carol") as [alice, bob, carol]:
        gone = alice.transport._mesh.links[bob.id]._transport  # type: ignore[union-attr]
        gone.write_eof = too_late  # type: ignore[method-assign, union-attr]
        await alice.transport.close()
        for node in (bob, carol):
            await node.loses(alice)


def sockets_of(loop: asyncio.AbstractEventLoop) -> int:
    return len(loop._selector.get_map())  # type: ignore[attr-defined]


def timers_of(loop: asyncio.AbstractEventLoop) -> list[Any]:
    return [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


async def test_nothing_is_left_when_it_is_closed() -> None:
    loop = asyncio.get_running_loop()
    tasks, sockets, timers = asyncio.all_tasks(), sockets_of(loop), len(timers_of(loop))
    async with mesh("alice", "bob", "carol") as [alice, *_]:
        await alice.transport.close()
    assert asyncio.all_tasks() == tasks
    assert sockets_of(loop) == sockets
    assert len(timers_of(loop)) == timers


def everywhere(scenario: Callable[[CancellationPoint, Node, Node], Coroutine[Any, Any, None]]) -> None:
    """Run `scenario(point, bob, alice)` for every point at which it can be cancelled; nothing of alice may be left."""

    async def once(point: CancellationPoint) -> None:
        loop = asyncio.get_running_loop()
        bob = Node("bob")
        async with running(bob):
            sockets = sockets_of(loop)
            alice = Node("alice", join=[bob.address, "127.0.0.1:1"])
            await scenario(point, bob, alice)
            await bob.until(lambda: not bob.transport.peers)
            with anyio.fail_after(PATIENCE):  # bob's end of what was under way is no concern of alice's
                while any(alice.id in task.get_name() for task in asyncio.all_tasks()) or sockets_of(loop) != sockets:
                    await asyncio.sleep(0)

    count = 0
    for point in cancellation_points():
        asyncio.run(once(point))
        count += 1
    assert count > 2


def test_a_start_can_be_cancelled_anywhere_and_leaves_nothing() -> None:
    async def scenario(point: CancellationPoint, bob: Node, alice: Node) -> None:
        if not await point.cancel(alice.start()):
            await alice.transport.close()
        assert not alice.transport.peers

    everywhere(scenario)


def test_a_close_can_be_cancelled_anywhere_and_leaves_nothing() -> None:
    async def scenario(point: CancellationPoint, bob: Node, alice: Node) -> None:
        await alice.start()
        await alice.meets(bob)
        await bob.meets(alice)
        alice.transport.send(bob.id, bytes(1_000_000))
        await point.cancel(alice.transport.close())
        assert not alice.transport.peers
        await bob.until(lambda: bob.gone)

    everywhere(scenario)
