"""CircuitBreaker with `async with` and by hand; its events, when it is idle, its settings."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, strategies as st

from meshkit.circuit_breaker import CircuitBreaker, CircuitChanged, CircuitRefused, FailureRate, State
from meshkit.errors import CircuitOpen, Refused
from meshkit.events import Event
from meshkit.testing import run
from tests.test_circuit_breaker import boom, fail, ok, seen, tripped

# --- `async with` ------------------------------------------------------------------------------------------


def nothing_open(breaker: CircuitBreaker) -> bool:
    """Return whether it knows of no block that is still open, and no call that is waited for."""
    return not breaker._open and not breaker._apart and not breaker._circuit.generation.watched


async def test_blocks_of_many_tasks_count_as_calls() -> None:
    breaker = CircuitBreaker(failure_threshold=2)

    async def block(seconds: float, error: Exception | None = None) -> None:
        async with breaker:
            await asyncio.sleep(seconds)
            if error:
                raise error

    await asyncio.gather(block(1, KeyError()), block(2, ValueError()), block(3), return_exceptions=True)
    assert seen(breaker) is State.OPEN
    with pytest.raises(CircuitOpen):
        await block(1)


async def test_blocks_after_a_change_of_state_are_told_from_those_before_it() -> None:
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=10.0)

    async def block(seconds: float, error: Exception | None = None) -> str:
        async with breaker:
            await asyncio.sleep(seconds)
            if error:
                raise error
        return "done"

    old = [asyncio.create_task(block(100 + n, ConnectionError())) for n in range(3)]  # still open far later
    await asyncio.sleep(0)
    await fail(breaker)
    await asyncio.sleep(10)
    probe = asyncio.create_task(block(5))
    await asyncio.sleep(1)
    with pytest.raises(CircuitOpen):
        await block(1)
    assert await probe == "done"
    assert seen(breaker) is State.CLOSED
    new = [asyncio.create_task(block(100)) for _ in range(3)]
    await asyncio.gather(*old, return_exceptions=True)
    assert seen(breaker) is State.CLOSED, "the failures were of blocks from before the break"
    assert await asyncio.gather(*new) == ["done"] * 3
    assert nothing_open(breaker)
    with pytest.raises(ConnectionError):
        await block(0, ConnectionError())
    assert seen(breaker) is State.OPEN


async def test_a_probe_that_is_left_over_when_the_circuit_closes_is_told_from_new_blocks() -> None:
    breaker = tripped(reset_timeout=10.0, half_open_max=2)
    await asyncio.sleep(10)

    async def block(seconds: float, error: Exception | None = None) -> None:
        async with breaker:
            await asyncio.sleep(seconds)
            if error:
                raise error

    left_over = asyncio.create_task(block(15, ConnectionError()))
    await asyncio.sleep(10)  # its place is taken by now
    await block(0)
    await block(0)
    assert seen(breaker) is State.CLOSED
    new = [asyncio.create_task(block(seconds)) for seconds in (1, 10)]
    await asyncio.sleep(0)
    await asyncio.gather(left_over, *new, return_exceptions=True)
    assert seen(breaker) is State.CLOSED
    assert breaker.stats().failures == 0
    assert nothing_open(breaker)


async def test_blocks_nest_in_one_task() -> None:
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=10.0)
    async with breaker:
        await fail(breaker)
        await asyncio.sleep(10)
        async with breaker:  # the probe
            pass
        assert seen(breaker) is State.CLOSED
        with pytest.raises(ConnectionError):
            async with breaker:
                async with breaker:
                    await ok()
                await boom()
        assert seen(breaker) is State.OPEN, "the failure was of the block inside"
        breaker.reset()
        with pytest.raises(ConnectionError):
            async with breaker, breaker:
                await boom()
        breaker.reset()
        with contextlib.suppress(ConnectionError):  # in the outermost one
            await boom()
    assert seen(breaker) is State.CLOSED
    assert nothing_open(breaker)


async def test_the_outermost_of_nested_blocks_is_a_straggler_and_its_failure_changes_nothing() -> None:
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=10.0)
    with pytest.raises(ConnectionError):
        async with breaker:
            await fail(breaker)
            breaker.reset()
            async with breaker:
                pass
            await boom()
    assert seen(breaker) is State.CLOSED
    assert nothing_open(breaker)


async def test_a_block_may_be_left_by_another_task_as_an_async_generator_is() -> None:
    breaker = CircuitBreaker(FailureRate(slow_call=60.0))  # its blocks are told apart by their tasks

    async def generate() -> AsyncIterator[int]:
        async with breaker:
            yield 1

    generator = generate()
    assert await anext(generator) == 1
    assert not nothing_open(breaker)
    await asyncio.create_task(generator.aclose())  # type: ignore[attr-defined]
    assert nothing_open(breaker)


def test_blocks_need_no_loop() -> None:
    breaker = CircuitBreaker(FailureRate(slow_call=60.0))  # its blocks are told apart by their tasks

    async def block() -> str:
        async with breaker:
            return "done"

    with pytest.raises(StopIteration) as stopped:
        block().send(None)
    assert stopped.value.value == "done"
    assert breaker.stats().calls == 1
    assert nothing_open(breaker)


Step = Literal["enter", "leave", "fail", "reset", "isolate"]


@pytest.mark.parametrize("slow_call", [None, 1e6])
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(get_args(Step))), max_size=40))
def test_every_block_is_left_with_the_lease_it_was_entered_with(
    slow_call: float | None, steps: list[tuple[int, Step]]
) -> None:
    """Blocks of one task nest, so each task has a stack of them; the model keeps these stacks."""
    breaker = CircuitBreaker(FailureRate(calls=100, minimum_calls=100, slow_call=slow_call))
    queues: list[asyncio.Queue[Step]] = [asyncio.Queue() for _ in range(4)]

    async def blocks(queue: asyncio.Queue[Step]) -> None:
        while (step := await queue.get()) == "enter":
            with contextlib.suppress(OSError, CircuitOpen):
                async with breaker:
                    await blocks(queue)
        if step == "fail":
            raise OSError

    async def main() -> None:
        open_in: list[list[int]] = [[] for _ in queues]  # the generations that the blocks of each task belong to
        tasks = [asyncio.create_task(blocks(queue)) for queue in queues]
        generation = calls = failures = 0
        isolated = False
        for task, step in steps:
            if step in ("reset", "isolate"):
                isolated = step == "isolate"
                breaker.isolate() if isolated else breaker.reset()
                generation, calls, failures = generation + 1, 0, 0
            elif step == "enter":
                queues[task].put_nowait(step)
                if not isolated:
                    open_in[task].append(generation)
            elif open_in[task]:
                queues[task].put_nowait(step)
                counts = open_in[task].pop() == generation
                calls += counts
                failures += counts and step == "fail"
            for _ in range(3):
                await asyncio.sleep(0)
            assert (breaker.stats().calls, breaker.stats().failures) == (calls, failures)
        for queue, generations in zip(queues, open_in, strict=True):
            for _ in range(len(generations) + 1):
                queue.put_nowait("leave")
        await asyncio.gather(*tasks)

    run(main)
    assert nothing_open(breaker)


@pytest.mark.parametrize(
    "threshold", [3, FailureRate(calls=10, minimum_calls=5), FailureRate(0.2, minimum_calls=5, slow_call=1.5)]
)
@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_calls_in_all_forms_and_random_cancellation_lose_no_lease(
    threshold: int | FailureRate, seed: int
) -> None:
    rng = random.Random(seed)
    breaker = CircuitBreaker(threshold, reset_timeout=2.0, half_open_max=2)
    probes: Counter[int] = Counter()  # under way, per break
    outcomes: Counter[str] = Counter()

    async def work() -> None:
        number, probe = breaker.stats().opened, seen(breaker) is State.HALF_OPEN
        probes[number] += probe
        assert probes[number] <= 2
        try:
            await asyncio.sleep(rng.random() * 1.9)
            if rng.random() < 0.4:
                raise rng.choice([ConnectionError, asyncio.CancelledError])
        finally:
            probes[number] -= probe

    decorated = breaker(work)

    async def block() -> None:
        async with breaker:
            await work()

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(1_500):
            tasks.append(asyncio.create_task(rng.choice([lambda: breaker.call(work), decorated, block])()))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() / 5)
            if rng.random() < 0.1:
                rng.choice(tasks).cancel()
        await asyncio.wait(tasks)
        outcomes.update("cancelled" if task.cancelled() else type(task.exception()).__name__ for task in tasks)

    run(main)
    assert set(outcomes) == {"cancelled", "ConnectionError", "CircuitOpen", "NoneType"}
    assert breaker.stats().probes == 0
    assert nothing_open(breaker)
    assert breaker.stats().opened > 5, "it was not much of a test"


# --- by hand -----------------------------------------------------------------------------------------------


async def test_by_hand_it_goes_through_all_states() -> None:
    breaker = CircuitBreaker(failure_threshold=2, reset_timeout=10.0)
    for _ in range(2):
        assert breaker.allow_request()
        breaker.record_failure()
    assert seen(breaker) is State.OPEN
    assert not breaker.allow_request()
    await asyncio.sleep(10)
    assert breaker.allow_request()
    assert not breaker.allow_request(), "the one place is taken"
    breaker.record_ignored()
    assert breaker.allow_request(), "and given back"
    breaker.record_success()
    assert seen(breaker) is State.CLOSED
    assert breaker.stats().refused == 2


async def test_a_report_ends_the_oldest_call_by_hand() -> None:
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=10.0)
    assert breaker.allow_request()
    assert breaker.allow_request()
    breaker.record_failure()
    await asyncio.sleep(10)
    assert breaker.allow_request()
    breaker.record_success()  # of the second call, which is a straggler
    assert seen(breaker) is State.HALF_OPEN
    breaker.record_success()
    assert seen(breaker) is State.CLOSED


async def test_a_report_without_a_call_counts_only_while_closed() -> None:
    breaker = CircuitBreaker(failure_threshold=2, reset_timeout=10.0)
    breaker.record_failure()
    breaker.record_success()
    breaker.record_failure()
    breaker.record_ignored()
    assert breaker.stats().failures == 1
    breaker.record_failure()
    assert seen(breaker) is State.OPEN
    breaker.record_success()
    assert seen(breaker) is State.OPEN
    await asyncio.sleep(10)
    probe = asyncio.create_task(breaker.call(asyncio.sleep, 1))
    await asyncio.sleep(0.5)
    breaker.record_failure()
    breaker.record_success()
    assert seen(breaker) is State.HALF_OPEN
    await probe


async def test_calls_by_hand_that_are_never_reported_are_bounded() -> None:
    breaker = CircuitBreaker()
    for _ in range(10_050):
        assert breaker.allow_request()
    assert len(breaker._manual) == 10_000


async def test_isolate_refuses_everything_until_reset() -> None:
    events: list[Event] = []
    breaker = CircuitBreaker(name="bob", observer=events.append)
    under_way = asyncio.create_task(breaker.call(asyncio.sleep, 5, "done"))
    await asyncio.sleep(0)
    breaker.isolate()
    breaker.isolate()
    await asyncio.sleep(1_000)
    assert await under_way == "done"
    with pytest.raises(CircuitOpen, match=r"^bob: the circuit is isolated, the call was not made$") as caught:
        await breaker.call(ok)
    assert caught.value.retry_after is None
    assert not breaker.allow_request()
    assert (seen(breaker), breaker.idle, breaker.stats().retry_after) == (State.OPEN, False, None)
    breaker.reset()
    assert await breaker.call(ok) == 1
    assert breaker.idle
    assert events == [
        CircuitChanged("bob", State.CLOSED, State.OPEN, None),
        CircuitRefused("bob", None),  # by `call`
        CircuitRefused("bob", None),  # by `allow_request`
        CircuitChanged("bob", State.OPEN, State.CLOSED, 0.0),
    ]


# --- events, idleness, two loops ---------------------------------------------------------------------------


async def test_every_transition_is_told_once_and_after_it_happened() -> None:
    told: list[tuple[CircuitChanged, State]] = []

    def observe(event: Event) -> None:
        assert isinstance(event, CircuitChanged)
        told.append((event, seen(breaker)))
        assert breaker.stats().probes == (1 if event.after is State.HALF_OPEN else 0)

    breaker = CircuitBreaker(failure_threshold=2, reset_timeout=10.0, name="bob", observer=observe)
    await fail(breaker, 2)
    await asyncio.sleep(10)
    await fail(breaker)
    await asyncio.sleep(10)
    await breaker.call(ok)
    closed, opened, half_open = State.CLOSED, State.OPEN, State.HALF_OPEN
    assert [(event.before, event.after, event.retry_after) for event, _ in told] == [
        (closed, opened, 10.0),
        (opened, half_open, 10.0),
        (half_open, opened, 10.0),
        (opened, half_open, 10.0),
        (half_open, closed, 0.0),
    ]
    assert all(event.after is state for event, state in told)
    assert breaker.stats().opened == 2


async def test_each_refusal_is_told_with_when_to_come_again() -> None:
    events: list[Event] = []
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=10.0, name="bob", observer=events.append)
    await fail(breaker)
    await asyncio.sleep(4)
    with pytest.raises(CircuitOpen):
        async with breaker:
            pass
    assert not breaker.allow_request()
    await asyncio.sleep(6)
    assert breaker.allow_request()
    refused = [event for event in events if isinstance(event, CircuitRefused)]
    assert refused == [CircuitRefused("bob", 6.0)] * 2
    assert breaker.stats().refused == 2


async def test_an_observer_that_raises_disturbs_nothing_and_is_reported() -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def observe(_: Event) -> None:
        raise RuntimeError("observer")

    breaker = CircuitBreaker(failure_threshold=1, observer=observe)
    await fail(breaker)
    assert seen(breaker) is State.OPEN
    assert [str(context["exception"]) for context in reported] == ["observer"]


async def test_an_observer_may_reset_the_breaker() -> None:
    breaker = CircuitBreaker(failure_threshold=1, observer=lambda _: breaker.reset())
    await fail(breaker, 3)
    assert seen(breaker) is State.CLOSED
    async with breaker:
        await fail(breaker)
    assert breaker.idle


def idle(breaker: CircuitBreaker) -> bool:
    return breaker.idle


async def test_idle_means_closed_and_no_failure_remembered() -> None:
    breaker = CircuitBreaker(failure_threshold=2, reset_timeout=10.0, max_reset_timeout=20.0)
    assert idle(breaker)
    await breaker.call(ok)
    assert idle(breaker)
    await fail(breaker)
    assert not idle(breaker)
    await breaker.call(ok)
    assert idle(breaker)
    await fail(breaker, 2)
    assert not idle(breaker)
    await asyncio.sleep(10)
    assert not idle(breaker), "what comes next is one probe, which a new breaker would not know"
    await breaker.call(ok)
    assert idle(breaker)


async def test_a_breaker_that_nobody_calls_for_ten_breaks_becomes_idle() -> None:
    await asyncio.sleep(1_000)
    opened = tripped(reset_timeout=10.0, max_reset_timeout=20.0)
    failed = CircuitBreaker(failure_threshold=5, reset_timeout=10.0, max_reset_timeout=20.0)
    failed.record_failure()
    last_calls = CircuitBreaker(FailureRate(calls=20), reset_timeout=20.0)
    last_calls.record_failure()
    isolated = CircuitBreaker(reset_timeout=10.0)
    isolated.isolate()
    await asyncio.sleep(199)
    assert not idle(failed)
    assert not idle(last_calls)
    await asyncio.sleep(1)
    assert idle(failed)
    assert idle(last_calls)
    assert not idle(opened)
    await asyncio.sleep(10)
    assert idle(opened)
    assert not idle(isolated)


def test_it_is_made_without_a_loop_and_works_in_two_loops_one_after_the_other() -> None:
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=30.0)
    guarded = breaker(boom)

    async def late() -> None:
        await asyncio.sleep(5_000)
        with pytest.raises(ConnectionError):
            await guarded()
        with pytest.raises(CircuitOpen):
            await guarded()

    async def early() -> None:  # its clock starts at 0 again, long before the break began
        assert seen(breaker) is State.HALF_OPEN
        assert await breaker.call(ok) == 1
        with pytest.raises(ConnectionError):
            await guarded()
        assert breaker.stats().retry_after == 30.0

    run(late)
    run(early)
    assert isinstance(seen(breaker), State), "without a loop, too"


def test_a_probe_left_over_from_a_loop_with_a_later_clock_holds_no_place() -> None:
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=30.0)

    async def late() -> None:
        await asyncio.sleep(5_000)
        breaker.record_failure()
        await asyncio.sleep(30)
        assert breaker.allow_request()  # and nobody ever says what came of it

    async def early() -> None:
        assert breaker.stats().retry_after == 0.0
        assert await breaker.call(ok) == 1
        assert seen(breaker) is State.CLOSED

    run(late)
    run(early)


@pytest.mark.parametrize("interrupted", ["observer", "predicate"])
async def test_an_observer_or_predicate_that_interrupts_loses_no_place(interrupted: str) -> None:
    def observe(event: Event) -> None:
        if interrupted == "observer" and isinstance(event, CircuitChanged) and event.after is State.HALF_OPEN:
            raise GeneratorExit

    def predicate(_: Exception) -> bool:
        raise GeneratorExit

    breaker = tripped(reset_timeout=10.0, observer=observe, trips_on=predicate)
    await asyncio.sleep(10)
    with pytest.raises(GeneratorExit):
        await breaker.call(boom)
    assert (seen(breaker), breaker.stats().probes) == (State.HALF_OPEN, 0)
    assert await breaker.call(ok) == 1
    assert seen(breaker) is State.CLOSED


def test_repr_shows_settings_and_state() -> None:
    assert repr(CircuitBreaker(3, name="bob")) == (
        "CircuitBreaker(failure_threshold=3, reset_timeout=30.0, name='bob', state=closed)"
    )
    assert "FailureRate(threshold=0.5, window=30.0" in repr(CircuitBreaker(FailureRate()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"failure_threshold": 0}, "failure_threshold must be at least 1, not 0"),
        ({"reset_timeout": 0}, "reset_timeout must be finite and more than zero seconds, not 0"),
        ({"reset_timeout": float("nan")}, "reset_timeout must be finite and more than zero seconds, not nan"),
        ({"max_reset_timeout": 0}, "max_reset_timeout must be finite and more than zero seconds, not 0"),
        ({"max_reset_timeout": 29}, "max_reset_timeout=29 is less than reset_timeout=30.0"),
        ({"half_open_max": 0}, "half_open_max must be at least 1, not 0"),
        ({"trips_on": ()}, "trips_on must name at least one exception class"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        CircuitBreaker(**settings)


def test_a_threshold_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^failure_threshold must be a whole number, not 0\.5"):
        CircuitBreaker(failure_threshold=0.5)  # type: ignore[arg-type]


def test_circuit_open_is_a_refusal() -> None:
    assert issubclass(CircuitOpen, Refused)
