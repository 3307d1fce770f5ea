"""Servers of NATS that are killed, frozen and started again: the known faults of the client are not passed on."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import anyio
import pytest

from meshkit.errors import CallTimeout, MeshkitError, OutcomeUnknown, PeerLost, Refused, Unreachable
from meshkit.logger import Logger
from meshkit.retrier import Retrier, RetryPolicy
from meshkit.runtime import Message, Runtime, Service, handles, request
from meshkit.transports import NatsLimits, NatsTransport
from meshkit.transports._nats.connector import Connector
from meshkit.transports._nats.servers import Server
from tests.runtime.nodes import SLEEP, STORE, Stash, Store, StoreAck
from tests.transports.nats_nodes import QUICK, SLOW, Node, running, stranger
from tests.transports.nats_servers import NatsServer, any_url, cluster, needs_a_server, until
from tests.transports.nodes import PATIENCE, all_meet, identity

pytestmark = [pytest.mark.real_time, needs_a_server]
NAMES = ["alice", "bob", "carol"]
TRUST = frozenset(identity(name).node_id for name in NAMES)


# --- transports


async def test_when_the_server_is_killed_all_are_lost_at_once_and_found_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with NatsServer() as server:
        alice, bob, carol = (Node(name, server.url, limits=SLOW) for name in NAMES)
        async with running(alice, bob, carol):
            caplog.clear()
            server.kill()
            await alice.loses(bob)
            await alice.loses(carol)
            await bob.loses(alice)
            for _ in range(3):
                with pytest.raises(
                    Unreachable, match=f"the NATS server 127.0.0.1:{server.port} is lost|nobody listens"
                ):
                    alice.transport.send(bob.id, b"from the outage")
                alice.transport.broadcast(b"from the outage")
            assert alice.transport.server is None
            server.start()
            await all_meet(alice, bob, carol)
            alice.transport.send(bob.id, b"afterwards")
            await bob.hears(1)
            assert bob.frames == [b"afterwards"]
            assert (bob.gone.count(alice.id), bob.met.count(alice.id)) == (1, 2)
            lines = [line for line in caplog.messages if "meshkit" in line or "NATS" in line]
            assert len(lines) == len(caplog.messages) == 6, "two for each node: that it is lost, and that it is there"
            assert sum("is lost" in line and "tries to connect again" in line for line in lines) == 3
            assert sum("connected to the NATS server" in line for line in lines) == 3


async def test_it_never_gives_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Connector, "FIRST_DELAY", 0.0001)
    monkeypatch.setattr(Connector, "LAST_DELAY", 0.0002)
    with NatsServer() as server:
        alice, bob = Node("alice", server.url), Node("bob", server.url)
        async with running(alice, bob):
            server.kill()
            mesh = alice.transport._mesh
            assert mesh is not None
            await until(lambda: mesh._connector._failures > 200)  # the client itself stops at 60
            server.start()
            await all_meet(alice, bob)
            assert len(caplog.messages) == 2


async def test_a_frozen_server_with_megabytes_unsent_is_left_for_one_that_works() -> None:
    with cluster(2) as [one, other]:
        alice, bob = Node("alice", one.url), Node("bob", other.url)
        async with running(alice, bob):
            assert alice.transport.server == f"127.0.0.1:{one.port}"
            one.freeze()
            mesh = alice.transport._mesh
            assert mesh is not None
            assert mesh.link is not None
            while mesh.link.unsent < 2 * 1024 * 1024:  # the system takes some megabytes, how many differs
                alice.transport.send(bob.id, bytes(1024 * 1024))
            await alice.loses(bob)
            await alice.until(lambda: alice.met.count(bob.id) == 2)
            assert alice.transport.server == f"127.0.0.1:{other.port}"
            await bob.meets(alice)
            alice.transport.send(bob.id, b"over the other one")
            await bob.until(lambda: b"over the other one" in bob.frames)
            one.thaw()


async def test_a_close_does_not_wait_for_a_frozen_server() -> None:
    with NatsServer() as server:
        limits = NatsLimits(heartbeat=1000.0, close_timeout=0.05)
        alice, bob = Node("alice", server.url, limits=limits), Node("bob", server.url, limits=limits)
        async with running(alice, bob):
            server.freeze()
            for _ in range(6):
                alice.transport.send(bob.id, bytes(1024 * 1024))
            with anyio.fail_after(PATIENCE):
                await alice.transport.close()
                await bob.transport.close()
            server.thaw()


async def test_a_connection_that_breaks_in_the_middle_of_a_close_is_not_looked_for_again() -> None:
    async with running(alice := Node("alice", any_url(), subject="breaks")):
        mesh = alice.transport._mesh
        assert mesh is not None
        alice.die()
        await until(mesh._keeper.done)
        assert mesh._keeper.exception() is None


async def test_a_loop_that_stood_still_loses_nobody() -> None:
    alice, bob = (Node(name, any_url(), subject="still", limits=QUICK) for name in ("alice", "bob"))
    async with running(alice, bob):
        mesh = alice.transport._mesh
        assert mesh is not None
        ticks = mesh._ticks
        time.sleep(3 * QUICK.heartbeat)  # noqa: ASYNC251 - that is the point
        await until(lambda: mesh._ticks > ticks + 4)
        assert not alice.gone.count(bob.id)
        assert not bob.gone.count(alice.id)


async def test_a_server_that_says_nothing_of_use_is_not_dialled_in_a_hurry_nor_logged_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with NatsServer() as server:
        async with running(alice := Node("alice", server.url)):
            mesh = alice.transport._mesh
            assert mesh is not None
            for number in range(1, 5):
                await until(lambda: mesh.link is not None)
                assert mesh.link is not None
                mesh.link.end("a whim")
                await until(lambda number=number: mesh._connector._failures >= number)  # type: ignore[misc]
            await until(lambda: mesh.link is not None)
            assert [line.split(" ")[0] for line in caplog.messages] == ["the", "connected"]


async def refused_once_more(node: Node) -> None:
    mesh = node.transport._mesh
    assert mesh is not None
    failures = mesh._connector._failures
    await until(lambda: mesh._connector._failures > failures)


async def test_credentials_that_do_not_hold_any_more_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with NatsServer("authorization { token: old }") as server:
        async with running(alice := Node("alice", server.url.replace("//", "//old@"))):
            server.kill()
            server._config = "authorization { token: new }"
            server.start()
            await until(lambda: "does not accept" in caplog.text)
            await refused_once_more(alice)
            assert len(caplog.messages) == 2
            assert "does not accept" in caplog.messages[1]


async def test_a_server_that_comes_back_unfit_is_said_once_and_used_when_it_is_mended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with NatsServer() as server:
        async with running(alice := Node("alice", server.url)):
            server.kill()
            server._config = "max_payload: 65536"
            server.start()
            await until(lambda: "messages of at most 65536 bytes" in caplog.text)
            await refused_once_more(alice)
            assert len(caplog.messages) == 2
            server.kill()
            server._config = ""
            server.start()
            await until(lambda: alice.transport.server)


async def test_a_node_whose_permission_is_taken_away_and_given_back_heals(caplog: pytest.LogCaptureFixture) -> None:
    right = "authorization { users: [{user: u, password: p}] }"
    with NatsServer(right) as server:
        alice, bob = (Node(name, server.url.replace("//", "//u:p@"), limits=SLOW) for name in ("alice", "bob"))
        async with running(alice, bob):
            server.reload("authorization { users: [{user: u, password: p, permissions: {subscribe: other}}] }")
            await until(lambda: caplog.text.count("does not permit what the mesh needs") == 2)
            assert not alice.transport.peers
            server.reload(right)
            await all_meet(alice, bob)


async def test_a_node_that_reads_too_slowly_is_cut_off_by_the_server_and_comes_back() -> None:
    with NatsServer("max_pending: 1MB") as server:
        alice, bob = Node("alice", server.url, limits=SLOW), Node("bob", server.url, limits=SLOW)
        async with running(alice, bob):
            mesh = bob.transport._mesh
            assert mesh is not None
            assert mesh.link is not None
            writer = mesh.link._socket._io_writer
            assert writer is not None
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            with anyio.fail_after(PATIENCE):
                while "Slow Consumer" not in server.log:
                    with suppress(Refused):  # the server does not read as fast as that
                        alice.transport.send(bob.id, bytes(500_000))
                    await asyncio.sleep(0)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            await bob.until(lambda: bob.met.count(alice.id) == 2)
            await all_meet(alice, bob)
            alice.transport.send(bob.id, b"afterwards")
            await bob.until(lambda: bob.frames[-1:] == [b"afterwards"])


async def test_the_other_servers_of_a_cluster_are_found_with_the_same_credentials() -> None:
    with cluster(3) as servers:
        async with running(alice := Node("alice", servers[0].url)):
            mesh = alice.transport._mesh
            assert mesh is not None
            ports = {server.port for server in servers}
            await until(lambda: mesh.link and {s.port for s in mesh.link.cluster} == ports - {servers[0].port})
            assert mesh.link is not None
            before = mesh.link.cluster
            await mesh.link._process_info({"connect_urls": [f"127.0.0.1:{servers[0].port}"]})
            assert mesh.link.cluster == before, "a server that knows only itself is cut off from the others"
            await mesh.link._process_info({"connect_urls": ["127.0.0.1:1", "one:99999", 5]})
            assert [str(server) for server in mesh.link.cluster] == ["127.0.0.1:1"]
            server = Server.parse("tls://user:pass@one.example").other("10.0.0.2", 4333)
            assert (server.host, server.port, server.tls, server.user, server.password, server.certified) == (
                ("10.0.0.2", 4333, True, "user", "pass", "one.example")
            )


# --- runtimes


class Nats(Runtime):
    def __init__(self, name: str, servers: str | Sequence[str], *services: Service, subject: str = "meshkit") -> None:
        self.stash = Stash()
        self.transport = NatsTransport(servers, subject=subject, limits=QUICK)
        super().__init__(
            name,
            [self.stash, *services],
            transport=self.transport,
            identity=identity(name),
            trust=TRUST,
            grace=0.1,
            logger=Logger(node=name, disabled=["runtime", "stash"]),
        )

    async def knows(self, *others: Runtime) -> None:
        nodes = {other.node for other in others} - {self.node}
        await until(lambda: {node for node, peer in self.peers.items() if peer.kinds} == nodes)


@asynccontextmanager
async def mesh_of(*nodes: Nats) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        for node in nodes:
            await node.knows(*nodes)
        yield


async def test_everyone_can_ask_everyone_whatever_the_size() -> None:
    alice, bob, _ = nodes = [Nats(name, any_url(), subject="everyone") for name in NAMES]
    async with mesh_of(*nodes):
        for node in nodes:
            for other in nodes:
                assert await node.call(STORE, Store("map", bytes(500_000)), to=other.node) == StoreAck(500_000)
        replies = await alice.call_many(STORE, Store("all"))
        assert len(replies.replies) == 3
        with pytest.raises(ValueError, match=r"a payload of .* bytes does not fit into a frame"):
            await alice.call(STORE, Store("map", bytes(1024 * 1024)), to=bob.node)


async def test_its_task_says_whose_it_is() -> None:
    async with Nats("alice", any_url(), subject="tasks"):
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert {"meshkit:alice:runtime:life", "meshkit:alice:nats:connection"} <= names


async def test_no_handler_waits_for_another() -> None:
    alice, bob = [Nats(name, any_url(), subject="at.once") for name in NAMES[:2]]
    async with mesh_of(alice, bob):
        calls = [asyncio.create_task(alice.call(SLEEP, 500.0, to=bob.node, timeout=1000)) for _ in range(8)]
        await until(lambda: len(bob.stash.begun) == 8)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await until(lambda: len(bob.stash.cancelled) == 8)


async def test_who_waits_for_a_node_that_is_killed_or_for_any_when_the_server_is_knows_long_before_the_timeout() -> (
    None
):
    with NatsServer() as server:
        alice, bob, carol = nodes = [Nats(name, server.url) for name in NAMES]
        async with mesh_of(*nodes):
            calls = [asyncio.create_task(alice.call(SLEEP, 500.0, to=bob.node, timeout=1000)) for _ in range(3)]
            other = asyncio.create_task(alice.call(SLEEP, 500.0, to=carol.node, timeout=1000))
            await until(lambda: len(bob.stash.begun) == 3 and carol.stash.begun)
            mesh = bob.transport._mesh
            assert mesh is not None
            assert mesh.link is not None
            mesh._closed = True  # from now on it says nothing
            mesh.link._socket.abort()
            with anyio.fail_after(PATIENCE):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [PeerLost] * 3
            assert not other.done()
            server.kill()
            with anyio.fail_after(PATIENCE):
                await asyncio.wait([other])
            assert isinstance(other.exception(), PeerLost)
            await until(lambda: carol.stash.cancelled)
            with pytest.raises(Unreachable):
                await alice.call(STORE, Store("x"), to=carol.node, timeout=1000)
            server.start()
            await alice.knows(carol)


WORK = request("test:work", int, reply=int)


class Worker(Service):
    name = "worker"
    max_mailbox = 10_000

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()
        self.late: list[int] = []
        self.given_up: set[int] = set()

    @handles(WORK)
    async def work(self, msg: Message[int]) -> int:
        self.runs[msg.payload] += 1
        if msg.payload in self.given_up:
            self.late.append(msg.payload)
        await asyncio.sleep(0.001)
        return msg.payload


async def test_a_server_that_is_killed_and_restarted_under_load_leaves_nothing_hanging_and_nothing_runs_twice() -> None:
    with NatsServer() as server:
        worker = Worker()
        alice, bob = Nats("alice", server.url), Nats("bob", server.url, worker)
        timeout, outcomes = 2.0, Counter[str]()
        hung: list[int] = []
        stop = False
        numbers = iter(range(10**9))
        loop = asyncio.get_running_loop()

        async def load() -> None:
            while not stop:
                number, began = next(numbers), loop.time()
                try:
                    assert await alice.call(WORK, number, to=bob.node, timeout=timeout) == number
                    outcomes["replied"] += 1
                except MeshkitError as error:
                    outcomes[type(error).__name__] += 1
                    worker.given_up.add(number)
                    if not isinstance(error, CallTimeout | OutcomeUnknown):
                        assert not worker.runs[number], "a call that was refused did not run"
                        await asyncio.sleep(0.01)
                if loop.time() - began > timeout + 5:
                    hung.append(number)

        async with mesh_of(alice, bob):
            async with asyncio.TaskGroup() as group:
                for _ in range(50):
                    group.create_task(load())
                for _ in range(3):
                    replied = outcomes["replied"]
                    await until(lambda replied=replied: outcomes["replied"] > replied + 300)  # type: ignore[misc]
                    server.kill()
                    unreachable = outcomes["Unreachable"]
                    await until(lambda before=unreachable: outcomes["Unreachable"] > before + 50)  # type: ignore[misc]
                    server.start()
                replied = outcomes["replied"]
                await until(lambda: outcomes["replied"] > replied + 300)
                stop = True
            assert not hung
            assert max(worker.runs.values()) == 1, "nothing runs twice"
            assert not worker.late, "nothing runs when its caller has given up"
            assert set(outcomes) <= {"replied", "Unreachable", "PeerLost"}, outcomes


async def test_a_cluster_of_three_loses_any_one_and_the_mesh_heals() -> None:
    with cluster(3) as servers:
        nodes = [Nats(name, server.url) for name, server in zip(NAMES, servers, strict=True)]
        async with mesh_of(*nodes):
            for server in servers:
                server.kill()
                gone = {f"127.0.0.1:{server.port}", None}
                await until(lambda gone=gone: all(node.transport.server not in gone for node in nodes))  # type: ignore[misc]
                policy = RetryPolicy(max_retries=1000, base_delay=0.02, max_delay=0.1, timeout=PATIENCE)
                retrier = Retrier(policy, on=(Refused, OutcomeUnknown), idempotent=True)
                for node in nodes:
                    for other in nodes:
                        reply = await retrier.call(node.call, STORE, Store("x", b"1"), to=other.node, timeout=5)
                        assert reply == StoreAck(1)
                server.start()


async def test_a_broker_is_not_joined_without_saying_whom_to_trust() -> None:
    with pytest.raises(ValueError, match="can be reached by strangers: say with trust= whom it trusts"):
        await Runtime("alice", transport=NatsTransport(any_url()), identity=identity("alice")).start()


async def test_when_the_server_is_not_there_the_runtime_does_not_start_and_says_why() -> None:
    with pytest.raises(ConnectionError, match=r"NATS server 127\.0\.0\.1:1: nobody listens there"):
        await Nats("alice", "nats://127.0.0.1:1").start()


async def test_what_a_stranger_sends_as_if_from_a_peer_is_not_handled() -> None:
    alice, bob = Nats("alice", any_url(), subject="forged"), Nats("bob", any_url(), subject="forged")
    async with mesh_of(alice, bob), stranger(any_url()) as mallory:
        await bob.call(STORE, Store("real"), to=alice.node)
        [frame, *_] = await mallory.until_heard(f"{alice.node}.{bob.node}")
        for data in (frame.data, frame.data[:-1] + b"x", b"", b"\x01\x00" + frame.data[2:], bytes(1000)):
            await mallory.says(f"forged.{alice.node}.{bob.node}", data)
            await mallory.says(f"forged.all.{bob.node}", data)
        await bob.call(STORE, Store("real too"), to=alice.node)
        assert alice.stash.begun == ["real", "real too"]
