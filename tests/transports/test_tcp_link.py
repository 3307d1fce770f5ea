"""When a connection is given up, and how soon an address is dialled again: in virtual time, without sockets."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

from meshkit.transports import TcpLimits
from meshkit.transports._tcp.dial import Dialler
from meshkit.transports._tcp.handshake import Handshake
from meshkit.transports._tcp.link import Link
from meshkit.transports._tcp.wire import Address, Kind, record
from tests.transports.nodes import identity

LIMITS = TcpLimits()


class Pipe(asyncio.Transport):
    """One end of a connection in memory; `frozen`, nothing is read at the other end."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("here", 1), "peername": ("there", 1)})
        self.other: Link | None = None
        self.frozen = False
        self.buffered = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.other is not None and not self.frozen:
            asyncio.get_running_loop().call_soon(self.other.data_received, bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def abort(self) -> None:
        self.other = None


class Owner:
    """Whoever has the connections: it wants and forgets them all."""

    limits = LIMITS
    buffer = memoryview(b"")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


async def pair() -> list[tuple[Link, Pipe]]:
    """Return both ends of a connection that is open; the first one is the arbiter's."""
    names = sorted(["alice", "bob"], key=lambda name: identity(name).node_id)
    ends = []
    for name in names:
        handshake = Handshake(
            identity(name),
            dialled=name == names[0],
            listens="",
            trusts=lambda _: True,
            challenge=os.urandom(32),
            dialling=lambda _: False,
        )
        ends.append((Link(Owner(), handshake), Pipe()))
    for (_, pipe), (other, _) in zip(ends, reversed(ends), strict=True):
        pipe.other = other
    for link, pipe in reversed(ends):
        link.connection_made(pipe)
    for link, _ in ends:
        await link.settled.wait()
        assert link.opened
    return ends


async def look_for(seconds: float, *links: Link) -> None:
    """Let time pass."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        await asyncio.sleep(0.25)
        for link in links:
            link.look(loop.time())


async def test_idle_peers_stay_connected() -> None:
    [(one, _), (other, _)] = await pair()
    await look_for(3600, one, other)
    assert not one.ended
    assert not other.ended


async def test_a_peer_that_is_silent_for_too_long_is_lost() -> None:
    [(one, _), (_, pipe)] = await pair()
    pipe.frozen = True
    await look_for(LIMITS.silence_timeout - 1, one)
    assert not one.ended
    await look_for(2, one)
    assert one.reason == "it has been silent for 15 s"


async def test_a_peer_that_is_doubted_and_silent_is_lost_soon_and_one_that_answers_is_not() -> None:
    [(one, _), (other, pipe)] = await pair()
    one.doubt()
    await look_for(60, one, other)
    assert not one.ended
    pipe.frozen = True
    one.doubt()
    await look_for(LIMITS.doubt_timeout + 0.5, one)
    assert one.ended


async def test_a_peer_that_reads_slowly_and_says_nothing_is_not_lost_even_if_it_is_doubted() -> None:
    [(one, pipe), (_, back)] = await pair()
    pipe.frozen = back.frozen = True
    pipe.buffered = 1_000_000
    one.pause_writing()
    one.doubt()
    for _ in range(100):
        pipe.buffered -= 1
        await look_for(1, one)
    assert not one.ended
    await look_for(LIMITS.write_timeout + 1, one)
    assert one.reason == "it has read nothing for 10 s"


async def test_records_between_the_limit_of_a_frame_and_that_of_others_are_no_frames() -> None:
    [(one, _), (_, pipe)] = await pair()
    one._limits = TcpLimits(max_frame=10)
    pipe.write(record(Kind.FRAME, bytes(11)))
    await one.gone.wait()
    assert one.reason == "it sent a record of 11 bytes and kind 0, which is more than it may have"


async def how_often(lasting: float, seconds: float) -> int:
    """Return how often a dialler turns to an address in that time, when each connection there lasts so long."""
    loop, turns = asyncio.get_running_loop(), list[float]()

    class Links(dict[str, Any]):
        def get(self, node: str, default: Any = None) -> Any:
            turns.append(loop.time())
            gone = asyncio.Event()
            loop.call_later(lasting, gone.set)
            return SimpleNamespace(gone=gone, began=loop.time())

    owner: Any = SimpleNamespace(limits=LIMITS, client_ssl=None, links=Links())
    dialler = Dialler(owner, "a", "alice")
    dialler.know("b", Address("127.0.0.1", 1))
    await asyncio.sleep(seconds)
    await dialler.close()
    await asyncio.sleep(lasting)
    return len(turns)


async def test_connections_that_break_at_once_are_made_less_and_less_often() -> None:
    assert await how_often(lasting=0.001, seconds=600) < 600


async def test_a_connection_that_has_lasted_is_made_again_at_once() -> None:
    assert await how_often(lasting=10.0, seconds=1000) > 95


async def test_what_others_say_changes_nothing_about_an_address_that_is_known_and_drives_none_out() -> None:
    owner: Any = SimpleNamespace(limits=TcpLimits(max_peers=2), client_ssl=None, links={})
    dialler = Dialler(owner, "z", "zoe")
    address, second, third = (Address("127.0.0.1", port) for port in (1, 2, 3))
    dialler.know("a", address)
    dialler.know("b", address)
    assert dialler._targets[address].node == "a"
    dialler.know("b", second)
    dialler.know("c", third)
    assert [*dialler._targets] == [address, second]
    dialler.met("c", third)
    assert [*dialler._targets] == [second, third], "what a node says of itself has its room"
    dialler.met("d", second)
    assert dialler._targets[second].node == "d"
    owner.links["d"] = None
    dialler.met("c", second)
    assert dialler._targets[second].node == "d", "it is there"
    await dialler.close()
