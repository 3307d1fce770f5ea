"""Strangers on the same server, who hear all and can say anything: they let nobody in, and drive nobody out."""

import asyncio
import os

import pytest

from meshkit.runtime.identity import Identity
from meshkit.transports._nats.announcement import Announcement, Says
from tests.transports.nats_nodes import SLOW, Node, Stranger, running, stranger
from tests.transports.nats_servers import NatsServer, any_url, needs_a_server, until
from tests.transports.nodes import all_meet, identity

pytestmark = [pytest.mark.real_time, needs_a_server]

NO_RESPONDERS = b"NATS/1.0 503\r\n\r\n"


def names(subject: str) -> list[Node]:
    return [Node(name, any_url(), subject=subject, limits=SLOW) for name in ("alice", "bob")]


async def is_heard(mallory: Stranger, node: Node, by: Node) -> None:
    """Wait until whatever mallory has said before has been taken in: the server keeps the order of what it is told."""
    count = len(by.heard)
    await mallory.client.flush()
    node.transport.send(by.id, b"mark")
    await by.hears(count + 1)


def announcement(
    node: Identity, subject: str, says: Says, session: bytes, number: int, echo: bytes = bytes(16)
) -> bytes:
    return Announcement(says, session, number, echo).signed(node, subject.encode())


async def test_what_is_not_signed_by_a_node_says_nothing_about_it() -> None:
    alice, bob = names("unsigned")
    async with stranger(any_url(), "unsigned.>") as mallory, running(alice, bob):
        mesh = bob.transport._mesh
        assert mesh is not None
        session, mine = mesh.company.session, identity("mallory")
        subject = f"unsigned.all.{bob.id}.here"
        for data in (
            b"",
            os.urandom(63),
            os.urandom(64),
            os.urandom(105),
            os.urandom(10_000),
            announcement(mine, subject, Says.GOODBYE, session, 10**9),
            announcement(bob.identity, subject, Says.GOODBYE, session, 10**9)[:-1] + b"\x01",
            announcement(bob.identity, subject.replace("all", alice.id), Says.GOODBYE, session, 10**9),
            announcement(bob.identity, subject.replace("unsigned", "other"), Says.GOODBYE, session, 10**9),
        ):
            await mallory.says(subject, data)
            await mallory.says(f"unsigned.all.{mine.node_id}.here", data)
            await mallory.says("unsigned.all.nobody.here", data)
            await mallory.says("unsigned.all.\xe9.here", data)
            await mallory.says(f"unsigned.{alice.id}.{bob.id}.here.and.there", data)
            await mallory.says(f"unsigned.all.{bob.id}.elsewhere", data)
        await is_heard(mallory, bob, alice)
        assert [what for what, _, _ in alice.story] == ["found", "frame"]
        assert list(alice.transport.peers) == [bob.id]


async def test_what_a_node_has_said_cannot_be_said_again_for_it() -> None:
    alice, bob = names("replayed")
    async with stranger(any_url(), "replayed.>") as mallory:
        async with running(alice, bob):
            for node in (alice, bob):
                assert node.transport._mesh is not None
                node.transport._mesh._tick()
                node.transport._mesh._tick()
            await mallory.until_heard(f".{bob.id}.here", 3)
            await bob.transport.close()
            await alice.loses(bob)
            await mallory.until_heard(f".{bob.id}.here", 4)  # the goodbye, too
            recorded = [*mallory.heard]
            for message in recorded:
                await mallory.repeats(message)
            await bob.start()  # in another session
            await all_meet(alice, bob)
            for message in recorded:
                await mallory.repeats(message)
            await is_heard(mallory, bob, alice)
            assert [what for what, _, _ in alice.story if what != "frame"] == ["found", "lost", "found"]
            assert list(alice.transport.peers) == [bob.id]
        story = [*alice.story]
        for message in recorded:  # to nobody
            await mallory.repeats(message)
        assert alice.story == story


async def test_a_stranger_that_says_that_nobody_is_there_makes_a_node_ask_and_no_more() -> None:
    alice, bob = names("nobody")
    async with stranger(any_url(), "nobody.>") as mallory, running(alice, bob):
        mesh = alice.transport._mesh
        assert mesh is not None
        for _ in range(3):
            await mallory.says(f"nobody.{alice.id}.{bob.id}", b"", NO_RESPONDERS)
            await mallory.says(f"nobody.{alice.id}.{identity('carol').node_id}", b"", NO_RESPONDERS)
            await mallory.says(f"nobody.{alice.id}.{bob.id}", b"frame?", b"NATS/1.0\r\na: b\r\n\r\n")
            await is_heard(mallory, bob, alice)
            await until(lambda: mesh.company.peers[bob.id].missing == 0)
            mesh._tick()
            mesh._tick()
        assert not alice.gone.count(bob.id)
        assert alice.frames == [b"mark"] * 3


async def test_what_a_node_said_in_its_last_life_does_not_look_like_another_one_with_its_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with stranger(any_url(), "life.>") as mallory:
        async with running(first := Node("alice", any_url(), subject="life")):
            await mallory.until_heard(f".{first.id}.here")
        recorded = [*mallory.heard]
        async with running(alice := Node("alice", any_url(), subject="life", limits=SLOW)):
            for message in recorded * 3:
                await mallory.repeats(message)
            asked = await mallory.until_heard(f"life.{alice.id}.{alice.id}.here")
            await mallory.repeats(asked[0])
            await mallory.repeats(asked[0])
            assert len(asked) == 1
            assert not caplog.messages


async def test_a_node_that_is_trusted_cannot_speak_for_another() -> None:
    alice, bob = names("another")
    async with stranger(any_url(), "another.>") as mallory, running(alice, bob):
        carol = identity("carol")
        mesh = bob.transport._mesh
        assert mesh is not None
        for subject in (f"another.all.{bob.id}.here", f"another.{alice.id}.{bob.id}.here"):
            for says in Says:
                await mallory.says(subject, announcement(carol, subject, says, mesh.company.session, 10**6))
        await is_heard(mallory, bob, alice)
        assert [what for what, _, _ in alice.story] == ["found", "frame"]


async def test_frames_of_who_is_no_peer_are_not_handed_over() -> None:
    alice, bob = names("frames")
    async with stranger(any_url(), "frames.>") as mallory, running(alice, bob):
        for sender in (identity("carol").node_id, "nobody", "all", alice.id):
            await mallory.says(f"frames.{alice.id}.{sender}", b"let me in")
            await mallory.says(f"frames.all.{sender}", b"let me in")
        await is_heard(mallory, bob, alice)
        assert alice.frames == [b"mark"]


async def test_a_flood_of_announcements_is_answered_with_few_and_remembered_within_bounds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alice = Node("alice", any_url(), subject="flood", limits=SLOW)
    carol = identity("carol")
    async with stranger(any_url(), "flood.>") as mallory, running(alice):
        mesh = alice.transport._mesh
        assert mesh is not None
        subject = f"flood.all.{carol.node_id}.here"
        same = announcement(carol, subject, Says.HERE_AND_WHO_ARE_YOU, bytes(16), 1)
        for _ in range(50):
            await mallory.says(subject, same)
        for number in range(mesh._options.limits.max_peers + 50):
            data = announcement(carol, subject, Says.HERE_AND_WHO_ARE_YOU, number.to_bytes(16), 1)
            await mallory.client.publish(subject, data)
        await mallory.client.flush()
        await until(lambda: len(mesh.company._asked) == mesh._options.limits.max_peers)
        await mallory.client.flush()
        asked = [message for message in mallory.heard if message.subject == f"flood.{carol.node_id}.{alice.id}.here"]
        assert len(asked) <= mesh._options.limits.max_peers
        assert not alice.story
        mesh._tick()
        assert not mesh.company._asked


async def test_what_is_logged_about_strangers_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    alice = Node("alice", any_url(), subject="logged", trust=[identity("bob").node_id])
    async with stranger(any_url(), "nothing") as mallory, running(alice):
        mesh = alice.transport._mesh
        assert mesh is not None
        for number in range(mesh.MOST_TOLD + 50):
            await mallory.client.publish(f"logged.all.\x1b[31mnode{number}{'x' * 200}.here", b"")
        await until(lambda: len(caplog.messages) == mesh.MOST_TOLD)
        await mallory.client.flush()
        assert max(len(line) for line in caplog.messages) < 200
        assert all(line.isprintable() for line in caplog.messages)


async def test_a_node_can_be_held_to_its_name_by_the_server() -> None:
    alice, bob = identity("alice").node_id, identity("bob").node_id
    users = ", ".join(
        f'{{ user: {name}, password: p, permissions: {{ publish: ["meshkit.*.{node}", "meshkit.*.{node}.here"], '
        f'subscribe: ["meshkit.{node}.>", "meshkit.all.>"] }} }}'
        for name, node in (("alice", alice), ("bob", bob))
    )
    with NatsServer(f"authorization {{ users: [ {users} ] }}") as server:
        nodes = [Node(name, server.url.replace("//", f"//{name}:p@")) for name in ("alice", "bob")]
        bobs = server.url.replace("//", "//bob:p@")
        async with running(*nodes), stranger(bobs, f"meshkit.{bob}.>") as mallory:
            await mallory.says(f"meshkit.{bob}.{alice}", b"as if from alice")
            nodes[0].transport.send(bob, b"from alice")
            await nodes[1].hears(1)
            assert nodes[1].frames == [b"from alice"]


async def test_garbage_from_the_server_ends_the_connection_and_the_node_goes_on() -> None:
    with NatsServer() as server:
        connections: list[asyncio.StreamWriter] = []

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer)
            there, back = await asyncio.open_connection("127.0.0.1", server.port)
            await asyncio.gather(pass_on(reader, back), pass_on(there, writer), return_exceptions=True)

        async with await asyncio.start_server(between, "127.0.0.1", 0) as proxy:
            url = f"nats://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
            alice, bob = Node("alice", url, limits=SLOW), Node("bob", server.url, limits=SLOW)
            async with running(alice, bob):
                for number, garbage in enumerate(
                    (
                        *(b"garbage\r\n", b"-ERR 'a whim'\r\n", b"MSG x\r\n", b"INFO {\r\n"),
                        b'INFO {"connect_urls": ["one:99999", "two:x", "[::1", ":1", "", 5]}\r\n-ERR \'bye\'\r\n',
                    ),
                    2,
                ):
                    connections[-1].write(garbage)
                    await alice.until(lambda number=number: alice.met.count(bob.id) == number)  # type: ignore[misc]
                await all_meet(alice, bob)
                alice.transport.send(bob.id, b"still here")
                await bob.hears(1)
