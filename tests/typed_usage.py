"""Usage that must type-check, and infer exactly. mypy and pyright read this file; nothing runs it."""

import asyncio
import functools
from collections.abc import Coroutine
from typing import Any, assert_type

import msgspec

from meshkit import (
    BatchCollector,
    Broadcast,
    Bulkhead,
    CallRegistry,
    CircuitBreaker,
    ConsensusHelper,
    Continue,
    DedupCache,
    Drop,
    Encryptor,
    Guard,
    Hedger,
    Logger,
    Message,
    Observer,
    PerKey,
    RateLimiter,
    Request,
    Retrier,
    RetryPolicy,
    Runtime,
    Sealed,
    Service,
    Stack,
    Stage,
    State,
    Timeout,
    broadcast,
    ephemeral,
    handles,
    local,
    majority,
    median,
    request,
    stack,
    trimmed_mean,
)
from meshkit.runtime.stages import Outcome


class Store(msgspec.Struct, frozen=True):
    data: bytes


class StoreAck(msgspec.Struct, frozen=True):
    size: int


STORE = request("stash:store", Store, reply=StoreAck)
TEASE = broadcast("social:tease", str)
STORED = local("stash:stored", int)


class Named(msgspec.Struct, frozen=True):
    name: str
    data: bytes


def no_shouting(msg: Message[Any]) -> Outcome:
    return Drop("shouting") if msg.payload.isupper() else Continue(msg, lambda: print("delivered"))


STORE_2 = STORE.next(Named, reply=int, filter=lambda msg: msg.payload.name != "")
TEASE_2 = TEASE.next(bytes, upgrade=str.encode, content_key=len, stages=[Stage("no_shouting", no_shouting)])
assert_type(STORE_2, Request[Named, int])
assert_type(STORE_2.payload, type[Named])
assert_type(STORE_2.reply, type[int])
assert_type(TEASE_2, Broadcast[bytes])
assert_type(ephemeral("social:typing", str).next(int), Broadcast[int])
STORE.next(Named, reply=int, upgrade=lambda old: Named("unnamed", old.data))


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
    assert_type(await rt.call(STORE_2, Named("n", b""), to="bob"), int)
    await rt.emit(TEASE, "boo")
    await rt.emit(STORED, 3)
    await rt.emit(TEASE_2, b"boo")


async def fetch(url: str, *, retries: int = 0) -> bytes:
    return f"{url}{retries}".encode()


async def write(row: int, table: str = "rows", *tags: str, force: bool, **more: int) -> list[int]:
    return [row, len(table), len(tags), force, *more.values()]


def every_guard_keeps_the_signature(guard: Guard) -> None:
    retrier = Retrier(RetryPolicy(), on=ConnectionError)
    for one in (guard, retrier, CircuitBreaker(), Timeout(1.0), Bulkhead(1), Hedger(delay=1.0), stack(retrier)):
        guarded = one(fetch)
        good: Coroutine[Any, Any, bytes] = guarded("url", retries=3)
        good.close()


async def every_guard_as_a_decorator_keeps_defaults_keyword_only_and_variable_arguments() -> None:
    breakers = PerKey(breaker_of)

    @Retrier(RetryPolicy(), on=ConnectionError)
    @breakers["db"]
    @Bulkhead(10)
    @Timeout(1.0)
    @Hedger(delay=1.0, quantile=0.95)
    @RateLimiter(max_count=5, window=1.0)
    @RateLimiter(max_count=5, window=1.0).for_key("bob")
    @stack(Timeout(1.0))
    async def save(row: int, table: str = "rows", *tags: str, force: bool, **more: int) -> list[int]:
        return [row, len(table), len(tags), force, *more.values()]

    assert_type(await save(1, force=True), list[int])
    assert_type(await save(1, "t", "tag", "tag", force=False, extra=3), list[int])
    await save(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await save(1, "t", force="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await save(1, force=True, extra="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    for guard in (Timeout(1.0), Bulkhead(1), CircuitBreaker(), Hedger(delay=1.0), stack(Timeout(1.0))):
        assert_type(await guard.call(write, 1, "t", "tag", force=True, extra=3), list[int])
        await guard.call(write, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def breaker_of(peer: str) -> CircuitBreaker:
    return CircuitBreaker(name=peer, trips_on=(ConnectionError, TimeoutError), observer=print)


def one_guard_per_key_is_of_the_kind_that_its_factory_makes() -> None:
    breakers = PerKey(breaker_of, max_keys=10)
    assert_type(breakers, PerKey[str, CircuitBreaker])
    assert_type(breakers["bob"].state, State)
    breakers[3]  # type: ignore[index]  # pyright: ignore[reportArgumentType]
    stacks = PerKey(stack_of)
    assert_type(stacks[3], Stack)


def stack_of(port: int) -> Stack:
    return stack(Timeout(1.0), Bulkhead(port))


async def blocks_that_are_guarded_give_what_they_say(retrier: Retrier, observer: Observer) -> None:
    async for attempt in retrier.attempts():
        with attempt:
            assert_type(await fetch("url"), bytes)
    async with CircuitBreaker(observer=observer), Bulkhead(1), Timeout(1.0), RateLimiter(max_count=1, window=1.0):
        pass


async def what_a_fn_may_be() -> None:
    assert_type(await Timeout(1.0).call(functools.partial(fetch, retries=3), "url"), bytes)
    assert_type(await Timeout(1.0).call(lambda: fetch("url")), bytes)
    Timeout(1.0)(len)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


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
        assert_type(collector.submit_nowait(1), asyncio.Future[str])
        assert_type(collector.try_add(1), bool)
        await collector.add("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    async def drop(rows: list[int]) -> None:
        rows.clear()

    async with BatchCollector(drop, max_size=3, max_wait=1.0) as without_results:
        await without_results.add(1)
        await without_results.submit(1)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


async def sealing_infers_what_it_gives() -> None:
    encryptor = Encryptor.derive(b"kept where secrets are kept", "stash v1")
    sealed = encryptor.seal(b"", aad=b"")
    assert_type(sealed, Sealed)
    assert_type(encryptor.open(*sealed), bytes)
    assert_type(encryptor.open_combined(encryptor.seal_combined(b"")), bytes)
    assert_type([piece async for piece in encryptor.open_stream(encryptor.seal_stream([b""]))], list[bytes])
    assert_type(await encryptor.seal_large(b""), Sealed)


async def the_others_infer_what_they_carry() -> None:
    registry = CallRegistry[StoreAck](timeout=1.0)
    assert_type(registry.resolve("id", StoreAck(1)), bool)
    assert_type(registry.reject("id", ConnectionError()), bool)
    registry.resolve("id", 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    helper = ConsensusHelper[float](3, median, ["alice"])
    await helper.wait()
    assert_type(helper.outcome().value, float)
    assert_type(helper.vote_count, int)
    helper.add_vote("alice", "3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    limiter = RateLimiter(max_count=5, window=60.0)
    assert_type(limiter.retry_after("bob"), float)
    assert_type(await limiter.for_key("bob").call(fetch, "url"), bytes)
    assert_type(DedupCache(ttl=1.0).check(("any", "hashable")), bool)
    async with Logger(disabled=["presence"]) as logger:
        logger.service("stash").bind(disk="sda").warning("%d left", 3, free="3%")
