"""Results to fall back on: `allow_or_cached`, and `call_or_cached`, which all who want the same share."""

import asyncio
import contextlib
import gc
import sys
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshkit._results import Results, _inside
from meshkit.errors import CallTimeout, RateLimited, TooManyKeys
from meshkit.rate_limiter import RateLimiter
from meshkit.testing import VirtualTimeLoop, cancellation_points, run


def now() -> float:
    return asyncio.get_running_loop().time()


class Work:
    """A call that takes a second, and is counted."""

    def __init__(self, result: object = "result", seconds: float = 1.0) -> None:
        self.result = result
        self.seconds = seconds
        self.begun = self.ended = self.cancelled = 0

    async def __call__(self) -> Any:
        self.begun += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


class Changing:
    """A key with a hash that changes, which a key should not have."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return hash(self.name)


async def test_the_verification_of_pings_as_the_specification_has_it() -> None:
    pings = RateLimiter(max_count=1, window=60.0)
    sent = 0

    async def verify(peer: str, *, alive: bool) -> bool:
        nonlocal sent
        allowed, cached, has_cached = pings.allow_or_cached(peer)
        if not allowed and has_cached:
            return bool(cached)
        if not allowed:
            return False
        sent += 1
        await asyncio.sleep(2)
        pings.set_cached_result(peer, alive)
        return alive

    assert await verify("bob", alive=True)
    assert await verify("bob", alive=False), "limited: the last result"
    assert sent == 1
    await asyncio.sleep(58)
    both = await asyncio.gather(verify("bob", alive=False), verify("bob", alive=False))
    assert list(both) == [False, True], "the last result stands in while the next is on its way"
    assert not await verify("bob", alive=True)
    assert sent == 2
    assert not pings.allow_or_cached("carol")[2]
    assert not await verify("carol", alive=True), "refused, and nothing cached"


async def test_none_and_false_are_results_like_any_other() -> None:
    limiter = RateLimiter(1, 10.0)
    for key, result in [("bob", None), ("carol", False), (None, 0)]:
        assert limiter.allow_or_cached(key) == (True, None, False)
        assert limiter.allow_or_cached(key) == (False, None, False)
        limiter.set_cached_result(key, result)
        assert limiter.allow_or_cached(key) == (False, result, True)
        assert await limiter.call_or_cached(key, Work()) is result


async def test_a_result_is_given_out_for_two_windows() -> None:
    limiter = RateLimiter(1, 10.0)
    limiter.set_cached_result("bob", "old")
    for time in (0.0, 10.0, 19.9):
        await asyncio.sleep(time - now())
        limiter.allow("bob")
        assert limiter.allow_or_cached("bob") == (False, "old", True)
    await asyncio.sleep(0.1)
    limiter.allow("bob")
    assert limiter.allow_or_cached("bob") == (False, None, False)


async def test_results_are_bounded() -> None:
    limiter = RateLimiter(1, 10.0, max_keys=3)
    for number in range(10):
        limiter.set_cached_result(number, number)
        assert limiter.stats().cached <= 3
    assert limiter._results.get(9, now()) == (True, 9)


class ResultsMachine(RuleBasedStateMachine):
    """Against a dict of all results, with their times."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.results = Results(ttl=10.0, max_keys=3)
        self.naive: dict[str, tuple[float, int]] = {}

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=st.sampled_from("abcdef"), result=st.integers())
    def put(self, key: str, result: int) -> None:
        self.results.put(key, result, self.now)
        self.naive[key] = (self.now, result)
        assert self.results.get(key, self.now) == (True, result)

    @rule()
    def clean_up(self) -> None:
        self.results.cleanup(self.now)
        assert all(self.results.get(key, self.now)[0] for key in self.results._results)

    @invariant()
    def what_is_found_is_right_and_bounded(self) -> None:
        assert len(self.results) <= 3
        fresh = {key: result for key, (since, result) in self.naive.items() if self.now - since < 10}
        found = {key: self.results.get(key, self.now)[1] for key in "abcdef" if self.results.get(key, self.now)[0]}
        assert found.items() <= fresh.items()
        if len(self.naive) <= 3:
            assert found == fresh


def test_results_whose_keys_have_changed_are_forgotten_like_others() -> None:
    results = Results(ttl=10.0, max_keys=1)
    key = Changing("bob")
    results.put(key, 1, 0.0)
    key.name = "carol"
    results.put("dave", 2, 0.0)
    assert len(results) == 1
    assert results.get("dave", 0.0) == (True, 2)


ResultsMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25)
TestResults = ResultsMachine.TestCase


def test_results_of_another_clock_do_not_last_forever() -> None:
    results = Results(ttl=10.0, max_keys=2)
    results.put("bob", 1, 1e6)
    assert results.get("bob", 1e6 - 9) == (True, 1)
    assert results.get("bob", 5.0) == (False, None)


# --- call_or_cached


async def test_it_calls_when_it_may_and_else_gives_the_last_result() -> None:
    limiter = RateLimiter(1, 10.0, name="ping")
    work = Work("first")
    assert await limiter.call_or_cached("bob", work) == "first"
    assert await limiter.call_or_cached("bob", work) == "first"
    assert work.begun == 1
    await asyncio.sleep(9)
    work.result = "second"
    assert await limiter.call_or_cached("bob", work) == "second"
    assert now() == 11.0
    assert limiter.stats().cached == 1


async def test_arguments_are_passed_on() -> None:
    async def add(a: int, *, b: int) -> int:
        return a + b

    assert await RateLimiter(1, 10.0).call_or_cached("bob", add, 1, b=2) == 3


async def test_without_a_result_it_says_when_to_come_back() -> None:
    limiter = RateLimiter(1, 10.0, max_keys=1, name="ping")
    assert limiter.allow("bob")
    await asyncio.sleep(2)
    with pytest.raises(RateLimited) as caught:
        await limiter.call_or_cached("bob", Work())
    assert caught.value.retry_after == 8.0
    with pytest.raises(TooManyKeys):
        await limiter.call_or_cached("carol", Work())
    assert limiter.stats().refused == 2


async def test_those_who_come_together_share_one_call() -> None:
    limiter = RateLimiter(1, 10.0)
    work = Work()
    results = await asyncio.gather(*[limiter.call_or_cached("bob", work) for _ in range(50)])
    assert results == ["result"] * 50
    assert work.begun == 1
    assert now() == 1.0
    assert limiter.stats().refused == 0
    assert not len(limiter._runs)
    await asyncio.gather(*[limiter.call_or_cached(key, work) for key in range(5)])
    assert work.begun == 6, "other keys have other calls"


async def test_an_error_goes_to_all_who_share_it_and_is_not_remembered() -> None:
    limiter = RateLimiter(2, 10.0)
    work = Work(OSError("no route"))
    results = await asyncio.gather(*[limiter.call_or_cached("bob", work) for _ in range(5)], return_exceptions=True)
    assert [str(result) for result in results] == ["no route"] * 5
    assert limiter.stats().cached == 0
    work.result = "better"
    assert await limiter.call_or_cached("bob", work) == "better"
    assert work.begun == 2
    with pytest.raises(RateLimited):
        limiter._results.cleanup(100.0)
        await limiter.call_or_cached("bob", work)


async def test_an_error_leaves_the_last_result_in_its_place() -> None:
    limiter = RateLimiter(1, 10.0)
    work = Work("good")
    assert await limiter.call_or_cached("bob", work) == "good"
    await asyncio.sleep(9)
    work.result = OSError()
    with pytest.raises(OSError):
        await limiter.call_or_cached("bob", work)
    assert await limiter.call_or_cached("bob", work) == "good"


async def test_a_function_that_cannot_even_be_called_is_an_error_like_any_other() -> None:
    limiter = RateLimiter(2, 10.0)
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        await limiter.call_or_cached("bob", Work(), 1)  # type: ignore[call-arg]
    assert await limiter.call_or_cached("bob", Work()) == "result"


@pytest.mark.parametrize("in_a_task", [False, True])
async def test_a_call_that_asks_for_its_own_key_does_not_wait_for_itself(in_a_task: bool) -> None:
    limiter = RateLimiter(2, 10.0)
    begun = 0

    async def recursive() -> str:
        nonlocal begun
        begun += 1
        again = limiter.call_or_cached("bob", recursive)
        try:
            return await (asyncio.create_task(again) if in_a_task else again)
        except RateLimited:
            return "the limit ends it"

    assert await limiter.call_or_cached("bob", recursive) == "the limit ends it"
    assert begun == 2
    assert await limiter.call_or_cached("bob", recursive) == "the limit ends it", "from memory"
    assert begun == 2
    assert not len(limiter._runs)


async def test_calls_that_lead_to_one_another_leave_no_trail() -> None:
    limiter = RateLimiter(1, 10.0)
    trails: list[int] = []

    async def renew() -> None:
        trails.append(len(_inside.get()))
        if len(trails) < 20:
            later.append(asyncio.create_task(after_a_while()))

    async def after_a_while() -> None:
        await asyncio.sleep(10)
        await limiter.call_or_cached("bob", renew)

    later = [asyncio.create_task(after_a_while())]
    for task in later:  # it grows as they end
        await task
    assert trails == [1] * 20


@pytest.mark.parametrize("which", range(5))
async def test_cancelling_one_of_five_leaves_four_results(which: int) -> None:
    limiter = RateLimiter(1, 10.0)
    work = Work()
    tasks = [asyncio.create_task(limiter.call_or_cached("bob", work)) for _ in range(5)]
    await asyncio.sleep(0.5)
    tasks[which].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for number, result in enumerate(results) if number == which] == [asyncio.CancelledError]
    assert [result for number, result in enumerate(results) if number != which] == ["result"] * 4
    assert (work.begun, work.cancelled) == (1, 0)


async def test_when_the_last_is_cancelled_so_is_the_call_and_it_is_awaited() -> None:
    limiter = RateLimiter(2, 10.0)
    ended: list[float] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
            ended.append(now())

    tasks = [asyncio.create_task(limiter.call_or_cached("bob", slow)) for _ in range(3)]
    for number, task in enumerate(tasks):
        await asyncio.sleep(1)
        assert not ended
        task.cancel()
        if number < 2:
            await asyncio.wait([task], timeout=0.1)
            assert task.cancelled()
    await asyncio.sleep(0.5)
    newcomer = asyncio.create_task(limiter.call_or_cached("bob", Work()))
    await asyncio.wait(tasks)
    assert ended == [now()]
    assert all(task.cancelled() for task in tasks)
    assert await newcomer == "result", "it did not join a call that was ending"
    assert limiter.stats().cached == 1
    assert not len(limiter._runs)


async def test_a_cancelled_call_is_not_remembered_and_its_admission_is_spent() -> None:
    limiter = RateLimiter(1, 10.0)
    with anyio.move_on_after(0.5):
        await limiter.call_or_cached("bob", Work())
    assert limiter.stats().cached == 0
    with pytest.raises(RateLimited):
        await limiter.call_or_cached("bob", Work())


def test_cancelled_at_any_point_nothing_is_left() -> None:
    for others in (0, 2):
        for point in cancellation_points():

            async def main(point: Any = point, others: int = others) -> None:
                limiter = RateLimiter(1, 10.0)
                work = Work()
                tasks = [asyncio.create_task(limiter.call_or_cached("bob", work)) for _ in range(others // 2)]
                await asyncio.sleep(0)
                scenario = asyncio.create_task(point.cancel(limiter.call_or_cached("bob", work)))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                tasks += [asyncio.create_task(limiter.call_or_cached("bob", work)) for _ in range(others // 2)]
                cancelled = await scenario
                assert cancelled == point.reached
                assert await asyncio.gather(*tasks) == ["result"] * others
                assert work.begun == work.ended == 1
                assert limiter.stats().cached == (1 if others or not work.cancelled else 0)
                await asyncio.sleep(0)
                assert not len(limiter._runs)

            run(main)


async def test_what_cleaning_up_raises_goes_to_the_one_who_cancelled_it() -> None:
    limiter = RateLimiter(1, 10.0)

    async def messy() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            raise OSError("could not close")

    task = asyncio.create_task(limiter.call_or_cached("bob", messy))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(OSError, match="could not close"):
        await task


async def test_a_call_that_ends_well_although_it_was_cancelled_is_remembered() -> None:
    limiter = RateLimiter(1, 10.0)

    async def stubborn() -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
        return "done"

    task = asyncio.create_task(limiter.call_or_cached("bob", stubborn))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await limiter.call_or_cached("bob", stubborn) == "done"


async def test_cancelled_twice_it_does_not_wait_for_the_end() -> None:
    limiter = RateLimiter(1, 10.0)

    async def stubborn() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(5)

    task = asyncio.create_task(limiter.call_or_cached("bob", stubborn))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert now() == 2.0
    await asyncio.sleep(5)


async def test_what_stops_programs_is_not_kept_back() -> None:
    limiter = RateLimiter(1, 10.0)

    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    task = asyncio.create_task(limiter.call_or_cached("bob", cancels_itself))
    await asyncio.wait([task])
    assert task.cancelled()


async def test_deadlines_travel_into_the_call() -> None:
    limiter = RateLimiter(10, 10.0)
    seen: list[float] = []

    async def work() -> None:
        seen.append(anyio.current_effective_deadline())
        await asyncio.sleep(3)
        seen.append(anyio.current_effective_deadline())

    async def caller(seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await limiter.call_or_cached("bob", work)

    await caller(2)
    assert now() == 2.0
    async with anyio.create_task_group() as group:
        for seconds in (4, 9, 5, 1):
            group.start_soon(caller, seconds)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    assert seen == [2.0, 6.0, 11.0]
    await limiter.call_or_cached("bob", work)
    assert seen[-1] == float("inf")


@pytest.mark.parametrize("shared", [1, 2])
async def test_a_deadline_ends_the_call_and_only_the_scope_hears_of_it(shared: int) -> None:
    limiter = RateLimiter(10, 10.0)
    work = Work(seconds=100.0)

    async def caller() -> None:
        with anyio.move_on_after(3) as scope:
            await limiter.call_or_cached("bob", work)
        assert scope.cancelled_caught

    await asyncio.gather(*[caller() for _ in range(shared)])
    assert now() == 3.0
    assert work.cancelled == 1


async def test_a_call_that_cleans_up_after_the_deadline_is_awaited() -> None:
    limiter = RateLimiter(10, 10.0)

    async def tidy() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)

    with anyio.move_on_after(3) as scope:
        await limiter.call_or_cached("bob", tidy)
    assert scope.cancelled_caught
    assert now() == 4.0


async def test_a_call_that_is_out_of_time_already_is_not_cancelled_in_its_cleaning_up() -> None:
    limiter = RateLimiter(10, 10.0)
    cleaned: list[float] = []

    async def tidy() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
            cleaned.append(now())

    async def caller() -> None:
        with anyio.fail_after(3) as scope:
            asyncio.get_running_loop().call_at(1, lambda: setattr(scope, "deadline", 100))
            await limiter.call_or_cached("bob", tidy)

    task = asyncio.create_task(caller())
    await asyncio.sleep(3.5)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert cleaned == [4.0] == [now()]


async def test_a_deadline_that_is_moved_too_late_is_a_timeout() -> None:
    limiter = RateLimiter(10, 10.0, name="ping")
    with anyio.fail_after(3) as scope:
        asyncio.get_running_loop().call_at(1, lambda: setattr(scope, "deadline", 100))
        with pytest.raises(CallTimeout, match="meshkit:ping:'bob': no result within 3 s; it may still have happened"):
            await limiter.call_or_cached("bob", Work(seconds=50.0))
    assert now() == 3.0


async def test_a_caller_closed_instead_of_cancelled_leaves_too() -> None:
    limiter = RateLimiter(1, 10.0)
    work = Work()
    caller = limiter.call_or_cached("bob", work)
    caller.send(None)
    await asyncio.sleep(0.5)
    caller.close()
    await asyncio.sleep(0)
    assert work.cancelled == 1


def test_a_caller_closed_after_its_loop_leaves_too() -> None:
    limiter = RateLimiter(1, 10.0)
    loop = VirtualTimeLoop()
    loop.set_exception_handler(lambda *_: None)  # it will complain that a task was destroyed
    caller = limiter.call_or_cached("bob", Work())

    async def main() -> None:
        caller.send(None)

    loop.run_until_complete(main())
    loop.close()
    caller.close()
    assert limiter._runs.get("bob") is None


def test_a_call_left_behind_in_another_loop_is_not_shared() -> None:
    limiter = RateLimiter(3, 10.0)
    work = Work()
    loop = VirtualTimeLoop()
    loop.set_exception_handler(lambda *_: None)  # it will complain that tasks were destroyed

    async def leave() -> None:
        loop.create_task(limiter.call_or_cached("bob", Work(seconds=1000.0)))
        await asyncio.sleep(0.1)

    async def main() -> None:
        assert await limiter.call_or_cached("bob", work) == "result"
        await asyncio.sleep(0)

    loop.run_until_complete(leave())
    run(main)
    assert len(limiter._runs) == 0
    loop.close()
    gc.collect()
    assert limiter.allow("bob")
    run(main)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks_change_nothing() -> None:
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]  # as above

    async def at_once() -> int:
        return 1

    limiter = RateLimiter(2, 10.0)
    assert await limiter.call_or_cached("bob", at_once) == 1
    await asyncio.sleep(0)
    assert not len(limiter._runs)
    with anyio.move_on_after(5):
        assert await limiter.call_or_cached("bob", Work()) == "result"
    assert await limiter.call_or_cached("bob", Work()) == "result"


@given(
    limit=st.integers(1, 3),
    calls=st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.4, 1.0, 6.0]), st.sampled_from([None, None, 0.0, 0.3, 1.0, 1.2])),
        min_size=1,
        max_size=15,
    ),
)
def test_whatever_is_cancelled_nobody_hangs_and_no_call_is_made_too_much(
    limit: int, calls: list[tuple[float, float | None]]
) -> None:
    async def main() -> None:
        limiter = RateLimiter(limit, 10.0)
        begun: list[float] = []
        ended: list[float] = []

        async def work() -> float:
            begun.append(now())
            try:
                await asyncio.sleep(1)
            finally:
                ended.append(now())
            return now()

        async def caller(patience: float | None) -> None:
            with anyio.move_on_after(patience), contextlib.suppress(RateLimited):
                assert now() - 20 < await limiter.call_or_cached("bob", work) <= now()

        tasks: list[asyncio.Task[None]] = []
        for step, patience in calls:
            await asyncio.sleep(step)
            tasks.append(asyncio.create_task(caller(patience)))
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)
        assert len(ended) == len(begun)
        assert not len(limiter._runs)
        assert all(later - earlier >= 10 for earlier, later in zip(begun, begun[limit:], strict=False))

    run(main)
