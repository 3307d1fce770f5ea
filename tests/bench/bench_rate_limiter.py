"""RateLimiter beside a dict of deques, as one would write it by hand; and what a flood of keys or waiters costs."""

import asyncio
import time
from collections import deque

from meshkit.rate_limiter import RateLimiter
from tests.bench.harness import Compare, Fact, Measure, bytes_each, slowest


def measures() -> list[Measure]:
    keys = [f"user-{i}" for i in range(100_000)]
    few = keys[:100]

    def bare_allow(n: int) -> None:
        times: dict[str, deque[float]] = {}
        clock, max_count, window = time.monotonic, 10, 60.0

        def allow(key: str) -> bool:
            now = clock()
            admitted = times.get(key)
            if admitted is None:
                admitted = times[key] = deque()
            while admitted and admitted[0] <= now - window:
                admitted.popleft()
            if len(admitted) >= max_count:
                return False
            admitted.append(now)
            return True

        for _ in range(n // 100):
            for key in few:
                allow(key)

    def ours_allow(n: int) -> None:
        allow = RateLimiter(10, 60.0).allow
        for _ in range(n // 100):
            for key in few:
                allow(key)

    def bare_free(n: int) -> None:
        times: dict[str, deque[float]] = {}
        clock, max_count, window = time.monotonic, 1_000_000, 60.0

        def allow(key: str) -> bool:
            now = clock()
            admitted = times.get(key)
            if admitted is None:
                admitted = times[key] = deque()
            while admitted and admitted[0] <= now - window:
                admitted.popleft()
            if len(admitted) >= max_count:
                return False
            admitted.append(now)
            return True

        for _ in range(n // 100):
            for key in few:
                allow(key)

    async def ours_free(n: int) -> None:
        acquire = RateLimiter(1_000_000, 60.0).acquire
        for _ in range(n // 100):
            for key in few:
                await acquire(key)

    def bytes_per_key(n: int) -> float:
        def remember(count: int) -> object:
            limiter = RateLimiter(10, 60.0)
            for key in keys[:count]:
                limiter.allow(key)
            return limiter

        return bytes_each(remember, n)

    def pause(n: int) -> float:
        limiter = RateLimiter(10, 60.0)
        return slowest(lambda i: limiter.allow(keys[i]), n)

    def waiting(n: int) -> float:
        """Return the microseconds that each of n waiters of one key takes, from its call to its turn."""

        async def main() -> None:
            limiter = RateLimiter(n, 0.05)
            assert limiter.allow("key", n)
            await asyncio.gather(*(limiter.acquire("key") for _ in range(n)))

        start = time.thread_time()
        asyncio.run(main())
        return (time.thread_time() - start) / n * 1e6

    return [
        Compare("limiter.allow, mostly refused", bare_allow, ours_allow, 200_000, goal=2),
        Compare("await limiter.acquire when free", bare_free, ours_free, 200_000, goal=2.6),
        Fact("bytes per key", bytes_per_key, 100_000, "B", goal=512, rounds=1),
        Fact("slowest allow of 100,000 new keys", pause, 100_000, "ms", goal=10),
        Fact("one of 10,000 waiters, with its task", waiting, 10_000, "us"),
    ]
