"""DedupCache beside a dict of expiries, over a million keys."""

import time

from meshkit.dedup import DedupCache
from tests.bench.harness import Compare, Fact, Measure, bytes_each, slowest

TTL = 3600.0


def measures() -> list[Measure]:
    keys = [f"message-{i:08}" for i in range(1_000_000)]

    def bare_new(n: int) -> None:
        expiries: dict[str, float] = {}
        clock = time.monotonic
        for key in keys[:n]:
            now = clock()
            expiry = expiries.get(key)
            if expiry is None or expiry <= now:
                expiries[key] = now + TTL

    def ours_new(n: int) -> None:
        cache = DedupCache(ttl=TTL, max_keys=1_000_000)
        check = cache.check
        for key in keys[:n]:
            check(key)

    full: dict[str, float] = {}
    cache = DedupCache(ttl=TTL, max_keys=1_000_000)

    def fill(n: int) -> None:
        if not full:
            full.update(dict.fromkeys(keys[:n], time.monotonic() + TTL))
            for key in keys[:n]:
                cache.mark(key)

    def bare_seen(n: int) -> None:
        fill(n)
        clock = time.monotonic
        for key in keys[:n]:
            now = clock()
            expiry = full.get(key)
            if expiry is None or expiry <= now:
                full[key] = now + TTL

    def ours_seen(n: int) -> None:
        fill(n)
        check = cache.check
        for key in keys[:n]:
            check(key)

    def bytes_per_key(n: int) -> float:
        def remember(count: int) -> object:
            filled = DedupCache(ttl=TTL, max_keys=count)
            for key in keys[:count]:
                filled.mark(key)
            return filled

        return bytes_each(remember, n)

    def pause(n: int) -> float:
        filled = DedupCache(ttl=TTL, max_keys=n)
        return slowest(lambda i: filled.check(keys[i]), n)

    def pause_of_a_dict(n: int) -> float:
        expiries: dict[str, float] = {}
        return slowest(lambda i: expiries.setdefault(keys[i], 0.0 + i), n)

    def pause_when_full(n: int) -> float:
        filled = DedupCache(ttl=TTL, max_keys=max(1, n // 4))
        return slowest(lambda i: filled.check(keys[i]), n)

    return [
        Compare("dedup.check, a million new keys", bare_new, ours_new, 1_000_000, goal=1.3, rounds=5),
        Compare("dedup.check, a million duplicates", bare_seen, ours_seen, 1_000_000, goal=1.3, rounds=5),
        Fact("bytes per key beside the key", bytes_per_key, 1_000_000, "B", goal=63, rounds=1),
        Fact("slowest check of a million new keys", pause, 1_000_000, "ms", goal=2, rounds=3),
        Fact("slowest check when each evicts another", pause_when_full, 1_000_000, "ms", goal=2, rounds=3),
        Fact("for comparison: slowest insert into a dict", pause_of_a_dict, 1_000_000, "ms", rounds=3),
    ]
