"""What CallRegistry promises, seen from outside: nothing of a call is left, however it ends."""

import asyncio
import pickle
import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from meshkit import CallRegistry, CallTimeout, Closed, Overloaded
from meshkit.call_registry import PendingCalls
from meshkit.events import Event
from meshkit.testing import VirtualTimeLoop, cancellation_points, run


def now() -> float:
    return asyncio.get_running_loop().time()


def timers() -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return len(loop.live_timers())


def answers(calls: CallRegistry[str], delay: float = 1.0) -> Callable[[str], None]:
    """Return a `send` whose request is answered after `delay`."""

    def send(call_id: str) -> None:
        asyncio.get_running_loop().call_later(delay, calls.resolve, call_id, f"reply to {call_id}")

    return send


async def test_the_reply_that_names_the_request_is_returned() -> None:
    calls: CallRegistry[str] = CallRegistry()
    assert await calls.call(answers(calls), id="seven") == "reply to seven"
    assert now() == 1.0
    assert len(calls) == 0
    assert timers() == 0
    assert calls.stats().replied == 1


async def test_the_usage_of_the_specification_store_with_a_confidant() -> None:
    calls: CallRegistry[int] = CallRegistry(timeout=5.0)
    sent: list[dict[str, object]] = []

    async def store_with(confidant: str, data: bytes) -> int:
        return await calls.call(lambda id: sent.append({"to": confidant, "data": data, "id": id}))  # noqa: A006 - so it reads

    def handle_store_ack(in_reply_to: str, size: int) -> bool:
        return calls.resolve(in_reply_to, size)

    storing = asyncio.create_task(store_with("bob", b"the map"))
    await asyncio.sleep(1)
    assert handle_store_ack(str(sent[0]["id"]), 7)
    assert await storing == 7
    assert not handle_store_ack(str(sent[0]["id"]), 7)
    assert not handle_store_ack("nonsense", 7)
    assert calls.stats().duplicate == 1
    assert calls.stats().unknown == 1


async def test_without_a_reply_it_times_out_exactly_then_and_a_late_reply_is_counted() -> None:
    calls: CallRegistry[str] = CallRegistry(name="store")
    ids: list[str] = []
    with pytest.raises(CallTimeout) as caught:
        await calls.call(ids.append, timeout=2.5)
    assert now() == 2.5
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.executed == "maybe"
    assert str(pickle.loads(pickle.dumps(caught.value))) == "store: no result within 2.5 s; it may still have happened"
    assert not calls.resolve(ids[0], "too late")
    assert calls.stats().late == 1
    assert len(calls) == 0
    assert timers() == 0


async def test_a_reply_in_the_very_instant_of_the_timeout_is_returned_if_it_was_first() -> None:
    calls: CallRegistry[str] = CallRegistry()
    assert (await calls.call(answers(calls, 1.0 - 1e-10), timeout=1.0)).startswith("reply")  # in one pass of the loop


async def test_ids_are_unguessable_and_never_the_same() -> None:
    calls: CallRegistry[str] = CallRegistry()
    ids: list[str] = []

    def send(call_id: str) -> None:
        ids.append(call_id)
        calls.resolve(call_id, "")

    for _ in range(1000):
        await calls.call(send)
    assert len(set(ids)) == 1000
    assert {len(bytes.fromhex(one)) for one in ids} == {16}
    for _ in range(2):
        calls = CallRegistry(rng=random.Random(7))
        await calls.call(send)
    assert ids[-1] == ids[-2]


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_what_send_raises_is_raised_and_nothing_is_left(asynchronous: bool) -> None:
    calls: CallRegistry[str] = CallRegistry()

    def fail(call_id: str) -> None:
        raise ConnectionError(call_id)

    async def fail_later(call_id: str) -> None:
        await asyncio.sleep(0.5)
        fail(call_id)

    with pytest.raises(ConnectionError):
        await calls.call(fail_later if asynchronous else fail)
    assert len(calls) == 0
    assert timers() == 0
    assert calls.stats().send_failed == 1


async def test_an_async_send_is_part_of_the_timeout_and_a_reply_during_it_is_kept() -> None:
    calls: CallRegistry[str] = CallRegistry()

    async def slow(call_id: str) -> None:
        await asyncio.sleep(10)

    with pytest.raises(CallTimeout):
        await calls.call(slow, timeout=1.0)
    assert now() == 1.0

    async def answered_while_sending(call_id: str) -> None:
        await asyncio.sleep(0.5)
        assert calls.resolve(call_id, "early")
        await asyncio.sleep(0.2)

    assert await calls.call(answered_while_sending, timeout=1.0) == "early"
    assert len(calls) == 0


async def test_a_rejected_call_raises_that_error_and_rejecting_with_no_exception_is_a_type_error() -> None:
    calls: CallRegistry[str] = CallRegistry()
    error = KeyError("theirs")
    asyncio.get_running_loop().call_later(1, calls.reject, "one", error)
    with pytest.raises(KeyError) as caught:
        await calls.call(lambda _: None, id="one")
    assert caught.value is error
    assert not calls.reject("one", KeyError("again"))
    for wrong in (asyncio.CancelledError(), StopIteration(), "text", KeyError):
        with pytest.raises(TypeError, match="a call can raise any instance of Exception"):
            calls.reject("one", wrong)  # type: ignore[arg-type]  # that is the point


async def test_closing_fails_everything_pending_at_once_and_every_later_call() -> None:
    calls: CallRegistry[str] = CallRegistry(name="calls of bob")
    tasks = [asyncio.create_task(calls.call(lambda _: None)) for _ in range(100)]
    await asyncio.sleep(1)
    assert len(calls) == 100
    calls.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert now() == 1.0
    assert all(isinstance(result, Closed) and result.executed == "maybe" for result in results)
    assert str(results[0]) == "calls of bob was closed while this call was under way"
    with pytest.raises(Closed) as caught:
        await calls.call(lambda _: None)
    assert caught.value.executed == "no"
    calls.close()
    assert len(calls) == 0
    assert timers() == 0


async def test_no_more_than_max_pending_wait_and_the_next_is_refused_before_it_is_sent() -> None:
    calls: CallRegistry[str] = CallRegistry(max_pending=2)
    waiting = [asyncio.create_task(calls.call(answers(calls))) for _ in range(2)]
    await asyncio.sleep(0)
    sent: list[str] = []
    with pytest.raises(Overloaded, match="it holds 2 already"):
        await calls.call(sent.append)
    assert sent == []
    await asyncio.gather(*waiting)
    assert await calls.call(answers(calls))


async def test_an_id_that_is_pending_cannot_be_used_again_until_it_has_ended() -> None:
    calls: CallRegistry[str] = CallRegistry()
    first = asyncio.create_task(calls.call(answers(calls), id="one"))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="id 'one' is pending already"):
        await calls.call(answers(calls), id="one")
    assert await first == "reply to one"
    assert await calls.call(answers(calls), id="one") == "reply to one"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_nothing_is_left_wherever_a_call_is_cancelled(asynchronous: bool) -> None:
    for point in cancellation_points():

        async def scenario() -> None:
            calls: CallRegistry[str] = CallRegistry()

            async def send(call_id: str) -> None:
                await asyncio.sleep(0.1)
                answers(calls)(call_id)

            cancelled = await point.cancel(calls.call(send if asynchronous else answers(calls)))  # noqa: B023 - runs now
            assert len(calls) == 0
            assert cancelled == (calls.stats().cancelled == 1)
            assert cancelled or point.result.startswith("reply")  # noqa: B023 - runs now
            await asyncio.sleep(5)
            assert timers() == 0

        run(scenario)


async def test_an_enclosing_deadline_ends_the_call() -> None:
    calls: CallRegistry[str] = CallRegistry()
    with anyio.move_on_after(2) as scope:
        await calls.call(lambda _: None)
    assert scope.cancelled_caught
    assert len(calls) == 0


def test_the_table_is_empty_after_every_outcome_of_10_000_calls() -> None:
    rng = random.Random(11)

    async def main() -> None:
        calls: CallRegistry[str] = CallRegistry(timeout=3.0)
        outcomes: dict[str, int] = {}

        async def one(number: int) -> None:
            kind = rng.choice(["reply", "silence", "reject", "fail"])

            def send(call_id: str) -> None:
                loop, delay = asyncio.get_running_loop(), rng.random() * 4
                if kind == "fail":
                    raise ConnectionError
                if kind == "reply":
                    loop.call_later(delay, calls.resolve, call_id, str(number))
                if kind == "reject":
                    loop.call_later(delay, calls.reject, call_id, KeyError(number))

            try:
                assert await calls.call(send) == str(number)
                outcome = "replied"
            except (CallTimeout, ConnectionError, KeyError) as error:
                outcome = type(error).__name__
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        tasks = [asyncio.create_task(one(number)) for number in range(10_000)]
        for task in rng.sample(tasks, 3000):
            asyncio.get_running_loop().call_later(rng.random() * 4, task.cancel)
        await asyncio.wait(tasks)
        assert len(calls) == 0
        stats = calls.stats()
        cancelled = sum(task.cancelled() for task in tasks)
        assert stats.cancelled == cancelled > 1000
        assert stats.replied == outcomes["replied"] > 1000
        assert stats.timed_out == outcomes["CallTimeout"] > 1000
        assert stats.rejected == outcomes["KeyError"] > 1000
        assert stats.send_failed == outcomes["ConnectionError"] > 1000
        await asyncio.sleep(10)
        assert timers() == 0

    run(main)


async def test_a_thousand_pending_calls_share_one_timer() -> None:
    calls: CallRegistry[str] = CallRegistry()
    tasks = [asyncio.create_task(calls.call(lambda _: None, timeout=1 + number)) for number in range(1000)]
    await asyncio.sleep(0.5)
    assert timers() == 1
    calls.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_raising_observer_changes_nothing() -> None:
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context["exception"]))

    def fails(event: Event) -> None:
        raise ZeroDivisionError(event)

    calls: CallRegistry[str] = CallRegistry(observer=fails)
    assert (await calls.call(answers(calls))).startswith("reply")
    assert not calls.resolve("unknown", "")
    assert [type(problem) for problem in problems] == [ZeroDivisionError] * 2


def test_it_serves_one_loop_after_another() -> None:
    calls: CallRegistry[str] = CallRegistry()
    for _ in range(2):
        assert run(lambda: calls.call(answers(calls), id="x")) == "reply to x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 0}, "timeout must be finite and more than zero"),
        ({"max_pending": 0}, "max_pending must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallRegistry(**arguments)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["add", "take", "expire"]), st.integers(0, 8), st.floats(0, 3)), max_size=60))
def test_the_core_agrees_with_a_plain_dict(steps: list[tuple[str, int, float]]) -> None:
    core = PendingCalls[int](max_pending=6)
    model: dict[str, tuple[int, float]] = {}
    clock = 0.0
    for verb, number, amount in steps:
        call_id = str(number)
        if verb == "add" and call_id not in model:
            wake_at = core.add(call_id, number, clock + amount)
            if len(model) < 6:
                model[call_id] = (number, clock + amount)
                assert wake_at <= clock + amount
            else:
                assert wake_at == float("inf")
        elif verb == "take":
            expected = model.pop(call_id, None)
            assert core.take(call_id, replied=True) == (None if expected is None else expected[0])
        elif verb == "expire":
            clock += amount
            due = sorted((deadline, slot) for slot, deadline in model.values() if deadline <= clock)
            assert sorted(core.expire(clock)) == sorted(slot for _, slot in due)
            model = {key: value for key, value in model.items() if value[1] > clock}
        assert core.calls.keys() == model.keys()
        if model:
            assert core.wake_at() <= min(deadline for _, deadline in model.values())
        else:
            assert core.wake_at() == float("inf")
