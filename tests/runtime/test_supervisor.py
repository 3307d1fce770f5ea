import asyncio
import contextvars

import pytest
from hypothesis import given, strategies as st

from meshkit.runtime.supervisor import Restarts, Supervisor
from meshkit.testing import CancellationPoint
from tests.runtime.nodes import everywhere

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


def test_the_delay_doubles_up_to_a_cap_and_then_there_are_no_more() -> None:
    restarts = Restarts(8, 16.0)
    assert [restarts.delay(0.0) for _ in range(9)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0, None]


def test_restarts_are_forgotten_after_the_window() -> None:
    restarts = Restarts(2, 10.0)
    assert restarts.delay(0.0) == 0.1
    assert restarts.delay(5.0) == 0.2
    assert restarts.delay(9.9) is None
    assert restarts.delay(10.0) == 0.2
    assert restarts.delay(100.0) == 0.1


def test_none_may_be_allowed() -> None:
    assert Restarts(0, 60.0).delay(0.0) is None


@given(st.integers(1, 100), st.floats(1e-3, 1e6))
def test_a_task_that_always_fails_at_once_reaches_the_limit(max_restarts: int, window: float) -> None:
    restarts, now = Restarts(max_restarts, window), 0.0
    for _ in range(max_restarts):
        delay = restarts.delay(now)
        assert delay is not None
        now += delay
    assert restarts.delay(now) is None


class Supervised:
    """A supervisor, what was told of its failures, and when."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str, float | None]] = []
        self.supervisor = Supervisor(
            "meshkit:alice:x", lambda what, error, delay: self.failures.append((what, str(error), delay))
        )


async def test_a_task_that_returns_is_done() -> None:
    supervised = Supervised()

    async def once() -> None:
        await asyncio.sleep(1)

    task = supervised.supervisor.supervise(once, "once", Restarts(1, 60.0))
    assert task.get_name() == "meshkit:alice:x:once"
    assert task in supervised.supervisor
    await task
    assert task not in supervised.supervisor
    assert supervised.failures == []


async def test_a_task_that_fails_runs_again_later_and_later_and_then_no_more() -> None:
    supervised = Supervised()
    begun: list[float] = []

    async def failing() -> None:
        begun.append(round(asyncio.get_running_loop().time(), 6))
        raise ValueError(f"failure {len(begun)}")

    await supervised.supervisor.supervise(failing, "failing", Restarts(3, 60.0))
    assert begun == [0, 0.1, 0.3, 0.7]
    assert supervised.failures == [
        ("failing", "failure 1", pytest.approx(0.1)),
        ("failing", "failure 2", pytest.approx(0.2)),
        ("failing", "failure 3", pytest.approx(0.4)),
        ("failing", "failure 4", None),
    ]


async def test_a_task_that_recovers_starts_counting_anew() -> None:
    supervised = Supervised()
    runs = 0

    async def failing_now_and_then() -> None:
        nonlocal runs
        runs += 1
        if runs == 10:
            return
        await asyncio.sleep(30)
        raise ValueError

    await supervised.supervisor.supervise(failing_now_and_then, "x", Restarts(2, 60.0))
    assert runs == 10
    assert {delay for _, _, delay in supervised.failures} <= {0.1, 0.2}


async def test_a_supervised_task_may_be_cancelled_and_is_not_restarted() -> None:
    supervised = Supervised()
    task = supervised.supervisor.supervise(lambda: asyncio.sleep(1000), "sleep", Restarts(3, 60.0))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert supervised.failures == []


async def test_a_task_in_which_something_else_was_cancelled_has_failed() -> None:
    supervised = Supervised()

    async def awaits_what_is_cancelled() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    await supervised.supervisor.supervise(awaits_what_is_cancelled, "x", Restarts(2, 60.0))
    assert [delay for _, _, delay in supervised.failures] == [0.1, 0.2, None]


async def test_tasks_run_in_the_context_of_the_crew() -> None:
    seen: list[str] = []

    async def look() -> None:
        seen.append(VARIABLE.get())
        VARIABLE.set("changed by a task")

    VARIABLE.set("supervisor")
    supervisor = Supervised().supervisor
    VARIABLE.set("causer")
    await supervisor.spawn(look, "look")
    await supervisor.spawn(look, "look")
    assert seen == ["supervisor", "supervisor"]


async def test_the_end_cancels_all_and_waits_for_them() -> None:
    ended: list[str] = []

    async def slow_to_end(seconds: float) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(seconds)
            ended.append(f"after {seconds}")

    supervisor = Supervised().supervisor
    for seconds in (1, 2, 4):
        supervisor.spawn(lambda seconds=seconds: slow_to_end(seconds), "slow")  # type: ignore[misc]  # bound for each
    await asyncio.sleep(0)
    assert await supervisor.end(10.0) == []
    assert ended == ["after 1", "after 2", "after 4"]
    assert asyncio.get_running_loop().time() == 4


async def test_a_task_that_ignores_its_cancellation_is_cancelled_again_and_then_named() -> None:
    ignored = 0

    async def stubborn(times: int) -> None:
        nonlocal ignored
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                ignored += 1
                if not (times := times - 1):
                    return

    supervisor = Supervised().supervisor
    supervisor.spawn(lambda: stubborn(2), "gives in")
    task = supervisor.spawn(lambda: stubborn(3), "stubborn")
    await asyncio.sleep(0)
    assert await supervisor.end(10.0) == ["meshkit:alice:x:stubborn"]
    assert ignored == 4
    assert asyncio.get_running_loop().time() == 10
    task.cancel()
    await task


async def test_after_the_end_nothing_begins() -> None:
    supervisor = Supervised().supervisor
    assert await supervisor.end(1.0) == []
    with pytest.raises(RuntimeError, match="meshkit:alice:x:late cannot begin: its service has stopped"):
        supervisor.supervise(lambda: asyncio.sleep(0), "late", Restarts(1, 1.0))


def test_a_supervised_task_can_be_cancelled_anywhere() -> None:
    async def scenario(point: CancellationPoint) -> None:
        async def failing() -> None:
            await asyncio.sleep(1)
            raise ValueError

        supervisor = Supervised().supervisor

        async def supervised() -> None:
            await supervisor.supervise(failing, "x", Restarts(2, 60.0))

        await point.cancel(supervised())
        assert await supervisor.end(1.0) == []

    everywhere(scenario)
