"""DedupCache beside a function over one dict of expiries.

What goes beyond the goal, of 1: choosing one of many dicts (0.25 to 0.5), which is the price of having no pauses,
asking whether the same loop still runs (about 0.2), and two calls of methods. Duplicates in one flat function that
reads `time.monotonic` still cost 1.25 to 1.5.
"""

import gc
import math
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable

from meshkit.dedup import DedupCache
from tests.bench.harness import Compare, Fact, Measure, bytes_each, slowest

TTL = 3600.0


def bare_cache(expiries: dict[str, float]) -> Callable[[str], bool]:
    clock = time.monotonic

    def check(key: str) -> bool:
        now = clock()
        expiry = expiries.get(key)
        if expiry is not None and expiry > now:
            return False
        expiries[key] = now + TTL
        return True

    return check


def bare_bounded(max_keys: int) -> Callable[[str], bool]:
    expiries: OrderedDict[str, float] = OrderedDict()
    clock = time.monotonic

    def check(key: str) -> bool:
        now = clock()
        expiry = expiries.get(key)
        if expiry is not None and expiry > now:
            return False
        expiries[key] = now + TTL
        if len(expiries) > max_keys:
            expiries.popitem(last=False)
        return True

    return check


def slowest_that_repeats(max_keys: int, keys: list[str]) -> float:
    """Return the milliseconds of the slowest `check`, each key at its fastest of three fills.

    What does the same work at the same key each time (a dict that grows, a sweep) shows here. What comes only now and
    then does not, be it the machine's or the allocator's: this does not replace the slowest `check`.
    """
    fastest = array("d", [math.inf]) * len(keys)
    clock = time.thread_time
    for _ in range(3):
        gc.collect()
        check = DedupCache(ttl=TTL, max_keys=max_keys).check
        for i, key in enumerate(keys):
            start = clock()
            check(key)
            fastest[i] = min(fastest[i], clock() - start)
    return max(fastest) * 1000


def measures() -> list[Measure]:
    keys = [f"message-{i:08}" for i in range(1_000_000)]
    full: dict[str, float] = {}
    cache = DedupCache(ttl=TTL, max_keys=1_000_000)

    def all_of(check: Callable[[str], bool], n: int) -> None:
        for key in keys[:n]:
            check(key)

    def bare_new(n: int) -> None:
        all_of(bare_cache({}), n)

    def ours_new(n: int) -> None:
        all_of(DedupCache(ttl=TTL, max_keys=1_000_000).check, n)

    def fill() -> None:  # in the warm-up
        if not full:
            all_of(bare_cache(full), len(keys))
            all_of(cache.check, len(keys))

    def bare_seen(n: int) -> None:
        fill()
        all_of(bare_cache(full), n)

    def ours_seen(n: int) -> None:
        fill()
        all_of(cache.check, n)

    def bare_evicts(n: int) -> None:
        all_of(bare_bounded(max(1, n // 4)), n)

    def ours_evicts(n: int) -> None:
        all_of(DedupCache(ttl=TTL, max_keys=max(1, n // 4)).check, n)

    def bytes_per_key(n: int) -> float:
        def remember(count: int) -> object:
            filled = DedupCache(ttl=TTL, max_keys=count)
            all_of(filled.check, count)
            return filled

        return bytes_each(remember, n)

    def bytes_per_key_when_full(n: int) -> float:
        def remember(count: int) -> object:
            filled = DedupCache(ttl=TTL, max_keys=max(1, count // 4))
            all_of(filled.check, count)
            return filled

        return bytes_each(remember, n) * 4

    def pause(n: int) -> float:
        filled = DedupCache(ttl=TTL, max_keys=n)
        return slowest(lambda i: filled.check(keys[i]), n)

    def pause_that_repeats(n: int) -> float:
        return slowest_that_repeats(n, keys[:n])

    def pause_of_nothing(n: int) -> float:
        return slowest(lambda i: keys[i], n)

    def pause_of_a_dict(n: int) -> float:
        expiries: dict[str, float] = {}
        return slowest(lambda i: expiries.setdefault(keys[i], 0.0 + i), n)

    def pause_when_full(n: int) -> float:
        filled = DedupCache(ttl=TTL, max_keys=max(1, n // 4))
        return slowest(lambda i: filled.check(keys[i]), n)

    return [
        Compare("dedup.check, a million new keys", bare_new, ours_new, 1_000_000, goal=1.3, rounds=5),
        Compare("dedup.check, a million duplicates", bare_seen, ours_seen, 1_000_000, goal=1.3, rounds=5),
        Compare("dedup.check, 3 of 4 evict the oldest key", bare_evicts, ours_evicts, 200_000, rounds=3),
        Fact("bytes per key beside the key", bytes_per_key, 1_000_000, "B", goal=63, rounds=1),
        Fact("bytes per key after many evictions", bytes_per_key_when_full, 1_000_000, "B", rounds=1),
        Fact("slowest check of a million new keys", pause, 1_000_000, "ms", goal=2, rounds=3),
        Fact("of it, what repeats at the same key", pause_that_repeats, 1_000_000, "ms", rounds=1),
        Fact("slowest check when 3 of 4 evict another", pause_when_full, 400_000, "ms", goal=2, rounds=3),
        Fact("for comparison: slowest of doing nothing", pause_of_nothing, 1_000_000, "ms", rounds=3),
        Fact("for comparison: slowest insert into a dict", pause_of_a_dict, 1_000_000, "ms", rounds=1),
    ]
