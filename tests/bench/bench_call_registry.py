"""CallRegistry beside the same written by hand: a future and a `call_later` for each call.

Both draw each id from os.urandom, and both are driven by the same tasks: `callers` of them, each calling again as soon
as it has its response; all requests of one pass of the loop are answered in the next.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from meshkit.call_registry import CallRegistry, PendingCalls
from tests.bench.harness import Compare, Fact, Measure, bytes_each, slowest

Send = Callable[[str], Any]
Call = Callable[[Send], Awaitable[object]]
Resolve = Callable[[str, object], object]


async def drive(n: int, callers: int, call: Call, resolve: Resolve, *, async_send: bool = False) -> None:
    loop = asyncio.get_running_loop()
    requests: list[str] = []

    def answer() -> None:
        ids = requests.copy()
        requests.clear()
        for call_id in ids:
            resolve(call_id, None)

    def send(call_id: str) -> None:
        if not requests:
            loop.call_soon(answer)
        requests.append(call_id)

    async def send_async(call_id: str) -> None:
        send(call_id)

    async def caller() -> None:
        for _ in range(n // callers):
            await call(send_async if async_send else send)

    await asyncio.gather(*(caller() for _ in range(callers)))


def by_hand(loop: asyncio.AbstractEventLoop, timeout: float = 30.0) -> tuple[Call, Resolve]:
    """A future, a timer and an entry in a dict for each call: what services write."""
    pending: dict[str, asyncio.Future[object]] = {}

    def expire(call_id: str) -> None:
        future = pending.pop(call_id, None)
        if future is not None and not future.done():
            future.set_exception(TimeoutError())

    def resolve(call_id: str, response: object) -> None:
        future = pending.pop(call_id, None)
        if future is not None and not future.done():
            future.set_result(response)

    async def call(send: Send) -> object:
        call_id = os.urandom(16).hex()
        future = pending[call_id] = loop.create_future()
        timer = loop.call_later(timeout, expire, call_id)
        try:
            send(call_id)
            return await future
        finally:
            timer.cancel()
            pending.pop(call_id, None)

    return call, resolve


def without_timeout(loop: asyncio.AbstractEventLoop) -> tuple[Call, Resolve]:
    """No timeout, no clean-up, no counts: what no registry can beat."""
    pending: dict[str, asyncio.Future[object]] = {}

    def resolve(call_id: str, response: object) -> None:
        pending.pop(call_id).set_result(response)

    async def call(send: Send) -> object:
        call_id = os.urandom(16).hex()
        future = pending[call_id] = loop.create_future()
        send(call_id)
        return await future

    return call, resolve


def scoped(loop: asyncio.AbstractEventLoop, timeout: float = 30.0) -> tuple[Call, Resolve]:
    """As services write it where sending has to be awaited too."""
    pending: dict[str, asyncio.Future[object]] = {}

    def resolve(call_id: str, response: object) -> None:
        future = pending.pop(call_id, None)
        if future is not None and not future.done():
            future.set_result(response)

    async def call(send: Send) -> object:
        call_id = os.urandom(16).hex()
        future = pending[call_id] = loop.create_future()
        try:
            async with asyncio.timeout(timeout):
                await send(call_id)
                return await future
        finally:
            pending.pop(call_id, None)

    return call, resolve


def bare(
    make: Callable[[asyncio.AbstractEventLoop], tuple[Call, Resolve]], callers: int, *, async_send: bool = False
) -> Callable[[int], Awaitable[None]]:
    async def work(n: int) -> None:
        await drive(n, min(n, callers), *make(asyncio.get_running_loop()), async_send=async_send)

    return work


def ours(callers: int, *, async_send: bool = False) -> Callable[[int], Awaitable[None]]:
    async def work(n: int) -> None:
        registry: CallRegistry[object] = CallRegistry(timeout=30.0)
        await drive(n, min(n, callers), registry.call, registry.resolve, async_send=async_send)
        assert len(registry) == 0
        assert registry.stats().replied == n

    return work


def fill(n: int) -> PendingCalls[None]:
    pending: PendingCalls[None] = PendingCalls(n)
    for number, call_id in enumerate(IDS[:n]):
        pending.add(call_id, None, 30.0 + number / 100_000)
    return pending


IDS = [f"{number:032x}" for number in range(200_000)]


def slowest_turnover(n: int) -> float:
    """Milliseconds of the slowest call that begins and ends while `n` others are pending."""
    pending = fill(n)

    def turn(number: int) -> None:
        call_id = f"again {number}"
        pending.add(call_id, None, 31.0 + number / 100_000)
        pending.take(call_id, replied=True)

    return slowest(turn, n)


def measures() -> list[Measure]:
    rounds: dict[str, Any] = {"n": 50_000, "rounds": 21}
    return [
        Compare("call, 1,000 callers / future + call_later", bare(by_hand, 1000), ours(1000), **rounds, goal=0.75),
        Compare(
            "  no timeout at all / future + call_later", bare(by_hand, 1000), bare(without_timeout, 1000), **rounds
        ),
        Compare("call, 1 caller / future + call_later", bare(by_hand, 1), ours(1), n=20_000),
        Compare(
            "call with an async send, 1,000 callers / asyncio.timeout",
            bare(scoped, 1000, async_send=True),
            ours(1000, async_send=True),
            n=20_000,
        ),
        Fact("slowest call among 100,000 pending", slowest_turnover, n=100_000, unit="ms", goal=10.0),
        Fact("bytes for a pending call, beside its id and slot", lambda n: bytes_each(fill, n), n=100_000, unit="B"),
    ]
