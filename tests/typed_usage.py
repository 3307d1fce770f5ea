"""Usage that must type-check, and infer exactly. mypy and pyright read this file; nothing runs it."""

from collections.abc import Coroutine
from typing import Any, assert_type

import msgspec

from meshkit import (
    BatchCollector,
    Bulkhead,
    CallRegistry,
    CircuitBreaker,
    ConsensusHelper,
    DedupCache,
    Encryptor,
    Guard,
    Hedger,
    Message,
    PerKey,
    RateLimiter,
    Retrier,
    RetryPolicy,
    Runtime,
    Sealed,
    Service,
    Timeout,
    broadcast,
    handles,
    local,
    majority,
    request,
    stack,
    trimmed_mean,
)


class Store(msgspec.Struct, frozen=True):
    data: bytes


class StoreAck(msgspec.Struct, frozen=True):
    size: int


STORE = request("stash:store", Store, reply=StoreAck)
TEASE = broadcast("social:tease", str)
STORED = local("stash:stored", int)


class Stash(Service):
    name, emoji = "stash", "📦"

    @handles(STORE)
    async def store(self, msg: Message[Store]) -> StoreAck:
        assert_type(msg.payload, Store)
        return StoreAck(len(msg.payload.data))

    @handles(TEASE)
    async def tease(self, msg: Message[str]) -> None:
        assert_type(msg.sender, str)


async def the_runtime_infers_payloads_and_replies(rt: Runtime) -> None:
    assert_type(await rt.call(STORE, Store(b""), to="bob", timeout=5), StoreAck)
    await rt.emit(TEASE, "boo")
    await rt.emit(STORED, 3)


async def fetch(url: str, *, retries: int = 0) -> bytes:
    return f"{url}{retries}".encode()


def every_guard_keeps_the_signature(guard: Guard) -> None:
    retrier = Retrier(RetryPolicy(), on=ConnectionError)
    for one in (guard, retrier, CircuitBreaker(), Timeout(1.0), Bulkhead(1), Hedger(delay=1.0), stack(retrier)):
        guarded = one(fetch)
        good: Coroutine[Any, Any, bytes] = guarded("url", retries=3)
        good.close()


async def calls_through_guards_infer_arguments_and_results() -> None:
    retrier = Retrier(RetryPolicy(), on=ConnectionError)
    assert_type(await retrier.call(fetch, "url", retries=3), bytes)
    assert_type(await stack(retrier, Timeout(1.0)).call(fetch, "url"), bytes)
    assert_type(await retrier(fetch)("url", retries=3), bytes)
    await retrier.call(fetch, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await retrier(fetch)("url", tries=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    breakers = PerKey[str, CircuitBreaker](lambda peer: CircuitBreaker(name=peer))
    assert_type(await breakers["bob"].call(fetch, "url"), bytes)


async def a_runtime_call_through_a_guard_keeps_its_reply_type(rt: Runtime, retrier: Retrier) -> None:
    assert_type(await retrier.call(rt.call, STORE, Store(b""), to="bob", timeout=5), StoreAck)


async def utilities_infer_what_they_carry() -> None:
    registry = CallRegistry[StoreAck]()
    assert_type(await registry.call(print, timeout=1.0), StoreAck)
    numbers = ConsensusHelper[int](threshold=3, aggregator=trimmed_mean)
    numbers.add_vote("alice", 3)
    assert_type(numbers.result(), int)
    words = ConsensusHelper[str](threshold=3, aggregator=majority)
    assert_type(words.result(), str)
    limiter = RateLimiter(max_count=5, window=60.0)
    assert_type(limiter.allow("bob"), bool)
    assert_type(await limiter.call_or_cached("bob", fetch, "url"), bytes)
    assert_type(await DedupCache(ttl=60.0).once("key", fetch, "url"), bytes)

    async def save(rows: list[int]) -> list[str]:
        return [str(row) for row in rows]

    async with BatchCollector(save, max_size=3, max_wait=1.0) as collector:
        await collector.add(1)
        assert_type(await collector.submit(1), str)
    sealed = Encryptor(bytes(32)).seal(b"")
    assert_type(sealed, Sealed)
