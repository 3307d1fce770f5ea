"""CircuitBreaker: a guarded call beside an empty async wrapper of the same form, and what a refusal costs."""

from collections.abc import Awaitable, Callable
from typing import Any

from meshkit.circuit_breaker import CircuitBreaker, FailureRate
from meshkit.errors import CircuitOpen
from meshkit.guard import PerKey
from tests.bench.harness import Compare, Fact, Measure, Round, bytes_each, slowest


class Empty:
    """The bare primitive: a wrapper that does nothing, in each of the three forms."""

    def decorate(self, fn: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await fn(*args, **kwargs)

        return wrapper

    async def call(self, fn: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any) -> Any:
        return await fn(*args, **kwargs)

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *_: object) -> None:
        return None


async def work(value: int) -> int:
    return value


def decorated(function: Callable[..., Awaitable[Any]]) -> Round:
    async def run(n: int) -> None:
        for i in range(n):
            await function(i)

    return run


def called(guard: Any) -> Round:
    async def run(n: int) -> None:
        for i in range(n):
            await guard.call(work, i)

    return run


def entered(guard: Any) -> Round:
    async def run(n: int) -> None:
        for _ in range(n):
            async with guard:
                pass

    return run


async def raise_and_catch(n: int) -> None:
    async def refuse(_: int) -> None:
        raise ConnectionError("the circuit is open")

    for i in range(n):
        try:
            await refuse(i)
        except ConnectionError:
            continue


async def raise_and_catch_the_same(n: int) -> None:
    async def refuse(_: int) -> None:
        raise CircuitOpen(name="breaker", state="open", retry_after=30.0)

    for i in range(n):
        try:
            await refuse(i)
        except CircuitOpen:
            continue


async def refusal(n: int) -> None:
    breaker = CircuitBreaker()
    guarded = breaker(work)
    for _ in range(5):
        breaker.record_failure()
    for i in range(n):
        try:
            await guarded(i)
        except CircuitOpen:
            continue


def breakers(max_keys: int = 10_000) -> PerKey[int, CircuitBreaker]:
    return PerKey(lambda peer: CircuitBreaker(name=f"peer {peer}"), max_keys=max_keys)


def fill(n: int) -> PerKey[int, CircuitBreaker]:
    per_key = breakers(n)
    for key in range(n):
        per_key[key]
    return per_key


def forms(name: str, breaker: Callable[[], CircuitBreaker], goal: float) -> list[Measure]:
    empty = Empty()
    return [
        Compare(f"{name}, decorated", decorated(empty.decorate(work)), decorated(breaker()(work)), 100_000, goal),
        Compare(f"{name}, call", called(empty), called(breaker()), 100_000, goal),
        Compare(f"{name}, async with", entered(empty), entered(breaker()), 100_000, goal),
    ]


def measures() -> list[Measure]:
    return [
        *forms("closed", CircuitBreaker, 1.25),
        *forms("last 100 calls", lambda: CircuitBreaker(FailureRate(calls=100)), 2.2),
        *forms("window of 30 s", lambda: CircuitBreaker(FailureRate()), 2.2),
        *forms("window of 30 s, slow calls", lambda: CircuitBreaker(FailureRate(slow_call=1.0)), 2.2),
        Compare("refusal", raise_and_catch, refusal, 50_000, 2.5),
        Compare("refusal, beside raising the same error", raise_and_catch_the_same, refusal, 50_000),
        Fact("PerKey: a breaker per key", lambda n: bytes_each(fill, n), 10_000, "bytes"),
        Fact("PerKey: slowest new key of a spray", lambda n: slowest(breakers().__getitem__, n), 100_000, "ms"),
    ]
