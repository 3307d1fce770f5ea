import asyncio
import pickle
import random
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit.bulkhead import Bulkhead, BulkheadRefused, BulkheadWaited, Slots
from meshkit.errors import BulkheadFull
from meshkit.events import Event
from meshkit.testing import VirtualTimeLoop, cancellation_points, run


def clock() -> float:
    return asyncio.get_running_loop().time()


# --- the core against a naive model ------------------------------------------------------------------------


class SlotsMachine(RuleBasedStateMachine):
    """The model: a list of those who run, and a list of those who wait."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.running: list[int] = []
        self.waiting: list[int] = []

    @initialize(max_concurrent=st.integers(1, 3), max_queue=st.integers(0, 4))
    def start(self, max_concurrent: int, max_queue: int) -> None:
        self.slots: Slots[int] = Slots(max_concurrent, max_queue)

    @rule()
    def come(self) -> None:
        self.number += 1
        free = len(self.running) < self.slots.max_concurrent
        assert self.slots.take() is free
        if free:
            self.running.append(self.number)
            return
        room = len(self.waiting) < self.slots.max_queue
        assert self.slots.line_up(self.number) is room
        if room:
            self.waiting.append(self.number)

    @precondition(lambda self: self.running)
    @rule()
    def give_back(self) -> None:
        self.running.pop()
        following = self.slots.give_back()
        assert following == (self.waiting.pop(0) if self.waiting else None)
        if following is not None:
            self.running.append(following)

    @rule(data=st.data())
    def step_out(self, data: st.DataObject) -> None:
        ticket = data.draw(st.integers(0, self.number))
        assert self.slots.step_out(ticket) is (ticket in self.waiting)
        self.waiting = [other for other in self.waiting if other != ticket]

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "slots"):
            return
        assert self.slots.running == len(self.running) <= self.slots.max_concurrent
        assert list(self.slots.waiting) == self.waiting
        assert not self.waiting or self.slots.running == self.slots.max_concurrent


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30)


# --- calls -------------------------------------------------------------------------------------------------


async def test_no_more_than_max_concurrent_run_at_once_and_all_others_wait_in_line() -> None:
    bulkhead = Bulkhead(3, max_queue=100)
    running = peak = 0
    order: list[int] = []

    @bulkhead
    async def work(number: int) -> int:
        nonlocal running, peak
        order.append(number)
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(1)
        running -= 1
        return number

    assert await asyncio.gather(*(work(number) for number in range(30))) == list(range(30))
    assert peak == 3
    assert order == list(range(30))
    assert clock() == pytest.approx(10.0)
    assert bulkhead.idle


async def test_where_the_line_is_full_it_refuses_at_once_and_says_so() -> None:
    bulkhead = Bulkhead(2, max_queue=1, name="db")
    calls = [asyncio.create_task(bulkhead.call(asyncio.sleep, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(BulkheadFull) as caught:
        await bulkhead.call(asyncio.sleep, 1)
    assert clock() == 0.0
    error = caught.value
    assert (error.name, error.max_concurrent, error.max_queue) == ("db", 2, 1)
    assert (error.retry_after, error.executed) == (None, "no")
    assert str(error) == "db: 2 calls are running and 1 are waiting already"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    stats = bulkhead.stats()
    assert (stats.running, stats.waiting, stats.refused) == (2, 1, 1)
    assert repr(bulkhead) == "Bulkhead(2, max_queue=1, name='db', running=2, waiting=1)"
    await asyncio.gather(*calls)


async def test_without_a_queue_nobody_waits() -> None:
    bulkhead = Bulkhead(1)
    async with bulkhead:
        with pytest.raises(BulkheadFull):
            async with bulkhead:
                raise AssertionError("entered")
        assert not bulkhead.idle
    assert await bulkhead.call(asyncio.sleep, 0, "free again") == "free again"


async def test_a_call_gives_its_slot_back_however_it_ends() -> None:
    bulkhead = Bulkhead(1)

    async def fails() -> None:
        raise KeyError

    def fails_early() -> Coroutine[Any, Any, None]:
        raise ValueError

    for fn in (fails, fails_early, bulkhead(fails)):
        with pytest.raises((KeyError, ValueError, BulkheadFull)):
            await bulkhead.call(fn)
        assert bulkhead.idle


async def test_nobody_overtakes_those_who_wait() -> None:
    bulkhead = Bulkhead(1, max_queue=10)
    order: list[str] = []

    async def work(name: str) -> None:
        async with bulkhead:
            order.append(name)

    async with bulkhead:
        tasks = [asyncio.create_task(work("first")), asyncio.create_task(work("second"))]
        await asyncio.sleep(1)
    await work("late")  # the slot is free for nobody else: it was handed to the first already
    await asyncio.gather(*tasks)
    assert order == ["first", "second", "late"]


async def test_a_cancelled_waiter_costs_nothing() -> None:
    bulkhead = Bulkhead(1, max_queue=2)
    async with bulkhead:
        waiting = [asyncio.create_task(bulkhead.call(asyncio.sleep, 1, number)) for number in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert bulkhead.stats().waiting == 1
        third = asyncio.create_task(bulkhead.call(asyncio.sleep, 1, 2))
        await asyncio.sleep(0)
        assert bulkhead.stats().waiting == 2, "the place in line is free again"
    assert (await waiting[1], await third) == (1, 2)
    assert waiting[0].cancelled()
    assert bulkhead.idle


@pytest.mark.parametrize("form", ["call", "decorated", "block"])
def test_cancelled_at_any_await_no_slot_is_lost(form: str) -> None:
    for point in cancellation_points():

        async def main() -> None:
            bulkhead = Bulkhead(1, max_queue=5)
            done: list[str] = []

            async def work(name: str) -> None:
                await asyncio.sleep(1)
                done.append(name)

            async def block(name: str) -> None:
                async with bulkhead:
                    await work(name)

            def through(name: str) -> Coroutine[Any, Any, None]:
                if form == "call":
                    return bulkhead.call(work, name)
                return bulkhead(work)(name) if form == "decorated" else block(name)

            before = asyncio.create_task(through("before"))
            await asyncio.sleep(0)
            victim = asyncio.create_task(point.cancel(through("victim")))  # noqa: B023 - runs in this iteration
            await asyncio.sleep(0)
            after = asyncio.create_task(through("after"))
            cancelled = await victim
            await asyncio.gather(before, after)
            assert done == (["before", "after"] if cancelled else ["before", "victim", "after"])
            assert bulkhead.idle
            assert bulkhead.stats().waiting == 0

        run(main)


async def test_several_cancelled_in_the_moment_of_their_turn_pass_the_slot_on() -> None:
    bulkhead = Bulkhead(1, max_queue=10)
    async with bulkhead:
        tasks = [asyncio.create_task(bulkhead.call(asyncio.sleep, 1, number)) for number in range(5)]
        await asyncio.sleep(1)
    for task in tasks[:3]:  # the first has its slot by now and does not know it; the next two still wait
        task.cancel()
    assert [await task for task in tasks[3:]] == [3, 4]
    assert bulkhead.idle


async def test_waiters_cancelled_in_the_same_moment_as_a_slot_is_given_back_are_skipped() -> None:
    bulkhead = Bulkhead(1, max_queue=10)
    async with bulkhead:
        tasks = [asyncio.create_task(bulkhead.call(asyncio.sleep, 1, number)) for number in range(3)]
        await asyncio.sleep(1)
        tasks[0].cancel()
        tasks[1].cancel()  # their futures are cancelled, but they have not run since
    assert await tasks[2] == 2
    assert bulkhead.idle


async def test_an_enclosing_deadline_ends_the_wait() -> None:
    bulkhead = Bulkhead(1, max_queue=1)
    async with bulkhead:
        with pytest.raises(TimeoutError):
            with anyio.fail_after(2):
                await bulkhead.call(asyncio.sleep, 0)
        assert clock() == pytest.approx(2.0)
        assert bulkhead.stats().waiting == 0


class CountingLoop(VirtualTimeLoop):
    """Counts what the loop is asked to run: each start and each wake-up of a task is one."""

    asked = 0

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        self.asked += 1
        return super().call_soon(*args, **kwargs)


def test_ten_thousand_waiters_cost_ten_thousand_wake_ups_and_no_timer() -> None:
    async def main(bulkhead: Bulkhead | None) -> int:
        async def work() -> None:
            if bulkhead is None:
                await asyncio.sleep(0)
                return
            async with bulkhead:
                await asyncio.sleep(0)

        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        before = loop.asked
        tasks = [asyncio.create_task(work()) for _ in range(10_010)]
        await asyncio.sleep(0)
        assert bulkhead is None or bulkhead.stats().waiting == 10_000
        assert loop.live_timers() == []
        await asyncio.wait(tasks)
        return loop.asked - before

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        bulkhead = Bulkhead(10, max_queue=10_000)
        assert runner.run(main(bulkhead)) - runner.run(main(None)) == 10_000
    assert bulkhead.idle


def test_random_cancellation_of_thousands_of_calls_loses_no_slot() -> None:
    rng = random.Random(7)
    bulkhead = Bulkhead(4, max_queue=50)

    async def work(seconds: float) -> None:
        async with bulkhead:
            assert bulkhead.stats().running <= 4
            await asyncio.sleep(seconds)

    async def main() -> None:
        tasks = deque[asyncio.Task[None]]()
        for _ in range(3_000):
            tasks.append(asyncio.create_task(work(rng.random())))
            if rng.random() < 0.6:
                await asyncio.sleep(rng.random() / 5)
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
        await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks if not task.cancelled()]
        assert {type(error) for error in errors} == {type(None), BulkheadFull}

    run(main)
    assert bulkhead.idle
    assert bulkhead.stats().waiting == 0


# --- the path that does not wait, events, loops, settings --------------------------------------------------


def test_a_call_that_finds_a_slot_does_not_suspend_and_needs_no_loop() -> None:
    bulkhead = Bulkhead(1)

    async def work() -> str:
        return "done"

    async def block() -> str:
        async with bulkhead:
            return "done"

    for coroutine in (bulkhead.call(work), bulkhead(work)(), block()):
        with pytest.raises(StopIteration) as stopped:
            coroutine.send(None)
        assert stopped.value.value == "done"


async def test_waits_and_refusals_are_told() -> None:
    events: list[Event] = []
    bulkhead = Bulkhead(1, max_queue=1, name="db", observer=events.append)
    calls = [bulkhead.call(asyncio.sleep, 2) for _ in range(3)]
    await asyncio.gather(*calls, return_exceptions=True)
    assert events == [BulkheadRefused("db", 1, 1), BulkheadWaited("db", 2.0)]


async def test_an_observer_that_interrupts_loses_no_slot() -> None:
    def observe(_: Event) -> None:
        raise GeneratorExit

    bulkhead = Bulkhead(1, max_queue=1, observer=observe)

    async def waiting() -> None:
        with pytest.raises(GeneratorExit):
            await bulkhead.call(asyncio.sleep, 0)

    async with bulkhead:
        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
    await task
    assert bulkhead.idle


def test_it_is_made_without_a_loop_and_works_in_two_loops_one_after_the_other() -> None:
    bulkhead = Bulkhead(1, max_queue=1)

    async def main() -> None:
        await asyncio.gather(*(bulkhead.call(asyncio.sleep, 1) for _ in range(2)))

    run(main)
    run(main)
    assert bulkhead.idle


def test_who_waited_in_a_loop_that_is_gone_is_passed_over() -> None:
    bulkhead = Bulkhead(1, max_queue=2)
    holder = bulkhead.call(asyncio.sleep, 1)
    gone = asyncio.new_event_loop()
    held = gone.create_task(holder)
    waiting = gone.create_task(bulkhead.call(asyncio.sleep, 1))
    gone.run_until_complete(asyncio.sleep(0))
    gone.close()
    assert bulkhead.stats().waiting == 1
    holder.close()
    assert bulkhead.idle
    waiting.get_coro().close()
    for task in (held, waiting):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is thrown away on purpose
    assert bulkhead.stats().waiting == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent must be at least 1, not 0"),
        ({"max_concurrent": 1, "max_queue": -1}, "max_queue must be at least 0, not -1"),
    ],
)
def test_bad_limits_are_refused_by_name(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Bulkhead(**arguments)  # type: ignore[arg-type]


def test_limits_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^max_concurrent must be a whole number, not True$"):
        Bulkhead(True)


def test_who_waits_in_another_thread_than_those_who_run_is_told_and_does_not_hang() -> None:
    bulkhead = Bulkhead(1, max_queue=1, name="db")
    waits, errors = threading.Event(), list[BaseException]()

    async def wait() -> None:
        asyncio.get_running_loop().call_soon(waits.set)
        try:
            async with bulkhead:
                pass
        except RuntimeError as error:
            errors.append(error)

    with asyncio.Runner() as runner:
        runner.run(bulkhead.__aenter__())
        thread = threading.Thread(target=asyncio.run, args=(wait(),), daemon=True)
        thread.start()
        assert waits.wait(10)
        runner.run(bulkhead.__aexit__(None, None, None))
        thread.join(10)
    assert not thread.is_alive()
    assert [str(e) for e in errors] == ["db: used on two event loops at a time: each needs a bulkhead of its own"]
    assert (bulkhead.stats().running, bulkhead.stats().waiting) == (0, 0)
