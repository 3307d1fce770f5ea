import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit.dedup import DedupCache, DedupStats, KeyEvicted, SeenKeys
from meshkit.events import Event
from meshkit.testing import VirtualTimeLoop, cancellation_points, run

Make = Callable[[], Coroutine[Any, Any, Any]]


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


# --- once --------------------------------------------------------------------------------------------------


class Work:
    """Takes a second, counts its runs, and how many there are at once."""

    def __init__(self) -> None:
        self.runs = self.running = 0
        self.error: Exception | None = None

    async def __call__(self, result: object = None) -> object:
        assert self.running == 0, "two at once"
        self.runs += 1
        self.running += 1
        try:
            await asyncio.sleep(1)
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        return result


@pytest.mark.parametrize("result", ["result", None, False])
async def test_the_result_is_remembered_for_the_ttl_from_when_it_is_done(result: object) -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    assert await cache.once("a", work, result) is result
    await asyncio.sleep(9.5)
    assert await cache.once("a", work, "another") is result
    assert work.runs == 1
    assert not cache.check("a")
    cache.mark("a")
    assert await cache.once("a", work) is result
    await asyncio.sleep(0.5)
    assert await cache.once("a", work, "another") == "another"
    assert work.runs == 2
    cache.forget("a")
    assert await cache.once("a", work, "third") == "third"
    assert cache.stats() == DedupStats(keys=1, in_flight=0, duplicates=3, evicted=0)


async def test_ten_thousand_calls_at_once_share_one_run() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    result = object()
    got = await asyncio.gather(*(cache.once("a", work, result) for _ in range(10_000)))
    assert all(one is result for one in got)
    assert work.runs == asyncio.get_running_loop().time() == 1
    assert cache.stats() == DedupStats(keys=1, in_flight=0, duplicates=9_999, evicted=0)


async def test_different_keys_run_at_once() -> None:
    cache = DedupCache(ttl=10.0)
    assert await asyncio.gather(*(cache.once(key, value, key) for key in "abc")) == ["a", "b", "c"]
    assert asyncio.get_running_loop().time() == 1


async def test_an_error_goes_to_all_who_wait_and_the_key_is_free_again() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    work.error = error = ValueError("no")
    got = await asyncio.gather(*(cache.once("a", work) for _ in range(3)), return_exceptions=True)
    assert all(one is error for one in got)
    assert work.runs == 1
    assert not cache.seen("a")
    work.error = None
    assert await cache.once("a", work, "at last") == "at last"


async def test_an_error_that_nobody_waits_for_any_more_is_not_complained_about() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    work.error = ValueError()
    leader, follower = (asyncio.create_task(cache.once("a", work)) for _ in range(2))
    await asyncio.sleep(0.5)
    asyncio.get_running_loop().call_at(1.0, follower.cancel)  # as the run ends
    got = await asyncio.gather(leader, follower, return_exceptions=True)
    assert [type(error) for error in got] == [ValueError, asyncio.CancelledError]
    assert cache.stats().in_flight == 0


async def test_what_is_called_may_fail_before_it_returns_anything_to_await() -> None:
    cache = DedupCache(ttl=10.0)

    def broken() -> Coroutine[Any, Any, None]:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        await cache.once("a", broken)
    assert cache.stats() == DedupStats(keys=0, in_flight=0, duplicates=0, evicted=0)


async def test_a_key_that_was_only_checked_has_no_result() -> None:
    cache = DedupCache(ttl=10.0, name="orders")
    cache.check("a")
    with pytest.raises(RuntimeError, match=r"orders: 'a' was seen by check\(\) or mark\(\), so there is no result"):
        await cache.once("a", value)


async def test_while_it_runs_the_key_counts_as_seen() -> None:
    cache = DedupCache(ttl=10.0)
    task = asyncio.create_task(cache.once("a", value))
    await asyncio.sleep(0.5)
    assert cache.seen("a")
    assert not cache.check("a")
    assert cache.check("b")
    assert cache.stats() == DedupStats(keys=1, in_flight=1, duplicates=1, evicted=0)
    cache.forget("a")  # there is nothing yet to forget
    assert cache.seen("a")
    cache.mark("a")
    assert await task == "done"
    assert await cache.once("a", value, "another") == "done"


# --- cancellation ------------------------------------------------------------------------------------------


async def test_when_the_one_of_five_that_runs_it_is_cancelled_the_others_have_a_result() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    tasks = [asyncio.create_task(cache.once("a", work, number)) for number in range(5)]
    await asyncio.sleep(0.5)
    tasks[0].cancel()
    got = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(got[0], asyncio.CancelledError)
    assert got[1:] == [1, 1, 1, 1]
    assert work.runs == 2


async def test_the_turn_passes_those_who_are_cancelled_at_the_same_time() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    tasks = [asyncio.create_task(cache.once("a", work, number)) for number in range(5)]
    await asyncio.sleep(0.5)
    for task in tasks[1:3]:
        task.cancel()  # they wait, and have not seen it yet when the turn comes
    tasks[0].cancel()
    assert (await asyncio.gather(*tasks, return_exceptions=True))[3:] == [3, 3]
    assert work.runs == 2


async def test_when_all_are_cancelled_nothing_is_left() -> None:
    cache = DedupCache(ttl=10.0)
    tasks = [asyncio.create_task(cache.once("a", Work())) for _ in range(100)]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert cache.stats() == DedupStats(keys=0, in_flight=0, duplicates=99, evicted=0)
    assert cache.check("a")


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("leader_gives_up", [False, True])
def test_wherever_one_is_cancelled_all_others_have_a_result(before: int, after: int, *, leader_gives_up: bool) -> None:
    for point in cancellation_points():

        async def main(point: Any = point) -> None:
            cache = DedupCache(ttl=10.0)
            work = Work()
            first = [asyncio.create_task(cache.once("a", work, "result")) for _ in range(before)]
            if leader_gives_up and first:
                asyncio.get_running_loop().call_later(0.5, first[0].cancel)
            await asyncio.sleep(0.25)
            last: list[asyncio.Task[object]] = []
            asyncio.get_running_loop().call_soon(
                lambda: last.extend(asyncio.create_task(cache.once("a", work, "result")) for _ in range(after))
            )
            cancelled = await point.cancel(cache.once("a", work, "result"))
            assert cancelled or point.result == "result"
            got = await asyncio.gather(*first, *last, return_exceptions=True)
            others = got[1:] if leader_gives_up and first else got
            assert others == ["result"] * len(others)
            stats = cache.stats()
            assert stats.in_flight == 0
            assert stats.keys == (0 if cancelled and not others and (not first or leader_gives_up) else 1)

        run(main)


async def test_a_follower_cancelled_in_the_moment_of_its_turn_passes_it_on() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    leader, second, third = (asyncio.create_task(cache.once("a", work, number)) for number in range(3))
    await asyncio.sleep(0.5)
    leader.cancel()
    await asyncio.wait([leader])
    second.cancel()  # it has been given the turn, and may have taken it
    got = await asyncio.gather(leader, second, third, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in got] == [True, True, False]
    assert got[2] == 2


async def test_what_stops_programs_passes_and_leaves_the_key_free() -> None:
    class Stop(BaseException):
        pass

    async def stops() -> None:
        raise Stop

    cache = DedupCache(ttl=10.0)
    with pytest.raises(Stop):
        await cache.once("a", stops)
    assert await cache.once("a", value) == "done"


def test_a_loop_that_was_thrown_away_locks_no_key_out() -> None:
    cache = DedupCache(ttl=10.0)
    suspended = []
    for stop in (None, ValueError()):
        loop = VirtualTimeLoop()

        async def caught(stop: Exception | None = stop) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            except GeneratorExit:
                if stop is not None:
                    raise stop from None
                raise

        async def main(fn: Callable[[], Coroutine[Any, Any, None]] = caught) -> None:
            calls = [cache.once("a", fn) for _ in range(2)]
            for call in calls:
                call.send(None)  # it is suspended, and nothing will ever resume it
            suspended.extend(calls)

        loop.run_until_complete(main())
        assert cache.stats().in_flight == 1
        loop.close()

    async def another() -> None:
        assert not cache.seen("a")
        task = asyncio.create_task(cache.once("a", value))
        follower = asyncio.create_task(cache.once("a", value))
        await asyncio.sleep(0)
        for number, call in enumerate(suspended):
            if number == 2:
                with pytest.raises(ValueError):
                    call.close()
            else:
                call.close()
        assert await task == await follower == "done"
        assert cache.stats() == DedupStats(keys=1, in_flight=0, duplicates=3, evicted=0)

    run(another)
