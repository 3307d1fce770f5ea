"""The transport over NATS on a real server: how it starts, what it says when it cannot, how nodes come and go."""

import asyncio
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from nats.errors import NoRespondersError

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.transports import NatsLimits, NatsTransport
from meshkit.transports._nats.connector import Connector
from tests.transports.nats_nodes import QUICK, SLOW, Node, running, stranger
from tests.transports.nats_servers import NatsServer, any_url, needs_a_server, until
from tests.transports.nodes import PATIENCE, all_meet

pytestmark = [pytest.mark.real_time, needs_a_server]


@pytest.fixture
def server() -> Iterator[NatsServer]:
    with NatsServer() as one:
        yield one


async def refusal(node: Node) -> OSError:
    """Return why a node cannot start, which it says at once, leaving nothing behind."""
    with anyio.fail_after(PATIENCE):
        with pytest.raises(OSError) as caught:
            await node.start()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    with pytest.raises(Closed):
        node.transport.broadcast(b"x")
    return caught.value


# --- the start, and what people are told


async def test_where_nobody_listens_the_start_fails_at_once_and_says_so() -> None:
    error = await refusal(Node("alice", "nats://127.0.0.1:1"))
    assert str(error) == "NATS server 127.0.0.1:1: nobody listens there"


async def test_every_server_is_tried_and_each_says_why_it_is_of_no_use(server: NatsServer) -> None:
    error = await refusal(Node("alice", ["nats://127.0.0.1:1", "nats://127.0.0.1:2"]))
    assert all(f"NATS server 127.0.0.1:{port}: nobody listens there" in str(error) for port in (1, 2))
    for _ in range(4):  # they are tried in any order
        async with running(node := Node("alice", ["nats://127.0.0.1:1", server.url])):
            assert node.transport.server == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("config", "right", "wrong"),
    [
        ('authorization { user: u, password: "p@:/w" }', "u:p%40%3A%2Fw@", "u:secret@"),
        ('authorization { user: u, password: "p" }', "u:p@", ""),
        ("authorization { token: right }", "right@", "secret@"),
    ],
)
async def test_who_gives_the_wrong_password_or_token_is_told_so_and_it_does_not_show(
    config: str, right: str, wrong: str
) -> None:
    with NatsServer(config) as server:
        error = await refusal(node := Node("alice", server.url.replace("//", f"//{wrong}")))
        assert isinstance(error, PermissionError)
        assert "does not accept the user, password, token or credentials" in str(error)
        assert "secret" not in str(error) + repr(node.transport)
        async with running(Node("alice", server.url.replace("//", f"//{right}"))):
            pass


async def test_a_node_that_may_not_subscribe_is_told_what_the_server_must_permit() -> None:
    with NatsServer("authorization { users: [{user: u, password: p, permissions: {subscribe: other}}] }") as server:
        error = await refusal(Node("alice", server.url.replace("//", "//u:p@")))
        assert isinstance(error, PermissionError)
        assert "does not permit what the mesh needs" in str(error)
        assert 'subscription to "meshkit.' in str(error)


async def test_what_the_server_does_not_permit_later_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with NatsServer("authorization { users: [{user: u, password: p, permissions: {publish: other}}] }") as server:
        async with running(Node("alice", server.url.replace("//", "//u:p@"))):
            await until(lambda: caplog.messages)
            async with stranger(server.url.replace("//", "//u:p@")):  # some time later
                assert len(caplog.messages) == 1
                assert "does not permit what the mesh needs" in caplog.text


async def test_a_server_that_takes_no_frame_as_large_as_may_be_is_not_used() -> None:
    with NatsServer("max_payload: 65536") as server:
        error = await refusal(Node("alice", server.url))
        assert "messages of at most 65536 bytes, and a frame may have 1048576: raise max_payload" in str(error)
        async with running(node := Node("alice", server.url, limits=NatsLimits(max_frame=65536))):
            with pytest.raises(ValueError, match="at most 65536 bytes, not 65537"):
                node.transport.broadcast(bytes(65537))


async def test_a_frozen_server_is_given_up_in_time(server: NatsServer) -> None:
    server.freeze()
    error = await refusal(Node("alice", server.url, limits=NatsLimits(connect_timeout=0.2)))
    assert "no answer within 0.2 s" in str(error)


async def test_whoever_is_no_nats_server_is_found_out() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        error = await refusal(Node("alice", f"nats://127.0.0.1:{other.sockets[0].getsockname()[1]}"))
        assert "whoever listens there is no NATS server" in str(error)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=mesh"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    try:
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    return folder


async def test_with_a_wrong_ca_the_start_fails_at_once_and_with_the_right_one_there_is_a_mesh(
    certificate: Path,
) -> None:
    config = f'tls {{ cert_file: "{certificate}/cert.pem", key_file: "{certificate}/key.pem" }}'
    with NatsServer(config) as server:
        for url in (server.url, server.url.replace("nats:", "tls:")):
            error = await refusal(Node("alice", url))
            assert "its certificate is not accepted (self-signed certificate): give an ssl.SSLContext" in str(error)
        tls = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        alice, bob = (Node(name, server.url, tls=tls) for name in ("alice", "bob"))
        async with running(alice, bob):
            frame = bytes(1024 * 1024)
            alice.transport.send(bob.id, frame)
            await bob.hears(1)
            assert bob.frames == [frame]
            server.kill()
            await alice.loses(bob)
            server.start()
            await all_meet(alice, bob)


async def test_who_asks_for_tls_gets_it_or_sends_nothing(server: NatsServer, certificate: Path) -> None:
    error = await refusal(Node("alice", server.url.replace("nats://", "tls://user:secret@")))
    assert "it does not offer TLS" in str(error)
    config = f'tls {{ cert_file: "{certificate}/cert.pem", key_file: "{certificate}/key.pem" }}\nallow_non_tls: true'
    with NatsServer(config) as either:
        tls = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        for context in (tls, None):
            async with running(node := Node("alice", either.url, tls=context)):
                mesh = node.transport._mesh
                assert mesh is not None
                assert mesh.link is not None
                writer = mesh.link._socket._io_writer
                assert writer is not None
                assert bool(writer.get_extra_info("ssl_object")) == bool(context)


async def test_a_server_that_asks_before_it_answers_is_answered() -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"max_payload": 1048576}\r\n')
        while line := await reader.readline():
            heard.put_nowait(line)
            if line == b"PING\r\n":
                writer.write(b"PING\r\nPONG\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as other:
        url = f"nats://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        async with running(Node("alice", url)):
            with anyio.fail_after(PATIENCE):
                while await heard.get() != b"PONG\r\n":
                    pass
        await until(lambda: len(asyncio.all_tasks()) == 1)


async def test_when_the_start_returns_the_server_knows_the_node(server: NatsServer) -> None:
    async with stranger(server.url, subject="nothing") as other:
        node = Node("alice", server.url)
        async with running(node):
            with pytest.raises(TimeoutError):  # and not that nobody is there
                await other.client.request(f"meshkit.{node.id}.somebody", b"", timeout=0.05)
        with pytest.raises(NoRespondersError):
            await other.client.request("meshkit.nobody.somebody", b"", timeout=PATIENCE)


async def test_a_start_that_is_closed_meanwhile_ends_and_leaves_nothing(server: NatsServer) -> None:
    server.freeze()
    node = Node("alice", server.url, limits=NatsLimits(connect_timeout=1000.0))
    start = asyncio.create_task(node.start())
    await asyncio.sleep(0)
    await node.transport.close()
    with pytest.raises(Closed):
        await start
    server.thaw()
    async with running(node):
        pass


def test_a_loop_that_ends_without_a_close_takes_the_transport_with_it(caplog: pytest.LogCaptureFixture) -> None:
    node = Node("alice", any_url(), subject="left")

    async def main() -> None:
        await node.start()

    for _ in range(2):
        asyncio.run(main())  # it cancels what is left
        assert not caplog.messages
        assert not node.transport.peers
        asyncio.run(node.transport.close())


async def test_a_cancellation_that_the_client_swallows_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stubborn(connector: Connector) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
        await asyncio.sleep(1000)

    monkeypatch.setattr(Connector, "first", stubborn)
    node = Node("alice", any_url())
    start = asyncio.create_task(node.start())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    start.cancel()
    with anyio.fail_after(PATIENCE):
        await asyncio.wait([start])
    assert start.cancelled()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# --- nodes that come and go


async def test_nodes_on_another_subject_or_that_are_not_trusted_do_not_meet(caplog: pytest.LogCaptureFixture) -> None:
    alice, bob = Node("alice", any_url(), subject="one"), Node("bob", any_url(), subject="one")
    carol = Node("carol", any_url(), subject="other.mesh")
    dave = Node("dave", any_url(), subject="one", trust=[bob.id])
    async with running(alice, bob):
        await carol.start()
        await dave.start()
        await dave.meets(bob)
        await bob.meets(dave)
        await until(lambda: "is not trusted" in caplog.text)
        assert not carol.transport.peers
        assert list(dave.transport.peers) == [bob.id]
        with pytest.raises(Unreachable):  # it trusts whoever is there, but it was not answered
            alice.transport.send(dave.id, b"let me in")
        bob.transport.send(dave.id, b"hello")
        await dave.hears(1)
        assert dave.frames == [b"hello"]
        await carol.transport.close()
        await dave.transport.close()


async def test_a_node_that_is_killed_is_lost_though_it_says_no_goodbye_and_is_found_when_it_is_back() -> None:
    alice, bob, carol = (Node(name, any_url(), subject="killed") for name in ("alice", "bob", "carol"))
    async with running(alice, bob, carol):
        bob.die()
        await alice.loses(bob)
        await carol.loses(bob)
        with pytest.raises(Unreachable, match="no node of this id has announced itself"):
            alice.transport.send(bob.id, b"x")
        await bob.transport.close()
        await bob.start()
        await all_meet(alice, bob, carol)
        assert alice.gone.count(bob.id) == 1
        assert alice.met.count(bob.id) == 2


async def test_who_sends_to_a_node_that_was_killed_is_told_by_the_server() -> None:
    alice, bob = (Node(name, any_url(), subject="told", limits=SLOW) for name in ("alice", "bob"))
    async with running(alice, bob):
        mesh = alice.transport._mesh
        assert mesh is not None
        bob.die()
        before = mesh.company.peers[bob.id].missing

        def in_doubt() -> bool:  # as soon as the server has noticed
            alice.transport.send(bob.id, b"are you there?")
            return mesh.company.peers[bob.id].missing > before

        await until(in_doubt)
        mesh._tick()
        mesh._tick()
        assert alice.gone.count(bob.id)


async def test_a_node_that_is_frozen_is_lost_and_found_when_it_goes_on() -> None:
    alice, bob = (Node(name, any_url(), subject="frozen") for name in ("alice", "bob"))
    async with running(alice, bob):
        mesh = bob.transport._mesh
        assert mesh is not None
        assert mesh._timer is not None
        mesh._timer.cancel()
        await alice.loses(bob)
        mesh._tick()
        await alice.meets(bob)
        alice.transport.send(bob.id, b"welcome back")
        await bob.hears(1)


async def test_a_node_that_restarts_before_it_was_missed_is_lost_and_found() -> None:
    alice, bob = (Node(name, any_url(), subject="quick", limits=SLOW) for name in ("alice", "bob"))
    async with running(alice, bob):
        bob.die()
        await bob.transport.close()
        await bob.start()
        await alice.until(lambda: alice.met.count(bob.id) == 2)
        assert [what for what, _, _ in alice.story] == ["found", "lost", "found"]
        await bob.meets(alice)


async def test_two_nodes_with_one_key_are_told_of_each_other(caplog: pytest.LogCaptureFixture) -> None:
    one, other = (Node("alice", any_url(), subject="twice") for _ in range(2))
    async with running(one):
        await other.start()
        await until(lambda: "another node has the key of this one: each node needs a key of its own" in caplog.text)
        assert not one.transport.peers
        await other.transport.close()


async def test_what_does_not_fit_into_the_buffer_is_overloaded(
    server: NatsServer,
) -> None:
    limits = NatsLimits(heartbeat=1000.0, max_buffer=100_000)
    alice, bob = Node("alice", server.url, limits=limits), Node("bob", server.url, limits=SLOW)
    async with running(alice, bob):
        server.freeze()
        with pytest.raises(Overloaded, match=r"connection to the NATS server .* it holds 100000 already"):
            for _ in range(10_000):
                alice.transport.send(bob.id, bytes(10_000))
        with pytest.raises(Overloaded):
            alice.transport.broadcast(bytes(10_000))
        server.thaw()
        await bob.until(lambda: alice.transport.server and bob.frames)


async def test_no_more_nodes_are_peers_than_may_be(caplog: pytest.LogCaptureFixture) -> None:
    few = NatsLimits(heartbeat=0.4, max_peers=2)
    alice = Node("alice", any_url(), subject="few", limits=few)
    others = [Node(name, any_url(), subject="few") for name in ("bob", "carol", "dave")]
    async with running(alice, *others[:2]):
        await others[2].start()
        await until(lambda: "more nodes than the 2 that may be peers" in caplog.text)
        assert set(alice.transport.peers) == {others[0].id, others[1].id}
        await others[0].transport.close()
        await alice.meets(*others[1:])
        await others[2].transport.close()


# --- nats-py is needed where it is used


def test_who_does_not_use_it_does_not_import_nats() -> None:
    code = (
        "import sys, meshkit, meshkit.transports; from meshkit.transports import NatsTransport, NatsLimits\n"
        "assert 'nats' not in sys.modules\n"
        "NatsTransport('nats://127.0.0.1:1'); assert 'nats.aio.client' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_nats_py_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(ModuleNotFoundError, match=r'NatsTransport needs nats-py: pip install "meshkit\[nats\]"'):
        NatsTransport("nats://127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"servers": []}, "servers must name a NATS server"),
        ({"servers": "http://127.0.0.1"}, "a server must be a URL such as .* not 'http://127.0.0.1'"),
        ({"subject": "a b"}, "subject must be words .* not 'a b'"),
        ({"subject": "a.*"}, "subject must be words"),
        ({"subject": "a..b"}, "subject must be words"),
        ({"subject": "a" * 101}, "subject must be words"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NatsTransport(**{"servers": "nats://127.0.0.1", **arguments})


async def test_it_says_where_it_is() -> None:
    node = Node("alice", any_url(), subject="says")
    assert repr(node.transport) == "NatsTransport(not connected, 'says', peers=0)"
    assert node.transport.server is None
    async with running(node):
        assert repr(node.transport) == f"NatsTransport({node.transport.server}, 'says', peers=0)"
        with pytest.raises(RuntimeError, match="give each runtime a NatsTransport of its own"):
            await node.start()
    assert node.transport.exposed
    assert not node.transport.in_process
    with pytest.raises(ValueError, match="needs an identity"):
        await node.transport.start("alice", node, None)
    assert QUICK.heartbeat < NatsLimits().heartbeat
