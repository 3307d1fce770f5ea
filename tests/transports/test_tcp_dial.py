"""Who dials whom: a node that meets itself goes on looking for others."""

import asyncio
import logging
import socket
from typing import Any

import anyio
import pytest

from meshkit.transports._tcp.dial import Dialler
from tests.transports.nodes import PATIENCE, running
from tests.transports.tcp_nodes import Node

pytestmark = pytest.mark.real_time
LOG = "meshkit.transports.tcp"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dialler, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(Dialler, "LAST_DELAY", 0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def resolve(monkeypatch: pytest.MonkeyPatch, *ports: int) -> list[int]:
    """Let any name stand for these ports of this machine, turned around each time; return the number of times."""
    times = [0]

    async def getaddrinfo(*_: object, **__: object) -> list[Any]:
        times[0] += 1
        turned = ports[times[0] % len(ports) :] + ports[: times[0] % len(ports)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in turned]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return times


@pytest.mark.usefixtures("impatient")
async def test_a_node_does_not_join_itself_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    times = resolve(monkeypatch, port)
    caplog.set_level(logging.INFO, LOG)
    alice = Node("alice", f"127.0.0.1:{port}", join=[f"mesh.test:{port}"])
    async with running(alice):
        with anyio.fail_after(PATIENCE):
            while times[0] < 5:
                await asyncio.sleep(0)
        assert not alice.transport.peers
    assert caplog.messages == [f"the join address mesh.test:{port} leads to this node itself"]


@pytest.mark.usefixtures("impatient")
async def test_one_name_may_stand_for_all_nodes_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a headless service, or of a round robin: each time, the node that asks may be the first again."""
    ports = [free_port(), free_port()]
    alice = Node("alice", f"127.0.0.1:{ports[0]}", join=[f"mesh.test:{ports[0]}"])
    bob = Node("bob", f"127.0.0.1:{ports[1]}")
    times = resolve(monkeypatch, *ports)
    async with running(alice):
        with anyio.fail_after(PATIENCE):
            while times[0] < 3:  # until then it is alone, and meets itself
                await asyncio.sleep(0)
        async with running(bob):
            await alice.meets(bob)


@pytest.mark.usefixtures("impatient")
async def test_who_hands_a_node_what_it_says_itself_does_not_take_the_address_from_its_list() -> None:
    alice_port, port = free_port(), free_port()
    handed = asyncio.Event()

    async def hand_over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await reader.read(200)
        back, there = await asyncio.open_connection("127.0.0.1", alice_port)
        there.write(hello)
        await back.read(200)
        for each in (writer, there):
            each.close()
        handed.set()

    alice = Node("alice", f"127.0.0.1:{alice_port}", join=[f"127.0.0.1:{port}"])
    squatter = await asyncio.start_server(hand_over, "127.0.0.1", port)
    async with running(alice):
        with anyio.fail_after(PATIENCE):
            await handed.wait()
        squatter.close()
        async with running(bob := Node("bob", f"127.0.0.1:{port}")):
            await alice.meets(bob)
