"""What strangers do to a node that listens: it costs little, ends soon, and its peers do not notice."""

import asyncio
import os
import struct
import time
import tracemalloc

import anyio
import pytest

from meshkit.transports import TcpLimits
from meshkit.transports._tcp.handshake import Handshake
from meshkit.transports._tcp.wire import MAX_CONTROL, Kind, Refusal, Unrecorder, addresses, record
from tests.transports.nodes import PATIENCE, identity, running
from tests.transports.tcp_nodes import QUICK, Node, Stranger, mesh

pytestmark = pytest.mark.real_time


def handshake(name: str) -> Handshake:
    return Handshake(
        identity(name),
        dialled=True,
        listens="",
        trusts=lambda _: True,
        challenge=os.urandom(32),
        dialling=lambda _: False,
    )


async def opened(node: Node, name: str) -> tuple[Stranger, Handshake, list[bytes]]:
    """Return a connection by hand that has proved itself, and what was sent for that."""
    stranger, ours, unrecorder = await Stranger.to(node), handshake(name), Unrecorder(MAX_CONTROL)
    sent = [ours.begin()]
    stranger.send(sent[0])
    with anyio.fail_after(PATIENCE):
        while not ours.proved:
            unrecorder.feed(await stranger.reader.read(65536))
            while (one := unrecorder.next()) is not None:
                if answer := ours.receive(*one):
                    sent.append(answer)
    stranger.send(sent[-1])
    return stranger, ours, sent


def huge(kind: Kind, size: int) -> bytes:
    return struct.pack(">IB", size, kind)


ATTACKS = {
    "a prefix of 2 GiB": huge(Kind.HELLO, 2**31),
    "a frame before the handshake": record(Kind.FRAME, b"x"),
    "an answer that nobody asked for": record(Kind.PROOF, bytes(64)),
    "an opening": record(Kind.OPEN),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a hello that is too large": huge(Kind.HELLO, MAX_CONTROL + 1),
    "noise": os.urandom(100_000),
    "zeros": bytes(100_000),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_is_no_handshake_ends_the_connection_at_once_without_an_answer(attack: str) -> None:
    alice = Node("alice", limits=TcpLimits(handshake_timeout=10 * PATIENCE))
    async with running(alice):
        stranger = await Stranger.to(alice)
        stranger.send(ATTACKS[attack])
        assert await stranger.rest() == b""
        stranger.close()


async def test_an_untrusted_node_gets_one_short_answer() -> None:
    alice = Node("alice", trust={identity("bob").node_id})
    async with running(alice):
        stranger = await Stranger.to(alice)
        stranger.send(handshake("eve").begin() * 10)
        assert await stranger.rest() == record(Kind.REFUSED, bytes([Refusal.STRANGER]))
        stranger.close()


async def test_a_replayed_handshake_is_refused() -> None:
    alice = Node("alice", trust={identity("bob").node_id})
    async with running(alice):
        bob, _, sent = await opened(alice, "bob")
        await alice.until(lambda: alice.transport.peers or True)
        bob.close()
        eve = await Stranger.to(alice)
        eve.send(b"".join(sent))
        assert (await eve.rest()).endswith(record(Kind.REFUSED, bytes([Refusal.BAD_PROOF])))
        eve.close()


@pytest.mark.parametrize("pause", ["nothing", "half a header", "half a hello"])
async def test_who_says_nothing_or_never_ends_is_dropped_in_time(pause: str) -> None:
    said = {"nothing": b"", "half a header": b"\0\0", "half a hello": handshake("eve").begin()[:-1]}[pause]
    alice = Node("alice", limits=QUICK)
    async with running(alice):
        start = time.monotonic()
        stranger = await Stranger.to(alice)
        stranger.send(said)
        assert await stranger.rest() == b""
        assert 0.3 < time.monotonic() - start < PATIENCE
        stranger.close()


async def test_an_endless_hello_is_dropped_in_time_however_it_trickles() -> None:
    alice = Node("alice", limits=QUICK)
    async with running(alice):
        start = time.monotonic()
        stranger = await Stranger.to(alice)
        stranger.send(huge(Kind.HELLO, MAX_CONTROL))

        async def trickle() -> None:
            while True:
                stranger.send(b"x")
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        assert await stranger.rest() == b""
        assert 0.3 < time.monotonic() - start < PATIENCE
        trickling.cancel()
        stranger.close()


async def test_who_proves_itself_and_then_never_opens_is_dropped_in_time() -> None:
    names = sorted(["alice", "bob"], key=lambda name: identity(name).node_id)
    arbiter, other = names
    node = Node(other, limits=QUICK)  # it has to be told by the arbiter that the connection is open
    async with running(node):
        start = time.monotonic()
        stranger, _, _ = await opened(node, arbiter)
        await stranger.rest()
        assert 0.3 < time.monotonic() - start < PATIENCE
        assert not node.transport.peers
        stranger.close()


@pytest.mark.parametrize(
    "said",
    [
        record(Kind.HELLO, bytes(65)),
        record(Kind.PROOF, bytes(64)),
        record(Kind.OPEN),
        huge(Kind.FRAME, 2**31),
        record(Kind.ADDRESSES, b"\xc1"),
        record(Kind.ADDRESSES, addresses([(identity("carol").node_id, "nowhere")])),
        struct.pack(">IB", 0, 99),
        record(Kind.FRAME, bytes(100_001)),
        record(Kind.ADDRESSES, addresses([("", "")] * MAX_CONTROL)),
    ],
)
async def test_a_peer_that_breaks_the_rules_is_lost(said: bytes) -> None:
    arbiter, other = sorted(["alice", "bob"], key=lambda name: identity(name).node_id)
    node = Node(arbiter, limits=TcpLimits(max_frame=100_000))
    async with running(node):
        stranger, _, _ = await opened(node, other)
        await node.until(lambda: node.met)
        stranger.send(record(Kind.FRAME, b"before") + said + record(Kind.FRAME, b"after"))
        await node.until(lambda: node.gone)
        assert node.heard == [(identity(other).node_id, b"before")]
        stranger.close()


async def test_many_addresses_of_a_peer_do_not_take_more_than_their_room() -> None:
    arbiter, other = sorted(["alice", "bob"], key=lambda name: identity(name).node_id)
    node = Node(arbiter, limits=TcpLimits(max_peers=10))
    async with running(node):
        stranger, _, _ = await opened(node, other)
        await node.until(lambda: node.met)
        tasks = len(asyncio.all_tasks())
        for start in range(0, 1000, 100):
            known = [(identity(f"{start + n}").node_id, f"127.0.0.1:{n + 1}") for n in range(100)]
            stranger.send(record(Kind.ADDRESSES, addresses(known)))
        stranger.send(record(Kind.FRAME, b"x"))
        await node.until(lambda: node.heard)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= tasks + 10
        stranger.close()


async def test_five_hundred_connections_that_say_nothing_cost_little_and_keep_nobody_out() -> None:
    limits = TcpLimits(max_unproved=50, handshake_timeout=10 * PATIENCE)  # nobody gets in because others time out
    async with mesh("alice", "bob", limits=limits) as [alice, bob]:
        strangers = [await Stranger.to(alice) for _ in range(500)]
        for stranger in strangers[-50:]:
            stranger.send(huge(Kind.HELLO, MAX_CONTROL) + bytes(MAX_CONTROL // 2))
        sockets = alice.transport._mesh._sockets  # type: ignore[union-attr]
        assert len(sockets._unproved) <= 50
        async with running(carol := Node("carol", join=[alice.address])):
            await carol.meets(alice)
        alice.transport.send(bob.id, b"x")
        await bob.until(lambda: bob.heard)
        for stranger in strangers[:450]:
            assert await stranger.rest() == b""
        await alice.until(lambda: carol.id in alice.gone)
        assert bob.id not in alice.gone
        for stranger in strangers:
            stranger.close()


async def test_strangers_take_no_memory_for_what_they_promise() -> None:
    alice = Node("alice")
    async with running(alice):
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            strangers = [await Stranger.to(alice) for _ in range(50)]
            for stranger in strangers:
                stranger.send(huge(Kind.HELLO, MAX_CONTROL))
            await asyncio.sleep(0.05)  # until they have been read: they say nothing that could be waited for
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (after - before) / 50 < 25_000, "bytes for each, both ends of it and its streams"
        for stranger in strangers:
            stranger.close()


async def test_strangers_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    alice = Node("alice")
    async with running(alice):
        for _ in range(30):
            stranger = await Stranger.to(alice)
            stranger.send(ATTACKS["http"])
            await stranger.rest()
            stranger.close()
    [line] = caplog.messages
    assert line.startswith("a connection from 127.0.0.1 came to nothing: it announced a record of 1195725856 bytes")
