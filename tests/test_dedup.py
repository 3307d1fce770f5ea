import asyncio
import contextlib
import time
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit.dedup import DedupCache, DedupStats, KeyEvicted, SeenKeys
from meshkit.events import Event
from meshkit.testing import run


async def value(result: object = "done", delay: float = 1.0) -> object:
    await asyncio.sleep(delay)
    return result


# --- the core against a naive model ------------------------------------------------------------------------


class ManySmallDicts(SeenKeys):
    PER_DICT = 2
    SWEEP = 3


class SeenKeysMachine(RuleBasedStateMachine):
    """The model: a dict of the times at which keys were seen first; those that have expired may be forgotten."""

    TTL = 10.0
    KEYS = st.integers(0, 15)

    @initialize(max_keys=st.integers(1, 12))
    def start(self, max_keys: int) -> None:
        self.keys = ManySmallDicts(ttl=self.TTL, max_keys=max_keys)
        self.first: dict[int, float] = {}
        self.now = self.latest = 0.0

    def live(self, key: int) -> bool:
        return key in self.first and self.now < self.first[key] + self.TTL

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0, 9.75, 10.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=KEYS)
    def check(self, key: int) -> None:
        new = not self.live(key)
        assert self.keys.check(key, self.now) is new
        if new:
            self.remember(key)

    @rule(key=KEYS)
    def add(self, key: int) -> None:
        expiry = self.now + self.TTL
        self.keys.add(key, self.now, expiry)
        assert self.keys.expiry(key, self.now) is expiry
        self.remember(key)

    @rule(key=KEYS)
    def forget(self, key: int) -> None:
        self.keys.forget(key)
        self.first.pop(key, None)

    @rule(limit=st.integers(0, 20))
    def sweep(self, limit: int) -> None:
        before = self.keys.count
        expired = sum(not self.live(key) for key in self.first)
        found = self.keys.sweep(self.now, limit)
        assert found == before - self.keys.count <= min(limit, expired)
        if found < limit:  # then none is left
            self.first = {key: first for key, first in self.first.items() if self.live(key)}
            assert self.keys.count == len(self.first)

    @precondition(lambda self: self.latest > 0)
    @rule(key=KEYS)
    def another_clock(self, key: int) -> None:
        self.now = self.latest / 2
        assert all(self.keys.expiry(key, self.now) is None for key in range(16))
        self.first.clear()
        self.check(key)
        assert self.keys.count == 1

    def remember(self, key: int) -> None:
        self.first.pop(key, None)
        self.first[key] = self.latest = self.now
        if self.keys.count > self.keys.max_keys:
            # Those expired are swept first, 3 at a time, which is more than one call adds: so this one counts still.
            oldest = min(first for key, first in self.first.items() if self.live(key))
            evicted = self.keys.evict()
            assert isinstance(evicted, int)
            assert self.first.pop(evicted) == oldest

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "keys"):
            return
        assert {key for key in range(16) if self.keys.expiry(key, self.now) is not None} == {
            key for key in self.first if self.live(key)
        }
        assert self.keys.count <= min(len(self.first), self.keys.max_keys)


TestSeenKeys = SeenKeysMachine.TestCase
TestSeenKeys.settings = settings(max_examples=60, stateful_step_count=40)


def test_keys_that_are_multiples_of_a_power_of_two_do_not_all_share_a_dict() -> None:
    keys = SeenKeys(ttl=1.0, max_keys=100_000)
    for number in range(10_000):
        keys.check(number << 20, 0.0)
    assert max(map(len, keys._dicts)) < 200


def test_room_for_any_number_of_keys_costs_nothing_beforehand() -> None:
    assert len(SeenKeys(ttl=1.0, max_keys=10**12)._dicts) == SeenKeys.MAX_DICTS


def test_a_ttl_too_short_for_the_clock_to_tell_remembers_nothing() -> None:
    keys = SeenKeys(ttl=1e-9, max_keys=1)
    for _ in range(3):
        assert keys.check("a", 1e9)
        keys.add("b", 1e9, 1e9 + 1e-9)
        assert (keys.expiry("b", 1e9), keys.count) == (None, 0)


# --- keys that misbehave -----------------------------------------------------------------------------------


class Fuse:
    """Lets that many comparisons pass, then fails each."""

    left = 1_000_000

    def burn(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError


class Hostile:
    def __init__(self, number: int, fuse: Fuse) -> None:
        self.number = number
        self.fuse = fuse

    def __hash__(self) -> int:
        self.fuse.burn()
        return 7

    def __eq__(self, other: object) -> bool:
        self.fuse.burn()
        return isinstance(other, Hostile) and self.number == other.number


@pytest.mark.parametrize("max_keys", [3, 100])
@pytest.mark.parametrize("expired", [False, True])
@pytest.mark.parametrize("number", [2, 9])
@pytest.mark.parametrize("verb", [SeenKeys.check, lambda keys, key, now: keys.forget(key), SeenKeys.sweep])
def test_a_key_that_fails_anywhere_in_a_call_leaves_nothing_corrupt(
    verb: Any, number: int, max_keys: int, *, expired: bool
) -> None:
    for left in range(12):
        fuse = Fuse()
        keys = SeenKeys(ttl=10.0, max_keys=max_keys)
        for other in range(3):
            keys.check(Hostile(other, fuse), 0.0)
        fuse.left = left
        now = 10.0 if expired else 5.0
        with contextlib.suppress(ZeroDivisionError):
            verb(keys, *((now, 100) if verb is SeenKeys.sweep else (Hostile(number, fuse), now)))
        fuse.left = Fuse.left
        assert keys.count == sum(map(len, keys._dicts))
        assert keys.check("another", 30.0)
        assert keys.count == 1


class Changing:
    def __init__(self) -> None:
        self.hash = 1

    def __hash__(self) -> int:
        return self.hash


def test_a_key_whose_hash_changes_goes_when_it_expires_and_takes_no_other_along() -> None:
    keys = SeenKeys(ttl=10.0, max_keys=100)
    changing = Changing()
    keys.check("before", 0.0)
    keys.check(changing, 1.0)
    keys.check("after", 2.0)
    changing.hash = 2
    assert keys.sweep(11.0, 100) == 2
    assert keys.count == 1
    assert not keys.check("after", 11.0)


def test_a_key_whose_hash_changes_makes_room_at_max_keys() -> None:
    events: list[Event] = []
    cache = DedupCache(ttl=10.0, max_keys=2, observer=events.append)
    changing = Changing()
    for key in (changing, "b"):
        cache.check(key)
    changing.hash = 2
    for number in range(3):
        assert cache.check(number)
        assert len(cache) == 2
    assert events == [KeyEvicted("dedup", key) for key in (changing, "b", 0)]


# --- check, seen, mark, forget -----------------------------------------------------------------------------


async def test_a_key_expires_exactly_one_ttl_after_it_was_seen_first() -> None:
    cache = DedupCache(ttl=10.0)
    assert not cache.seen("a")
    assert cache.check("a")
    for _ in range(3):
        await asyncio.sleep(3)
        assert cache.seen("a")
        assert not cache.check("a")
    await asyncio.sleep(0.9999)
    assert not cache.check("a")
    loop = asyncio.get_running_loop()
    await asyncio.sleep(10.0 - loop.time())
    assert loop.time() == 10.0
    assert not cache.seen("a")
    assert cache.check("a")
    assert not cache.check("a")
    assert cache.stats() == DedupStats(keys=1, in_flight=0, duplicates=5, evicted=0)


async def test_mark_remembers_and_keeps_the_time_of_what_is_remembered() -> None:
    cache = DedupCache(ttl=10.0)
    cache.mark("a")
    await asyncio.sleep(9)
    cache.mark("a")
    assert not cache.check("a")
    await asyncio.sleep(1)
    assert cache.check("a")
    assert cache.stats().duplicates == 1


def test_what_is_forgotten_is_new_again() -> None:
    cache = DedupCache(ttl=10.0)
    cache.forget("a")
    cache.check("a")
    cache.forget("a")
    assert not cache.seen("a")
    assert cache.check("a")


async def test_cleanup_forgets_what_has_expired_and_says_how_many_that_were() -> None:
    cache = DedupCache(ttl=10.0, max_keys=10_000)
    assert cache.cleanup() == 0
    for number in range(5_000):
        cache.check(number)
    await asyncio.sleep(5)
    cache.check("later")
    assert cache.cleanup() == 0
    await asyncio.sleep(5)
    assert len(cache) == 5_001
    assert cache.cleanup() == 5_000
    assert len(cache) == 1
    assert cache.seen("later")


async def test_expired_keys_go_by_themselves_a_few_with_each_new_one() -> None:
    cache = DedupCache(ttl=10.0)
    for number in range(1_000):
        cache.check(number)
    await asyncio.sleep(10)
    for left in (1_000 - 255, 1_000 - 510, 1_000 - 765, 4, 5, 6):
        cache.check(object())
        assert len(cache) == left


async def test_at_max_keys_the_oldest_goes_which_is_counted_and_told() -> None:
    events: list[Event] = []
    cache = DedupCache(ttl=10.0, max_keys=2, name="gossip", observer=events.append)
    for key in ("a", "b"):
        cache.check(key)
        await asyncio.sleep(1)
    assert not cache.check("a")
    cache.mark("c")
    assert [cache.seen(key) for key in ("a", "b", "c")] == [False, True, True]
    assert await cache.once("d", value, "result", delay=0) == "result"
    assert [cache.seen(key) for key in ("b", "c", "d")] == [False, True, True]
    assert cache.check("e")
    assert events == [KeyEvicted("gossip", "a"), KeyEvicted("gossip", "b"), KeyEvicted("gossip", "c")]
    assert cache.stats() == DedupStats(keys=2, in_flight=0, duplicates=1, evicted=3)
    await asyncio.sleep(10)
    cache.check("f")
    cache.check("g")
    assert len(events) == cache.stats().evicted == 3  # what has expired makes room without being missed


def test_without_an_observer_evictions_are_counted() -> None:
    cache = DedupCache(ttl=10.0, max_keys=1)
    assert [cache.check(number) for number in range(4)] == [True] * 4
    assert cache.stats().evicted == 3


def test_a_failing_observer_breaks_nothing() -> None:
    def observer(_: Event) -> None:
        raise ValueError("of the observer")

    async def main() -> None:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        cache = DedupCache(ttl=10.0, max_keys=1, observer=observer)
        assert cache.check("a")
        assert cache.check("b")
        assert told == ["meshkit: observer failed on KeyEvicted"]

    run(main)


def test_without_a_loop_it_goes_by_the_monotonic_clock() -> None:
    cache = DedupCache(ttl=3600.0)
    before = time.monotonic()
    assert cache.check("a")
    assert not cache.check("a")
    after = time.monotonic()
    expiry = cache._keys.expiry("a", after)
    assert expiry is not None
    assert before + 3600 <= expiry <= after + 3600

    async def main() -> bool:
        return cache.check("a")

    with asyncio.Runner() as runner:
        assert not runner.run(main())  # an ordinary loop has the same clock


def test_the_next_loop_with_another_clock_begins_with_nothing() -> None:
    cache = DedupCache(ttl=10.0)

    async def first() -> None:
        assert cache.check("early")
        assert await cache.once("result", value) == "done"
        await asyncio.sleep(4)
        assert cache.check("late")

    async def second() -> None:
        assert not any(map(cache.seen, ("early", "result", "late")))
        assert cache.check("late")
        assert len(cache) == 1
        assert cache.check("early")
        assert not cache.check("late")
        assert await cache.once("result", value, "anew") == "anew"

    run(first)
    run(second)


def test_a_repr_shows_the_configuration_and_what_is_there() -> None:
    cache = DedupCache(ttl=0.5, max_keys=7, name="gossip")
    cache.mark("a")
    assert repr(cache) == "DedupCache('gossip', ttl=0.5, max_keys=7, keys=1)"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"ttl": 0}, ValueError, "ttl must be finite and more than zero seconds, not 0"),
        ({"ttl": float("nan")}, ValueError, "ttl must be finite"),
        ({"ttl": "1"}, TypeError, "ttl must be a number of seconds, not '1'"),
        ({"ttl": 1, "max_keys": 0}, ValueError, "max_keys must be at least 1, not 0"),
        ({"ttl": 1, "max_keys": 1.5}, TypeError, "max_keys must be a whole number, not 1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        DedupCache(**arguments)


def test_a_key_must_be_hashable() -> None:
    cache = DedupCache(ttl=1.0)
    with pytest.raises(TypeError, match="unhashable"):
        cache.check([])  # type: ignore[arg-type]  # that is the point
    assert len(cache) == 0


def test_a_dict_from_which_all_keys_were_forgotten_is_passed_over_when_the_oldest_goes() -> None:
    keys = SeenKeys(ttl=100.0, max_keys=2 * SeenKeys.PER_DICT)  # three dicts: numbers lie in them by their remainder
    assert keys.check(0, 0.0)
    keys.forget(0)
    assert [keys.check(number, 1.0) for number in (1, 4, 7)] == [True] * 3
    assert keys.evict() == 1
    assert keys.evict() == 4
