"""Runtimes over TCP, each with an identity, in one process; and TLS."""

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from meshkit.errors import PeerLost, Unreachable
from meshkit.events import Event
from meshkit.logger import Logger
from meshkit.runtime import PeerGone, PeerUp, Runtime
from meshkit.transports import TcpLimits, TcpTransport
from tests.runtime.nodes import SLEEP, STORE, TEASE, Stash, Store, StoreAck
from tests.transports.nodes import PATIENCE, identity, running
from tests.transports.tcp_nodes import Node, Stranger, mesh

pytestmark = pytest.mark.real_time
NAMES = ["alice", "bob", "carol", "dave", "erin"]
TRUST = frozenset(identity(name).node_id for name in NAMES)


class Tcp(Runtime):
    """A runtime on a loopback port, that can say when it knows whom."""

    def __init__(
        self, name: str, listen: str = "127.0.0.1:0", *, join: Collection[str] = (), trust: Any = TRUST
    ) -> None:
        self.transport = TcpTransport(listen, join=[*join])
        self.stash = Stash()
        self._news = asyncio.Event()
        super().__init__(
            name,
            [self.stash],
            transport=self.transport,
            identity=identity(name),
            trust=trust,
            grace=0.1,
            observer=self._on_event,
            logger=Logger(node=name, disabled=["runtime", "stash"]),
        )

    def _on_event(self, event: Event) -> None:
        if isinstance(event, PeerUp | PeerGone):
            self._news.set()

    async def knows(self, *others: Runtime) -> None:
        with anyio.fail_after(PATIENCE):
            while {node for node, peer in self.peers.items() if peer.kinds} != {o.node for o in others} - {self.node}:
                self._news.clear()
                await self._news.wait()

    @property
    def address(self) -> str:
        address = self.transport.address
        assert address is not None
        return address

    def kill(self) -> None:
        """Close all its sockets, as the operating system does when a process is killed: nobody says goodbye."""
        inner = self.transport._mesh
        assert inner is not None
        inner._closed = True
        assert inner._server is not None
        inner._server.close()
        for target in inner.dialler._targets.values():
            assert target.task is not None
            target.task.cancel()
        for link in inner.links.values():
            link.abort()


@asynccontextmanager
async def five() -> AsyncIterator[list[Tcp]]:
    nodes: list[Tcp] = []
    async with AsyncExitStack() as stack:
        for name in NAMES:
            nodes.append(await stack.enter_async_context(Tcp(name, join=[nodes[0].address] if nodes else [])))
        for node in nodes:
            await node.knows(*nodes)
        yield nodes


async def test_everyone_can_ask_everyone_and_tell_everyone() -> None:
    async with five() as nodes:
        for node in nodes:
            for other in nodes:
                assert await node.call(STORE, Store("map", b"123"), to=other.node) == StoreAck(3)
            assert await node.call(STORE, Store("map", b"1234")) == StoreAck(4)
        await nodes[0].emit(TEASE, "boo")
        replies = await nodes[4].call_many(STORE, Store("all"))
        assert len(replies.replies) == 5
        for node in nodes:
            assert [(tease.payload, tease.sender) for tease in node.stash.teases] == [("boo", nodes[0].node)]


async def test_the_callers_of_a_node_that_is_killed_know_at_once_and_it_can_come_back() -> None:
    async with five() as nodes:
        *callers, victim = nodes
        calls = [asyncio.create_task(node.call(SLEEP, 30.0, to=victim.node, timeout=60)) for node in callers]
        with anyio.fail_after(PATIENCE):
            while len(victim.stash.begun) < len(callers):
                await asyncio.sleep(0)
        port = victim.address
        victim.kill()
        with anyio.fail_after(PATIENCE):  # of the calls, none has a timeout that is shorter
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerLost] * 4
        for node in callers:
            await node.knows(*callers)
            with pytest.raises(Unreachable):
                await node.call(STORE, Store("x"), to=victim.node)
        async with Tcp(victim.name, port) as again:  # it has its key, and nothing else
            for node in callers:
                await node.knows(*callers, again)
            await again.knows(*callers)
            for node in callers:
                assert await node.call(STORE, Store("x", b"1"), to=again.node) == StoreAck(1)


async def test_one_that_a_node_does_not_trust_is_not_let_in() -> None:
    async with (
        Tcp("alice", trust={identity("bob").node_id}) as alice,
        Tcp("carol", join=[alice.address]) as carol,
        Tcp("bob", join=[alice.address]) as bob,
    ):
        await alice.knows(bob)
        await bob.knows(alice)
        with pytest.raises(Unreachable):
            await carol.call(STORE, Store("x"), to=alice.node)


async def test_on_one_machine_a_node_needs_no_more_than_an_address() -> None:
    listening = TcpTransport("127.0.0.1:0")
    async with (
        Runtime("bob", [Stash()], transport=listening) as bob,
        Runtime("alice", transport=TcpTransport(join=[listening.address or ""])) as alice,
    ):
        with anyio.fail_after(PATIENCE):
            while bob.node not in alice.peers:
                await asyncio.sleep(0.01)
        assert await alice.call(STORE, Store("x", b"12"), to=bob.node) == StoreAck(2)


async def test_a_node_that_strangers_can_reach_must_be_told_whom_to_trust() -> None:
    with pytest.raises(ValueError, match="can be reached by strangers: say with trust= whom it trusts"):
        await Runtime("alice", transport=TcpTransport(":0"), identity=identity("alice")).start()


async def test_nine_hundred_calls_at_once_are_answered() -> None:
    async with Tcp("alice") as alice, Tcp("bob", join=[alice.address]) as bob:
        await bob.knows(alice)
        replies = await asyncio.gather(
            *(bob.call(STORE, Store(str(n), bytes(n % 50)), to=alice.node, timeout=60) for n in range(900))
        )
        assert [reply.size for reply in replies] == [n % 50 for n in range(900)]


# --- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder: Path = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=mesh"
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    client.check_hostname = False
    return server, client


async def test_a_mesh_over_tls(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async with mesh("alice", "bob", "carol", server_ssl=tls[0], client_ssl=tls[1]) as [alice, bob, carol]:
        frame = bytes(1_000_000)
        alice.transport.send(bob.id, frame)
        carol.transport.send(bob.id, frame)
        await bob.hears(2)
        assert {*bob.heard} == {(alice.id, frame), (carol.id, frame)}
        await carol.transport.close()
        await alice.until(lambda: alice.gone)
        assert alice.gone == [carol.id]


async def test_who_does_not_speak_tls_is_dropped_in_time(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    limits = TcpLimits(handshake_timeout=0.4, max_unproved=10)
    alice = Node("alice", server_ssl=tls[0], client_ssl=tls[1], limits=limits)
    async with running(alice):
        strangers = [await Stranger.to(alice) for _ in range(40)]
        strangers[-1].send(b"GET / HTTP/1.1\r\n\r\n")
        plain = Node("bob", join=[alice.address], limits=limits)
        async with (
            running(plain),
            running(carol := Node("carol", join=[alice.address], client_ssl=tls[1], listen=None)),
        ):
            await carol.meets(alice)
            start = time.monotonic()
            for stranger in strangers:
                await stranger.rest()
                stranger.close()
            assert time.monotonic() - start < PATIENCE
            assert list(alice.transport.peers) == [carol.id]
            assert not plain.transport.peers


async def test_its_tasks_say_whose_they_are(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    transport = TcpTransport("127.0.0.1:0", join=["127.0.0.1:1"], server_ssl=tls[0], client_ssl=tls[1])
    async with Runtime("alice", identity=identity("alice"), trust=TRUST, transport=transport):
        assert transport.address is not None
        host, _, port = transport.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        tasks = {"meshkit:alice:runtime:life", "meshkit:alice:tcp:dial 127.0.0.1:1", "meshkit:alice:tcp:tls"}
        with anyio.fail_after(PATIENCE):
            while {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}} != tasks:
                await asyncio.sleep(0)
        writer.transport.abort()


async def test_a_node_whose_certificate_is_not_trusted_is_not_joined(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    alice = Node("alice", server_ssl=tls[0], client_ssl=tls[1])
    async with running(alice):
        bob = Node("bob", None, join=[alice.address], client_ssl=ssl.create_default_context())
        async with running(bob):
            with anyio.fail_after(PATIENCE):
                while not any("CERTIFICATE_VERIFY_FAILED" in line for line in caplog.messages):
                    await asyncio.sleep(0)
            assert not alice.transport.peers


async def test_a_broadcast_that_a_full_buffer_keeps_from_a_node_is_counted_and_explained() -> None:
    async with Tcp("alice") as alice, Tcp("bob", join=[alice.address]) as bob:
        await alice.knows(bob)
        await bob.knows(alice)
        mesh = bob.transport._mesh
        assert mesh is not None
        slow = mesh.links[alice.node]._transport
        assert slow is not None
        slow.pause_reading()
        ids = []
        while not alice.stats().dropped:
            ids.append(await alice.emit(TEASE, "x" * 200_000))
            await asyncio.sleep(0)
        slow.resume_reading()
        assert alice.stats().dropped == {("social:tease", "transport", "overloaded"): 1}
        [drop] = alice.drops
        assert (drop.message_id, bob.node in drop.detail) == (ids[-1], True)
        assert "dropped at transport: overloaded" in alice.explain(ids[-1])
