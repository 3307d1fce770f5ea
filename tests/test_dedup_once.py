import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from meshkit.dedup import DedupCache, DedupStats
from meshkit.testing import VirtualTimeLoop, cancellation_points, run


async def value(result: object = "done", delay: float = 1.0) -> object:
    await asyncio.sleep(delay)
    return result


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


async def test_a_shared_error_does_not_grow_with_each_who_gets_it() -> None:
    cache = DedupCache(ttl=10.0)
    work = Work()
    work.error = error = ValueError("no")
    await asyncio.gather(*(cache.once("a", work) for _ in range(1_000)), return_exceptions=True)
    assert 2 <= len(list(traceback.walk_tb(error.__traceback__))) < 10


async def test_what_is_forgotten_in_flight_still_lands() -> None:
    cache = DedupCache(ttl=10.0)
    task = asyncio.create_task(cache.once("a", value, "first"))
    await asyncio.sleep(0.5)
    cache.forget("a")
    assert list(await asyncio.gather(task, cache.once("a", value, "second"))) == ["first", "first"]
    assert await cache.once("a", value, "third") == "first"


async def test_a_key_that_fails_when_its_result_is_to_be_kept_leaves_nobody_waiting() -> None:
    class Key:
        broken = False

        def __hash__(self) -> int:
            if Key.broken:
                raise ZeroDivisionError
            return 7

    async def breaks() -> None:
        await asyncio.sleep(1)
        Key.broken = True

    cache = DedupCache(ttl=10.0)
    key = Key()
    got = await asyncio.gather(*(cache.once(key, breaks) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in got] == [ZeroDivisionError] * 3
    Key.broken = False
    assert not cache.seen(key)
    assert await cache.once(key, value) == "done"
    assert cache.stats().in_flight == 0


@pytest.mark.parametrize("max_keys", [1, 100])
async def test_a_result_may_use_the_cache_when_it_ends(max_keys: int) -> None:
    class Result:
        def __del__(self) -> None:
            ended.append(cache.check(f"end {len(ended)}"))

    async def result() -> Result:
        return Result()

    ended: list[bool] = []
    cache = DedupCache(ttl=10.0, max_keys=max_keys)
    for number in range(6):
        await cache.once(number, result)
    await asyncio.sleep(10)
    cache.check("another")
    cache.cleanup()
    assert ended == [True] * 6
    assert len(cache) == cache._keys.count == sum(map(len, cache._keys._dicts)) <= 7


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
