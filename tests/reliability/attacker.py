"""A process that attacks a node: `python -m tests.reliability.attacker ADDRESS LORISES REPEATS`.

It prints "attacks" when all slow ones are connected, and in the end one JSON object: for each kind of attack, the
seconds after which each of its connections was closed (infinity: it was not, or not for the right reason).
"""

import asyncio
import json
import math
import os
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from meshkit.transports._tcp.handshake import Handshake
from meshkit.transports._tcp.wire import MAX_CONTROL, Kind, Refusal, Unrecorder, record
from tests.reliability.nodes import identity

PATIENCE = 30.0  # seconds after which a connection counts as never closed


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def trickle() -> AsyncIterator[bytes]:
    """Begin a hello as long as may be, and go on byte by byte."""
    yield struct.pack(">IB", MAX_CONTROL, Kind.HELLO)
    while True:
        await asyncio.sleep(0.2)
        yield b"x"


async def headers() -> AsyncIterator[bytes]:
    """Ask as a browser would, and never come to an end."""
    yield b"GET / HTTP/1.1\r\n"
    while True:
        yield b"X-More: and more\r\n" * 10
        await asyncio.sleep(0.01)


async def attack(
    host: str, port: int, said: AsyncIterator[bytes], connected: asyncio.Barrier | None = None, *, end: bytes = b""
) -> float:
    """Connect and say this; return the seconds until the connection was closed, with `end` as the last words."""
    reader, writer = await asyncio.open_connection(host, port)
    started = time.monotonic()
    if connected is not None:
        await connected.wait()

    async def say() -> None:
        with suppress(OSError):
            async for data in said:
                writer.write(data)
                await writer.drain()

    saying = asyncio.create_task(say())
    answer = b""
    try:
        async with asyncio.timeout(PATIENCE):
            with suppress(OSError):
                answer += await reader.read()
        took = time.monotonic() - started
    except TimeoutError:
        took = math.inf
    saying.cancel()
    writer.transport.abort()
    return took if answer.endswith(end) else math.inf


async def record_handshake(host: str, port: int) -> bytes:
    """Prove to be a trusted node; return all that was sent for it."""
    reader, writer = await asyncio.open_connection(host, port)
    ours = Handshake(
        identity("caller4"), dialled=True, listens="", trusts=lambda _: True, challenge=os.urandom(32),
        dialling=lambda _: False,
    )  # fmt: skip
    unrecorder, sent = Unrecorder(MAX_CONTROL), ours.begin()
    writer.write(sent)
    while not ours.proved:
        unrecorder.feed(await reader.readexactly(1))
        while (one := unrecorder.next()) is not None:
            answer = ours.receive(*one)
            writer.write(answer)
            sent += answer
    await writer.drain()
    writer.transport.abort()
    return sent


async def main(host: str, port: int, lorises: int, repeats: int) -> dict[str, list[float]]:
    replay = await record_handshake(host, port)
    quick: dict[str, Callable[[], AsyncIterator[bytes]]] = {
        "a length prefix of 2 GiB": lambda: once(struct.pack(">IB", 2**31, Kind.HELLO)),
        "endless headers": headers,
        "100 kB of garbage": lambda: once(os.urandom(100_000)),
        "a replayed handshake": lambda: once(replay),
    }
    bad_proof = record(Kind.REFUSED, bytes([Refusal.BAD_PROOF]))  # not just silence, until the time for it is up
    connected = asyncio.Barrier(lorises + 1)  # or this process would be too busy to notice what it is to measure
    slow = [asyncio.create_task(attack(host, port, trickle(), connected)) for _ in range(lorises)]
    async with asyncio.timeout(PATIENCE):
        await connected.wait()
    print("attacks", flush=True)
    closed: dict[str, list[float]] = {name: [] for name in quick}
    for _ in range(repeats):
        for name, said in quick.items():
            closed[name].append(
                await attack(host, port, said(), end=bad_proof if name == "a replayed handshake" else b"")
            )
        await asyncio.sleep(0.05)
    return {"slow-loris": await asyncio.gather(*slow), **closed}


if __name__ == "__main__":
    where, _, at = sys.argv[1].rpartition(":")
    print(json.dumps(asyncio.run(main(where, int(at), *map(int, sys.argv[2:])))))
