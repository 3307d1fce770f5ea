"""A call may be cancelled anywhere, at any time: nothing of it is left, and nobody else notices."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from meshkit.call_registry import CallRegistry
from meshkit.errors import CallTimeout, Closed
from meshkit.testing import CancellationPoint, VirtualTimeLoop, cancellation_points, run
from tests.test_call_registry import later, nowhere

Registry = CallRegistry[str]


def answered_later(registry: Registry) -> Callable[[str], object]:
    return lambda call_id: later(1.0, registry.resolve, call_id, "response")


def answered_at_once(registry: Registry) -> Callable[[str], object]:
    return lambda call_id: registry.resolve(call_id, "response")


def sent_slowly(registry: Registry) -> Callable[[str], object]:
    async def send(call_id: str) -> None:
        await asyncio.sleep(1)
        await asyncio.sleep(1)
        later(1.0, registry.resolve, call_id, "response")

    return send


def answered_while_sent(registry: Registry) -> Callable[[str], object]:
    async def send(call_id: str) -> None:
        await asyncio.sleep(1)
        registry.resolve(call_id, "response")
        await asyncio.sleep(1)

    return send


def rejected_while_sent(registry: Registry) -> Callable[[str], object]:
    async def send(call_id: str) -> None:
        later(1.0, registry.reject, call_id, ConnectionError())
        await asyncio.sleep(2)

    return send


def never_answered(registry: Registry) -> Callable[[str], object]:
    return nowhere


def never_sent(registry: Registry) -> Callable[[str], object]:
    return lambda _: asyncio.sleep(3600)


def closed_while_sent(registry: Registry) -> Callable[[str], object]:
    async def send(_: str) -> None:
        later(1.0, registry.close)
        await asyncio.sleep(2)

    return send


@pytest.mark.parametrize(
    "way",
    [
        answered_later,
        answered_at_once,
        sent_slowly,
        answered_while_sent,
        rejected_while_sent,
        never_answered,
        never_sent,
        closed_while_sent,
    ],
)
def test_nothing_is_left_wherever_a_call_is_cancelled(way: Callable[[Registry], Callable[[str], object]]) -> None:
    async def scenario(point: CancellationPoint) -> None:
        registry: Registry = CallRegistry(timeout=5.0)
        other = asyncio.create_task(registry.call(lambda call_id: later(4.0, registry.resolve, call_id, "other")))
        try:
            cancelled = await point.cancel(registry.call(way(registry), id="1"))
        except (CallTimeout, ConnectionError, Closed):
            cancelled = False
        assert "1" not in registry
        assert registry.stats().cancelled == cancelled
        await asyncio.sleep(10)
        stats = registry.stats()
        assert other.exception() is None or stats.closed, "the other call notices nothing"
        assert len(registry) == 0
        ended = stats.replied + stats.rejected + stats.timed_out + stats.cancelled + stats.send_failed + stats.closed
        assert ended == 2

    for point in cancellation_points():
        run(lambda point=point: scenario(point))  # type: ignore[misc]  # mypy cannot infer a lambda with a default


async def test_a_cancelled_call_takes_the_timer_with_it_if_it_was_the_last() -> None:
    registry: Registry = CallRegistry()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    calls = [asyncio.create_task(registry.call(nowhere)) for _ in range(2)]
    await asyncio.sleep(1)
    for call, left in zip(calls, (1, 0), strict=True):
        call.cancel()
        await asyncio.wait([call])
        assert len(loop.live_timers()) == left


@pytest.mark.parametrize("rejected", [False, True])
async def test_a_cancellation_wins_over_a_reply_that_has_just_come(rejected: bool) -> None:
    registry: Registry = CallRegistry()
    call = asyncio.create_task(registry.call(nowhere, id="1"))
    await asyncio.sleep(1)
    assert registry.reject("1", ValueError("unseen")) if rejected else registry.resolve("1", "unseen")
    call.cancel()
    await asyncio.wait([call])  # an error that is never retrieved would fail this test
    assert call.cancelled()
    stats = registry.stats()
    assert (stats.cancelled, stats.late, stats.replied, stats.rejected) == (1, 1, 0, 0)


@pytest.mark.parametrize("settle", ["resolve", "reject", "close"])
async def test_a_reply_to_a_caller_who_is_cancelled_but_has_not_run_yet_is_late(settle: str) -> None:
    registry: Registry = CallRegistry()
    call = asyncio.create_task(registry.call(nowhere, id="1"))
    await asyncio.sleep(1)
    call.cancel()
    if settle == "resolve":
        assert registry.resolve("1", "unseen") is False
    elif settle == "reject":
        assert registry.reject("1", ValueError("unseen")) is False
    else:
        registry.close()
    with pytest.raises(asyncio.CancelledError):
        await call
    stats = registry.stats()
    assert (len(registry), stats.cancelled, stats.late) == (0, 1, settle != "close")


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_timeout_of_a_caller_who_is_cancelled_in_the_same_moment_is_a_cancellation(
    cancelled_first: bool,
) -> None:
    registry: Registry = CallRegistry(timeout=1.0)
    call = asyncio.create_task(registry.call(nowhere))
    if not cancelled_first:
        await asyncio.sleep(0)  # the call sets its timer first
    later(1.0, call.cancel)
    await asyncio.wait([call])
    assert call.cancelled()
    stats = registry.stats()
    assert (len(registry), stats.cancelled, stats.timed_out) == (0, 1, 0)


async def test_the_end_of_a_cancelled_call_does_not_touch_a_new_one_with_its_id() -> None:
    registry: Registry = CallRegistry()
    first = asyncio.create_task(registry.call(nowhere, id="1"))
    await asyncio.sleep(1)
    first.cancel()
    registry.resolve("1", "too late for the first")
    second = registry.call(nowhere, id="1")
    waiting = second.send(None)  # begins before the first has run
    await asyncio.wait([first])
    assert first.cancelled()
    assert "1" in registry
    assert registry.resolve("1", "for the second")
    assert waiting.done()
    with pytest.raises(StopIteration) as stop:
        second.send(None)
    assert stop.value.value == "for the second"


async def test_a_cancellation_that_send_raises_itself_passes_untouched() -> None:
    registry: Registry = CallRegistry()

    def send(_: str) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await registry.call(send)
    with pytest.raises(KeyboardInterrupt):
        await _interrupted(registry)
    assert (len(registry), registry.stats().cancelled) == (0, 2)


async def _interrupted(registry: Registry) -> None:
    def send(_: str) -> None:
        raise KeyboardInterrupt

    await registry.call(send)


def test_ten_thousand_calls_with_random_cancellation_leave_an_empty_table() -> None:
    async def main() -> None:
        registry: Registry = CallRegistry(timeout=3.0, max_pending=10_000)
        rng = random.Random(11)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        ways = [
            answered_later,
            answered_at_once,
            sent_slowly,
            answered_while_sent,
            rejected_while_sent,
            never_answered,
            never_sent,
        ]
        under_way: set[str] = set()

        async def one(number: int) -> None:
            call_id = str(number)
            under_way.add(call_id)
            call = registry.call(rng.choice(ways)(registry), id=call_id, timeout=rng.choice([None, 1.0, 2.5]))
            try:
                if rng.random() < 0.3:
                    with anyio.move_on_after(rng.choice([0.0, 0.5, 1.0, 2.0])):
                        await call
                else:
                    await call
            except (CallTimeout, ConnectionError):
                pass
            finally:
                under_way.discard(call_id)
                assert call_id not in registry

        tasks: list[asyncio.Task[None]] = []
        for number in range(10_000):
            tasks.append(loop.create_task(one(number)))
            if rng.random() < 0.3:
                later(rng.choice([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), tasks[-1].cancel)
            if number % 100 == 0:
                await asyncio.sleep(rng.choice([0.0, 0.01, 0.5]))
                assert len(registry) <= len(under_way)
                assert all(call_id in under_way for call_id in registry._pending.calls)
        done, _ = await asyncio.wait(tasks)
        assert all(task.cancelled() or task.exception() is None for task in done)
        await asyncio.sleep(10)  # the last replies come to nobody
        stats = registry.stats()
        assert (len(registry), stats.pending, loop.live_timers()) == (0, 0, [])
        assert stats.send_failed == stats.refused == stats.closed == stats.unknown == stats.duplicate == 0
        assert min(stats.replied, stats.rejected, stats.timed_out, stats.cancelled, stats.late) > 500

    run(main)


# --- the class against a naive model -----------------------------------------------------------------------

TIMES = st.integers(0, 40).map(lambda number: number / 8)


@settings(max_examples=100)
@given(
    calls=st.lists(
        st.fixed_dictionaries(
            {
                "start": TIMES,
                "timeout": TIMES.filter(bool),
                "reply": st.one_of(st.none(), TIMES),
                "cancel": st.one_of(st.none(), TIMES),
                "sending": st.sampled_from([0.0, 0.0, 0.5]),
            }
        ),
        min_size=1,
        max_size=12,
    ),
    close=st.one_of(st.none(), TIMES),
)
def test_every_call_ends_as_what_comes_first_says(calls: list[dict[str, Any]], close: float | None) -> None:
    """What comes first decides, and when; where two come in the same moment, either may."""

    async def main() -> None:
        registry: Registry = CallRegistry()
        loop = asyncio.get_running_loop()
        ends: list[tuple[str, float]] = [("", 0.0)] * len(calls)

        async def one(number: int, call: dict[str, Any]) -> None:
            def send(call_id: str) -> object:
                if call["reply"] is not None:
                    loop.call_later(call["reply"], registry.resolve, call_id, "response")
                return asyncio.sleep(call["sending"]) if call["sending"] else None

            try:
                await registry.call(send, timeout=call["timeout"])
                outcome = "reply"
            except CallTimeout:
                outcome = "timeout"
            except Closed:
                outcome = "close"
            except asyncio.CancelledError:
                outcome = "cancel"
            ends[number] = (outcome, loop.time())

        tasks: list[asyncio.Task[None]] = []

        def begin(number: int, call: dict[str, Any]) -> None:
            task = loop.create_task(one(number, call))
            tasks.append(task)
            if call["cancel"] is not None:
                loop.call_later(call["cancel"] + 1 / 64, task.cancel)

        for number, call in enumerate(calls):
            loop.call_at(call["start"], begin, number, call)
        if close is not None:
            loop.call_at(close + 1 / 128, registry.close)
        await asyncio.sleep(100)
        assert all(task.done() for task in tasks)
        assert len(registry) == 0
        for call, (outcome, at) in zip(calls, ends, strict=True):
            start = call["start"]
            times = {"timeout": start + call["timeout"]}
            if call["reply"] is not None:
                times["reply"] = start + call["reply"]
            if call["cancel"] is not None:
                times["cancel"] = start + call["cancel"] + 1 / 64
            if close is not None:
                times["close"] = max(start, close + 1 / 128)
            settled = min(at for name, at in times.items() if name != "cancel")
            first = {name for name, at in times.items() if at == settled}
            # A response waits until sending is done; only the end of the time and a cancellation cut that.
            expected = settled
            if outcome == "reply":
                expected = max(settled, min(start + call["sending"], times["timeout"]))
            if times.get("cancel", 1000.0) < expected or (outcome == "cancel" and times["cancel"] < 100):
                assert (outcome, at) == ("cancel", times["cancel"])
                continue
            assert outcome in first
            assert at == expected

    run(main)
