import asyncio
import collections
import contextlib
import contextvars
import gc
import itertools
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio
import pytest
from hypothesis import example, given, strategies as st

from meshkit import _time
from meshkit._entropy import random_bytes
from meshkit.runtime import Identity
from meshkit.testing import Deadlock, Leak, Livelock, SimLoop, run, simulated
from meshkit.testing._sim_machine import current
from meshkit.testing._sim_order import stepped


async def in_order(sim: SimLoop) -> str:
    """Return the order in which three tasks run that are ready at the same moment."""
    order: list[str] = []

    async def append(name: str) -> None:
        await asyncio.sleep(1)
        order.append(name)

    async with anyio.create_task_group() as group:
        for name in "abc":
            group.start_soon(append, name)
    return "".join(order)


def test_an_hour_passes_at_once() -> None:
    async def main(sim: SimLoop) -> tuple[float, float]:
        assert asyncio.get_running_loop() is sim
        before = _time.wall()
        await asyncio.sleep(3600)
        return _time.now(), _time.wall() - before

    assert simulated(0, main) == (3600.0, 3600.0)


def test_what_is_ready_at_one_moment_runs_in_every_order_that_there_is() -> None:
    seen = collections.Counter(simulated(seed, in_order) for seed in range(60))
    assert sorted(seen) == sorted(map("".join, itertools.permutations("abc")))


def test_the_same_seed_gives_the_same_order_and_the_same_trace() -> None:
    async def main(sim: SimLoop) -> tuple[str, str]:
        return await in_order(sim), sim.trace

    runs = [simulated(seed, main) for seed in range(20)]
    assert [simulated(seed, main) for seed in range(20)] == runs
    assert len({trace for _, trace in runs}) == len(set(runs)) > 6


def test_callbacks_keep_their_order_and_run_before_between_or_after_the_steps_of_tasks() -> None:
    async def main(sim: SimLoop) -> str:
        order: list[str] = []

        async def step() -> None:
            order.append("step")

        sim.call_soon(order.append, "1")
        async with asyncio.TaskGroup() as group:
            group.create_task(step())
            sim.call_soon(order.append, "2")
            await asyncio.sleep(1)
        return " ".join(order)

    assert {simulated(seed, main) for seed in range(40)} == {"1 2 step", "1 step 2", "step 1 2"}


def test_callbacks_that_are_methods_of_a_task_keep_their_order_as_well() -> None:
    async def main(sim: SimLoop) -> list[int]:
        ended: list[int] = []
        task = sim.create_task(asyncio.sleep(60))
        await asyncio.sleep(1)
        for number in range(5):
            sim.call_soon(task.add_done_callback, lambda _, number=number: ended.append(number))
        sim.call_soon(task.cancel)
        await asyncio.wait([task])
        return ended

    for seed in range(5):
        assert simulated(seed, main) == [0, 1, 2, 3, 4]


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_set() -> None:
    async def main(sim: SimLoop) -> None:
        fired: list[int] = []
        timers = [sim.call_at(1.0 + number % 3, fired.append, number) for number in range(10_000)]
        for timer in timers[::7]:
            timer.cancel()
        await asyncio.sleep(5)
        left = [number for number in range(10_000) if number % 7]
        assert fired == sorted(left, key=lambda number: (number % 3, number))
        assert not sim._scheduled
        assert sim._timer_cancelled_count == 0

    simulated(0, main)


def test_timers_that_were_cancelled_do_not_pile_up() -> None:
    async def main(sim: SimLoop) -> None:
        for _ in range(1000):
            timers = [sim.call_later(60, print) for _ in range(10)]
            for timer in timers:
                timer.cancel()
            await asyncio.sleep(0)
            assert len(sim._scheduled) < 300
        assert not sim.live_timers()

    simulated(0, main)


def test_a_timer_fires_at_its_exact_time_and_never_before() -> None:
    async def main(sim: SimLoop) -> None:
        times = [1.0, math.nextafter(1.0, 2), 1.0 + 1e-12, 1e9, math.nextafter(1e9, 2e9)]
        fired: list[float] = []
        for time in reversed(times):
            sim.call_at(time, lambda: fired.append(sim.time()))
        await asyncio.sleep(2e9)
        assert fired == times

    simulated(0, main)


@pytest.mark.parametrize(
    ("when", "error"),
    [(math.nan, "when must be a time, not NaN"), (None, "must be real number, not NoneType"), ("1", "not str")],
)
def test_a_time_that_is_none_is_refused(when: Any, error: str) -> None:
    async def main(sim: SimLoop) -> None:
        with pytest.raises((TypeError, ValueError), match=error):
            sim.call_at(when, print)
        fired: list[int] = []
        sim.call_at(-math.inf, fired.append, 1)
        sim.call_later(-5, fired.append, 2)
        await asyncio.sleep(1)
        assert fired == [1, 2]

    simulated(0, main)


def test_a_callback_that_was_cancelled_by_one_before_it_does_not_run() -> None:
    async def main(sim: SimLoop) -> None:
        second: asyncio.Handle | None = None
        sim.call_soon(lambda: second.cancel() if second else None)
        second = sim.call_soon(pytest.fail, "it ran")
        await asyncio.sleep(1)

    for seed in range(5):
        simulated(seed, main)


def test_a_deadlock_shows_the_whole_stack_of_every_task() -> None:
    async def inner() -> None:
        await asyncio.Event().wait()

    async def outer() -> None:
        await inner()

    async def main(sim: SimLoop) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(outer(), name="the stuck one")

    with pytest.raises(Deadlock) as caught:
        simulated(0, main)
    stuck = str(caught.value).partition("the stuck one\n")[2].splitlines()
    assert [line.rpartition(".")[2] for line in stuck[:3]] == ["outer", "inner", "wait"]
    assert f"{__file__}:" in stuck[0]


def test_a_sleep_forever_that_nothing_can_end_is_a_deadlock() -> None:
    with pytest.raises(Deadlock, match="nothing is ready"):
        simulated(0, lambda _: anyio.sleep_forever())


@pytest.mark.parametrize("tasks", [1, 30])
def test_tasks_that_run_forever_at_one_moment_are_a_livelock(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    monkeypatch.setattr(SimLoop, "MAX_STEPS", 1000)
    passes = 0

    async def spin() -> None:
        nonlocal passes
        while True:
            passes += 1
            await asyncio.sleep(0)

    async def main(sim: SimLoop) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(spin(), name="spins")

    with pytest.raises(Livelock, match=r"1000 steps at one moment(.|\n)*spins"):
        simulated(0, main)
    assert passes <= 1000


def test_many_steps_are_no_livelock_where_the_clock_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimLoop, "MAX_STEPS", 100)

    async def main(sim: SimLoop) -> None:
        for _ in range(20):
            for _ in range(50):
                await asyncio.sleep(0)
            await asyncio.sleep(1e-6)

    simulated(0, main)


def test_what_is_left_behind_is_a_leak() -> None:
    async def main(sim: SimLoop) -> None:
        sim.create_task(asyncio.sleep(1), name="forgotten")
        await asyncio.sleep(0)

    with pytest.raises(Leak, match="forgotten"):
        simulated(0, main)


REFUSED: list[Callable[[Any], Any]] = [
    lambda _: asyncio.to_thread(print),
    lambda _: asyncio.open_connection("127.0.0.1", 1),
    lambda _: asyncio.create_subprocess_exec("true"),
    lambda sim: sim.getaddrinfo("localhost", 1),
    lambda sim: sim.add_signal_handler(2, print),
]


@pytest.mark.parametrize("attempt", REFUSED)
def test_what_takes_real_time_is_refused_with_the_reason(attempt: Callable[[Any], Any]) -> None:
    async def main(sim: SimLoop) -> None:
        await attempt(sim)

    with pytest.raises(RuntimeError, match="takes real time, which virtual time cannot wait for"):
        simulated(0, main)


@pytest.mark.parametrize("seed", ["1", 1.0, None, True])
def test_a_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(TypeError, match=f"seed must be an int, not {seed!r}"):
        SimLoop(seed)


def test_settle_returns_when_nothing_is_left_to_be_done_now() -> None:
    async def main(sim: SimLoop) -> None:
        done: list[float] = []

        async def work() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            done.append(sim.time())
            await asyncio.sleep(1)
            done.append(sim.time())

        task = sim.create_task(work())
        await sim.settle()
        assert done == [0.0]
        await task

    simulated(0, main)


def test_what_stops_programs_passes_through_and_the_rest_is_cleaned_up() -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0)
            cleaned.append("up")

    async def main(sim: SimLoop) -> None:
        tasks = [sim.create_task(work()) for _ in range(5)]
        await asyncio.sleep(1)

        def stop() -> None:
            raise SystemExit(3)

        sim.call_soon(stop)
        await asyncio.gather(*tasks)

    for seed in range(5):
        cleaned.clear()
        with pytest.raises(SystemExit):
            simulated(seed, main)
        assert cleaned == ["up"] * 5


# --- tasks


def test_default_names_of_tasks_are_the_same_in_each_run() -> None:
    async def main(sim: SimLoop) -> list[str]:
        tasks = [sim.create_task(asyncio.sleep(1)) for _ in range(3)]
        assert sim.tasks[1:] == tasks
        await asyncio.gather(*tasks)
        return [task.get_name() for task in tasks]

    assert simulated(0, main) == simulated(1, main) == ["Task-2", "Task-3", "Task-4"]


def test_a_task_that_was_made_without_the_loop_takes_part() -> None:
    async def main(sim: SimLoop) -> str:
        order: list[str] = []

        async def append(name: str) -> None:
            await asyncio.sleep(0)
            order.append(name)

        await asyncio.gather(*(asyncio.Task(append(name), loop=sim) for name in "abc"))
        return "".join(order)

    orders = [simulated(seed, main) for seed in range(40)]
    assert len(set(orders)) == 6
    assert [simulated(seed, main) for seed in range(40)] == orders


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
def test_eager_tasks_run_at_once_and_take_part_from_then_on() -> None:
    async def main(sim: SimLoop) -> tuple[str, str]:
        sim.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - unknown on Python 3.11
        order: list[str] = []

        async def append(name: str) -> None:
            order.append(name.upper())
            await asyncio.sleep(0)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(append(name))
            assert order == ["A", "B", "C"]
        return "".join(order), sim.trace

    runs = [simulated(seed, main) for seed in range(40)]
    assert len({order for order, _ in runs}) == 6
    assert [simulated(seed, main) for seed in range(40)] == runs


def test_a_set_of_tasks_that_is_cancelled_ends_in_an_order_that_does_not_depend_on_the_memory() -> None:
    async def main(sim: SimLoop, names: list[int]) -> list[int]:
        ended: list[int] = []

        async def wait(name: int) -> None:
            try:
                await asyncio.sleep(10)
            finally:
                ended.append(name)

        tasks = {sim.create_task(wait(name)): name for name in range(30)}
        await asyncio.sleep(1)
        for task in sorted(tasks, key=lambda task: names[tasks[task]]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return ended

    one = simulated(7, lambda sim: main(sim, list(range(30))))
    other = simulated(7, lambda sim: main(sim, list(reversed(range(30)))))
    assert one == other != sorted(one)


def with_other_memory(play: Callable[[], Any]) -> set[Any]:
    """Return what `play` returns when memory has other holes each time."""
    results = set()
    for size in range(8):
        others = [[[None] * (number % 50) for number in range(each % 7 * size)] for each in range(500)]
        del others[::2]
        results.add(play())
        del others
    return results


def test_the_order_of_a_set_of_tasks_is_that_of_the_seed_and_not_of_the_memory() -> None:
    async def main(sim: SimLoop) -> tuple[int, ...]:
        tasks = [sim.create_task(asyncio.sleep(1, number)) for number in range(10)]
        done, _ = await asyncio.wait(tasks)
        return tuple(task.result() for task in done)

    as_it_was_when_this_was_written = (1, 4, 7, 6, 3, 9, 0, 2, 5, 8)
    assert with_other_memory(lambda: simulated(1, main)) == {as_it_was_when_this_was_written}
    assert len({simulated(seed, main) for seed in range(5)}) == 5


def test_callbacks_that_a_group_of_tasks_sets_off_when_it_is_cancelled_come_in_the_order_of_the_seed() -> None:
    async def main(sim: SimLoop) -> tuple[int, ...]:
        ended: list[int] = []

        async def wait(number: int) -> None:
            future = sim.create_future()
            future.add_done_callback(lambda _: ended.append(number))
            await future

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1), asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(wait(number))
        return tuple(ended)

    assert len(with_other_memory(lambda: simulated(1, main))) == 1


def test_generators_that_are_left_are_closed_in_the_order_of_the_seed() -> None:
    closed: list[int] = []
    left: list[AsyncGenerator[int]] = []

    async def numbers(number: int) -> AsyncGenerator[int]:
        try:
            yield number
        finally:
            await asyncio.sleep(0)
            closed.append(number)

    async def main(sim: SimLoop) -> None:
        left[:] = [numbers(number) for number in range(20)]
        for generator in left:
            await anext(generator)

    def play() -> tuple[int, ...]:
        closed.clear()
        simulated(1, main)
        return tuple(closed)

    assert len(with_other_memory(play)) == 1
    assert sorted(closed) == list(range(20))


def test_machines_that_are_still_paused_at_the_end_go_on_in_the_order_in_which_they_were_paused() -> None:
    async def main(sim: SimLoop) -> None:
        machines = [sim.machine("same") for _ in range(20)]
        for number, machine in enumerate(machines):
            context = contextvars.copy_context()
            context.run(current.set, machine)
            machine.pause()
            sim.call_soon(late.append, number, context=context)
        await asyncio.sleep(1)
        assert not late
        sim.call_soon(sim.stop)
        await asyncio.sleep(1)

    late: list[int] = []
    with pytest.raises(RuntimeError, match="stopped before"):
        simulated(0, main)
    assert late == list(range(20))


# --- the trace


async def busy(sim: SimLoop) -> str:
    """Use what asyncio offers (but `Condition`, which wakes more tasks since 3.13), and return the trace."""
    queue: asyncio.Queue[int] = asyncio.Queue(3)
    lock, free, event = asyncio.Lock(), asyncio.Semaphore(2), asyncio.Event()

    async def produce() -> None:
        for number in range(20):
            await queue.put(number)
            await asyncio.sleep(random.random())
        event.set()

    async def consume() -> None:
        for _ in range(10):
            async with lock:
                sim.note(str(await queue.get()))
            async with free:
                await asyncio.sleep(random.random())

    async def watch() -> None:
        try:
            async with asyncio.timeout(random.uniform(1, 20)):
                await event.wait()
        except TimeoutError:
            sim.note("late")

    async with asyncio.TaskGroup() as group:
        for work in (produce, consume, consume, *[watch] * 10):
            group.create_task(work())
        left = [group.create_task(asyncio.sleep(math.inf)) for _ in range(10)]
        await asyncio.sleep(5)
        for task in set(left):
            task.cancel()
    return sim.trace


def test_the_trace_is_the_same_on_every_python_and_as_it_was_when_this_was_written() -> None:
    assert simulated(1, busy) == "b25de81cfed594dd6bdc5232c0ce0712"


def test_each_seed_has_another_trace() -> None:
    assert len({simulated(seed, busy) for seed in range(20)}) == 20


MESH = """
import anyio, asyncio, random, sys
from meshkit import *
from meshkit.testing import simulated
from meshkit.transports import MemoryHub, MemoryTransport

ASK = request("test:ask", str, reply=str)
NEWS = broadcast("test:news", str)

class Answers(Service):
    name = "answers"

    @handles(ASK)
    async def ask(self, msg: Message[str]) -> str:
        await asyncio.sleep(random.random())
        if random.random() < 0.1:
            raise Reject("busy", retryable=True)
        return msg.payload + msg.sender

    @handles(NEWS)
    async def news(self, msg: Message[str]) -> None:
        await asyncio.sleep(0)

async def main(sim):
    hub, names = MemoryHub(), ["alice", "bob", "carol"]
    alice, bob, carol = nodes = [Runtime(name, services=[Answers()], transport=MemoryTransport(hub)) for name in names]
    policy = RetryPolicy(max_retries=3, base_delay=0.1)
    retrier = Retrier(policy, on=(RemoteError, OutcomeUnknown), idempotent=True)
    limiter = RateLimiter(max_count=9, window=1.0)

    async def call(number):
        node = nodes[number % 3]
        try:
            await limiter.acquire()
            answer = await retrier.call(node.call, ASK, str(number), to=names[(number + 1) % 3], timeout=0.7)
            await node.emit(NEWS, answer)
            sim.note(answer)
        except MeshkitError as error:
            sim.note(type(error).__name__)

    async with alice, bob, carol:
        with anyio.move_on_after(4):
            async with anyio.create_task_group() as group:
                for number in range(40):
                    group.start_soon(call, number)
        await asyncio.sleep(2)
    sim.note(Identity.generate().node_id)
    return sim.trace

others = [bytearray(size) for size in range(int(sys.argv[1]))]  # so that memory is laid out differently
print(*(simulated(seed, main) for seed in range(3)))
"""


def test_a_mesh_has_the_same_trace_in_a_process_with_another_hash_seed_and_another_heap() -> None:
    traces: list[str] = []
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", MESH, hash_seed]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        traces.append(done.stdout)
    assert traces[0] == traces[1]
    assert len(set(traces[0].split())) == 3


def test_garbage_is_collected_when_the_seed_says_so_and_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimLoop, "STEPS_PER_COLLECTION", 500)
    enabled = gc.isenabled()

    async def main(sim: SimLoop) -> tuple[float, str]:
        closed: list[float] = []

        async def numbers() -> AsyncGenerator[int]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0)
                closed.append(sim.now)

        async def leave_one_behind() -> None:
            iterator = numbers()
            cycle: list[object] = [iterator]
            cycle.append(cycle)
            assert await anext(iterator) == 1

        await leave_one_behind()
        for _ in range(1000):
            garbage: list[object] = [[], [], []]
            garbage.append(garbage)
            await asyncio.sleep(0.001)
        return closed[0], sim.trace

    runs = set()
    for number in (0, 150, 300, 450, 600):
        others = [list[int]() for _ in range(number)]
        runs.add(simulated(1, main))
        del others
    assert len(runs) == 1
    assert gc.isenabled() == enabled


def test_a_note_counts_in_the_trace_and_the_log_shows_what_runs_when() -> None:
    async def main(sim: SimLoop, text: str) -> tuple[str, list[str]]:
        log: list[str] = []
        sim.log = log.append
        sim.note(text)
        await asyncio.sleep(2.5)
        await sim.machine("alice").create_task(asyncio.sleep(0), name="naps")
        return sim.trace, log.copy()

    trace, log = simulated(1, lambda sim: main(sim, "a"))
    other, _ = simulated(1, lambda sim: main(sim, "b"))
    assert trace != other
    assert log == [
        "0.000000 a",
        "2.500000 #1 Task-1",
        *["2.500000 #2 naps on alice"] * 2,
        "2.500000 #1 Task-1",
    ]


# --- what is random


def test_what_is_random_obeys_the_seed() -> None:
    async def main(sim: SimLoop) -> tuple[object, ...]:
        await asyncio.sleep(1)
        return random.random(), random_bytes(16), Identity.generate().node_id, sim.rng.random()

    assert simulated(1, main) == simulated(1, main)
    assert not set(simulated(1, main)) & set(simulated(2, main))


def test_outside_of_the_simulation_chance_is_what_it_was() -> None:
    async def main(sim: SimLoop) -> bytes:
        random.random()
        return random_bytes(16)

    before = random.getstate()
    assert simulated(1, main) == simulated(1, main) != random_bytes(16)
    assert random.getstate() == before


def test_another_thread_and_its_loop_draw_from_the_operating_system_meanwhile() -> None:
    async def draw() -> bytes:
        return random_bytes(16)

    async def main(sim: SimLoop) -> list[bytes]:
        drawn: list[bytes] = []
        thread = threading.Thread(target=lambda: drawn.extend((random_bytes(16), asyncio.run(draw()))))
        thread.start()
        thread.join()
        return drawn

    assert not set(simulated(1, main)) & set(simulated(1, main))


def test_what_the_test_draws_disturbs_nobody_else() -> None:
    async def main(sim: SimLoop, draws: int) -> tuple[object, ...]:
        for _ in range(draws):
            sim.rng.random()
            sim.stream("mine").random()
        return await in_order(sim), random.random(), random_bytes(4), sim.stream("other").random()

    assert simulated(3, lambda sim: main(sim, 0)) == simulated(3, lambda sim: main(sim, 5))


# --- machines


def test_a_machine_sees_its_own_clocks_and_the_others_see_theirs() -> None:
    async def main(sim: SimLoop) -> None:
        fast = sim.machine("fast", rate=1.25, wall_offset=-10.0)

        async def look() -> tuple[float, float]:
            await asyncio.sleep(0)
            return _time.now(), _time.wall()

        wall = _time.wall()
        now, _ = await fast.create_task(look())
        await asyncio.sleep(8)
        later, its_wall = await fast.create_task(look())
        assert later - now == 10.0
        assert its_wall - wall == 0.0
        assert (_time.now(), _time.wall() - wall) == (8.0, 8.0)
        fast.wall_offset = 3.0
        assert (await fast.create_task(look()))[1] - wall == 13.0

    simulated(0, main)


def test_what_waits_on_a_machine_waits_by_its_clock_wherever_it_was_started_from() -> None:
    async def main(sim: SimLoop) -> None:
        slow = sim.machine("slow", rate=0.5)

        async def work() -> float:
            with anyio.move_on_after(10):
                async with anyio.create_task_group() as group:
                    group.start_soon(anyio.sleep_forever)
            async with asyncio.timeout(60), asyncio.TaskGroup() as inner:
                inner.create_task(asyncio.sleep(5))
            fired = sim.create_future()
            sim.call_later(1, sim.call_soon, fired.set_result, None)
            await fired
            return _time.now()

        before = sim.time()
        await slow.create_task(work())
        assert sim.time() - before == 32.0

    simulated(0, main)


@given(rate=st.floats(0.1, 10), booted=st.integers(0, 1000), elapsed=st.floats(0, 1e9))
@example(rate=1.1, booted=0, elapsed=1.3)  # (1.3 / 1.1) * 1.1 < 1.3
def test_a_moment_is_the_first_at_which_the_clock_says_so(rate: float, booted: int, elapsed: float) -> None:
    loop = SimLoop(0)
    machine = loop.machine("m", rate=rate)
    machine._booted = booted
    local = booted + elapsed
    moment = machine.moment(local)
    assert machine.local(moment) >= local
    assert machine.local(moment) - local <= 4 * math.ulp(local)
    assert machine.moment(math.inf) == math.inf
    loop.close()


def test_a_paused_machine_does_nothing_and_does_it_all_late_when_it_is_resumed() -> None:
    async def main(sim: SimLoop) -> None:
        machine = sim.machine("alice")
        ticks: list[float] = []

        async def tick() -> None:
            for _ in range(4):
                await asyncio.sleep(1)
                ticks.append(sim.now)

        task = machine.create_task(tick())
        await asyncio.sleep(1.5)
        machine.pause()
        machine.pause()
        assert "paused" in repr(machine)
        await asyncio.sleep(10)
        assert ticks == [1.0]
        machine.resume()
        assert "running" in repr(machine)
        machine.resume()
        await task
        assert ticks == [1.0, 11.5, 12.5, 13.5]

    for seed in range(5):
        simulated(seed, main)


def test_a_deadlock_says_which_machines_are_paused() -> None:
    async def main(sim: SimLoop) -> None:
        machine = sim.machine("alice")
        machine.pause()
        await machine.create_task(asyncio.sleep(1))

    with pytest.raises(Deadlock, match="paused: alice"):
        simulated(0, main)


def test_the_tasks_of_a_machine_are_those_that_were_started_on_it_and_by_those() -> None:
    async def main(sim: SimLoop) -> None:
        machine = sim.machine("alice")

        async def parent() -> None:
            async with asyncio.TaskGroup() as group:
                for name in "bc":
                    group.create_task(asyncio.sleep(1), name=name)

        task = machine.create_task(parent(), name="a")
        other = sim.machine("bob").create_task(asyncio.sleep(1), name="other")
        await asyncio.sleep(0.5)
        assert [each.get_name() for each in machine.tasks] == ["a", "b", "c"]
        await asyncio.gather(task, other)
        assert machine.tasks == []

    simulated(0, main)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_is_finite_and_more_than_zero(rate: float) -> None:
    loop = SimLoop(0)
    with pytest.raises(ValueError, match="rate must be finite and more than zero"):
        loop.machine("alice", rate=rate)
    loop.close()


# --- what it relies on


def test_this_python_keeps_what_the_loop_relies_on_where_it_looks() -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        timer = loop.call_later(60, print)
        assert list(loop._scheduled) == [timer]
        assert timer._scheduled
        before = loop._timer_cancelled_count
        timer.cancel()
        assert loop._timer_cancelled_count == before + 1
        context = contextvars.copy_context()
        handle = loop.call_soon(print, "x", context=context)
        assert loop._ready[-1] is handle
        assert isinstance(loop._ready, collections.deque)
        assert handle._callback is print
        assert handle._context is context
        handle.cancel()
        assert handle._cancelled
        assert stepped(handle) is None
        started = loop.create_task(asyncio.sleep(1))
        assert stepped(loop._ready[-1]) is started
        await asyncio.sleep(0)
        woken = loop.create_future()

        async def wait() -> None:
            await woken

        task = loop.create_task(wait())
        await asyncio.sleep(0)
        woken.set_result(None)
        assert stepped(loop._ready[-1]) is task
        loop.call_soon(task.cancelled)
        assert stepped(loop._ready[-1]) is None
        started.cancel()
        await asyncio.wait([started, task])

    run(main)
