"""The proxy with real sockets, in real time: what they see, and that nothing is left of them."""

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import anyio
import pytest

from meshkit.testing import CancellationPoint, ChaosProxy, cancellation_points

pytestmark = pytest.mark.real_time

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def sockets() -> int:
    """Return how many sockets this process has open."""
    gc.collect()
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    before = sockets()
    yield
    await until(lambda: sockets() <= before)  # asyncio closes those of the tests one pass later


class Upstream:
    """A server that answers each byte with itself, and keeps what it heard."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.pieces: list[bytes] = []
        self.ends: list[str] = []
        self.connected = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        self._writers.append(writer)
        try:
            while data := await reader.read(65_536):
                self.heard += data
                self.pieces.append(data)
                writer.write(data)
                await writer.drain()
            self.ends.append("end")
        except ConnectionResetError:
            self.ends.append("reset")
        finally:
            writer.close()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.address = self.server.sockets[0].getsockname()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for writer in self._writers:
            writer.transport.abort()
        await until(lambda: len(self.ends) == self.connected)


async def until(happened: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not happened():
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def through(proxy: ChaosProxy) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection(*proxy.address)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def says(stream: Stream, data: bytes) -> bytes:
    """Say something, and return the answer."""
    reader, writer = stream
    writer.write(data)
    with anyio.fail_after(10):
        return await reader.readexactly(len(data))


async def is_reset(stream: Stream) -> bool:
    try:
        with anyio.fail_after(10):
            while await stream[0].read(65_536):
                pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("upstream_as_text", [True, False])
async def test_what_goes_in_comes_out_in_both_directions(upstream_as_text: bool) -> None:
    async with Upstream() as upstream:
        host, port = upstream.address
        target: Any = f"{host}:{port}" if upstream_as_text else (host, port)
        async with ChaosProxy(target, jitter=0.001) as proxy, through(proxy) as stream:
            data = os.urandom(1_000_000)
            stream[1].write(data)
            stream[1].write_eof()
            assert await stream[0].read(-1) == data
            assert upstream.ends == ["end"], "the end of one direction is not the end of the other"
            await until(lambda: "connections=0" in repr(proxy))


async def test_single_bytes_are_single_bytes() -> None:
    async with Upstream() as upstream, ChaosProxy(upstream.address, slice=1) as proxy, through(proxy) as stream:
        assert await says(stream, bytes(range(200))) == bytes(range(200))
        assert len(upstream.pieces) > 50, "a task that reads is given the few bytes that came before it ran"


async def test_latency_and_rate_take_their_time() -> None:
    async with Upstream() as upstream:
        async with ChaosProxy(upstream.address, latency=0.05) as proxy, through(proxy) as stream:
            before = time.monotonic()
            await says(stream, b"x")
            assert time.monotonic() - before >= 0.1
        async with ChaosProxy(upstream.address, rate=10_000) as proxy, through(proxy) as stream:
            before = time.monotonic()
            await says(stream, bytes(1_000))
            assert time.monotonic() - before >= 0.1


@pytest.mark.parametrize("seed", range(5))
async def test_a_reset_is_a_reset_at_both_ends_and_nothing_behind_it_arrives(seed: int) -> None:
    proxy = ChaosProxy("127.0.0.1:1", seed=seed, reset_rate=0.5)
    core = proxy._chaos(0, "up")  # what it has decided for the first connection
    core.feed(bytes(50_000), 0.0)
    limit = core.waiting
    async with Upstream() as upstream, ChaosProxy(upstream.address, seed=seed, reset_rate=0.5) as proxy:
        async with through(proxy) as stream:
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    stream[1].write(bytes(500))
                    await stream[1].drain()
                    await asyncio.sleep(0)
            assert await is_reset(stream)
        await until(lambda: upstream.ends)
        assert upstream.ends == ["reset"]
        assert len(upstream.heard) <= limit, "less, if it had not read yet what the reset then discarded"


async def test_reset_all_resets_what_there_is_and_lets_in_what_comes() -> None:
    async with Upstream() as upstream, ChaosProxy(upstream.address) as proxy:
        async with through(proxy) as one, through(proxy) as other:
            assert await says(one, b"x") == await says(other, b"x") == b"x"
            proxy.reset_all()
            assert await is_reset(one)
            assert await is_reset(other)
        await until(lambda: upstream.ends == ["reset", "reset"])
        async with through(proxy) as stream:
            assert await says(stream, b"again") == b"again"


async def test_a_cut_lasts_until_it_is_healed() -> None:
    async with Upstream() as upstream, ChaosProxy(upstream.address) as proxy:
        async with through(proxy) as stream:
            await says(stream, b"x")
            proxy.cut()
            assert await is_reset(stream)
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                async with through(proxy) as stream:
                    assert await is_reset(stream)
        assert upstream.connected == 1
        proxy.heal()
        async with through(proxy) as stream:
            assert await says(stream, b"x") == b"x"


@pytest.mark.parametrize("direction", ["up", "down", "both"])
async def test_what_a_blackhole_swallows_arrives_when_it_is_healed(direction: Any) -> None:
    async with Upstream() as upstream, ChaosProxy(upstream.address) as proxy, through(proxy) as stream:
        await says(stream, b"before")
        proxy.blackhole(direction)
        stream[1].write(b"during")
        with anyio.move_on_after(0.05):
            await stream[0].readexactly(1)
            pytest.fail("something came out of a black hole")
        assert bytes(upstream.heard) == (b"beforeduring" if direction == "down" else b"before")
        proxy.heal()
        assert await stream[0].readexactly(6) == b"during"


async def test_nobody_learns_in_a_blackhole_that_the_other_end_is_gone() -> None:
    async with (
        Upstream() as upstream,
        ChaosProxy(upstream.address) as proxy,
        through(proxy) as one,
        through(proxy) as other,
    ):
        await says(one, b"x")
        await says(other, b"x")
        proxy.blackhole()
        one[1].write_eof()
        linger_not = b"\x01\0\0\0\0\0\0\0"
        other[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        other[1].transport.abort()
        with anyio.move_on_after(0.05):
            await until(lambda: upstream.ends)
            pytest.fail("the news went through a black hole")
        proxy.heal()
        await until(lambda: sorted(upstream.ends) == ["end", "reset"])


async def test_the_reset_of_one_end_is_a_reset_of_the_other() -> None:
    async with Upstream() as upstream, ChaosProxy(upstream.address) as proxy, through(proxy) as stream:
        await says(stream, b"x")
        stream[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream[1].transport.abort()
        await until(lambda: upstream.ends == ["reset"])


async def test_whoever_does_not_read_is_waited_for_and_little_is_kept() -> None:
    stop = asyncio.Event()

    async def sleepy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]  # streams read ahead by themselves
        await stop.wait()
        writer.transport.abort()

    server = await asyncio.start_server(sleepy, "127.0.0.1", 0)
    async with ChaosProxy(server.sockets[0].getsockname()) as proxy, through(proxy) as stream:
        stream[1].transport.set_write_buffer_limits(0)
        written = 0
        with anyio.move_on_after(0.5):
            while True:
                stream[1].write(bytes(65_536))
                await stream[1].drain()
                written += 65_536
        [link] = proxy._links.values()
        assert all(way._chaos.waiting <= 256 * 1024 for way in link._ways)
        assert written < 64 * 1024 * 1024, "the rest is in the buffers of the system"
    stop.set()
    server.close()
    await asyncio.sleep(0)


async def test_an_upstream_that_is_not_there_is_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    async with ChaosProxy(address) as proxy, through(proxy) as stream:
        assert await is_reset(stream)


def test_however_it_ends_nothing_is_left() -> None:
    async def session(address: Any, connected: asyncio.Event) -> None:
        async with ChaosProxy(address, latency=0.001, slice=40) as proxy, through(proxy) as stream:
            connected.set()
            await says(stream, b"hello")
            await says(stream, bytes(100))

    async def scenario(point: CancellationPoint) -> None:
        before = sockets()
        async with Upstream() as upstream:
            await point.cancel(session(upstream.address, asyncio.Event()))
        await until(lambda: sockets() <= before and len(asyncio.all_tasks()) == 1)

    count = 0
    for point in cancellation_points():
        asyncio.run(scenario(point))
        count += 1
    assert count > 10


async def test_it_is_used_one_time_after_the_other_and_says_what_it_is() -> None:
    async with Upstream() as upstream:
        proxy = ChaosProxy(upstream.address, seed=3)
        with pytest.raises(RuntimeError, match=r"ChaosProxy\(.*, seed=3, closed\) has no address: use `async with`"):
            _ = proxy.address
        for _ in range(2):
            async with proxy:
                async with through(proxy) as stream:
                    assert await says(stream, b"x") == b"x"
                    assert repr(proxy).endswith("seed=3, connections=1)")
                with pytest.raises(RuntimeError, match="is in use already"):
                    await proxy.__aenter__()
                proxy.cut()
                assert repr(proxy).endswith("cut)")
        proxy.heal()
        proxy.reset_all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": -1}, "latency must be finite and zero or more seconds"),
        ({"jitter": float("nan")}, "jitter must be finite"),
        ({"rate": 0}, "rate must be at least 1"),
        ({"slice": 0}, "slice must be at least 1"),
        ({"reset_rate": 1.5}, "reset_rate must be more than 0 and at most 1"),
        ({"upstream": "nowhere"}, 'upstream must be (host, port) or "host:port"'),
        ({"upstream": ("127.0.0.1",)}, 'upstream must be (host, port) or "host:port"'),
        ({"upstream": ":80"}, 'upstream must be (host, port) or "host:port"'),
    ],
)
def test_what_it_is_given_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ChaosProxy(**{"upstream": "127.0.0.1:1", **options})
    assert message in str(caught.value)


def test_a_blackhole_has_a_direction() -> None:
    with pytest.raises(ValueError, match='direction must be "up", "down" or "both", not \'left\''):
        ChaosProxy("127.0.0.1:1").blackhole("left")  # type: ignore[arg-type]
