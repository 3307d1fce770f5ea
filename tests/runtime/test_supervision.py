"""Background tasks that fail: restarts, and escalation as an exception in the host."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from meshkit.errors import Closed
from meshkit.runtime import Service, ServiceFailed
from meshkit.testing import CancellationPoint
from meshkit.transports import MemoryHub
from tests.runtime.nodes import SLEEP, STORE, Node, Stash, Store, everywhere
from tests.runtime.test_life import Noted, nothing_is_left, now

TOO_OFTEN = 0.1 + 0.2 + 0.4 + 0.8 + 1.6
"""When a task that fails at once has failed for the sixth time."""


class Failing(Service):
    """Its background task fails at once, `times` times, from `after` seconds on."""

    name = "failing"

    def __init__(self, times: int = 1000, after: float = 0.0) -> None:
        self.times = times
        self.after = after
        self.runs: list[float] = []
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.task = self.spawn(self.beat, "argument")

    async def beat(self, argument: str) -> None:
        assert argument == "argument"
        if not self.runs:
            await asyncio.sleep(self.after)
        self.runs.append(round(now(), 6))
        if len(self.runs) <= self.times:
            raise ValueError(f"failure {len(self.runs)}")


async def test_a_background_task_that_fails_runs_again_and_its_service_goes_on() -> None:
    failing = Failing(times=3)
    async with Node("alice", failing, Stash()) as alice:
        await asyncio.sleep(10)
        assert failing.runs == [0, 0.1, 0.3, 0.7]
        assert (await alice.call(STORE, Store("x"), to="alice")).size == 0
        assert "task 'beat' failed, and runs again in 0.1 s" in alice.logged
        assert "ValueError: failure 3" in alice.logged
        assert failing.task is not None
        assert failing.task.done()


async def test_one_that_fails_too_often_cancels_the_body_and_is_raised_with_the_cause() -> None:
    diary: list[str] = []
    alice = Node("alice", Noted("first", diary), Failing())
    with pytest.raises(ServiceFailed) as caught:
        async with alice:
            await asyncio.sleep(1000)
    assert now() == pytest.approx(TOO_OFTEN)
    assert str(caught.value) == "task 'beat' of service 'failing' on node 'alice' failed: ValueError: failure 6"
    assert isinstance(caught.value.__cause__, ValueError)
    assert diary[-1] == "first stopped"
    assert "task 'beat' failed too often: node 'alice' stops" in alice.logged
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the cancellation was ours, and is taken back"
    assert nothing_is_left()


async def test_no_restarts_means_the_first_failure_stops_it() -> None:
    failing = Failing(after=5.0)
    failing.max_restarts = 0
    with pytest.raises(ServiceFailed, match="failure 1"):
        async with Node("alice", failing):
            await asyncio.sleep(1000)
    assert now() == 5


async def test_one_that_fails_before_the_body_begins_cancels_it_at_its_first_await() -> None:
    async def fail() -> None:
        raise ValueError

    async def spawn(service: Service) -> None:
        service.spawn(fail)

    service = Noted("one", [], start=spawn)
    service.max_restarts = 0
    with pytest.raises(ServiceFailed):
        async with Node("alice", service):
            await asyncio.sleep(1000)
    assert now() == 0


async def test_what_is_in_flight_is_finished_before_it_stops() -> None:
    failing, stash = Failing(after=5.0), Stash()
    failing.max_restarts = 0
    with pytest.raises(ServiceFailed):
        async with Node("alice", failing, stash) as alice:
            asked = asyncio.create_task(alice.call(SLEEP, 6.0, to="alice"))
            await asyncio.sleep(1000)
    assert now() == 6
    assert asked.result() == 6.0


async def test_a_body_inside_a_task_group_is_cancelled_too() -> None:
    with pytest.raises(ServiceFailed):
        async with Node("alice", Failing()), anyio.create_task_group() as group:
            group.start_soon(asyncio.sleep, 1000)
            await asyncio.sleep(1000)
    assert now() == pytest.approx(TOO_OFTEN)
    assert nothing_is_left()


async def test_a_body_that_ends_with_an_error_of_its_own_keeps_it_as_the_context() -> None:
    with pytest.raises(ServiceFailed) as caught:
        async with Node("alice", Failing()) as alice:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
            await asyncio.sleep(100)
            await alice.call(STORE, Store("x"), to="alice")
    assert isinstance(caught.value.__context__, Closed)
    assert "the body of `async with` then raised Closed" in caught.value.__notes__[0]


async def test_a_cancellation_from_outside_at_the_same_time_is_not_lost() -> None:
    async def body() -> None:
        async with Node("alice", Failing()):
            await asyncio.sleep(1000)

    task = asyncio.create_task(body())
    asyncio.get_running_loop().call_at(TOO_OFTEN, task.cancel)
    await asyncio.wait([task])
    assert task.cancelled() or isinstance(task.exception(), ServiceFailed)
    assert task.cancelling() == 1
    assert nothing_is_left()


async def test_wait_raises_it_to_everybody_who_waits_and_stop_too() -> None:
    alice = Node("alice", Failing())
    await alice.start()
    first, second = await asyncio.gather(alice.wait(), alice.wait(), return_exceptions=True)
    assert isinstance(first, ServiceFailed)
    assert isinstance(second, ServiceFailed)
    assert first is not second, "each has a traceback of its own"
    assert first.__cause__ is second.__cause__
    with pytest.raises(ServiceFailed):
        await alice.stop()
    with pytest.raises(Closed) as caught:
        await alice.call(STORE, Store("x"), to="alice")
    assert isinstance(caught.value.__cause__, ServiceFailed), "it says why"
    assert nothing_is_left()


async def test_one_that_fails_while_others_still_start_fails_the_start() -> None:
    diary: list[str] = []
    failing = Failing(after=1.0)
    failing.max_restarts = 0
    with pytest.raises(ServiceFailed, match="task 'beat' of service 'failing'"):
        async with Node("alice", failing, Noted("slow", diary, start=10.0)):
            pytest.fail("it did not start")
    assert now() == 1
    assert diary == ["slow init", "slow starting"]
    assert nothing_is_left()


async def test_one_that_fails_while_it_stops_is_raised_too() -> None:
    failing = Failing(after=2.0)
    failing.max_restarts = 0
    with pytest.raises(ServiceFailed, match="failure 1"):
        async with Node("alice", Stash(), failing) as alice:
            asked = asyncio.create_task(alice.call(SLEEP, 3.0, to="alice"))
            await asyncio.sleep(1)
    assert asked.result() == 3.0


async def test_the_second_failure_is_logged() -> None:
    one, two = Failing(after=1.0), Failing(after=1.0)
    one.max_restarts = two.max_restarts = 0
    two.name = "other"
    alice = Node("alice", one, two)
    with pytest.raises(ServiceFailed, match="service 'failing'"):
        async with alice:
            await asyncio.sleep(1000)
    assert alice.logged.count("failed too often") == 2
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the body was cancelled once"


async def test_a_body_of_which_the_task_has_ended_is_let_alone() -> None:
    """As in a fixture: it was entered in a task that is gone, and is left in another one."""
    alice = Node("alice", Failing())
    await asyncio.create_task(alice.__aenter__())
    await asyncio.sleep(10)
    with pytest.raises(ServiceFailed):
        await alice.__aexit__(None, None, None)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_it_can_be_entered_in_one_task_and_left_in_another() -> None:
    alice = Node("alice", Stash())
    await asyncio.create_task(alice.__aenter__())
    assert (await alice.call(STORE, Store("x"), to="alice")).size == 0
    await asyncio.create_task(alice.__aexit__(None, None, None))
    assert nothing_is_left()


def test_a_failing_runtime_can_be_cancelled_anywhere_and_leaves_nothing() -> None:
    async def scenario(point: CancellationPoint) -> None:
        diary: list[str] = []

        async def body() -> None:
            async with Node("alice", Noted("one", diary, stop=0.5), Failing()):
                await asyncio.sleep(1000)

        with contextlib.suppress(ServiceFailed):
            assert await point.cancel(body())
        assert nothing_is_left()
        assert diary.count("one started") == diary.count("one stopping")

    everywhere(scenario)


# --- embedding


@pytest.fixture
async def alice() -> AsyncIterator[Node]:
    async with Node("alice", Stash(), hub=MemoryHub()) as node:
        yield node


async def test_a_fixture_can_hold_it_open_across_its_yield(alice: Node) -> None:
    assert (await alice.call(STORE, Store("x", b"12"), to="alice")).size == 2


@pytest.fixture
async def failing() -> AsyncIterator[Node]:
    with pytest.raises(ServiceFailed):
        async with Node("alice", Failing()) as node:
            yield node


async def test_a_fixture_of_which_the_runtime_fails_tells_so_when_it_is_left(failing: Node) -> None:
    with pytest.raises(ServiceFailed):
        await failing.wait()


async def test_an_asgi_lifespan_can_hold_it_open() -> None:
    """The protocol as servers speak it: one task for the lifespan, others for requests."""
    rt = Node("alice", Stash())
    receive: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def app() -> None:
        assert (await receive.get())["type"] == "lifespan.startup"
        async with rt:
            await sent.put({"type": "lifespan.startup.complete"})
            assert (await receive.get())["type"] == "lifespan.shutdown"
        await sent.put({"type": "lifespan.shutdown.complete"})

    lifespan = asyncio.create_task(app())
    await receive.put({"type": "lifespan.startup"})
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    requests = [asyncio.create_task(rt.call(STORE, Store("x"), to="alice")) for _ in range(10)]
    await asyncio.gather(*requests)
    await receive.put({"type": "lifespan.shutdown"})
    assert (await sent.get())["type"] == "lifespan.shutdown.complete"
    await lifespan
    assert nothing_is_left()


def test_a_repl_can_hold_it_open_each_line_being_a_task_of_its_own() -> None:
    rt = Node("alice", Stash())
    with asyncio.Runner() as repl:
        repl.run(rt.start())
        assert repl.run(rt.call(STORE, Store("x", b"123"), to="alice")).size == 3
        repl.run(rt.stop())


async def test_two_runtimes_in_one_loop_know_nothing_of_each_other() -> None:
    one, two = Stash(), Stash()
    async with Node("alice", one) as first, Node("alice", two) as second:
        await first.call(STORE, Store("first"), to="alice")
        await second.call(STORE, Store("second"), to="alice")
        assert (one.begun, two.begun) == (["first"], ["second"])
        assert (first.peers, second.peers) == ({}, {})


class Stubborn(Service):
    """Its background task raises as it is cancelled."""

    name = "stubborn"

    def __init__(self) -> None:
        self.begun = 0

    async def start(self) -> None:
        self.task = self.spawn(self.work)

    async def work(self) -> None:
        self.begun += 1
        try:
            await asyncio.sleep(1000)
        finally:
            raise OSError("the disk is full")


async def test_a_task_that_raises_as_it_is_cancelled_does_not_run_again() -> None:
    service = Stubborn()
    async with Node("alice", service):
        await asyncio.sleep(1)
    await asyncio.sleep(100)
    assert service.begun == 1
    assert isinstance(service.task.exception(), OSError)


async def test_one_that_somebody_cancels_tells_them_what_it_raised() -> None:
    service = Stubborn()
    async with Node("alice", service):
        await asyncio.sleep(1)
        service.task.cancel()
        with pytest.raises(OSError, match="the disk is full"):
            await service.task
        await asyncio.sleep(100)
        assert service.begun == 1


async def test_a_stop_that_raises_what_is_no_exception_leaves_nothing_behind() -> None:
    class Odd(Service):
        name = "odd"

        async def stop(self) -> None:
            raise BaseExceptionGroup("odd", [BaseException("odd")])

    hub = MemoryHub()
    node = Node("alice", Odd(), hub=hub)
    with pytest.raises(ServiceFailed) as caught:
        async with node:
            pass
    assert isinstance(caught.value.__cause__, BaseExceptionGroup)
    assert hub.nodes == ()
    assert "stop() failed" in node.logged


def test_an_interrupt_while_it_stops_ends_the_program_when_all_has_ended() -> None:
    class Interrupted(Service):
        name = "interrupted"

        async def stop(self) -> None:
            raise KeyboardInterrupt

    hub = MemoryHub()

    async def main() -> None:
        async with Node("alice", Interrupted(), hub=hub):
            pass

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert hub.nodes == ()
